"""Sizes and durations: the units, how people write them, how we write them back."""

from __future__ import annotations

import re
from decimal import Decimal

from .errors import UsageError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB
HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS

_SIZE_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_DURATION_UNITS = {"": 1, "s": 1, "m": 60, "h": HOUR_SECONDS, "d": DAY_SECONDS}


def parse_size(text: str) -> int:
    """Bytes from "30G", "30 GiB", "1.5T", "512M" or plain bytes; all units are binary.

    Raises UsageError for anything else, "30GB" included: that could mean 10**9.
    """
    pattern = r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?(?:([KMGT])(?:iB)?|B)?"
    match = re.fullmatch(pattern, text.strip(), re.IGNORECASE | re.ASCII)
    size = Decimal(match.group(1)) * _SIZE_UNITS[(match.group(2) or "").upper()] if match else None
    if size is None or size != int(size):
        raise UsageError(
            f"{text[:80]!r} is not a size",
            "write a number of bytes, or one with K, M, G or T: 512M, 30G, 30GiB; "
            "all of them are binary units",
        )
    return int(size)


def parse_duration(text: str) -> int:
    """Seconds from "90", "90s", "15m", "4h" or "1d". Raises UsageError for anything else."""
    match = re.fullmatch(r"([0-9]{1,15}) ?([smhd]?)", text.strip())
    if not match:
        raise UsageError(
            f"{text[:80]!r} is not a duration",
            "write a whole number of seconds, or one with s, m, h or d: 90s, 15m, 4h, 1d",
        )
    return int(match.group(1)) * _DURATION_UNITS[match.group(2)]


def format_size(size_bytes: int) -> str:
    """A size as people read it: "30 GiB", "1.4 GiB", "512 B"."""
    size, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if round(size, 1) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f}".removesuffix(".0") + f" {unit}"


def format_exact_size(size_bytes: int) -> str:
    """A whole number of the largest unit that gives one: "1025 GiB", "1000 B"."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit} {name}"
    return f"{size_bytes} B"


def format_duration(seconds: int) -> str:
    """A whole number of the largest unit that gives one: "7 d", "90 m", "90 s"."""
    for unit in ("d", "h", "m"):
        if seconds and seconds % _DURATION_UNITS[unit] == 0:
            return f"{seconds // _DURATION_UNITS[unit]} {unit}"
    return f"{seconds} s"
