"""The private directory of one build, gone with everything in it however the build ends.

A watchdog process holds a pipe to the build. When the build dies without
saying that it is done (SIGKILL, a crash), the watchdog kills the qemu and
libguestfs processes that name the directory on their command lines, and
removes it. What even a watchdog has not survived (a reboot), sweep() removes later.
Nothing here may touch a process or a directory of another build that lives, or of another user.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import appliancesockets
from .errors import BuilderFault

PREFIX = "koji-indirection-"
RUN_PARENT = Path("/tmp")  # noqa: S108 - short; a random name below it
_RUN_PREFIX = "ki-"
_NAME = re.compile(rf"({PREFIX}|{_RUN_PREFIX})[0-9a-f]{{12}}")
_DONE = b"done\n"
_WATCHDOG_SECONDS = 30
# Besides qemu's own and the appliance: what the rooms run on files of the job directory.
_PROGRAMS = (b"mke2fs", b"debugfs", b"mkfs.xfs", b"xfs_db", b"cp", b"git")


@dataclass(frozen=True)
class JobDirectory:
    """Where one build keeps its files.

    path -- disks and temporary files; on the work area, which must have room for them.
    run -- sockets only; short, because a Unix socket's path ends at 107 bytes.
    """

    path: Path
    run: Path


@contextlib.contextmanager
def job_directory(
    work_dir: Path, run_parent: Path = RUN_PARENT, *, also_removed: Sequence[Path] = ()
) -> Iterator[JobDirectory]:
    """Make the directories of one build, guard them, and remove them at the end.

    Both get mode 0711: libvirt may run qemu as another user, who must reach the
    disks by their names and must not list them; the names cannot be guessed.
    also_removed -- directories that the build may make elsewhere, and remove itself
        unless it is killed.
    Raises BuilderFault when work_dir, or run_parent for the sockets, cannot be written.
    """
    path = _unused_name(work_dir, PREFIX)
    run = _unused_name(run_parent, _RUN_PREFIX)
    # Before there is anything to remove: no moment is left in which a signal leaves something.
    watchdog = _Watchdog(path, run, *also_removed)
    try:
        with contextlib.ExitStack() as locks:
            _make_directory(path, "name another one with --work-dir")
            locks.callback(os.close, lock(path))
            _make_directory(run, "it must be writable, for sockets")
            locks.callback(os.close, lock(run))
            yield JobDirectory(path, run)
    finally:
        # The watchdog goes last: an interrupt in these lines leaves the rest to it.
        kill_processes_of([path, run])
        remove(path)
        remove(run)
        watchdog.dismiss()


def _unused_name(parent: Path, prefix: str) -> Path:
    return parent.absolute() / f"{prefix}{secrets.token_hex(6)}"


def _make_directory(path: Path, hint: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
        path.chmod(0o711)  # whatever the umask is
    except OSError as error:
        raise BuilderFault(
            f"the work directory {path.parent} cannot be written: {error.strerror}", hint
        ) from error


def python_environment() -> dict[str, str]:
    """The environment in which `python -m koji_indirection.X` finds this very library."""
    package_parent = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": f"{package_parent}{os.pathsep}{inherited}" if inherited else package_parent,
    }


def remove(path: Path) -> None:
    """Remove a directory tree; what is gone already is no error."""
    shutil.rmtree(path, ignore_errors=True)


def kill_processes_of(names: Sequence[Path | str]) -> None:
    """SIGKILL every program of a build whose command line has one of the names in it.

    With what libguestfs leaves elsewhere when it is killed.
    names -- directories of the build, or the name of its VM.
    """
    needles = [os.fsencode(name) for name in names]
    sockets: set[Path] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it ended while we looked
        program = os.path.basename(arguments.split(b"\0", 1)[0])  # noqa: PTH119 - bytes
        ours = (
            program.startswith(b"qemu")
            or program in _PROGRAMS
            or b"koji_indirection.appliance" in arguments
        )
        if ours and any(needle in arguments for needle in needles):
            sockets |= appliancesockets.of_process(int(entry.name))
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(entry.name), signal.SIGKILL)
    appliancesockets.remove(sockets)


# --- what dead builds have left ---------------------------------------------------------------


def lock(directory: Path) -> int:
    """Mark a directory as in use for as long as this process keeps the descriptor open."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def is_dead(directory: Path) -> bool:
    """Whether whoever made a directory, with lock(), is gone; False for another user's.

    A watchdog is asked too: it is there before the directory has its lock, and while it is, what
    is left is its business.
    """
    if _is_watched(directory):
        return False
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def sweep(parents: Sequence[Path]) -> list[Path]:
    """Remove the directories that dead builds have left in these; returns what was removed."""
    removed = []
    for parent in parents:
        for path in sorted(parent.glob(f"{PREFIX}*")) + sorted(parent.glob(f"{_RUN_PREFIX}*")):
            if _NAME.fullmatch(path.name) and path.is_dir() and remove_if_dead(path):
                removed.append(path)
    return removed


def remove_if_dead(directory: Path) -> bool:
    """And what still runs on files below it."""
    if not is_dead(directory):
        return False
    kill_processes_of([directory])
    remove(directory)
    return True


def _is_watched(directory: Path) -> bool:
    """Whether a watchdog guards this directory, or one below it."""
    needle = os.fsencode(directory)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                arguments = (entry / "cmdline").read_bytes()
                if b"koji_indirection.jobdir" in arguments and needle in arguments:
                    return True
    return False


# --- the watchdog -----------------------------------------------------------------------------


class _Watchdog:
    """A process that waits for ours to end, and cleans up when it ends without a word.

    It is nobody's child: kojid ends a task by signalling all its descendants, the deepest
    first, and waits seconds for each that does not go.
    """

    def __init__(self, *directories: Path) -> None:
        starter = subprocess.Popen(
            [sys.executable, "-m", "koji_indirection.jobdir", *map(str, directories)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=python_environment(),
            cwd="/",
            start_new_session=True,  # no terminal's Ctrl-C or killed process group reaches it
        )
        assert starter.stdin is not None
        assert starter.stdout is not None
        self._orders, self._life = starter.stdin, starter.stdout
        try:
            starter.wait(_WATCHDOG_SECONDS)
        except subprocess.TimeoutExpired:
            starter.kill()
            raise BuilderFault(
                f"a Python process did not start within {_WATCHDOG_SECONDS} s",
                "the machine has too much to do, or too little memory",
            ) from None

    def dismiss(self) -> None:
        """There is nothing left to clean up; returns when the process has ended."""
        with contextlib.suppress(BrokenPipeError):
            self._orders.write(_DONE)
            self._orders.close()
        select.select([self._life], [], [], _WATCHDOG_SECONDS)  # its end closes this pipe
        self._life.close()


def _watch(directories: list[Path]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    if sys.stdin.buffer.read() == _DONE:
        return
    # A qemu that was being started may show up a moment later, so look more than once.
    for _ in range(5):
        kill_processes_of(directories)
        time.sleep(0.3)
    for directory in directories:
        remove(directory)


if __name__ == "__main__":
    _watch([Path(argument) for argument in sys.argv[1:]])
