"""What is this file, is it safe, how large; and overlays on it.

An image is untrusted input. qemu and qemu-img are always told its format, and
open it only after its header was found to name no other file. This module must
never write to an image, hold one in memory, or leave a file outside work_dir.
"""

from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import re
import shlex
import signal
import stat
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from . import programs
from .errors import BuilderFault, BuildFailed, UsageError
from .units import MIB, format_size

UTILITY_IMAGE = "utility image"
INPUT_IMAGE = "input image"

_CHUNK_BYTES = MIB
_BLOCK_BYTES = 4096  # the grain of holes; the block size of every common file system
_HEAD_BYTES = MIB  # all that format detection sees: enough for every signature it knows
_SNAPSHOTS_MAX = 64
_UNPACK_SECONDS = 3600.0  # and one for each MiB of packed data
_INFO_TIMEOUT_SECONDS = 60.0
_CHECK_TIMEOUT_SECONDS = 600.0
_LIMITS = programs.Limits()

_QCOW2_MAGIC = b"QFI\xfb"
# Incompatible feature bits, https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.rst:
# 0 dirty, 1 corrupt, 2 external data file, 3 compression type, 4 extended L2.
_QCOW2_DIRTY, _QCOW2_CORRUPT, _QCOW2_DATA_FILE, _QCOW2_KNOWN = 1 << 0, 1 << 1, 1 << 2, 0b11111
# What qemu itself reads at most, for images of petabytes.
_QCOW2_L1_BYTES_MAX, _QCOW2_REFCOUNT_BYTES_MAX = 32 * MIB, 8 * MIB

