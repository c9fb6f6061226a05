"""Make the workspace disk: one partition, a file system, and in it the input image as raw.

Everything happens in an ordinary file: no mount, no loop device, no appliance,
no root. The input is written once, to where it stays, and is never written to.
Nothing here may open a disk that a guest has written to.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import secrets
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import programs
from .errors import BuilderFault, BuildFailed, UsageError
from .programs import ProgramFailed
from .units import GIB, KIB, MIB, format_size

log = logging.getLogger(__name__)

FILESYSTEMS = ("ext4", "ext2", "xfs")
LABEL = "workspace"

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
PARTITION_OFFSET_BYTES = MIB
LARGEST_BYTES = 2**32 * SECTOR_BYTES  # what an MBR can say

# Smaller ones are of no use, and mkfs.xfs refuses less than 300 MiB.
_SMALLEST_BYTES = {"ext4": 64 * MIB, "ext2": 64 * MIB, "xfs": 512 * MIB}

# What e2fsprogs 1.42 and Linux 3.10 (RHEL 7) know. Left out on purpose:
# resize_inode and sparse_super2 (an old kernel takes the places where the
# backups would be for metadata, and refuses to read a file that lies there);
# uninit_bg and metadata_csum (the guest would spend its first minutes on
# zeroing inode tables, which are zero already).
_EXT_FEATURES = {
    "ext4": "has_journal,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,"
    "huge_file,dir_nlink,extra_isize",
    "ext2": "ext_attr,dir_index,filetype,sparse_super,large_file",
}

# Switched off where mkfs.xfs knows them: newer than Linux 3.10.
_XFS_FEATURES_OFF = (
    ("-m", "finobt=0"),
    ("-m", "rmapbt=0"),
    ("-m", "reflink=0"),
    ("-m", "bigtime=0"),
    ("-m", "inobtcount=0"),
    ("-i", "sparse=0"),
    ("-i", "nrext64=0"),
    ("-i", "exchange=0"),
    ("-n", "parent=0"),
)
_XFS_LOG_BYTES = 64 * MIB  # the least that mkfs.xfs takes


@dataclass(frozen=True)
class Workspace:
    """A finished workspace disk. The guest sees its partition as /dev/vdb1.

    path -- sparse raw disk image with an MBR and one partition.
    input_filename -- where the input image is in it, with a leading slash;
        None if it is not in it. Its size is a multiple of 512 bytes.
    """

    path: Path
    size_bytes: int
    filesystem: str
    partition_offset_bytes: int
    input_filename: str | None


@dataclass(frozen=True)
class _Run:
    """Bytes of an image that lie in one piece on the disk."""

    file_offset: int
    disk_offset: int
    length: int


@dataclass(frozen=True)
class _Input:
    path: Path
    format: str
    size_bytes: int
    components: tuple[str, ...]

    @property
    def blocks(self) -> int:
        return _divide_up(self.size_bytes, BLOCK_BYTES)

    @property
    def filename(self) -> str:
        return "/" + "/".join(self.components)


def create(
    path: Path,
    *,
    size_bytes: int,
    filesystem: str,
    input_path: Path | None,
    input_format: str | None,
    input_size_bytes: int,
    input_filename: str,
) -> Workspace:
    """Make a workspace of size_bytes at path, which must not exist yet.

    input_path -- a vetted image; None makes an empty file system, and then the
        other input arguments are not looked at.
    input_format -- 'raw' or 'qcow2'; never guessed.
    input_size_bytes -- virtual size. The file gets the bytes of `qemu-img
        convert -O raw`, which fills up the last sector of 512 bytes with zeros.
    input_filename -- '/input_image.raw', '/images/in.raw'; components of
        [A-Za-z0-9._-] only, validated by the caller.

    Raises BuildFailed when the input does not fit, BuilderFault when the host's
    disk is full or a program fails; path does not exist then. Temporary files
    are made beside path, and are gone afterwards; their path must not have a '?'.
    """
    if filesystem not in FILESYSTEMS:
        raise UsageError(
            f"{filesystem!r} is not a file system for the workspace",
            f"choose one of {', '.join(FILESYSTEMS)}",
        )
    path = path.absolute()
    if "?" in str(path):
        # e2fsprogs read what follows it as options
        raise BuilderFault(f"the work directory {path.parent} has a '?' in its name", "rename it")
    source = None
    if input_path is not None:
        if input_format not in ("raw", "qcow2"):
            raise UsageError(f"{input_format!r} is not an input format", "use raw or qcow2")
        source = _Input(
            path=input_path.absolute(),
            format=input_format,
            size_bytes=_divide_up(input_size_bytes, SECTOR_BYTES) * SECTOR_BYTES,
            components=tuple(input_filename.strip("/").split("/")),
        )
        _check_source(source)
    _check_fits(size_bytes, filesystem, source.size_bytes if source else 0)

    partition_bytes = (size_bytes - PARTITION_OFFSET_BYTES) // BLOCK_BYTES * BLOCK_BYTES
    with _full_disk_named(path.parent):
        path.touch(exist_ok=False)
        try:
            with path.open("r+b") as disk:
                disk.truncate(size_bytes)
                disk.write(_mbr(partition_bytes))
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
                _fill(path, partition_bytes, filesystem, source, Path(scratch))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return Workspace(
        path=path,
        size_bytes=size_bytes,
        filesystem=filesystem,
        partition_offset_bytes=PARTITION_OFFSET_BYTES,
        input_filename=source.filename if source else None,
    )


# Room


def needed_bytes(filesystem: str, input_size_bytes: int, size_bytes: int) -> int:
    """What a workspace of size_bytes has to have for the input and its own structures.

    An upper bound: a workspace for which this says that the input fits can be made.
    """
    if filesystem == "xfs":
        own = _XFS_LOG_BYTES + 16 * MIB + size_bytes // 1000
    else:
        groups = _divide_up(size_bytes, 128 * MIB)
        descriptors = _divide_up(groups * 32, BLOCK_BYTES) * BLOCK_BYTES
        inode_tables = size_bytes // _inode_ratio(size_bytes) * 256 + groups * BLOCK_BYTES
        bitmaps = groups * 2 * BLOCK_BYTES
        backups = 48 * (BLOCK_BYTES + descriptors)  # groups 0, 1 and powers of 3, 5 and 7
        file_map = input_size_bytes // 512 if filesystem == "ext2" else groups * 64
        journal = _journal_mib(size_bytes) * MIB if filesystem == "ext4" else 0
        # mke2fs leaves a last group unused that is hardly larger than its tables
        own = inode_tables + bitmaps + backups + file_map + journal + 8 * MIB
    return PARTITION_OFFSET_BYTES + own + _divide_up(input_size_bytes, BLOCK_BYTES) * BLOCK_BYTES


def suggested_bytes(filesystem: str, input_size_bytes: int) -> int:
    """Whole GiB that hold the input, with room for results."""
    size = _divide_up(input_size_bytes * 21, 20 * GIB) * GIB + GIB
    while needed_bytes(filesystem, input_size_bytes, size) > size:
        size += GIB
    return size


def _check_fits(size_bytes: int, filesystem: str, input_size_bytes: int) -> None:
    if size_bytes > LARGEST_BYTES:
        raise BuildFailed(
            f"a workspace of {format_size(size_bytes)} is larger than the 2 TiB that its"
            " partition table can describe",
            "choose a smaller --workspace-size",
        )
    fits = needed_bytes(filesystem, input_size_bytes, size_bytes) <= size_bytes
    if input_size_bytes and not fits:
        suggestion = suggested_bytes(filesystem, input_size_bytes)
        raise BuildFailed(
            f"the input image ({format_size(input_size_bytes)}) does not fit into a workspace of"
            f" {format_size(size_bytes)}",
            f"use --workspace-size {suggestion // GIB}G or more"
            if suggestion <= LARGEST_BYTES
            else "hand it to the guest as a device of its own; a workspace has at most 2 TiB",
        )
    smallest = _SMALLEST_BYTES[filesystem]
    if size_bytes < smallest or not fits:
        raise BuildFailed(
            f"a workspace of {format_size(size_bytes)} is too small for {filesystem}",
            f"use --workspace-size {smallest // MIB}M or more",
        )


def _divide_up(number: int, by: int) -> int:
    return -(-number // by)


@contextmanager
def _full_disk_named(directory: Path) -> Iterator[None]:
    """Turn 'no space left', whoever says it, into one sentence about the directory."""
    try:
        yield
    except (ProgramFailed, OSError) as error:
        free = shutil.disk_usage(directory).free
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            limited = error.errno == errno.EFBIG
        else:
            # mke2fs and debugfs may call it a short write
            full = free < 64 * KIB or bool(
                re.search("No space left on device|Disk quota exceeded", error.stderr)
            )
            limited = "File too large" in error.stderr
        if limited:
            raise BuilderFault(
                f"the file system of {directory} cannot hold a file as large as the workspace",
                "use a work directory on another file system",
            ) from error
        if not full:
            raise
        raise BuilderFault(
            f"no space left for the workspace in {directory} ({format_size(free)} free)",
            "make room there, or use another work directory",
        ) from error


# The disk


def _mbr(partition_bytes: int) -> bytes:
    """A partition table with one partition, type Linux, not active."""
    beyond_chs = b"\xfe\xff\xff"  # "do not look here, look at the sector numbers"
    entry = struct.pack(
        "<B3sB3sII",
        0,
        beyond_chs,
        0x83,
        beyond_chs,
        PARTITION_OFFSET_BYTES // SECTOR_BYTES,
        partition_bytes // SECTOR_BYTES,
    )
    signature = secrets.token_bytes(3) + b"\x01"  # never zero
    return bytes(440) + signature + bytes(2) + entry + bytes(48) + b"\x55\xaa"


def _check_source(source: _Input) -> None:
    """Runs are copied by number, so an image that is not of the size we were told must not pass."""
    text = programs.run(
        ["qemu-img", "info", "-f", source.format, "--output=json", str(source.path)],
        timeout_seconds=120,
        limits=programs.Limits(),
    )
    actual = _divide_up(int(json.loads(text)["virtual-size"]), SECTOR_BYTES) * SECTOR_BYTES
    if actual == 0:
        raise BuildFailed(f"the input image {source.path} is empty", "give an image with content")
    if actual != source.size_bytes:
        raise BuilderFault(
            f"the input image {source.path} has {actual} bytes, not {source.size_bytes}",
            "did it change while it was read? try again",
        )


def _fill(
    disk: Path, partition_bytes: int, filesystem: str, source: _Input | None, scratch: Path
) -> None:
    """Make the file system beside the disk, put it into its place, then the input into its file.

    Beside, because mkfs.xfs knows no offset, and because the programs write many
    zeros (journal, inode tables) that shall be holes.
    """
    image = scratch / "filesystem"
    with image.open("xb") as file:
        file.truncate(partition_bytes)
    runs: list[_Run] = []
    if filesystem == "ext4":
        runs = _make_ext4(image, source, scratch)
    elif filesystem == "xfs":
        runs = _make_xfs(image, source, scratch)
    else:
        _mke2fs(image, "ext2", {}, scratch)
    _convert(image, "raw", _Run(0, PARTITION_OFFSET_BYTES, partition_bytes), disk)
    image.unlink()
    if source is not None and filesystem == "ext2":
        _write_ext2_file(disk, source, scratch)
    elif source is not None:
        for run in runs:
            _convert(source.path, source.format, run, disk)


def _convert(source: Path, source_format: str, run: _Run, disk: Path) -> None:
    """Write one run into the disk, which is zero there; holes and zeros stay holes."""
    # A backing file that the image names is not followed, whoever vetted it.
    image: dict[str, object] = {
        "driver": source_format,
        "file": {"driver": "file", "filename": str(source)},
    }
    if source_format == "qcow2":
        image["backing"] = None
    part = {"driver": "raw", "offset": run.file_offset, "size": run.length, "file": image}
    target = (
        f"driver=raw,offset={run.disk_offset},size={run.length},"
        f"file.driver=file,file.filename={str(disk).replace(',', ',,')}"
    )
    argv = ["qemu-img", "convert", "-n", "--target-is-zero", "-W", "-m", "16"]
    argv += ["--target-image-opts", f"json:{json.dumps(part)}", target]
    seconds = _deadline(run.length)
    limits = programs.Limits(address_space_bytes=4 * GIB, cpu_seconds=int(seconds))
    programs.run(argv, timeout_seconds=seconds, limits=limits)


def _deadline(size_bytes: int) -> float:
    """A disk that writes less than 10 MiB a second is out of order."""
    return 600 + size_bytes / (10 * MIB)


# ext4 and ext2


def _make_ext4(image: Path, source: _Input | None, scratch: Path) -> list[_Run]:
    """Let mke2fs allocate the input's file without writing it."""
    # All metadata in front, so that only the few backups of the superblock
    # break the file into pieces.
    settings = {"flex_bg_size": "262144", "packed_meta_blocks": "true"}
    if source is None:
        _mke2fs(image, "ext4", settings, scratch)
        return []
    settings |= {
        "make_hugefiles": "true",
        "hugefiles_dir": "/" + "/".join(source.components[:-1]),
        "hugefiles_name": source.components[-1],
        "hugefiles_digits": "0",
        "hugefiles_umask": "022",
        "hugefiles_uid": "0",
        "hugefiles_gid": "0",
        "num_hugefiles": "1",
        "hugefiles_size": f"{source.blocks * BLOCK_BYTES // KIB}K",
        "zero_hugefiles": "false",
    }
    _mke2fs(image, "ext4", settings, scratch)
    _debugfs(image, [f"set_inode_field {source.filename} size {source.size_bytes}"], scratch)
    _check_ext_file(image, source)
    return _ext4_runs(image, source)


