"""The machine-readable record of one build: what came from what, how, and how long it took.

docs/manifest.schema.json describes the file; the tests hold the two together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import without_passwords

MANIFEST_VERSION = 1
FILE_NAME = "manifest.json"


@dataclass
class Timeline:
    """Phases one after the other; entering one ends the one before."""

    on_phase: Callable[[str], None]
    phases: list[dict[str, Any]] = field(default_factory=list)
    _started: float = 0.0

    def enter(self, phase: str) -> None:
        self.end()
        self.phases.append({"phase": phase, "seconds": None})
        self._started = time.monotonic()
        self.on_phase(phase)

    def end(self) -> None:
        """End the phase that runs, if one does."""
        if self.phases and self.phases[-1]["seconds"] is None:
            self.phases[-1]["seconds"] = round(time.monotonic() - self._started, 2)


@dataclass(frozen=True)
class KojiRecord:
    """An image as Koji knows it: an archive of a build, or a file that a task has put out.

    reference -- what the user wrote.
    checksum -- as the hub has it; checksum_type is "md5", "sha1" or "sha256".
    """

    reference: str
    role: str
    nvr: str | None
    build_id: int | None
    archive_id: int | None
    task_id: int | None
    filename: str
    arch: str
    checksum: str
    checksum_type: str


@dataclass(frozen=True)
class Origin:
    """Where template and images come from, as far as anybody but this machine knows it.

    template -- the SCM URL with its commit, or the path of the upload; None for a local file.
    """

    template: str | None = None
    utility_image: KojiRecord | None = None
    input_image: KojiRecord | None = None


@dataclass
class ImageRecord:
    """An image as it was used; sizes in bytes.

    sha256 -- of the file that the user named; None until it is computed.
    koji -- None for a file that is not from Koji.
    """

    path: str
    format: str
    size_bytes: int
    virtual_size_bytes: int
    sha256: str | None = None
    koji: KojiRecord | None = None


@dataclass(frozen=True)
class OutputRecord:
    """A result: its name in the output directory, and its path in the workspace."""

    name: str
    guest_path: str
    size_bytes: int
    sha256: str


@dataclass
class Manifest:
    """See docs/manifest.schema.json for each field. What never came about stays empty."""

    spec: dict[str, Any]
    template: dict[str, Any]
    started_at: str = field(
        default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    )
    outcome: str = "builder fault"
    reason: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    accelerator: dict[str, str] = field(default_factory=dict)
    utility_image: ImageRecord | None = None
    input_image: ImageRecord | None = None
    guest: dict[str, Any] = field(default_factory=dict)
    timeline: list[dict[str, Any]] = field(default_factory=list)
    setup: list[dict[str, Any]] = field(default_factory=list)
    commands: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[OutputRecord] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"manifest_version": MANIFEST_VERSION, **asdict(self)}

    def write(self, output: Path) -> None:
        """Write manifest.json into the output directory, whole or not at all."""
        partial = output / f".{FILE_NAME}.part"
        try:
            text = without_passwords(json.dumps(self.to_dict(), indent=2))
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(output / FILE_NAME)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