_COMPRESSIONS = {b"\xfd7zXZ\0": "xz", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_QCOW2_NAME = re.compile(r"\.qcow2(\.(xz|gz|zst|zstd))?$", re.IGNORECASE)
# What a foreign format is called by oslo.utils, and by qemu-img convert -f.
_FOREIGN = {"vmdk": "vmdk", "vdi": "vdi", "vhd": "vpc", "vhdx": "vhdx", "qed": "qed"}

_BOOT_SECTOR = (510, b"\x55\xaa")
_DISK_SIGNATURES = (
    _BOOT_SECTOR,  # MBR, protective MBR, FAT, NTFS
    (512, b"EFI PART"),
    (4096, b"EFI PART"),  # GPT on 4 KiB sectors
    (1080, b"\x53\xef"),  # ext2, ext3, ext4
    (0, b"XFSB"),
    (0x10040, b"_BHRfS_M"),  # btrfs
    (32769, b"CD001"),  # ISO 9660
    (0, b"hsqs"),  # squashfs
    (1024, b"\xe2\xe1\xf5\xe0"),  # erofs
    (512, b"LABELONE"),  # LVM
)

Identity = tuple[int, int, int, int]


@dataclass(frozen=True)
class ImageFile:
    """A disk image that passed vet(), or an overlay that we made ourselves.

    path -- absolute; the file that qemu may open with `format`.
    format -- "raw" or "qcow2"; always passed to qemu, never guessed by it.
    virtual_size_bytes -- size of the disk that a guest sees; a multiple of 512.
    source -- what the user named; differs from `path` when it was unpacked.
    identity -- st_dev, st_ino, st_size, st_mtime_ns of the source when it was vetted;
        see unchanged().
    """

    path: Path
    format: str
    virtual_size_bytes: int
    source: Path
    identity: Identity


def vet(path: Path, *, max_virtual_size_bytes: int, work_dir: Path, role: str) -> ImageFile:
    """Find out what a file is, and refuse it unless it is a disk that is safe to open.

    role -- UTILITY_IMAGE or INPUT_IMAGE: used in messages, and a raw utility
    image must have a boot sector. xz, gzip and zstd are recognized by content
    and unpacked, sparse, into work_dir. Content decides the format: qcow2 by its
    magic, else raw. Nothing that an image names is opened (CVE-2024-32498: qcow2
    with an external data file; CVE-2024-4467: json: in such a name).

    Raises UsageError when there is no such readable file, BuildFailed when its
    content is refused, BuilderFault when this machine cannot tell (a tool is
    missing, work_dir is full).
    """
    source, compression = require_file(path, role)
    what = f"{role} {path}"
    identity = _identity(source.stat())
    if compression is None:
        return _vet_disk(source, source, identity, what, max_virtual_size_bytes, role)
    unpacked = _unpack(source, compression, work_dir, what, max_virtual_size_bytes)
    try:
        return _vet_disk(unpacked, source, identity, what, max_virtual_size_bytes, role)
    except BaseException:
        unpacked.unlink(missing_ok=True)
        raise


def create_overlay(base: ImageFile, path: Path) -> ImageFile:
    """Make a copy-on-write qcow2 over `base`, which stays as it is."""
    path = path.absolute()
    write_overlay(base.path, base.format, base.virtual_size_bytes, path)
    return dataclasses.replace(base, path=path, format="qcow2")


def write_overlay(base: Path, base_format: str, size_bytes: int, path: Path) -> None:
    """Write an empty copy-on-write qcow2 over a file.

    Nothing is opened but the new file: size and format of the base are known
    (-u), so this cannot follow what took the base's place in the meantime.
    """
    argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2"]
    argv += ["-F", base_format, "-b", str(base), str(path), str(size_bytes)]
    programs.run(argv, timeout_seconds=_INFO_TIMEOUT_SECONDS, limits=_LIMITS)


def unchanged(image: ImageFile) -> bool:
    """Whether the source is still the file that was vetted, as far as stat can tell."""
    try:
        return _identity(image.source.stat()) == image.identity
    except OSError:
        return False


def sha256(path: Path, *, cancelled: Callable[[], bool] = lambda: False) -> str:
    """Hex digest of a file, read in pieces.

    cancelled -- asked before each piece; concurrent.futures.CancelledError is
    raised when it says yes, so that a hashing thread can be stopped.
    """
    digest = hashlib.sha256()
    piece = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while not cancelled():
            length = file.readinto(piece)
            if not length:
                return digest.hexdigest()
            digest.update(piece[:length])
    raise CancelledError


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


# -- the file itself ---------------------------------------------------------


def require_file(path: Path, role: str) -> tuple[Path, str | None]:
    """The file's real path, and how it is compressed if it is.

    Raises UsageError when there is no such readable file, BuildFailed when it is empty.
    """
    what = f"{role} {path}"
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"{what} is a directory", "name the image file in it")
        if not stat.S_ISREG(mode):
            raise UsageError(f"{what} is not a regular file", "copy the disk into a file first")
        with real.open("rb") as file:
            head = file.read(8)
    except FileNotFoundError:
        raise UsageError(f"{what} does not exist", "check the path") from None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of symlinks, a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{what} cannot be read: {reason}", "check its permissions") from None
    if not head:
        raise BuildFailed(f"{what} is empty", "was it downloaded or copied to its end?")
    for magic, name in _COMPRESSIONS.items():
        if head.startswith(magic):
            return real, name
    return real, None


# -- compressed images -------------------------------------------------------


def _unpack(source: Path, compression: str, work_dir: Path, what: str, limit_bytes: int) -> Path:
    """Unpack into a new sparse file in work_dir, at most limit_bytes of disk."""
    chunks = {"xz": _unxz, "gzip": _ungzip, "zstd": _unzstd}[compression]
    try:
        with _new_file(work_dir) as path:
            with path.open("wb", buffering=_CHUNK_BYTES) as target, source.open("rb") as file:
                seconds = _UNPACK_SECONDS + os.fstat(file.fileno()).st_size / MIB
                _write_sparse(_until(seconds, chunks(file), what), target, what, limit_bytes)
            return path
    except EOFError:
        raise BuildFailed(
            f"{what} is incomplete: its {compression} data ends too early",
            "copy or download it again",
        ) from None
    except _Damaged as error:
        raise BuildFailed(
            f"{what} is damaged: its {compression} data cannot be unpacked: {error}",
            "copy or download it again",
        ) from None
    except OSError as error:
        raise _cannot_unpack(what, work_dir, error) from error


