"""However a build ends on a builder, nothing of it is left: no process, no file, no open build."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from taskflow import (
    MAKE_ISO,
    RESULTS,
    Submit,
    build_of,
    builder_conf,
    fault_of,
    job_directories,
    kojid_only,
    qemu_of,
    runs_of,
    state_of,
    submitting,
    wait_for_log,
    with_images,
)

if TYPE_CHECKING:
    from harness.base import AnyKoji


@pytest.fixture(scope="module")
def koji(any_koji: AnyKoji) -> Iterator[AnyKoji]:
    with with_images(any_koji) as koji:
        yield koji


@pytest.fixture
def submit(koji: AnyKoji) -> Iterator[Submit]:
    with submitting(koji) as submit:
        yield submit


def until(what: str, true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.1)


def vms_of(koji: AnyKoji, word: str) -> list[int]:
    """qemu processes on this builder's files that have the word in their command lines."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "qemu" in line.split("\0")[0] and str(koji.work) in line and word in line:
            found.append(int(process.name))
    return found


def task_process(koji: AnyKoji) -> int:
    """What kojid has forked for the only task."""
    assert koji._builder is not None
    daemon = koji._builder.pid
    pids = []
    for pid in koji.builder_pids():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == daemon and "python" in Path(f"/proc/{pid}/exe").readlink().name:
            pids.append(pid)
    (only,) = pids
    return only


def expect_nothing_left(koji: AnyKoji, idle: set[int], directories: set[Path]) -> None:
    """Ten seconds are promised; a busy machine may take longer."""

    def left() -> list[object]:
        return [
            *qemu_of(koji),
            *(set(koji.builder_pids()) - idle),
            *runs_of(koji),
            *(path for path in directories if path.exists()),
            *(koji.work / "builder-cache" / "images").glob("*.part"),
        ]

    until(f"nothing is left, but {left()}", lambda: not left(), 30)


@pytest.mark.parametrize(
    ("word", "begun", "fault"),
    [
        ("koji-indirection-task-", ("job.log", "running"), "the VM's qemu process died"),
        ("guestfs-", ("task.log", "phase: "), "libguestfs"),
    ],
    ids=["qemu", "appliance"],
)
def test_what_is_killed_under_a_task_fails_it_and_leaves_nothing(
    koji: AnyKoji, submit: Submit, word: str, begun: tuple[str, str], fault: str
) -> None:
    idle = kojid_only(koji)
    task_id = submit("echo running; sleep 300")
    wait_for_log(koji, task_id, *begun)
    until("it runs", lambda: vms_of(koji, word))
    directories = job_directories(koji)
    for pid in vms_of(koji, word):
        os.kill(pid, signal.SIGKILL)
    koji.wait_task(task_id, 60)
    assert state_of(koji, task_id) == ("FAILED", "FAILED")
    assert fault_of(koji, task_id).startswith("builder fault: ")
    assert fault in fault_of(koji, task_id)
    expect_nothing_left(koji, idle, directories)


def test_a_killed_task_process_leaves_nothing_and_its_build_goes_on(
    koji: AnyKoji, submit: Submit
) -> None:
    task_id = submit("echo running; sleep 6", MAKE_ISO)
    wait_for_log(koji, task_id, "job.log", "running")
    before, directories = build_of(koji, task_id), job_directories(koji)
    (qemu,) = vms_of(koji, f"koji-indirection-task-{task_id}-")
    os.kill(task_process(koji), signal.SIGKILL)
    until(
        "the VM and the files of the run are gone",
        lambda: not Path(f"/proc/{qemu}").exists() and not any(map(Path.exists, directories)),
        30,
    )
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE")
    assert build_of(koji, task_id)["id"] == before["id"]
    until("nor is anything left of the second run", lambda: not runs_of(koji), 30)


OTHER_HOST = "elsewhere.test"


@contextmanager
def another_host(koji: AnyKoji) -> Iterator[Any]:
    """The session of a host that a test plays."""
    admin = koji.admin_session()
    if admin.getHost(OTHER_HOST) is None:
        admin.addHost(OTHER_HOST, ["x86_64"])
        admin.addHostToChannel(OTHER_HOST, "image")
        koji._set_password(OTHER_HOST)
    session = koji._session(OTHER_HOST)
    session.exclusiveSession(force=True)
    yield session
    session.logout()


def test_an_orphan_whose_task_another_host_has_stops(koji: AnyKoji, submit: Submit) -> None:
    task_id = submit("echo running; sleep 300")
    wait_for_log(koji, task_id, "job.log", "running")
    directories = job_directories(koji)
    koji.builder_kill()
    try:
        assert qemu_of(koji), "it goes on"
        koji.admin_session().freeTask(task_id)
        with another_host(koji) as other:
            assert other.host.openTask(task_id)
            expect_nothing_left(koji, set(), directories)
            assert koji.task(task_id)["state"] == 1, "it is the other one's to end"
            assert build_of(koji, task_id)["state"] == 0
            koji.admin_session().cancelTask(task_id)
        assert state_of(koji, task_id) == ("CANCELED", "CANCELED")
    finally:
        koji.builder_start(plugin_conf=builder_conf(koji))


