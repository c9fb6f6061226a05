"""The media: a read-only disk with packages for a guest that has no network.

A directory becomes an ext2 image, because every kernel with a disk reads that
and mke2fs is here already; an ISO is handed over as it is. Neither is parsed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import imagefile, programs
from .domain import Disk
from .errors import BuilderFault, BuildFailed, UsageError
from .guestjob import MEDIA_SERIAL
from .imagefile import ImageFile
from .units import MIB, format_size

_ROLE = "media"
_BLOCK_BYTES = 4096
# What kernels before 3.x read too. No journal: nobody writes.
_FEATURES = "none,ext_attr,dir_index,filetype,large_file,sparse_super"


@dataclass(frozen=True)
class Media:
    """The disk, the file system on it as mount calls it, and the ISO if it is the user's own."""

    disk: Disk
    file_system: str
    image: ImageFile | None = None


def prepare(path: Path, *, device: str, work_dir: Path, max_size_bytes: int) -> Media:
    """Make a disk of a directory, or vet an ISO.

    device -- the name that the disk gets in the guest.
    Raises UsageError when there is neither, BuildFailed when a file is no ISO or
    there is too much.
    """
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        raise UsageError(f"{_ROLE} {path} does not exist", "check the path") from None
    except OSError as error:
        raise UsageError(
            f"{_ROLE} {path} cannot be read: {error.strerror}", "check its permissions"
        ) from None
    if is_directory:
        disk = work_dir / "media.ext2"
        _make_image(path.resolve(), disk, max_size_bytes)
        return Media(Disk(device, MEDIA_SERIAL, disk, "raw", readonly=True), "ext4")
    image = imagefile.vet(
        path, max_virtual_size_bytes=max_size_bytes, work_dir=work_dir, role=_ROLE
    )
    if image.format != "raw" or not _is_iso(image.path):
        raise BuildFailed(
            f"{_ROLE} {path} is neither a directory nor an ISO image",
            "give a directory with a repository in it, or an ISO 9660 image",
        )
    disk_of_iso = Disk(device, MEDIA_SERIAL, image.path, "raw", readonly=True)
    return Media(disk_of_iso, "iso9660", image)


def _is_iso(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(32769)
        return file.read(5) == b"CD001"


def _make_image(directory: Path, disk: Path, max_size_bytes: int) -> None:
    inodes, data_bytes = _measure(directory)
    size_bytes = data_bytes + data_bytes // 50 + inodes * 512 + 8 * MIB
    size_bytes -= size_bytes % _BLOCK_BYTES
    if size_bytes > max_size_bytes:
        raise BuildFailed(
            f"{_ROLE} {directory} holds {format_size(data_bytes)}, too much for a disk of"
            f" {format_size(max_size_bytes)}",
            "max_image_size in the settings is the limit",
        )
    with disk.open("xb") as file:
        file.truncate(size_bytes)
    argv = ["mke2fs", "-q", "-F", "-t", "ext2", "-O", _FEATURES, "-b", str(_BLOCK_BYTES)]
    argv += ["-I", "256", "-N", str(inodes + 64), "-m", "0", "-L", _ROLE]
    argv += ["-E", "nodiscard,root_owner=0:0", "-d", str(directory), str(disk)]
    try:
        programs.run(argv, timeout_seconds=600 + data_bytes / 10_000_000)
    except programs.ProgramFailed as error:
        raise BuilderFault(
            f"{_ROLE} {directory} cannot be made into a disk: {error.stderr or error.message}",
            error.hint,
        ) from error
    disk.chmod(0o644)  # qemu may run as another user


def _measure(directory: Path) -> tuple[int, int]:
    """Number of files and directories, and the bytes that their blocks take."""
    inodes, data_bytes = 1, _BLOCK_BYTES
    for entry in _entries(directory):
        status = entry.stat(follow_symlinks=False)
        inodes += 1
        # A directory of ours may need more blocks than where it is now.
        size = status.st_size * (2 if stat.S_ISDIR(status.st_mode) else 1)
        data_bytes += -(-size // _BLOCK_BYTES) * _BLOCK_BYTES + size // 512
    return inodes, data_bytes


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as found:
            for entry in found:
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    yield from _entries(Path(entry.path))
    except OSError as error:
        raise UsageError(
            f"{_ROLE} {directory} cannot be read: {error.strerror}", "check its permissions"
        ) from None
