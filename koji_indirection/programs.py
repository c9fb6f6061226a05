"""The one place that runs external programs (qemu-img, mke2fs, debugfs, ...).

Never through a shell, always with a deadline; no child outlives the call,
however it is left. A failure carries a command line that can be pasted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .errors import BuilderFault

log = logging.getLogger(__name__)

_STDERR_BYTES = 64 * 1024  # its last part; a 5 MB qcow2 makes `qemu-img check` write gigabytes
_STDOUT_BYTES = 16 * 1024 * 1024  # all of it, or the program is killed; debugfs writes 1 MB


@dataclass(frozen=True)
class Limits:
    """What a program may use; for programs that read files which somebody else made."""

    address_space_bytes: int = 2 * 1024**3
    cpu_seconds: int = 60


class ProgramFailed(BuilderFault):
    """A program exited non-zero, or was killed at its deadline.

    returncode -- exit status, negative for a signal, None when the deadline passed.
    stderr -- what it said, at most the last 2,000 characters.
    """

    def __init__(
        self, argv: Sequence[str], returncode: int | None, stderr: str, timeout_seconds: float
    ) -> None:
        self.argv = list(argv)
        self.returncode = returncode
        self.stderr = stderr.strip()[-2000:]
        if returncode is None:
            what = f"did not end within {timeout_seconds:g} s"
        elif returncode < 0:
            what = f"was killed by signal {-returncode}"
        else:
            what = f"exited with status {returncode}"
        detail = f": {self.stderr}" if self.stderr else ""
        super().__init__(f"{argv[0]} {what}{detail}", f"the command was: {shlex.join(argv)}")


def run(
    argv: Sequence[str],
    *,
    timeout_seconds: float,
    input_text: str | None = None,
    env: Mapping[str, str] | None = None,
    limits: Limits | None = None,
) -> str:
    """Run a program to its end and return what it wrote to standard output.

    env -- added to the inherited environment, which is pinned to the C locale.
    limits -- resource limits of the program.

    Raises ProgramFailed for a non-zero exit, a passed deadline or endless output, and
    BuilderFault when the program is not installed. The program runs in a
    session of its own, so that a terminal's Ctrl-C reaches it only through us;
    at the deadline, or when we are interrupted, its process group is killed.
    """

    log.debug("run: %s", shlex.join(argv))
    try:
        child = _start(
            argv,
            stdin=subprocess.PIPE if input_text is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise BuilderFault(
            f"{argv[0]} is not installed",
            "install it; `koji-indirection doctor` lists what is missing",
        ) from error
    try:  # from the first moment on: an interrupt may come in any line
        if limits is not None:
            _set_limits(child.pid, limits)
        assert child.stderr is not None
        assert child.stdout is not None
        complaints = _Tail(child.stderr)
        answer = _Head(child.stdout, full=lambda: _kill(child))
        child.stdout = child.stderr = None  # communicate() would keep all of it in memory
        data = None if input_text is None else input_text.encode()
        child.communicate(data, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        _kill(child)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)  # it may hang in the kernel
        raise ProgramFailed(argv, None, complaints.text(), timeout_seconds) from None
    except BaseException:
        _kill(child)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)
        raise
    stdout = answer.text()
    said = complaints.text()
    if answer.is_cut:
        said = f"it wrote more than {_STDOUT_BYTES // 1024**2} MiB"
        raise ProgramFailed(argv, -signal.SIGKILL, said, timeout_seconds)
    if child.returncode != 0:
        raise ProgramFailed(argv, child.returncode, said, timeout_seconds)
    return stdout


def _start(argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Popen, in a thread: an interrupt, which only the main one gets, loses no child."""
    started: Future[subprocess.Popen[bytes]] = Future()

    def start() -> None:
        try:
            started.set_result(subprocess.Popen(argv, **options))
        except BaseException as error:  # noqa: BLE001 - it is raised below
            started.set_exception(error)

    threading.Thread(target=start, name="start a program").start()
    try:
        return started.result()
    except (KeyboardInterrupt, SystemExit):
        _kill(started.result())
        raise


def _set_limits(pid: int, limits: Limits) -> None:
    # From outside: code between fork and exec is not safe in a process with threads.
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_AS, (limits.address_space_bytes,) * 2)
        resource.prlimit(pid, resource.RLIMIT_CPU, (limits.cpu_seconds,) * 2)
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


class _Head:
    """Reads a pipe to its end in a thread, and keeps it all, as long as that is not too much."""

    def __init__(self, pipe: IO[bytes], *, full: Callable[[], None]) -> None:
        self.is_cut = False
        self._pipe = pipe
        self._full = full
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._pipe:
            while piece := os.read(self._pipe.fileno(), 65536):
                self._kept += piece
                if len(self._kept) > _STDOUT_BYTES:
                    self.is_cut = True
                    self._full()
                    return

    def text(self) -> str:
        """What was written, once the program has ended."""
        self._thread.join(timeout=1)  # a daemon that it left behind may hold the pipe
        return self._kept.decode(errors="replace")


class _Tail:
    """Reads a pipe to its end in a thread, and keeps the last part."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._kept = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._pipe:
            while piece := os.read(self._pipe.fileno(), _STDERR_BYTES):
                self._kept = (self._kept + piece)[-_STDERR_BYTES:]

    def text(self) -> str:
        """The last part, once the program has ended."""
        self._thread.join(timeout=1)  # a daemon that it left behind may hold the pipe
        return self._kept.decode(errors="replace")


def _kill(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def kill_descendants() -> None:
    """SIGKILL all that this process has started, and what that has started: not by run()."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    pids = list(children.get(os.getpid(), ()))
    for pid in pids:
        pids.extend(children.get(pid, ()))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