def _write_ext2_file(disk: Path, source: _Input, scratch: Path) -> None:
    """Without extents mke2fs allocates no file in advance, so the input is written twice.

    The work directory needs room for both while it lasts.
    """
    raw = scratch / "input.raw"
    with raw.open("xb") as file:
        file.truncate(source.size_bytes)
    _convert(source.path, source.format, _Run(0, 0, source.size_bytes), raw)
    quoted = str(raw).replace('"', '""')
    commands = []
    for name in source.components[:-1]:
        commands += [f"mkdir {name}", f"cd {name}"]
    commands += [f'write "{quoted}" {source.components[-1]}']
    commands += [f"set_inode_field {source.filename} {what} 0" for what in ("uid", "gid")]
    commands += [f"set_inode_field {source.filename} mode 0100644"]
    partition = f"{disk}?offset={PARTITION_OFFSET_BYTES}"
    _debugfs(partition, commands, scratch, written_bytes=source.size_bytes)
    _check_ext_file(partition, source)


def _inode_ratio(size_bytes: int) -> int:
    """Bytes per inode: half a million inodes for the default 30 GiB."""
    return 65536 if size_bytes >= 16 * GIB else 16384


def _journal_mib(size_bytes: int) -> int:
    return 64 if size_bytes >= 8 * GIB else 16 if size_bytes >= 512 * MIB else 4


