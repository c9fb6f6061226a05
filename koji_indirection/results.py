"""Read results and logs out of the disks that a guest has written.

Everything happens through the appliance: the host never parses those file
systems. Names, sizes, links and contents are the guest's word, so each is
checked, bounded, and refused with a sentence.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import posixpath
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .appliance import Appliance, ApplianceError, OutOfTime
from .errors import BuilderFault, BuildFailed, IndirectionError
from .guestlog import printable
from .imagefile import sha256
from .units import format_size

log = logging.getLogger(__name__)

_MAX_LINKS = 40  # as the kernel's own limit on symbolic links in a path
_LISTED_NAMES = 20
_FULL_BELOW_BYTES = 64 * 1024
_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+~@=,-]{0,199}")
_LOGS_NUMBER = 200  # of all patterns together, those that cannot be had included; and their size
_LOGS_TOTAL_BYTES = 1024**3
RESERVED_NAMES = ("logs", "manifest.json")
PARTIAL = ".partial"  # in the output directory, while results are copied

# ECMA-119: sector 16 starts the volume descriptors; type 1 is the primary one.
_ISO_DESCRIPTOR_OFFSET = 16 * 2048


@dataclass(frozen=True)
class ResultLimits:
    """Bounds on what is collected: number of results, bytes of all results together."""

    number: int
    total_bytes: int


@dataclass(frozen=True)
class Result:
    """One collected file.

    path -- on the host; guest_path -- in the workspace.
    """

    path: Path
    guest_path: str
    size_bytes: int
    sha256: str


def collect(
    appliance: Appliance, patterns: Sequence[str], *, output: Path, limits: ResultLimits
) -> list[Result]:
    """Copy what the patterns name from the workspace, mounted at /, into the output directory.

    Every pattern must match at least one regular, non-empty file. Nothing is
    left in the output directory when one of them fails. Raises BuildFailed
    for what the guest did wrong, BuilderFault when the host's disk is full.
    """
    found = _find_all(appliance, patterns, limits)
    partial = output / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        results = []
        for guest_path, size_bytes in found.items():
            name = posixpath.basename(guest_path)
            copy = partial / name
            _download(appliance, guest_path, copy, size_bytes)
            _check_iso(copy, guest_path)
            results.append(Result(output / name, guest_path, size_bytes, sha256(copy)))
            log.info("result %s: %d bytes, sha256 %s", name, size_bytes, results[-1].sha256)
        for result in results:
            (partial / result.path.name).replace(result.path)
    finally:
        shutil.rmtree(partial)
    return results


def collect_logs(
    appliance: Appliance, patterns: Sequence[str], *, where: str, output: Path, limit_bytes: int
) -> set[str]:
    """Copy the log files that the patterns name, as far as they are there.

    Fails no build, unless there is no time left for it (OutOfTime).
    where -- "workspace" or "root": which file system is mounted at /, for the log.
    Returns the patterns that matched. A log longer than the limit loses its middle.
    """
    matched: set[str] = set()
    left_bytes, left_number = _LOGS_TOTAL_BYTES, _LOGS_NUMBER

    def warn(error: IndirectionError) -> None:
        log.warning("log %s in the %s cannot be collected: %s", pattern, where, error.message)

    for pattern in patterns:
        try:
            guest_paths = _expand(appliance, pattern)
        except OutOfTime:
            raise
        except BuildFailed as error:
            warn(error)
            continue
        for guest_path in guest_paths:
            if left_number <= 0 or left_bytes <= 0:
                log.warning(
                    "log %s: the rest is left out, because at most %d files and %s of logs are"
                    " collected: name fewer with --collect-log",
                    pattern,
                    _LOGS_NUMBER,
                    format_size(_LOGS_TOTAL_BYTES),
                )
                return matched
            left_number -= 1
            try:
                left_bytes -= _collect_log(appliance, guest_path, output, limit_bytes)
                matched.add(pattern)
            except OutOfTime:
                raise
            except (ApplianceError, BuildFailed) as error:
                warn(error)
            except OSError as error:
                log.warning("log %s cannot be written: %s", pattern, error.strerror)
    return matched


@contextlib.contextmanager
def mounted(appliance: Appliance, device: str, *, what: str) -> Iterator[None]:
    """Mount a file system that the guest has written, read-only, at the appliance's /."""
    try:
        appliance.call("mount_ro", device, "/")
    except ApplianceError as error:
        raise BuildFailed(
            f"the guest left the {what} unreadable: {printable(error.reason, 300)}",
            "the commands must leave a clean file system on it",
        ) from error
    yield
    appliance.call("umount_all")


