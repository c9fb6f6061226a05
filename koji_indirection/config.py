"""Settings of the machine that builds: where things go, and the limits it sets.

What a user asks of one build is in spec.py; what the machine grants is here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from .units import GIB, MIB


def default_cache_dir() -> Path:
    """/var/cache for root, the XDG cache directory for everybody else."""
    if os.geteuid() == 0:
        return Path("/var/cache/koji-indirection")
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "koji-indirection"


def default_work_dir() -> Path:
    """$TMPDIR, or /var/tmp, which is meant for files that are too large for /tmp."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108 - mkdtemp below it


@dataclass(frozen=True)
class Settings:
    """One machine's settings, each with a default that works.

    connect -- libvirt URI; None finds one that works.
    accel -- "auto", "kvm" or "tcg".
    work_dir -- has room for the overlay, the workspace and unpacked images.
    cache_dir -- verdicts and capabilities that outlive a build.
    max_image_bytes -- virtual size above which an image is refused.
    max_results, max_result_bytes -- number of results, bytes of all together.
    max_log_bytes -- of each log; of a longer one head and tail are kept.
    """

    connect: str | None = None
    accel: str = "auto"
    work_dir: Path = field(default_factory=default_work_dir)
    cache_dir: Path = field(default_factory=default_cache_dir)
    max_image_bytes: int = 1024 * GIB
    max_results: int = 50
    max_result_bytes: int = 20 * GIB
    max_log_bytes: int = 64 * MIB
