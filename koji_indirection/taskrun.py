"""One run of a task on this builder: does the host suit it, its settings, directory, subtasks, end.

Nothing here imports the daemon: the plugin lends what is needed of it (Daemon). It must never
remove what another run, of the same task even, is still using.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from . import accel, arches, hubcalls, jobdir, sweep
from .config import Settings, load_settings, require_within_limits
from .errors import BuilderFault, UsageError
from .sources import Source
from .taskspec import TaskSpec
from .units import GIB, format_size

log = logging.getLogger(__name__)

_OPEN = 1  # of koji.TASK_STATES


@dataclass(frozen=True)
class Daemon:
    """What the plugin lends us of the builder's daemon and of one task.

    session -- a koji.ClientSession; used by one thread at a time.
    topdir -- where Koji's tree is mounted, if it is.
    work_dir -- the task's own directory, removed by the daemon after the task.
    checkout -- check out an SCM URL below a directory; returns where the files are, and
        the URL with the commit's id.
    upload -- put a file into the task's directory at the hub, under a name.
    append -- upload what a log has grown by since the file's position.
    """

    session: Any
    task_id: int
    topurl: str | None
    topdir: Path | None
    work_dir: Path
    checkout: Callable[[str, Path], tuple[Path, str]]
    upload: Callable[[Path, str], None]
    append: Callable[[IO[bytes], str], None]


# --- the host ---------------------------------------------------------------------------------


class Unsuitable(Exception):
    """This host cannot do the task now, another one may: one sentence."""


def task_settings(config: Path, spec: TaskSpec, work_dir: Path) -> Settings:
    """The builder's settings for one task, which works in its own directory unless told otherwise.

    Raises BuilderFault when the file is wrong: no user can mend it.
    """
    try:
        settings = load_settings([config], defaults=Settings(work_dir=work_dir))
    except UsageError as error:
        raise BuilderFault(error.message, error.hint) from error
    if settings.accel == "auto":
        settings = dataclasses.replace(settings, accel=spec.accel)
    return settings


def require_host(spec: TaskSpec, arch: str, settings: Settings) -> None:
    """Raise Unsuitable without the accelerator, the network or the free memory that a build needs.

    Raises UsageError above the host's limits: a softly refused task would wait for ever where
    no host grants more, and nobody would be told.
    """
    build = spec.build_for(arch)
    require_within_limits(build, settings)
    if build.network is not None and build.network not in settings.networks:
        raise Unsuitable(
            f"the build asks for the network {build.network},"
            f" this host allows {', '.join(settings.networks) or 'none'}"
        )
    if spec.accel not in ("auto", settings.accel):
        raise Unsuitable(f"the build asks for {spec.accel}, this host is set to {settings.accel}")
    try:
        accel.choose(settings.accel, cache_dir=settings.cache_dir)
    except BuilderFault as fault:
        raise Unsuitable(fault.message) from fault
    free, wanted = _available_memory_bytes(), build.memory_bytes
    if free is not None and free < wanted:
        raise Unsuitable(
            f"the guest is to have {format_size(wanted)} of memory, {format_size(free)} are free"
        )


def require_space(input_image: Source, settings: Settings) -> None:
    """Raise Unsuitable when the work area cannot even hold what the input image is unpacked to."""
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.work_dir).free
    needed = input_image.size_bytes + GIB
    if free < needed:
        raise Unsuitable(
            f"the build needs {format_size(needed)} in {settings.work_dir},"
            f" {format_size(free)} are free"
        )


def runs_here(arch: str, host_arches: Sequence[str]) -> bool:
    """Whether a host that Koji says to be of these arches can run a guest of this one."""
    machine = platform.machine()
    native = (machine, "i386") if machine == "x86_64" else (machine,)
    known = map(arches.koji_arch, host_arches)
    return arches.koji_arch(arch) in native and arches.koji_arch(arch) in known


def _available_memory_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


# --- the run's directory and settings ---------------------------------------------------------


@dataclass(frozen=True)
class RunDirectory:
    """A directory for one run of a task, locked until it is removed.

    runs -- where it is noted for sweep.py; None when that cannot be written.
    """

    path: Path
    runs: Path | None
    _lock: int

    @classmethod
    def make(cls, task_dir: Path, runs: Path) -> RunDirectory:
        """A new one. kojid gives a task one directory; when kojid was killed, the run that it
        left behind and the new one are in it for some seconds. What dead runs left is removed.
        """
        task_dir.mkdir(parents=True, exist_ok=True)
        for left in task_dir.glob("run-*"):
            jobdir.remove_if_dead(left)
        path = Path(tempfile.mkdtemp(prefix="run-", dir=task_dir))
        path.chmod(0o755)  # qemu may run as another user
        lock = jobdir.lock(path)
        try:
            sweep.note_run(runs, path)
        except OSError as error:
            log.warning("should this builder be killed, %s is left: %s", path, error)
            return cls(path, None, lock)
        return cls(path, runs, lock)

    def remove(self) -> None:
        """And those of runs before it that were killed, which their watchdogs may still have
        guarded when this one began; the task's own, if no other run is in it.
        """
        jobdir.remove(self.path)
        os.close(self._lock)
        self._forget(self.path)
        for left in self.path.parent.glob("run-*"):
            if jobdir.remove_if_dead(left):
                self._forget(left)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    def _forget(self, path: Path) -> None:
        if self.runs is not None:
            with contextlib.suppress(OSError):
                sweep.forget_run(self.runs, path)


def runs_directory(config: Path) -> Path:
    """Where runs are noted."""
    return sweep.runs_directory(_settings_or_defaults(config))


def patient(config: Path, session: Any) -> hubcalls.PatientSession:
    """A task's session with the deadlines that the settings give it."""
    settings = _settings_or_defaults(config)
    return hubcalls.PatientSession(
        session, settings.hub_timeout_seconds, settings.hub_import_timeout_seconds
    )


