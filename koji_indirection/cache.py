"""Fetched images on this machine: shared by all its tasks, each image fetched once.

This module must never hand out a file that is not whole, or remove one that somebody uses;
whoever is killed at any moment leaves nothing that the next one takes for good.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from .config import Settings
from .errors import BuilderFault
from .units import GIB, format_size

log = logging.getLogger(__name__)

_CHUNK_BYTES = 256 * 1024


class Image(Protocol):
    """What has to be known of an image to keep it; sources.Source, for one. str() names it.

    checksum, checksum_type, checksum_name -- hex digest; 2 is sha256, which hashlib calls so.
    archive_id -- its id in Koji, if it has one.
    """

    @property
    def archive_id(self) -> int | None: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def checksum(self) -> str: ...
    @property
    def checksum_type(self) -> int: ...
    @property
    def checksum_name(self) -> str: ...


_WAIT_SECONDS = 0.2
_ENTRY_NAME = re.compile(r"(md5|sha1|sha256)-[0-9a-f]+(-[0-9]+)?", re.ASCII)
_PART_NAME = re.compile(rf"(?P<key>{_ENTRY_NAME.pattern})\.(?P<size>[0-9]+)\.part", re.ASCII)


@dataclass(frozen=True)
class Cache:
    """Fetched images on this machine, shared by all its tasks.

    directory -- made when missing; nothing else lives in it.
    max_bytes -- of all images together, those in use included.
    keep_free_bytes -- what is left free on the file system.
    verify -- compare an image's checksum at each use, not only when it is fetched. Without
    it, an image whose size is right is taken for whole: it was fsynced before it got its
    name and is read-only, so only a failing disk or an administrator changes it.

    In the directory are, for an image KEY (kind of checksum and checksum):
    KEY -- the image, whole and verified; never written to.
    KEY.SIZE.part -- being fetched, by whoever has the lock exclusively.
    KEY.lock -- flock: shared while the image is used, exclusive while it is fetched or
    removed; its mtime is when the image was used last.
    lock -- flock: exclusive while room is made.
    The kernel drops the locks of a process that dies, so what it left is told apart.
    """

    directory: Path
    max_bytes: int = 50 * GIB
    keep_free_bytes: int = 2 * GIB
    verify: bool = False

    @classmethod
    def of(cls, settings: Settings) -> Cache:
        """The cache that a machine's settings describe."""
        return cls(
            settings.cache_dir / "images",
            settings.max_cache_bytes,
            settings.cache_keep_free_bytes,
            settings.cache_verify,
        )


Fill = Callable[[IO[bytes]], None]


@contextlib.contextmanager
def cached(cache: Cache, source: Image, fill: Fill, timeout_seconds: float) -> Iterator[Path]:
    """The image's file in the cache, filled first if it is not there; held while it is used."""
    key, directory = _key(source), cache.directory
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lock = _hold(cache, source, key, fill, timeout_seconds)
            stack.callback(os.close, lock)
            os.utime(lock)
            path = directory / key
            stack.callback(_suppressing_oserror, os.utime, lock)
            held = stack.pop_all()
    except OSError as error:
        raise _cache_fault(directory, error) from error
    with held:
        yield path


def _suppressing_oserror(function: Callable[[int], None], argument: int) -> None:
    with contextlib.suppress(OSError):
        function(argument)


def _key(source: Image) -> str:
    key = f"{source.checksum_name}-{source.checksum}"
    # Anybody can make two files of one MD5 or SHA-1; they must not stand in for each other.
    weak = source.checksum_type != 2
    return f"{key}-{source.archive_id}" if weak and source.archive_id is not None else key


def _hold(cache: Cache, source: Image, key: str, fill: Fill, timeout_seconds: float) -> int:
    """A shared lock on the image, which is there and whole."""
    path, lock_path = cache.directory / key, cache.directory / f"{key}.lock"
    give_up = time.monotonic() + timeout_seconds
    verified, damaged, said = not cache.verify, False, False
    while True:
        lock = None if damaged else _try_lock(lock_path, fcntl.LOCK_SH)
        if lock is not None:
            with _closing_on_error(lock):
                if _is_whole(path, source.size_bytes):
                    if verified or _has_checksum(path, source):
                        return lock
                    log.warning("%s is damaged in the cache, fetching it again", source)
                    damaged = True
            os.close(lock)
        lock = _try_lock(lock_path, fcntl.LOCK_EX)
        if lock is not None:
            try:
                if damaged or not _is_whole(path, source.size_bytes):
                    _fetch_into(cache, source, key, fill)
                    verified, damaged = True, False
            finally:
                # Not turned into a shared lock: flock() does that by letting go first anyway.
                os.close(lock)
            continue
        if not said:
            log.info("%s: waiting for another task that fetches it", source)
            said = True
        if time.monotonic() > give_up:
            raise BuilderFault(
                f"{source}: another process has not fetched it within {timeout_seconds:g} s",
                f"see which one holds {lock_path}; total_timeout in the configuration's [download]"
                " allows more",
            )
        time.sleep(_WAIT_SECONDS)


