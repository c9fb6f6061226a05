"""The private directory of one build, gone with everything in it however the build ends.

A watchdog process holds a pipe to the build. When the build dies without
saying that it is done (SIGKILL, a crash), the watchdog kills the qemu and
libguestfs processes that name the directory on their command lines, and
removes it. It must never touch a process or a directory that is not this build's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import BuilderFault

PREFIX = "koji-indirection-"
_RUN_PARENT = Path("/tmp")  # noqa: S108 - short; mkdtemp below it
_DONE = b"done\n"


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
    work_dir: Path, run_parent: Path = _RUN_PARENT, *, also_removed: Sequence[Path] = ()
) -> Iterator[JobDirectory]:
    """Make the directories of one build, guard them, and remove them at the end.

    Both get mode 0711: libvirt may run qemu as another user, who must reach the
    disks by their names and must not list them; mkdtemp's name is not guessable.
    also_removed -- directories that the build may make elsewhere, and remove itself
        unless it is killed.
    Raises BuilderFault when work_dir, or run_parent for the sockets, cannot be written.
    """
    path = _new_directory(work_dir, PREFIX, "name another one with --work-dir")
    try:
        run = _new_directory(run_parent, "ki-", "it must be writable, for sockets")
    except BuilderFault:
        remove(path)
        raise
    watchdog = _start_watchdog(path, run, *also_removed)
    try:
        yield JobDirectory(path, run)
    finally:
        # The watchdog goes last: an interrupt in these lines leaves the rest to it.
        remove(path)
        remove(run)
        assert watchdog.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            watchdog.stdin.write(_DONE)
            watchdog.stdin.close()
        watchdog.wait()


def _new_directory(parent: Path, prefix: str, hint: str) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).resolve()
        path.chmod(0o711)
    except OSError as error:
        raise BuilderFault(
            f"the work directory {parent} cannot be written: {error.strerror}", hint
        ) from error
    return path


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


def kill_processes_of(directories: list[Path]) -> None:
    """SIGKILL every qemu or libguestfs helper whose command line names one of the directories."""
    needles = [os.fsencode(directory) for directory in directories]
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it ended while we looked
        program = arguments.split(b"\0", 1)[0]
        ours = b"qemu" in program or b"koji_indirection.appliance" in arguments
        if ours and any(needle in arguments for needle in needles):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(entry.name), signal.SIGKILL)


def _start_watchdog(*directories: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "koji_indirection.jobdir", *map(str, directories)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=python_environment(),
        cwd="/",
        start_new_session=True,  # a terminal's Ctrl-C and a killed process group do not reach it
    )


def _watch(directories: list[Path]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
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