def test_an_orphan_that_waits_for_subtasks_stops_and_leaves_them_to_its_successor(
    koji: AnyKoji, submit: Submit
) -> None:
    from harness.base import ENDED

    session = koji.admin_session()
    # Subtasks that no host here takes.
    task_id = submit(MAKE_ISO, arches=["x86_64", "i686"], build={"network": "wan"})
    until("it waits", lambda: koji.task(task_id)["waiting"])
    build, children = build_of(koji, task_id), session.getTaskChildren(task_id)
    koji.builder_kill()
    try:
        time.sleep(7)  # longer than it waits before it looks
        assert koji.builder_pids(), "as long as the task is its own, it waits"
        session.freeTask(task_id)
        expect_nothing_left(koji, set(), set())
        states = {one["state"] for one in session.getTaskChildren(task_id)}
        assert not states & set(ENDED), "they are its successor's"
    finally:
        koji.builder_start(plugin_conf=builder_conf(koji))
    koji.wait_task_state(task_id, "OPEN")
    until("its successor waits", lambda: koji.task(task_id)["waiting"])
    assert build_of(koji, task_id)["id"] == build["id"]
    assert {one["id"] for one in session.getTaskChildren(task_id)} == {
        one["id"] for one in children
    }
    session.cancelTask(task_id)
    assert state_of(koji, task_id) == ("CANCELED", "CANCELED")
    until("the successor ends too", lambda: not runs_of(koji), 30)


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[None]:
    """A file system of its own, which those see who are started in the block."""
    directory.mkdir(parents=True, exist_ok=True)
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(directory)]
    if subprocess.run(argv, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_full_cache_is_a_fault_and_leaves_nothing(koji: AnyKoji, submit: Submit) -> None:
    images = koji.work / "full-cache" / "images"
    with small_disk(images, "2M"):
        conf = builder_conf(koji, "[cache]\nkeep_free = 0\n", cache="full-cache")
        koji.builder_restart(plugin_conf=conf)
        try:
            idle = kojid_only(koji)
            task_id = submit(MAKE_ISO)
            koji.wait_task(task_id, 60)
            assert state_of(koji, task_id) == ("FAILED", "FAILED")
            assert "builder fault: no room for tiny.x86_64.qcow2" in fault_of(koji, task_id)
            assert not list(images.glob("*.part"))
            expect_nothing_left(koji, idle, set())
        finally:
            koji.builder_restart(plugin_conf=builder_conf(koji))


def test_a_work_directory_that_fills_up_under_a_task_is_a_fault_and_leaves_nothing(
    koji: AnyKoji, submit: Submit
) -> None:
    work = koji.work / "small-work"
    with small_disk(work, "4G"):
        settings = f"work_dir = {work}\n[guest]"
        conf = builder_conf(koji).replace("[guest]", settings)
        koji.builder_restart(plugin_conf=conf)
        try:
            idle = kojid_only(koji)
            # Without end, so that some of it comes after the disk has got small, whenever that is.
            write = "dd if=/dev/urandom of=/dev/vdb bs=1M seek=$at count=1; sync"
            fill = f"at=20; while sleep 1; do {write}; at=$((at + 1)); done"
            task_id = submit(f"echo running; {fill}")
            wait_for_log(koji, task_id, "job.log", "running")
            used = os.statvfs(work)
            left = (used.f_blocks - used.f_bfree) * used.f_frsize + 8 * 1024**2
            subprocess.run(["mount", "-o", f"remount,size={left}", str(work)], check=True)
            koji.wait_task(task_id, 120)
            assert state_of(koji, task_id) == ("FAILED", "FAILED")
            assert "builder fault: the host could not write" in fault_of(koji, task_id)
            assert "no space left in the work directory" in fault_of(koji, task_id)
            expect_nothing_left(koji, idle, set())
            assert list(work.iterdir()) == []
        finally:
            koji.builder_restart(plugin_conf=builder_conf(koji))


def test_a_hub_whose_disk_is_full_for_a_while_gets_the_results_later(
    koji: AnyKoji, submit: Submit
) -> None:
    koji.builder_stop()
    koji.hub_stop()
    tasks = koji.topdir / "work" / "tasks"
    kept = koji.work / "tasks-kept"
    if tasks.exists():
        tasks.rename(kept)
    with small_disk(tasks, "1M"):
        koji.hub_start()
        koji.builder_start(plugin_conf=builder_conf(koji))
        task_id = submit(
            f"{RESULTS} && head -c 3000000 /dev/urandom >results/images/boot.iso", scratch=True
        )
        until("it was refused", lambda: "No space left" in builders_log(koji), 120)
        remount = ["mount", "-o", "remount,size=64M", str(tasks)]
        subprocess.run(remount, check=True)
        assert koji.wait_task(task_id, 120)["state"] == 2, fault_of(koji, task_id)
        koji.builder_stop()
        koji.hub_stop()
    if kept.exists():
        tasks.rmdir()
        kept.rename(tasks)
    koji.hub_start()
    koji.builder_start(plugin_conf=builder_conf(koji))


def builders_log(koji: AnyKoji) -> str:
    return "".join(path.read_text(errors="replace") for path in koji.logs.glob("builder*.log"))