def _mke2fs(image: Path, filesystem: str, settings: Mapping[str, str], scratch: Path) -> None:
    size_bytes = image.stat().st_size
    config = scratch / "mke2fs.conf"
    lines = [
        "[defaults]",
        "base_features = none",
        f"blocksize = {BLOCK_BYTES}",
        "inode_size = 256",
        f"inode_ratio = {_inode_ratio(size_bytes)}",
        "reserved_ratio = 0",
        "[fs_types]",  # a section begins in the first column, or it is not seen
        f"{filesystem} = {{",
        f"features = {_EXT_FEATURES[filesystem]}",
        *(f"{name} = {value}" for name, value in settings.items()),
        "}",
    ]
    config.write_text("\n".join(lines) + "\n")
    argv = ["mke2fs", "-q", "-F", "-t", filesystem, "-L", LABEL]
    argv += ["-b", str(BLOCK_BYTES), "-m", "0"]
    if filesystem == "ext4":
        argv += ["-J", f"size={_journal_mib(size_bytes)}"]
    argv += ["-E", "nodiscard,root_owner=0:0", str(image)]
    programs.run(argv, timeout_seconds=600, env={"MKE2FS_CONFIG": str(config)})


def _debugfs(
    image: Path | str, commands: Sequence[str], scratch: Path, *, written_bytes: int = 0
) -> None:
    """Run commands that change the file system; look afterwards: debugfs exits 0 always."""
    script = scratch / "debugfs.commands"
    script.write_text("".join(f"{command}\n" for command in commands))
    programs.run(
        ["debugfs", "-w", "-f", str(script), str(image)], timeout_seconds=_deadline(written_bytes)
    )