def _until(seconds: float, chunks: Iterator[bytes], what: str) -> Iterator[bytes]:
    """The same chunks; BuildFailed when they take longer: a few MB may hold hours of zeros."""
    deadline = time.monotonic() + seconds
    for chunk in chunks:
        if time.monotonic() > deadline:
            raise BuildFailed(
                f"{what} could not be unpacked within {seconds:.0f} s",
                "make it smaller, or unpack it and hand it over as qcow2",
            )
        yield chunk


@contextmanager
def _new_file(work_dir: Path) -> Iterator[Path]:
    """A new file that stays only if the block is left without an exception."""
    handle, name = tempfile.mkstemp(prefix="unpacked-", suffix=".img", dir=work_dir.absolute())
    os.fchmod(handle, 0o644)  # for qemu's user; what is around it lets nobody list its name
    os.close(handle)
    path = Path(name)
    try:
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _cannot_unpack(what: str, work_dir: Path, error: OSError) -> BuilderFault:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BuilderFault(
            f"no space left in {work_dir} to unpack {what}",
            "free some, or use a work directory on a larger file system",
        )
    return BuilderFault(
        f"cannot unpack {what} into {work_dir}: {error.strerror or error}",
        "check the directory and its file system",
    )


def _write_sparse(chunks: Iterator[bytes], target: IO[bytes], what: str, limit_bytes: int) -> None:
    """Write what is not zero, up to the limit (decompression bombs); the rest becomes holes."""
    allowed_bytes = limit_bytes
    zeros = bytes(_BLOCK_BYTES)
    size = 0
    for chunk in chunks:
        if size == 0 and chunk.startswith(_QCOW2_MAGIC):
            allowed_bytes += limit_bytes // 16 + 64 * MIB  # qcow2's own tables
        if size + len(chunk) > allowed_bytes:
            raise BuildFailed(
                f"{what} unpacks to more than the limit of {format_size(limit_bytes)}",
                "use a smaller image; --max-image-size (max_image_size on a builder) allows more",
            )
        start = 0
        while start < len(chunk):
            end = min(start + _BLOCK_BYTES - (size + start) % _BLOCK_BYTES, len(chunk))
            block = chunk[start:end]
            if block != zeros[: len(block)]:
                target.seek(size + start)
                target.write(block)
            start = end
        size += len(chunk)
    if size == 0:
        raise BuildFailed(f"{what} is empty once unpacked", "was it packed by mistake?")
    target.truncate(size)


class _Damaged(Exception):
    """The compressed data is not what it claims to be."""


def _ungzip(file: IO[bytes]) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _Damaged(error) from error


def _unxz(file: IO[bytes]) -> Iterator[bytes]:
    """Concatenated streams and padding included, as pixz and `xz -T` write them."""

    def new() -> lzma.LZMADecompressor:
        # xz -9 wants 65 MiB; a header may ask for 4 GiB.
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=256 * MIB)

    decoder, inside = new(), False
    try:
        while data := file.read(_CHUNK_BYTES):
            while data := data if inside else data.lstrip(b"\0"):
                inside = True
                yield decoder.decompress(data, _CHUNK_BYTES)
                while not (decoder.eof or decoder.needs_input):
                    yield decoder.decompress(b"", _CHUNK_BYTES)
                data = b""
                if decoder.eof:
                    data, decoder, inside = decoder.unused_data, new(), False
    except lzma.LZMAError as error:
        raise _Damaged(error) from error
    if inside:
        raise EOFError


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise BuilderFault(
            "zstd-compressed images need the Python module zstandard",
            "install python3-zstandard, or unpack the image with `zstd -d`",
        ) from error
    # Not stream_reader(): it takes truncated data for complete. decompressobj() cannot bound
    # its output, so it is fed little: 1 KiB of zstd makes at most 32 MiB.
    decoder, inside = zstandard.ZstdDecompressor().decompressobj(), False
    try:
        while data := file.read(1024):
            while data:
                inside = True
                yield decoder.decompress(data)
                data = b""
                if decoder.eof:
                    data, inside = decoder.unused_data, False
                    decoder = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise _Damaged(error) from error
    if inside:
        raise EOFError


# -- the disk in it ----------------------------------------------------------