def _find_all(
    appliance: Appliance, patterns: Sequence[str], limits: ResultLimits
) -> dict[str, int]:
    """The files to collect, by their real path in the workspace, with their sizes."""
    found: dict[str, int] = {}
    names: dict[str, str] = {}
    for pattern in patterns:
        matches = _expand(appliance, pattern)
        if not matches:
            raise BuildFailed(
                f"the result {pattern} is missing; {_what_is_there(appliance, pattern)}",
                "see logs/job.log; --results names another path, --collect-log keeps a tool's log",
            )
        for guest_path in matches:
            size_bytes = _regular_file_size(appliance, guest_path)
            name = posixpath.basename(guest_path)
            if not _NAME.fullmatch(name) or name in RESERVED_NAMES:
                raise BuildFailed(
                    f"the result {_shown(guest_path)!r} has a name that cannot be used",
                    "use letters, digits and ._+~@=,- in names of results",
                )
            if names.setdefault(name, guest_path) != guest_path:
                raise BuildFailed(
                    f"two results are called {name}:"
                    f" {_shown(names[name])} and {_shown(guest_path)}",
                    "give results different names",
                )
            found[guest_path] = size_bytes
            if len(found) > limits.number:
                raise BuildFailed(
                    f"there are more results than the limit of {limits.number}",
                    "--max-results (max_results on a builder) allows more",
                )
            if sum(found.values()) > limits.total_bytes:
                raise BuildFailed(
                    f"the results are larger than the limit of {limits.total_bytes} bytes:"
                    f" {_shown(guest_path)} has {size_bytes}",
                    "--max-result-size (max_result_size on a builder) allows more",
                )
    return found


def _expand(appliance: Appliance, pattern: str) -> list[str]:
    """The paths that a pattern matches; a path without wildcards matches itself, if it exists."""
    if any(character in pattern for character in "*?["):
        try:
            return sorted(appliance.call("glob_expand", pattern, directoryslash=False))
        except ApplianceError as error:
            raise BuildFailed(
                f"the files that match {pattern} cannot be listed: {printable(error.reason, 200)}",
                "give results names in UTF-8, and fewer than some ten thousand of them",
            ) from error
    try:
        appliance.call("lstatns", pattern)
    except ApplianceError:
        return []
    return [pattern]


def _regular_file_size(appliance: Appliance, guest_path: str) -> int:
    status = appliance.call("lstatns", _resolve(appliance, guest_path))
    if not stat.S_ISREG(status["st_mode"]):
        raise BuildFailed(
            f"the result {_shown(guest_path)} is {_kind(status['st_mode'])}, not a regular file",
            "a result must be a file; --results takes globs such as /results/images/*",
        )
    size_bytes = int(status["st_size"])
    if size_bytes == 0:
        raise BuildFailed(
            f"the result {_shown(guest_path)} is empty", "see logs/job.log for the reason"
        )
    return size_bytes


def _resolve(appliance: Appliance, guest_path: str) -> str:
    """Follow symbolic links as long as they stay in the workspace.

    An absolute link means the guest's root, not the workspace: it leads out,
    and so does one that climbs above the workspace's top.
    """
    pending = [part for part in guest_path.split("/") if part]
    resolved: list[str] = []
    links = 0
    while pending:
        part = pending.pop(0)
        if part == ".":
            continue
        if part == "..":
            if not resolved:
                raise _leads_out(guest_path, "..")
            resolved.pop()
            continue
        here = "/" + "/".join([*resolved, part])
        if not appliance.call("is_symlink", here):
            resolved.append(part)
            continue
        links += 1
        target: str = appliance.call("readlink", here)
        if target.startswith("/") or links > _MAX_LINKS:
            raise _leads_out(guest_path, target)
        pending = [piece for piece in target.split("/") if piece] + pending
    path = "/" + "/".join(resolved)
    if not appliance.call("exists", path):
        raise BuildFailed(
            f"the result {_shown(guest_path)} is a symbolic link to a file"
            " that does not exist in the workspace",
            "write the file itself",
        )
    return path


def _leads_out(guest_path: str, target: str) -> BuildFailed:
    return BuildFailed(
        f"the result {_shown(guest_path)} is a symbolic link out of the workspace"
        f" (to {printable(target, 100)}), which is not followed",
        "write the file itself into the workspace",
    )


