"""One run of a task on a builder: does the host suit it, settings, directory, subtasks, end."""

from __future__ import annotations

import configparser
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from taskparts import DAEMON, Refused, source, spec

from koji_indirection import sweep, taskrun
from koji_indirection.config import _SECTIONS, Settings, load_settings
from koji_indirection.errors import BuilderFault, UsageError
from koji_indirection.taskrun import RunDirectory, Unsuitable


def test_the_sample_of_the_settings_file_shows_the_defaults() -> None:
    sample = Path(__file__).parents[2] / "builder" / "indirection.conf"
    cache = Path("/var/cache/koji-indirection")
    settings = load_settings([sample])
    assert settings == dataclasses.replace(Settings(), cache_dir=cache)
    shown = configparser.RawConfigParser()
    shown.read(sample)
    assert {name: set(keys) for name, keys in _SECTIONS.items()} == {
        name: set(shown.options(name)) for name in shown.sections()
    }


def settings_from(path: Path, text: str, **fields: Any) -> Settings:
    path.write_text(text)
    return taskrun.task_settings(path, spec(**fields), Path("/task"))


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    return tmp_path / "indirection.conf"


def test_a_task_works_in_its_own_directory_unless_the_file_names_another(conf: Path) -> None:
    assert taskrun.task_settings(conf, spec(), Path("/task")).work_dir == Path("/task")
    assert settings_from(conf, "[indirection]\nwork_dir =\n").work_dir == Path("/task")
    assert settings_from(conf, "[indirection]\nwork_dir = /big\n").work_dir == Path("/big")


def test_the_spec_chooses_the_accelerator_where_the_host_leaves_it_open(conf: Path) -> None:
    assert settings_from(conf, "", accel="tcg").accel == "tcg"
    assert settings_from(conf, "[indirection]\naccel = tcg\n").accel == "tcg"
    asked = {"accel": "kvm"}
    settings = settings_from(conf, "[indirection]\naccel = tcg\n", **asked)
    with pytest.raises(Unsuitable, match="asks for kvm, this host is set to tcg"):
        taskrun.require_host(spec(**asked), "x86_64", settings)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[indirection]\nacel = tcg\n", "has no key 'acel'"), ("acel", "is not an ini file")],
)
def test_a_settings_file_with_a_mistake_is_the_builders_fault(
    conf: Path, text: str, reason: str
) -> None:
    with pytest.raises(BuilderFault, match=reason):
        settings_from(conf, text)
    assert taskrun.runs_directory(conf).name == "runs"


def test_a_host_without_enough_memory_or_space_is_unsuitable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(accel="tcg", work_dir=tmp_path, cache_dir=tmp_path)
    small = spec(build={"memory_bytes": 256 * 2**20})
    taskrun.require_host(small, "x86_64", settings)
    monkeypatch.setattr(taskrun, "_available_memory_bytes", lambda: 2**20)
    with pytest.raises(Unsuitable, match=r"of memory, 1.* are free"):
        taskrun.require_host(small, "x86_64", settings)
    with pytest.raises(Unsuitable, match="the build needs"):
        taskrun.require_space(source(size_bytes=2**60), settings)


def test_a_build_above_a_limit_is_refused_for_good_and_an_unknown_network_softly(
    tmp_path: Path,
) -> None:
    settings = Settings(accel="tcg", work_dir=tmp_path, cache_dir=tmp_path, max_cpus=2)
    with pytest.raises(UsageError, match=r"cpus is 3, above this machine's limit of 2 \(max_cpus"):
        taskrun.require_host(spec(build={"cpus": 3}), "x86_64", settings)
    asks = spec(build={"network": "lan", "memory_bytes": 128 * 2**20})
    with pytest.raises(Unsuitable, match="asks for the network lan, this host allows none"):
        taskrun.require_host(asks, "x86_64", settings)
    taskrun.require_host(asks, "x86_64", dataclasses.replace(settings, networks=("lan",)))


def test_each_run_of_a_task_has_a_directory_and_removes_those_of_dead_ones(tmp_path: Path) -> None:
    task, runs = tmp_path / "tasks" / "1" / "1", tmp_path / "cache" / "runs"
    first = RunDirectory.make(task, runs)
    dead = task / "run-dead"
    (dead / "vm").mkdir(parents=True)
    second = RunDirectory.make(task, runs)
    assert sorted(task.iterdir()) == sorted([first.path, second.path])
    assert {link.readlink() for link in runs.iterdir()} == {first.path, second.path}
    first.remove()
    assert list(task.iterdir()) == [second.path]
    killed = task / "run-killed"  # a moment ago: its watchdog was still there
    killed.mkdir()
    sweep.note_run(runs, killed)
    second.remove()
    assert not task.exists()
    assert list(runs.iterdir()) == []


