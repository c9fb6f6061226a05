"""The directories for sockets that libguestfs makes in /tmp, and leaves there when it is killed.

Root's are in /tmp whatever libguestfs is told, so that no directory of a build holds them: they
are found by the processes that use them. Only a directory that libguestfs has named, that is this
user's own and holds nothing but sockets is ever removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable
from pathlib import Path

_NAME = r"libguestfs[A-Za-z0-9]{6}"
_ON_COMMAND_LINE = re.compile(rb"(?:^|[=,\0])(/[^=,\0]*/" + _NAME.encode() + rb")/")
_OF_SOCKET = re.compile(rf"(/.*/{_NAME})/[^/]+")
_FILES = re.compile(r"[a-z]+\.(sock|pid)")
_EMPTY_FOR_SECONDS = 60  # one that was made a moment ago gets its socket in the next


def of_process(pid: int) -> set[Path]:
    """Those that a process of this user has sockets in, or is told of on its command line."""
    process = Path("/proc") / str(pid)
    found: set[Path] = set()
    with contextlib.suppress(OSError):  # it has ended
        if process.stat().st_uid != os.geteuid():
            return found
        found = _named_by(process)
        open_files = {str(link.readlink()) for link in (process / "fd").iterdir()}
        found |= {path for inode, path in _bound() if f"socket:[{inode}]" in open_files}
    return found


def of_group(group: int) -> set[Path]:
    """Those of all processes of a process group."""
    found: set[Path] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(int(entry.name)) == group:
                    found |= of_process(int(entry.name))
    return found


def remove(directories: Iterable[Path]) -> None:
    """Remove them, as far as they are what they are taken for; what is gone is no error."""
    for directory in directories:
        with contextlib.suppress(OSError):
            _remove(directory)


def sweep(parents: Iterable[Path]) -> list[Path]:
    """Remove those in these directories that no process has a socket in any more; returns them.

    Nor one that a process is told of: sockets in another network namespace are not to be seen.
    """
    # Before the processes are looked at: whose socket is here by now is among those.
    found = [path for parent in parents for path in sorted(parent.glob("libguestfs*"))]
    made = [path for path in found if not _is_being_made(path)]
    alive = {path for _, path in _bound()}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                alive |= _named_by(entry)
    removed = []
    for path in made:
        with contextlib.suppress(OSError):
            if path not in alive and _remove(path):
                removed.append(path)
    return removed


def _is_being_made(directory: Path) -> bool:
    try:
        young = time.time() - directory.lstat().st_mtime < _EMPTY_FOR_SECONDS
        return young and not any(directory.iterdir())
    except OSError:
        return True


def _remove(directory: Path) -> bool:
    status = directory.lstat()
    if (
        not re.fullmatch(_NAME, directory.name)
        or not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.geteuid()
    ):
        return False
    files = list(directory.iterdir())
    if not all(_FILES.fullmatch(file.name) for file in files):
        return False
    for file in files:
        file.unlink(missing_ok=True)
    directory.rmdir()
    return True


def _named_by(process: Path) -> set[Path]:
    """Those on the command line of this process in /proc."""
    arguments = (process / "cmdline").read_bytes()
    return {Path(os.fsdecode(name)) for name in _ON_COMMAND_LINE.findall(arguments)}


def _bound() -> list[tuple[str, Path]]:
    """Inode and directory of each socket that is in such a directory."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/unix").read_text(errors="replace").splitlines():
            fields = line.split(maxsplit=7)
            match = _OF_SOCKET.fullmatch(fields[7]) if len(fields) == 8 else None
            if match is not None:
                found.append((fields[6], Path(match.group(1))))
    return found