def _download(appliance: Appliance, guest_path: str, target: Path, size_bytes: int) -> None:
    try:
        appliance.download(_resolve(appliance, guest_path), target, limit_bytes=size_bytes)
    except ApplianceError as error:
        # libguestfs's own words for a full disk depend on who noticed it first.
        full = shutil.disk_usage(target.parent).free < _FULL_BELOW_BYTES
        if full or os.strerror(errno.ENOSPC) in error.reason:
            raise BuilderFault(
                f"no space left in {target.parent.parent} for the result {target.name}"
                f" of {size_bytes} bytes",
                "free some space or name another directory with --output",
            ) from error
        raise
    written = target.stat().st_size
    if written != size_bytes:
        raise BuildFailed(
            f"the result {_shown(guest_path)} has {written} bytes, not the {size_bytes}"
            " that its file system states",
            "the workspace's file system is damaged",
        )


def _check_iso(path: Path, guest_path: str) -> None:
    """An ISO must hold all that its volume descriptor says: a full disk leaves a truncated one."""
    with path.open("rb") as file:
        file.seek(_ISO_DESCRIPTOR_OFFSET)
        descriptor = file.read(2048)
    if descriptor[:6] != b"\x01CD001":
        return
    # ECMA-119 8.4.8 and 8.4.12: volume space size, logical block size, little-endian first.
    blocks = int.from_bytes(descriptor[80:84], "little")
    block_bytes = int.from_bytes(descriptor[128:130], "little")
    if blocks * block_bytes > path.stat().st_size:
        raise BuildFailed(
            f"the result {_shown(guest_path)} is truncated: its ISO volume has"
            f" {blocks * block_bytes} bytes, the file {path.stat().st_size}",
            "the workspace was probably full: --workspace-size makes it larger",
        )


def _what_is_there(appliance: Appliance, pattern: str) -> str:
    """A sentence that lists the nearest directory that exists on the way to a missing result."""
    directory = posixpath.dirname(pattern.split("*")[0].split("?")[0].split("[")[0])
    while True:
        try:
            names, complete = appliance.names(directory)
            break
        except ApplianceError as error:
            if directory == "/":
                return f"the workspace cannot be listed: {printable(error.reason, 200)}"
            directory = posixpath.dirname(directory)
    shown = ", ".join(printable(name, 100) for name in sorted(names)[:_LISTED_NAMES])
    more = f" and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
    more = more if complete else " and thousands more"
    return f"{directory} holds {shown or 'nothing'}{more}"


def _collect_log(appliance: Appliance, guest_path: str, output: Path, limit_bytes: int) -> int:
    """Copy one log; returns the bytes it takes."""
    path = _resolve(appliance, guest_path)
    status = appliance.call("lstatns", path)
    if not stat.S_ISREG(status["st_mode"]):
        raise BuildFailed(f"{_shown(guest_path)} is {_kind(status['st_mode'])}")
    target = _free_name(output, posixpath.basename(guest_path))
    size_bytes = int(status["st_size"])
    if size_bytes <= limit_bytes:
        appliance.download(path, target, limit_bytes=limit_bytes)
    else:
        _download_ends(appliance, path, target, size_bytes, limit_bytes)
    log.info("log %s: %d bytes", target.name, size_bytes)
    return target.stat().st_size


def _download_ends(
    appliance: Appliance, path: str, target: Path, size_bytes: int, limit_bytes: int
) -> None:
    half = limit_bytes // 2
    piece = target.with_name(target.name + ".part")
    try:
        with target.open("wb") as whole:
            for offset in (0, size_bytes - half):
                appliance.call("download_offset", path, str(piece), offset, half)
                if offset:
                    left_out = size_bytes - 2 * half
                    mark = (
                        f"\n[... {left_out} bytes left out here: the log is limited to"
                        f" {limit_bytes} bytes, see --max-log-size (max_log_size on a"
                        " builder) ...]\n"
                    )
                    whole.write(mark.encode())
                whole.write(piece.read_bytes())
    finally:
        piece.unlink(missing_ok=True)


def _free_name(output: Path, name: str) -> Path:
    """A name ending in .log that nothing in the directory has yet."""
    safe = re.sub(r"[^A-Za-z0-9._+-]", "_", name).lstrip(".-")[:150] or "unnamed"
    stem = safe[: -len(".log")] if safe.endswith(".log") else safe
    candidate, number = output / f"{stem}.log", 1
    while candidate.exists():
        number += 1
        candidate = output / f"{stem}-{number}.log"
    return candidate


def _shown(guest_path: str) -> str:
    return printable(guest_path, 200)


def _kind(mode: int) -> str:
    kinds: dict[str, Any] = {
        "a directory": stat.S_ISDIR,
        "a symbolic link": stat.S_ISLNK,
        "a device": lambda m: stat.S_ISBLK(m) or stat.S_ISCHR(m),
        "a pipe or socket": lambda m: stat.S_ISFIFO(m) or stat.S_ISSOCK(m),
    }
    return next((kind for kind, test in kinds.items() if test(mode)), "of an unknown kind")