def _check_ext_file(image: Path | str, source: _Input) -> None:
    said = programs.run(
        ["debugfs", "-R", f"stat {source.filename}", str(image)], timeout_seconds=600
    )
    seen = " ".join(said[:1000].split())
    for wanted in (
        "Type: regular",
        "Mode: 0644",
        "User: 0 Group: 0 ",
        f"Size: {source.size_bytes} ",
    ):
        if wanted not in seen:
            raise BuilderFault(f"{source.filename} was not made as it should be", "report this")


def _ext4_runs(image: Path, source: _Input) -> list[_Run]:
    """Where the file lies; an extent has at most 128 MiB, so neighbours are joined."""
    said = programs.run(
        ["debugfs", "-R", f"dump_extents -l {source.filename}", str(image)],
        timeout_seconds=600,
    )
    line = re.compile(
        r"\s*(?P<level>\d+)/\s*(?P<depth>\d+)\s+\d+/\s*\d+"
        r"\s+(?P<logical>\d+)\s*-\s*\d+\s+(?P<physical>\d+)\s*-\s*\d+\s+(?P<length>\d+)"
        r"\s*(?P<flags>\S*)\s*"
    )
    extents = []
    for match in filter(None, map(line.fullmatch, said.splitlines())):
        if match["level"] != match["depth"]:
            continue
        if match["flags"]:
            raise BuilderFault(f"{source.filename} has unwritten extents", "report this")
        extents.append(
            (int(match["logical"]), int(match["physical"]), int(match["length"])),
        )
    return _runs(extents, source, image.stat().st_size)