def _settings_or_defaults(config: Path) -> Settings:
    """For what is needed even where the settings are wrong, which is told elsewhere."""
    try:
        return load_settings([config])
    except UsageError:
        return Settings()


# --- subtasks ---------------------------------------------------------------------------------

_SUBTASKS_SECONDS = 5.0


def wait_for_subtasks(
    daemon: Daemon, tasks: Sequence[int], can_fail: Sequence[int] = ()
) -> list[Any]:
    """Until all have ended; their results, in their order, of one that can fail maybe a fault.

    The first of the others that fails ends the rest, and its fault is raised. kojid wakes us
    with SIGUSR2 when a subtask ends. We look without being woken too, and at whether the task
    still is ours: kojid may have been killed, and nobody would ever wake us, or end us.
    """
    session, task_id = daemon.session, daemon.task_id
    woken, checked = threading.Event(), set(can_fail)
    before = signal.signal(signal.SIGUSR2, lambda _number, _frame: woken.set())
    try:
        host_id = session.host.getID()
        session.host.taskSetWait(task_id, list(tasks))
        while True:
            _stop_unless_ours(daemon, host_id)
            finished, unfinished = session.host.taskWait(task_id)
            if not unfinished:
                break
            for one in set(finished) - checked:
                checked.add(one)
                _require_success(session, task_id, one)
            woken.wait(_SUBTASKS_SECONDS)
            woken.clear()
    finally:
        signal.signal(signal.SIGUSR2, before)
    results = session.host.taskWaitResults(task_id, list(tasks), canfail=list(can_fail))
    by_task = {int(one): result for one, result in results}
    return [by_task[one] for one in tasks]


def _stop_unless_ours(daemon: Daemon, host_id: int) -> None:
    try:
        ours = is_ours(daemon, host_id)
    except Exception as error:
        if getattr(error, "faultCode", None) not in hubcalls.LOST:
            raise
        ours = False
    if not ours:
        log.error(_NOT_OURS)
        raise KeyboardInterrupt


def _require_success(session: Any, task_id: int, subtask: int) -> None:
    try:
        session.getTaskResult(subtask)
    except Exception as error:
        if getattr(error, "faultCode", None) is not None:
            session.cancelTaskChildren(task_id)
        raise


# --- its end ----------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted_once() -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the task; those after it must not end its cleaning up.

    kojid sends SIGINT, SIGTERM twice and SIGKILL within five seconds.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_NOT_OURS = "the task is no longer ours: it was cancelled or given to another builder"


def is_ours(daemon: Daemon, host_id: int) -> bool:
    """Whether a task still is this host's to do, as the hub sees it.

    Raises what the hub answers where the task was given to another run on the same host.
    """
    task = daemon.session.getTaskInfo(daemon.task_id)
    return bool(task["state"] == _OPEN and task["host_id"] == host_id)


def interrupt_main_thread() -> None:
    """As kojid does."""
    log.error(_NOT_OURS)
    os.kill(os.getpid(), signal.SIGINT)
