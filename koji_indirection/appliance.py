"""One libguestfs appliance, in a child process that can be killed at any moment.

The only place where a file system that somebody else made is parsed: inside
the appliance's own small VM, never on the host. libguestfs calls block in C
and cannot be interrupted, so they happen in a child; whoever leaves the
`with`, the child's whole process group (appliance included) is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import resource
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import appliancesockets, programs
from .errors import BuilderFault, BuildFailed
from .jobdir import python_environment

log = logging.getLogger(__name__)

LAUNCH_TIMEOUT_SECONDS = 180  # under TCG; the first launch on a machine builds the appliance (32 s)
CALL_TIMEOUT_SECONDS = 300
_SLOW_CALL_SECONDS = 0.5
_FULL_BELOW_BYTES = 64 * 1024
_STUCK_SECONDS = 5
_ANSWER_BYTES = 32 * 1024 * 1024  # libguestfs's own messages end at 4 MiB
_LISTING_BYTES = 64 * 1024
_ADVICE = re.compile(r" (?:To see full error messages|Do: export LIBGUESTFS)")


@dataclass(frozen=True)
class Drive:
    """A disk of the appliance. The format is always given; libguestfs must not guess it."""

    path: str
    format: str
    readonly: bool


class ApplianceError(BuilderFault):
    """A libguestfs call failed; the message is libguestfs's own."""

    def __init__(self, call: str, reason: str) -> None:
        # One sentence; what libguestfs says of its variables for debugging is not for here.
        reason = _ADVICE.split(" ".join(reason.split()))[0]
        self.reason = reason
        super().__init__(
            f"libguestfs could not {call}: {reason}",
            "`koji-indirection doctor` checks libguestfs, `libguestfs-test-tool` shows more",
        )


class OutOfTime(BuildFailed):
    """All calls together have taken longer than they may; there will be no more of them."""


@dataclass(frozen=True)
class TimeLimit:
    """How long everything that is done with one appliance may take, its launch included.

    Every call has a deadline of its own; of calls a disk that somebody has made for it may need
    any number.
    what -- begins the sentence "WHAT took longer than N s".
    """

    seconds: float
    what: str
    hint: str

    def error(self) -> OutOfTime:
        return OutOfTime(f"{self.what} took longer than {self.seconds:.0f} s", self.hint)


TIME_LIMIT = TimeLimit(
    1800, "libguestfs's appliance", "see whether this machine has too much to do"
)