def _fetch_into(cache: Cache, source: Image, key: str, fill: Fill) -> None:
    """Fill a temporary file and give it its name; the caller has the exclusive lock."""
    path = cache.directory / key
    part = cache.directory / f"{key}.{source.size_bytes}.part"
    if path.exists():
        log.warning("%s in the cache is not what it should be: dropped", source)
        path.unlink()
    _make_room(cache, source, key, part)
    try:
        with part.open("r+b") as file:
            fill(file)
            file.flush()
            os.fchmod(file.fileno(), 0o444)  # qemu may run as another user
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    directory = os.open(cache.directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class _Entry(NamedTuple):
    used: float
    path: Path
    size_bytes: int
    disk_bytes: int


def _make_room(cache: Cache, source: Image, key: str, part: Path) -> None:
    """Sweep what dead processes left, evict what was not used longest, reserve with an empty part.

    Nothing is evicted when even that would not be enough.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, _lock(cache.directory / "lock"))
        entries, reserved, pending = _survey(cache.directory, key)
        filesystem = os.statvfs(cache.directory)
        free = filesystem.f_bavail * filesystem.f_frsize
        size = source.size_bytes
        too_much = sum(one.size_bytes for one in entries) + reserved + size - cache.max_bytes
        too_little = cache.keep_free_bytes + pending + size - free

        victims: list[_Entry] = []
        for entry in sorted(entries):
            if too_much <= 0 and too_little <= 0:
                break
            lock = _try_lock(_lock_path(entry.path), fcntl.LOCK_EX)
            if lock is not None:
                stack.callback(os.close, lock)
                victims.append(entry)
                too_much -= entry.size_bytes
                too_little -= entry.disk_bytes
        if too_much > 0:
            raise BuilderFault(
                f"{source} ({format_size(size)}) does not fit into the image cache of"
                f" {format_size(cache.max_bytes)}, whose other images are in use"
                if reserved or len(victims) < len(entries)
                else f"{source} ({format_size(size)}) does not fit into the image cache of"
                f" {format_size(cache.max_bytes)}",
                "raise max_size in the configuration's [cache]",
            )
        if too_little > 0:
            raise BuilderFault(
                f"no room for {source}: {format_size(size)} and {format_size(too_little)} more"
                f" than there is once {format_size(cache.keep_free_bytes)} are kept free",
                f"free some space on the file system of {cache.directory}",
            )
        for entry in victims:
            log.info("cache: dropping %s (%s)", entry.path.name, format_size(entry.size_bytes))
            entry.path.unlink()
            _lock_path(entry.path).unlink(missing_ok=True)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _survey(directory: Path, own_key: str) -> tuple[list[_Entry], int, int]:
    """Images; bytes that fetches under way reserved, and how many of these are still to come.

    Removes parts and lock files that belong to nobody. Under the cache's lock.
    """
    entries, reserved, pending = [], 0, 0
    names = sorted(os.listdir(directory))  # noqa: PTH208 - names are all that is wanted
    for name in names:
        path = directory / name
        match = _PART_NAME.fullmatch(name)
        try:
            status = path.lstat()
            if match and (match["key"] == own_key or _is_free(directory / f"{match['key']}.lock")):
                log.info("cache: sweeping %s, whose process is gone", name)
                path.unlink()
            elif match:
                reserved += int(match["size"])
                pending += max(0, int(match["size"]) - status.st_blocks * 512)
            elif _ENTRY_NAME.fullmatch(name):
                entries.append(
                    _Entry(_last_used(path), path, status.st_size, status.st_blocks * 512)
                )
            elif name.endswith(".lock") and name[: -len(".lock")] not in names:
                _remove_lock(path)
        except FileNotFoundError:
            # A fetch ended while we looked, most likely well.
            reserved += int(match["size"]) if match else 0
    return entries, reserved, pending


def _last_used(path: Path) -> float:
    try:
        return _lock_path(path).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _is_free(lock_path: Path) -> bool:
    lock = _try_lock(lock_path, fcntl.LOCK_EX)
    if lock is not None:
        os.close(lock)
    return lock is not None


def _remove_lock(lock_path: Path) -> None:
    lock = _try_lock(lock_path, fcntl.LOCK_EX)
    if lock is not None:
        try:
            # Its image may have come since the names were listed.
            if not lock_path.with_suffix("").exists():
                lock_path.unlink(missing_ok=True)
        finally:
            os.close(lock)


def _try_lock(path: Path, operation: int) -> int | None:
    """A descriptor that holds the lock, or None when others hold it.

    Lock files get removed, by who has them locked; so the one that was locked
    must still be the one that has the name.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with _closing_on_error(lock):
            try:
                fcntl.flock(lock, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                return None
            if _has_name(lock, path):
                return lock
        os.close(lock)


def _lock(path: Path) -> int:
    """Wait for the lock of the cache, which nobody holds for long or removes."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with _closing_on_error(lock):
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@contextlib.contextmanager
def _closing_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


def _has_name(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _is_whole(path: Path, size_bytes: int) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size_bytes


def _has_checksum(path: Path, source: Image) -> bool:
    digest = hashlib.new(source.checksum_name, usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == source.checksum


def _cache_fault(directory: Path, error: OSError) -> BuilderFault:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BuilderFault(
            f"no space left for fetched images in {directory}",
            "free some; keep_free and max_size in the configuration's [cache] prevent it",
        )
    return BuilderFault(
        f"the image cache {directory} cannot be used: {error.strerror or error}",
        "check the directory; cache_dir in the configuration names another one",
    )
