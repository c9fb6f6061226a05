"""Validate a template or an image without running anything."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import imagefile, template
from .config import Settings
from .errors import IndirectionError
from .jobdir import job_directory
from .units import format_size


@dataclass(frozen=True)
class Finding:
    """What became of one file; exit_status is 0 when it can be used."""

    path: str
    kind: str
    message: str
    hint: str = ""
    exit_status: int = 0

    def line(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        verdict = "WRONG" if self.exit_status else "ok"
        return f"{verdict:6}{self.path}: {self.message}{hint}"

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.exit_status == 0, **asdict(self)}


def examine(path: Path, settings: Settings) -> Finding:
    """Validate one file; what starts like XML is taken for a template, all else for an image."""
    kind = "template" if _looks_like_xml(path) else "image"
    try:
        message = _template(path) if kind == "template" else _image(path, settings)
        return Finding(str(path), kind, message)
    except IndirectionError as error:
        return Finding(str(path), kind, error.message, error.hint, error.exit_status)


def _looks_like_xml(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return path.suffix in (".tdl", ".xml")
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") or path.suffix in (".tdl", ".xml")


def _template(path: Path) -> str:
    parsed = template.load(path)
    names = ", ".join(command.name for command in parsed.commands)
    ignored = f"; ignored: {', '.join(parsed.ignored)}" if parsed.ignored else ""
    return f"template with {len(parsed.commands)} commands: {names}{ignored}"


def _image(path: Path, settings: Settings) -> str:
    with job_directory(settings.work_dir) as job:
        image = imagefile.vet(
            path,
            max_virtual_size_bytes=settings.max_image_bytes,
            work_dir=job.path,
            role="image",
        )
    return f"{image.format} image, {format_size(image.virtual_size_bytes)} virtual"