class Appliance:
    """A launched appliance; call() runs one method of guestfs.GuestFS in it.

    limit -- for all calls together; OutOfTime is raised when it is over.
    is_stuck -- asked while an answer is late: whether none can come any more.
    """

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        limit: TimeLimit = TIME_LIMIT,
        *,
        is_stuck: Callable[[], bool] = lambda: False,
    ) -> None:
        self._child = child
        self._limit = limit
        self._ends = time.monotonic() + limit.seconds
        self._is_stuck = is_stuck
        self._buffer = b""
        self._dead = ""

    def call(
        self, method: str, *args: Any, timeout_seconds: float = CALL_TIMEOUT_SECONDS, **kwargs: Any
    ) -> Any:
        """Run a guestfs method and return its value.

        Raises ApplianceError with libguestfs's own words, or when the answer
        does not come in time, and OutOfTime.
        """
        if time.monotonic() >= self._ends:
            raise self._out_of_time(method)
        if self._dead:
            raise ApplianceError(method, self._dead)
        assert self._child.stdin is not None
        request = json.dumps({"method": method, "args": args, "kwargs": kwargs})
        try:
            self._child.stdin.write(request.encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._died(method, "its process has ended") from None
        started = time.monotonic()
        answer = json.loads(self._read_line(method, timeout_seconds))
        seconds = time.monotonic() - started
        if seconds > _SLOW_CALL_SECONDS:
            log.debug("libguestfs: %s took %.1f s", method, seconds)
        if "error" in answer:
            raise ApplianceError(method, answer["error"])
        return answer["value"]

    def version(self) -> str:
        """libguestfs's version, e.g. "1.48.6"."""
        v = self.call("version")
        return f"{v['major']}.{v['minor']}.{v['release']}"

    def download(self, source: str, target: Path, *, limit_bytes: int) -> None:
        """Copy a file out of the appliance; what it holds beyond the limit is never written.

        The limit is the kernel's (RLIMIT_FSIZE in the child), so that a guest
        file that lies about its size cannot fill the disk.
        """
        timeout_seconds = 600 + limit_bytes / 2_000_000  # 2 MB/s: a tenth of what TCG manages
        self.call(
            "download", source, str(target), timeout_seconds=timeout_seconds, limit=limit_bytes
        )

    def names(self, directory: str) -> tuple[list[str], bool]:
        """Names in a directory, sorted: all of them, or the first some thousand and False.

        However many there are: a guest may have made millions.
        """
        names, complete = self.call("__names__", directory)
        return names, complete

    @property
    def is_dead(self) -> bool:
        """Whether no call can have an answer any more."""
        return bool(self._dead)

    def _out_of_time(self, method: str) -> OutOfTime:
        log.debug("libguestfs: no time left, in %s", method)
        self._died(method, "no time left")
        return self._limit.error()

    def _died(self, method: str, reason: str) -> ApplianceError:
        """Kill what is left: a late answer must not be taken for that of the next call."""
        self._dead = f"it died in an earlier call, {method}: {reason}"
        _kill_group(self._child)
        return ApplianceError(method, reason)

    def _read_line(self, method: str, timeout_seconds: float) -> bytes:
        assert self._child.stdout is not None
        deadline = min(time.monotonic() + timeout_seconds, self._ends)
        looks_stuck = 0
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 and deadline == self._ends:
                raise self._out_of_time(method)
            if left <= 0:
                raise self._died(method, f"no answer within {timeout_seconds:.0f} s")
            wait = min(left, _STUCK_SECONDS)
            if not select.select([self._child.stdout], [], [], wait)[0]:
                looks_stuck = looks_stuck + 1 if self._is_stuck() else 0
                if looks_stuck == 2:
                    raise self._died(method, "it hangs")
                continue
            chunk = os.read(self._child.stdout.fileno(), 65536)
            if not chunk:
                raise self._died(method, "its process has ended")
            self._buffer += chunk
            if len(self._buffer) > _ANSWER_BYTES:
                self._buffer = b""
                raise self._died(method, f"the answer is longer than {_ANSWER_BYTES} bytes")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


@contextlib.contextmanager
def appliance(
    drives: Sequence[Drive],
    limit: TimeLimit = TIME_LIMIT,
    *,
    accel_kind: str,
    job_dir: Path,
    run_dir: Path | None = None,
) -> Iterator[Appliance]:
    """Launch an appliance on these drives; shut it down, or kill it, at the end.

    limit -- for all that is done with it.
    accel_kind -- "kvm" or "tcg": the verdict of accel.py. libguestfs must not
        find out for itself: it believes a /dev/kvm on which guests hang.
    job_dir -- holds libguestfs's temporary files, and names the child for the watchdog.
    run_dir -- holds the file that qemu keeps what the appliance changes of itself in; it removes
        that at once, unless it is killed in just that moment. None: as qemu has it, /var/tmp.
    """
    with contextlib.ExitStack() as stack:
        writable = [
            stack.enter_context(_read_through(drive, job_dir)) if drive.readonly else drive
            for drive in drives
        ]
        is_written = any(not drive.readonly for drive in drives)
        yield stack.enter_context(
            _launched(writable, limit, is_written, accel_kind, job_dir, run_dir)
        )


@contextlib.contextmanager
def _read_through(drive: Drive, job_dir: Path) -> Iterator[Drive]:
    """A throw-away overlay on a disk that must not be written to.

    Not libguestfs's own: over a read-only drive it (1.48) puts a qcow2 and names no format above
    that, so that qemu guesses what the content of the disk is. A guest that has written a qcow2
    header into its raw disk would have the host open any file that it names.
    """
    overlay = job_dir / f"read-{secrets.token_hex(4)}.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", drive.format, "-b", drive.path]
    try:
        programs.run([*argv, str(overlay)], timeout_seconds=60, limits=programs.Limits())
        yield Drive(str(overlay), "qcow2", readonly=False)
    finally:
        overlay.unlink(missing_ok=True)