def _vet_disk(
    path: Path, source: Path, identity: Identity, what: str, limit_bytes: int, role: str
) -> ImageFile:
    """Everything after unpacking: cheap and harmless looks first, qemu-img last."""
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD_BYTES)
        file.seek(max(0, size_bytes - 512))
        tail = file.read(512)
    is_qcow2 = head.startswith(_QCOW2_MAGIC)
    if is_qcow2:
        _vet_qcow2_header(head, what, limit_bytes)
    elif size_bytes > limit_bytes:
        raise _too_large(what, size_bytes, limit_bytes)
    _vet_format(head, tail, source, what)
    if not is_qcow2:
        _vet_raw(head, source, what, role)
    image_format = "qcow2" if is_qcow2 else "raw"
    virtual_size_bytes = _vet_info(path, image_format, what, limit_bytes)
    if is_qcow2:
        _vet_tables(path, source, what, bool(_qcow2_features(head) & _QCOW2_DIRTY))
    image = ImageFile(path, image_format, virtual_size_bytes, source, identity)
    if not unchanged(image):
        raise BuildFailed(f"{what} changed while it was read", "wait until it is complete")
    return image


def _vet_qcow2_header(head: bytes, what: str, limit_bytes: int) -> None:
    """What qemu would act on, before any qemu program sees the file."""
    version = int.from_bytes(head[4:8], "big")
    if version not in (2, 3):
        raise BuildFailed(
            f"{what} is qcow2 version {version}, only 2 and 3 are supported",
            "convert it: qemu-img convert -O qcow2 OLD NEW",
        )
    if len(head) < (72 if version == 2 else 104):
        raise BuildFailed(f"{what} is incomplete: its qcow2 header is cut off", "copy it again")
    backing_offset, backing_length, _, size_bytes, encryption = struct.unpack(">QIIQI", head[8:36])
    if backing_offset:
        name = head[backing_offset:][: min(backing_length, 100)].decode("utf-8", "replace")
        raise BuildFailed(
            f"{what} has a backing file ({name!r}), which is never followed",
            "flatten it where that file is: qemu-img convert -f qcow2 -O qcow2 OLD NEW",
        )
    features = _qcow2_features(head)
    if features & _QCOW2_DATA_FILE:
        raise BuildFailed(
            f"{what} keeps its content in an external data file, which is never followed",
            "flatten it where that file is: qemu-img convert -f qcow2 -O qcow2 OLD NEW",
        )
    if encryption:
        raise BuildFailed(
            f"{what} is encrypted", "decrypt it first: qemu-img convert with its secret"
        )
    if features & ~_QCOW2_KNOWN:
        raise BuildFailed(
            f"{what} uses unknown qcow2 features ({features & ~_QCOW2_KNOWN:#x})",
            "convert it with the program that made it: qemu-img convert -O qcow2 OLD NEW",
        )
    if features & _QCOW2_CORRUPT:
        raise BuildFailed(
            f"{what} is marked as corrupt", "make it anew, or repair a copy: qemu-img check -r all"
        )
    if size_bytes > limit_bytes:
        raise _too_large(what, size_bytes, limit_bytes)
    _vet_table_sizes(head, what)
    snapshots = int.from_bytes(head[60:64], "big")
    if snapshots > _SNAPSHOTS_MAX:
        raise BuildFailed(
            f"{what} holds {snapshots} internal snapshots, more than {_SNAPSHOTS_MAX}",
            "drop them: qemu-img convert -f qcow2 -O qcow2 OLD NEW",
        )


def _vet_table_sizes(head: bytes, what: str) -> None:
    """Tables that no program writes: whoever reads them needs gigabytes of memory."""
    cluster_bits, l1_entries = struct.unpack(">I12xI", head[20:40])
    refcount_clusters = int.from_bytes(head[56:60], "big")
    if (
        not 9 <= cluster_bits <= 21
        or l1_entries * 8 > _QCOW2_L1_BYTES_MAX
        or refcount_clusters << cluster_bits > _QCOW2_REFCOUNT_BYTES_MAX
    ):
        raise BuildFailed(
            f"{what} states sizes of clusters or tables that no qcow2 image has",
            "copy or download it again, or make it anew",
        )


