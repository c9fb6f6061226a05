"""The processes of one test Koji: started apart, marked, and all gone in the end.

Each runs in a session of its own, so a terminal's Ctrl-C reaches it only through
us, and carries a mark in its environment that its descendants inherit. A keeper
process holds a pipe from the test process: when the pipe closes, for whatever
reason, SIGKILL of pytest included, the keeper kills all that is marked and
removes the work directory.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "KOJI_TEST_RUN"
ROLE = "KOJI_TEST_ROLE"
SWEEP_SECONDS = 20

# What is started sees signals as a service does: nothing ignored, whatever pytest's shell did.
_AS_A_SERVICE = ("env", "--default-signal")


class StartFailed(Exception):
    """A process of the test Koji did not come up; the message has the end of its log."""


class Processes:
    """Starts processes below one work directory, each with a log of its own."""

    def __init__(self, work: Path, logs: Path) -> None:
        self.work = work
        self.logs = logs
        self._started: list[subprocess.Popen[bytes]] = []

    def environment(self, role: str, extra: Mapping[str, str]) -> dict[str, str]:
        """The caller's, without what would lead a process to another database or Koji."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PG", "KOJI_", "PYTHON"))
        }
        home = str(self.work / "home")
        return {**kept, "HOME": home, MARK: str(self.work), ROLE: role, **extra}

    def start(
        self,
        role: str,
        argv: Sequence[object],
        *,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """The pid is that of the program, which argv may begin with a prefix of."""
        words = [str(word) for word in (*_AS_A_SERVICE, *argv)]
        with self.log_path(role).open("ab") as log:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(role, env or {}),
                cwd=self.work,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def log_path(self, role: str) -> Path:
        return self.logs / f"{role}.log"

    def log_tail(self, role: str, lines: int = 25) -> str:
        path = self.log_path(role)
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def wait_until(
        self,
        role: str,
        process: subprocess.Popen[bytes],
        ready: Callable[[], object],
        timeout_seconds: float,
    ) -> None:
        """Until ready() is true; fails at once when the process has ended instead."""
        deadline = time.monotonic() + timeout_seconds
        while not ready():
            if process.poll() is not None:
                what = f"ended with status {process.returncode}"
            elif time.monotonic() > deadline:
                what = f"was not ready within {timeout_seconds:g} s"
            else:
                time.sleep(0.05)
                continue
            log = f"{self.log_path(role)} ends:\n{self.log_tail(role)}"
            raise StartFailed(f"the {role} of the test Koji {what}; {log}")

    def reap(self) -> None:
        """After the keeper has done its work."""
        for process in self._started:
            process.wait(SWEEP_SECONDS)


def stop(process: subprocess.Popen[bytes], number: signal.Signals, timeout_seconds: float) -> None:
    """Send the signal; SIGKILL when it has no effect."""
    process.send_signal(number)
    try:
        process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# The keeper


@contextmanager
def kept(work: Path) -> Iterator[None]:
    """Nothing of what was started with the mark of this directory, nor it, is left after this."""
    code = "import sys; from harness.processes import keep; keep(sys.argv[1])"
    keeper = subprocess.Popen(
        [sys.executable, "-c", code, str(work)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd="/",
        start_new_session=True,
    )
    try:
        yield
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait(3 * SWEEP_SECONDS)
    if keeper.returncode != 0:
        raise RuntimeError(f"could not end every process of the Koji in {work}, or remove it")


def keep(directory: str) -> None:
    """In the keeper: wait until the test process closes the pipe or is gone."""
    sys.stdin.buffer.read()
    work = Path(directory)
    _quit_postgresql(work)
    deadline = time.monotonic() + SWEEP_SECONDS
    while pids := marked(work):
        for pid in pids:
            # A build's watchdog ends its VM, which has no environment, and then itself.
            with suppress(OSError):
                if b"\0koji_indirection.jobdir\0" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            sys.exit(f"still running: {pids}")
        time.sleep(0.05)
    shutil.rmtree(work)


def _quit_postgresql(work: Path) -> None:
    """With SIGQUIT: it ends at once, and still removes its System V shared memory."""
    try:
        pid = int((work / "postgresql" / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGQUIT)
    except (OSError, ValueError, IndexError):
        return  # it never came up, or is gone
    deadline = time.monotonic() + SWEEP_SECONDS / 2
    while time.monotonic() < deadline and _running(pid):
        time.sleep(0.05)


def marked(work: Path, role: str | None = None) -> list[int]:
    """The processes of this Koji, orphans included; of one role if one is given."""
    wanted = {f"{MARK}={work}"} | ({f"{ROLE}={role}"} if role else set())
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or is somebody else's
            environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            if wanted <= set(environment) and _running(int(process.name)):
                pids.append(int(process.name))
    return pids


def _running(pid: int) -> bool:
    """A zombie does not run: it is its parent's to bury."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