def _runs(
    extents: Sequence[tuple[int, int, int]], source: _Input, partition_bytes: int
) -> list[_Run]:
    """Join extents (logical, physical, length; in blocks) to runs, and check every one of them.

    The runs count from the beginning of the disk, not of its partition.
    """
    wanted = 0
    joined: list[list[int]] = []
    for logical, physical, length in extents:
        if logical != wanted or length < 1 or physical < 1:
            raise BuilderFault(f"{source.filename} was laid out with gaps", "report this")
        wanted += length
        if joined and joined[-1][1] + joined[-1][2] == physical:
            joined[-1][2] += length
        else:
            joined.append([logical, physical, length])
    by_place = sorted((physical, length) for _, physical, length in joined)
    ends = [0, *(physical + length for physical, length in by_place)]
    overlap = any(place < end for (place, _), end in zip(by_place, ends))
    if wanted != source.blocks or overlap or ends[-1] * BLOCK_BYTES > partition_bytes:
        raise BuilderFault(f"{source.filename} was not laid out in full", "report this")
    runs = []
    for logical, physical, length in joined:
        offset = logical * BLOCK_BYTES
        runs.append(
            _Run(
                file_offset=offset,
                disk_offset=PARTITION_OFFSET_BYTES + physical * BLOCK_BYTES,
                length=min(length * BLOCK_BYTES, source.size_bytes - offset),
            )
        )
    log.debug("%s lies on the workspace in %d runs", source.filename, len(runs))
    return runs