def _qcow2_features(head: bytes) -> int:
    """The incompatible features; version 2 has none, whatever stands at their place."""
    return int.from_bytes(head[72:80], "big") if head[4:8] == b"\0\0\0\3" else 0


def _vet_format(head: bytes, tail: bytes, source: Path, what: str) -> None:
    """One format, and one that we handle: the second opinion is oslo.utils'."""
    try:
        from oslo_utils.imageutils import format_inspector
    except ImportError as error:
        raise BuilderFault(
            f"the Python module {error.name}, which inspects images, is not installed",
            "install oslo.utils 7.3 or newer (python3-oslo-utils) and python3-cryptography",
        ) from error
    format_inspector.LOG.setLevel(logging.CRITICAL)  # our errors say it, once

    # detect_file_format() may read a file to its end, and refuses isohybrids; so it is fed here.
    wrapper = format_inspector.InspectWrapper(io.BytesIO(head))
    inspectors: list[Any] = []
    try:
        while wrapper.read(4096):
            pass
        wrapper.close()
        inspectors = wrapper.formats or []
    except Exception:  # noqa: BLE001, S110 - text that is not ASCII: AttributeError in 10.2
        pass
    found = {str(inspector) for inspector in inspectors}
    if head.startswith(_QCOW2_MAGIC):
        if "qcow2" not in found:
            raise BuildFailed(f"{what} is incomplete: it ends after its header", "copy it again")
    elif tail.startswith(b"conectix"):
        found = {"vhd"}  # the fixed kind has its header at its end, where oslo does not look
    elif head.lstrip().lower().startswith(b"# disk descriptorfile"):
        found = {"vmdk"}  # names its extents; oslo misses it when it is padded with zeros

    if len(found) > 1 and found != {"iso", "gpt"}:  # an ISO with a partition table: isohybrid
        raise BuildFailed(
            f"{what} looks like several formats at once ({', '.join(sorted(found))})",
            "such a file is refused; make it anew with qemu-img convert",
        )
    for name in found & _FOREIGN.keys():
        convert = f"qemu-img convert -f {_FOREIGN[name]} -O qcow2"
        raise BuildFailed(
            f"{what} is in {name} format, only raw and qcow2 are supported",
            f"convert it: {convert} {_quoted(source)} NEW.qcow2",
        )
    if "luks" in found:
        raise BuildFailed(f"{what} is encrypted (LUKS)", "decrypt it first")
    if "qcow2" in found:
        _vet_by_oslo(inspectors[0], format_inspector, what)


def _vet_by_oslo(inspector: Any, format_inspector: Any, what: str) -> None:
    # Not for gpt: its check demands a textbook MBR, which hybrid and boot-sector-only disks lack,
    # and qemu does not read it.
    failures: list[str] = []
    try:
        inspector.safety_check()
    except format_inspector.SafetyCheckFailed as error:
        failures = sorted(error.failures)
    except format_inspector.ImageFormatError as error:
        failures = [str(error)]
    # oslo.utils 10.2 does not know bit 4, extended L2; _vet_qcow2_header() checked all bits.
    failures = [failure for failure in failures if failure != "unknown_features"]
    if failures:
        raise BuildFailed(
            f"{what} fails the safety checks for qcow2: {', '.join(failures)}",
            "convert it: qemu-img convert -f qcow2 -O qcow2 OLD NEW",
        )


def _vet_raw(head: bytes, source: Path, what: str, role: str) -> None:
    """Any file is a raw disk to qemu; to us it must look like one."""
    if _QCOW2_NAME.search(source.name):
        raise BuildFailed(
            f"{what} is named .qcow2 but its content is not qcow2",
            f"look at it with `file {_quoted(source)}`; a download may have gone wrong",
        )
    signatures = (_BOOT_SECTOR,) if role == UTILITY_IMAGE else _DISK_SIGNATURES
    if any(head.startswith(magic, offset) for offset, magic in signatures):
        return
    if role == UTILITY_IMAGE:
        problem = "has no boot sector and no partition table, so nothing can boot from it"
    else:
        problem = "is not a disk image: it has no partition table and no known file system"
    raise BuildFailed(
        f"{what} {problem}",
        f"raw and qcow2 disks are supported; look at it with `file {_quoted(source)}`",
    )