def test_a_run_needs_no_note_of_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    run = RunDirectory.make(tmp_path / "1", tmp_path / "cache" / "runs")
    assert run.path.is_dir()
    assert f"should this builder be killed, {run.path} is left" in caplog.text
    run.remove()


def test_two_signals_interrupt_once_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ended = []
    with pytest.raises(KeyboardInterrupt), taskrun.interrupted_once():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            ended.append(True)
    assert ended
    assert signal.getsignal(signal.SIGTERM) == before


class Parent:
    """A hub that has a task with subtasks, whose states a test sets."""

    def __init__(self, **subtasks: str) -> None:
        self.subtasks = {int(name[1:]): state for name, state in subtasks.items()}
        self.task: dict[str, int] = {"state": 1, "host_id": 3}
        self.refusal: Exception | None = None
        self.cancelled: list[int] = []
        self.looked = threading.Event()
        self.host = self

    def getID(self) -> int:
        return 3

    def getTaskInfo(self, task_id: int) -> dict[str, int]:
        assert task_id == 5
        self.looked.set()
        if self.refusal is not None:
            raise self.refusal
        return self.task

    def taskSetWait(self, task_id: int, subtasks: list[int]) -> None:
        assert (task_id, subtasks) == (5, sorted(self.subtasks))

    def taskWait(self, task_id: int) -> list[list[int]]:
        running = [one for one, state in self.subtasks.items() if state == "open"]
        return [[one for one in self.subtasks if one not in running], running]

    def getTaskResult(self, task_id: int) -> str:
        if self.subtasks[task_id] == "failed":
            raise Refused(1005, "build failed: no luck")
        return f"result of {task_id}"

    def taskWaitResults(self, task_id: int, tasks: list[int], canfail: list[int]) -> list[Any]:
        return [[one, self.subtasks[one]] for one in reversed(tasks)]

    def cancelTaskChildren(self, task_id: int) -> None:
        self.cancelled.append(task_id)

    def wait(self, can_fail: tuple[int, ...] = ()) -> list[Any]:
        daemon = dataclasses.replace(DAEMON, session=self)
        return taskrun.wait_for_subtasks(daemon, sorted(self.subtasks), can_fail)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskrun, "_SUBTASKS_SECONDS", 0.01)


def later(action: Callable[[], object]) -> None:
    threading.Timer(0.1, action).start()


def test_subtasks_are_waited_for_and_give_their_results_in_order(at_once: None) -> None:
    parent = Parent(t7="closed", t8="open")
    later(lambda: parent.subtasks.update({8: "closed"}))
    assert parent.wait() == ["closed", "closed"]
    assert Parent(t7="failed", t8="closed").wait(can_fail=(7,)) == ["failed", "closed"]


@pytest.mark.timeout(60)
def test_kojid_wakes_who_waits_for_subtasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskrun, "_SUBTASKS_SECONDS", 600.0)
    parent = Parent(t7="open")
    handler = signal.getsignal(signal.SIGUSR2)

    def end() -> None:
        parent.subtasks[7] = "closed"
        os.kill(os.getpid(), signal.SIGUSR2)

    later(end)
    assert parent.wait() == ["closed"]
    assert signal.getsignal(signal.SIGUSR2) == handler


def test_a_subtask_that_fails_ends_the_others(at_once: None) -> None:
    parent = Parent(t7="failed", t8="open")
    with pytest.raises(Refused, match="no luck"):
        parent.wait()
    assert parent.cancelled == [5]


@pytest.mark.parametrize(
    "task",
    [{"state": 0, "host_id": None}, {"state": 1, "host_id": 4}, {"state": 3, "host_id": 3}],
    ids=["freed", "another host's", "cancelled"],
)
def test_who_waits_for_subtasks_of_a_task_that_is_no_longer_its_own_stops(
    at_once: None, task: Any
) -> None:
    parent = Parent(t7="open")
    later(lambda: setattr(parent, "task", task))
    with pytest.raises(KeyboardInterrupt):
        parent.wait()
    parent = Parent(t7="open")
    parent.refusal = Refused(1006, "User locked by another session")
    with pytest.raises(KeyboardInterrupt):
        parent.wait()
    assert parent.cancelled == [], "they are its successor's"