# xfs


def _make_xfs(image: Path, source: _Input | None, scratch: Path) -> list[_Run]:
    """Let mkfs.xfs reserve the input's file by a prototype, and declare its extents written."""
    _mkfs_xfs(image, source, scratch)
    return [] if source is None else _finish_xfs_file(image, source)


def _mkfs_xfs(image: Path, source: _Input | None, scratch: Path) -> None:
    # -N: only say what would be done
    base = ["mkfs.xfs", "-q", "-f", "-K", "-L", LABEL, "-b", f"size={BLOCK_BYTES}"]
    base += ["-s", f"size={SECTOR_BYTES}", "-d", "noalign", "-m", "crc=1", "-i", "size=512"]
    base += ["-l", f"size={_XFS_LOG_BYTES}"]
    for option in _XFS_FEATURES_OFF:
        try:
            programs.run([*base, "-N", *option, str(image)], timeout_seconds=60)
        except ProgramFailed as error:
            if "unknown" not in error.stderr:
                raise
            log.debug("mkfs.xfs does not know %s %s", *option)
        else:
            base += option
    if source is not None:
        # 'r' in the place of '-' is a file whose space is reserved, not filled
        prototype = ["/dev/null", "0 0", "d--755 0 0"]
        prototype += [f"{name} d--755 0 0" for name in source.components[:-1]]
        prototype += [f"{source.components[-1]} r--644 0 0 {source.blocks * BLOCK_BYTES}"]
        prototype += ["$"] * len(source.components)
        (scratch / "prototype").write_text("\n".join(prototype) + "\n")
        base += ["-p", str(scratch / "prototype")]
    programs.run([*base, str(image)], timeout_seconds=600)


def _finish_xfs_file(image: Path, source: _Input) -> list[_Run]:
    """Give the reserved file its size and make its extents ordinary; return where it lies."""
    extents = _xfs_extents(image, source)
    commands = [f"write core.size {source.size_bytes}", "write core.prealloc 0"]
    commands += [f"write u3.bmx[{number}].extentflag 0" for number in range(len(extents))]
    _xfs_db(image, source, commands, change=True)
    written = _xfs_extents(image, source)
    size = re.search(r"core\.size = (\d+)", _xfs_db(image, source, ["print core.size"]))
    if any(flag for *_, flag in written) or not size or int(size[1]) != source.size_bytes:
        raise BuilderFault(
            f"xfs_db could not finish {source.filename}", "use ext4, and report this"
        )
    return _runs([extent[:3] for extent in written], source, image.stat().st_size)


def _xfs_extents(image: Path, source: _Input) -> list[tuple[int, int, int, int]]:
    """Logical block, physical block, length and 'unwritten' flag of every extent."""
    said = _xfs_db(image, source, ["print core.format", "bmap", "sb 0", "print agblocks"])
    group_blocks = re.search(r"agblocks = (\d+)", said)
    line = re.compile(
        r"data offset (\d+) startblock \d+ \((\d+)/(\d+)\) count (\d+) flag (\d+)", re.MULTILINE
    )
    if "(extents)" not in said or group_blocks is None:
        # their list no longer fits into the inode: beyond some 150 GiB
        raise BuildFailed(
            f"the input image ({format_size(source.size_bytes)}) has too many extents for an xfs"
            " workspace",
            "use an ext4 workspace",
        )
    return [
        (logical, group * int(group_blocks[1]) + block, count, flag)
        for logical, group, block, count, flag in (
            tuple(map(int, match)) for match in line.findall(said)
        )
    ]


def _xfs_db(image: Path, source: _Input, commands: Sequence[str], change: bool = False) -> str:
    argv = ["xfs_db", "-x" if change else "-r", "-c", f"path {source.filename}"]
    for command in commands:
        argv += ["-c", command]
    return programs.run([*argv, str(image)], timeout_seconds=600)