def _vet_info(path: Path, image_format: str, what: str, limit_bytes: int) -> int:
    """`qemu-img info -f` opens nothing that the image names; returns the virtual size."""
    argv = ["qemu-img", "info", "--output=json", "-f", image_format, str(path)]
    try:
        answer = programs.run(argv, timeout_seconds=_INFO_TIMEOUT_SECONDS, limits=_LIMITS)
    except programs.ProgramFailed as error:
        raise _refused_by_qemu(error, what, image_format) from error
    info: dict[str, Any] = json.loads(answer)
    data: dict[str, Any] = info.get("format-specific", {}).get("data", {})
    for danger, present in {
        "a backing file": "backing-filename" in info or "full-backing-filename" in info,
        "an external data file": "data-file" in data,
        "encryption": bool(info.get("encrypted")) or "encrypt" in data,
        "the corrupt mark": bool(data.get("corrupt")),
    }.items():
        if present:
            raise BuildFailed(
                f"{what} has {danger}, says qemu-img",
                "convert it: qemu-img convert -f qcow2 -O qcow2 OLD NEW",
            )
    if info["format"] != image_format:
        raise BuildFailed(f"{what} is {info['format']} to qemu-img, not {image_format}")
    size_bytes = int(info["virtual-size"])
    if size_bytes > limit_bytes:
        raise _too_large(what, size_bytes, limit_bytes)
    if size_bytes == 0:
        raise BuildFailed(f"{what} is a disk of no size at all", "make it anew")
    return size_bytes


def _vet_tables(path: Path, source: Path, what: str, dirty: bool) -> None:
    """`qemu-img check`: do the tables agree, and does what they point at exist (truncation)?

    Exit status 3 is leaked clusters: wasted space, no harm. A file that lost
    less than its last cluster passes: qemu itself writes such files.
    """
    argv = ["qemu-img", "check", "-q", "-f", "qcow2", str(path)]
    try:
        programs.run(argv, timeout_seconds=_CHECK_TIMEOUT_SECONDS, limits=_LIMITS)
    except programs.ProgramFailed as error:
        if error.returncode == 3:
            return
        if error.returncode == 2 and dirty:  # lazy refcounts are wrong after a crash; check says so
            raise BuildFailed(
                f"{what} was not closed properly: it is marked dirty and its tables disagree",
                f"repair it: qemu-img check -r all -f qcow2 {_quoted(source)}",
            ) from error
        if error.returncode == 2:
            raise BuildFailed(
                f"{what} is incomplete or damaged: its qcow2 tables do not fit its content",
                "copy or download it again, or make it anew",
            ) from error
        raise _refused_by_qemu(error, what, "qcow2") from error


def _refused_by_qemu(error: programs.ProgramFailed, what: str, image_format: str) -> Exception:
    """The user's doing when qemu-img gave a reason or met its limits; ours when it was slow."""
    if error.returncode is None:
        return error
    if error.returncode < 0:
        return BuildFailed(
            f"{what} cannot be examined with {_LIMITS.cpu_seconds} s of CPU time and "
            f"{format_size(_LIMITS.address_space_bytes)} of memory: "
            f"qemu-img ended by {signal.Signals(-error.returncode).name}",
            "convert it: qemu-img convert -f qcow2 -O qcow2 OLD NEW",
        )
    if "lock" in error.stderr:
        return BuildFailed(
            f"{what} is in use by another program, which may write to it",
            "stop the virtual machine that uses it, or use a copy",
        )
    lines = error.stderr.splitlines() or [f"exit status {error.returncode}"]
    return BuildFailed(
        f"{what} is not a usable {image_format} image: {lines[-1]}",
        "was it copied to its end? make it anew, or copy it again",
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _too_large(what: str, size_bytes: int, limit_bytes: int) -> BuildFailed:
    return BuildFailed(
        f"{what} is a disk of {format_size(size_bytes)}, more than the limit of"
        f" {format_size(limit_bytes)}",
        "use a smaller image; --max-image-size (max_image_size on a builder) allows more",
    )