@contextlib.contextmanager
def _launched(
    drives: Sequence[Drive],
    limit: TimeLimit,
    is_written: bool,
    accel_kind: str,
    job_dir: Path,
    run_dir: Path | None,
) -> Iterator[Appliance]:
    setup: dict[str, Any] = {
        "drives": [asdict(drive) for drive in drives],
        "force_tcg": accel_kind == "tcg",
        "tmpdir": str(job_dir),
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "koji_indirection.appliance", str(job_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**python_environment(), **_temporary_files_in(run_dir)},
        cwd="/",
        start_new_session=True,
    )
    sockets: set[Path] = set()
    try:
        # qemu stops a VM whose disk it cannot write, and says so to nobody.
        running = Appliance(child, limit, is_stuck=lambda: is_written and _is_full(job_dir))
        running.call("__setup__", **setup)
        running.call("launch", timeout_seconds=LAUNCH_TIMEOUT_SECONDS)
        sockets = appliancesockets.of_group(child.pid)
        yield running
        # An orderly end: what was written must reach the disk image.
        running.call("shutdown")
        running.call("close")
    except ApplianceError as error:
        # To what runs in the appliance a full disk of the host is an I/O error, or nothing at all.
        if _is_full(job_dir):
            raise BuilderFault(
                f"no space left in {job_dir.parent}: {error.message}",
                "free some, or name another directory with --work-dir",
            ) from error
        raise
    finally:
        _kill_group(child)
        appliancesockets.remove(sockets)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in the kernel
            child.wait(5)
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _temporary_files_in(run_dir: Path | None) -> dict[str, str]:
    if run_dir is None:
        return {}
    # The appliance itself stays where libguestfs looks for it, or it would be made each time.
    temporary = os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108
    cache = os.environ.get("LIBGUESTFS_CACHEDIR") or temporary
    return {"TMPDIR": str(run_dir), "LIBGUESTFS_CACHEDIR": cache}


def _is_full(directory: Path) -> bool:
    return shutil.disk_usage(directory).free < _FULL_BELOW_BYTES


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    sockets = appliancesockets.of_group(child.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    appliancesockets.remove(sockets)


def guestfs_module() -> Any:
    try:
        import guestfs
    except ImportError as error:
        raise BuilderFault(
            "the Python binding of libguestfs is not installed",
            "install python3-guestfs (Debian) or python3-libguestfs (Fedora, RHEL)",
        ) from error
    return guestfs


def _serve() -> None:
    """The child: a JSON request a line on standard input, an answer a line on standard output."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the build
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever libguestfs's children print must not look like an answer
    try:
        guest = guestfs_module().GuestFS(python_return_dict=True)
    except BuilderFault as error:
        guest = None
        missing = str(error)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if guest is None:
                raise RuntimeError(missing)
            value = _perform(guest, request["method"], request["args"], request["kwargs"])
            answer = {"value": value}
        except (RuntimeError, OSError, TypeError, ValueError, AttributeError) as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer).encode() + b"\n")


def _perform(guest: Any, method: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if method == "__setup__":
        guest.set_backend("direct")
        guest.set_backend_settings(["force_tcg"] if kwargs["force_tcg"] else [])
        guest.set_tmpdir(kwargs["tmpdir"])
        guest.set_network(False)
        guest.set_append("quiet loglevel=1")
        for drive in kwargs["drives"]:
            guest.add_drive_opts(drive["path"], format=drive["format"])
        return None
    if method == "launch":
        try:
            return guest.launch()
        except RuntimeError:
            guest.close()  # or what it has made in /tmp would stay
            raise
    if method == "download":
        with _file_size_limit(kwargs.pop("limit")):
            return guest.download(*args, **kwargs)
    if method == "__names__":
        return _names(guest, args[0])
    value = getattr(guest, method)(*args, **kwargs)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _names(guest: Any, directory: str) -> tuple[list[str], bool]:
    listing = Path(guest.get_tmpdir()) / "names"
    try:
        # ls() would keep all of them in memory.
        with _file_size_limit(_LISTING_BYTES):
            guest.ls0(directory, str(listing))
        complete = True
    except RuntimeError:
        if not listing.exists() or listing.stat().st_size < _LISTING_BYTES:
            raise
        complete = False
    with listing.open("rb") as file:
        *names, _ = file.read(_LISTING_BYTES).split(b"\0")
    listing.unlink()
    return [name.decode("utf-8", "replace") for name in names], complete


@contextlib.contextmanager
def _file_size_limit(limit_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


if __name__ == "__main__":
    _serve()
