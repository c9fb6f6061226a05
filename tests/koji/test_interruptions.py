"""What becomes of a build that is cancelled, or whose builder, hub or task ends or begins anew."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

from taskflow import (
    MAKE_ISO,
    RESULTS,
    Submit,
    build_of,
    builder_conf,
    cancel_and_expect_nothing_left,
    fault_of,
    job_directories,
    kojid_only,
    qemu_of,
    runs_of,
    state_of,
    wait_for_log,
)

if TYPE_CHECKING:
    from harness.base import AnyKoji

# For a task that has ended: as if its builder had died just before it could say so.
RUN_AGAIN = """
UPDATE task SET state = 0, host_id = NULL, completion_time = NULL, result = NULL
    WHERE id = :'task_id';
"""


def test_a_cancelled_build_leaves_no_vm_after_five_seconds(koji: AnyKoji, submit: Submit) -> None:
    task_id = submit("echo running; sleep 300")
    wait_for_log(koji, task_id, "job.log", "running")
    assert qemu_of(koji)
    koji.admin_session().cancelTask(task_id)
    started = time.monotonic()
    while qemu_of(koji):
        assert time.monotonic() < started + 5
        time.sleep(0.1)
    assert state_of(koji, task_id) == ("CANCELED", "CANCELED")


def test_a_build_goes_on_where_its_builder_was_restarted(koji: AnyKoji, submit: Submit) -> None:
    task_id = submit("echo running; sleep 8", MAKE_ISO)
    wait_for_log(koji, task_id, "job.log", "running")
    before = build_of(koji, task_id)
    koji.builder_stop()
    assert qemu_of(koji) == []
    assert state_of(koji, task_id)[1] == "BUILDING"
    koji.builder_start(plugin_conf=builder_conf(koji))
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE")
    assert build_of(koji, task_id)["id"] == before["id"], "one build, not two"


def test_what_a_killed_builder_leaves_running_ends_itself(koji: AnyKoji, submit: Submit) -> None:
    task_id = submit("echo running; sleep 8", MAKE_ISO)
    wait_for_log(koji, task_id, "job.log", "running")
    before = build_of(koji, task_id)
    koji.builder_kill()
    orphans = koji.builder_pids()
    assert orphans
    koji.builder_start(plugin_conf=builder_conf(koji))
    deadline = time.monotonic() + 15
    while set(orphans) & set(koji.builder_pids()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE")
    assert build_of(koji, task_id)["id"] == before["id"]


def test_a_hub_that_restarts_meanwhile_delays_nothing_and_misses_nothing(
    koji: AnyKoji, submit: Submit
) -> None:
    task_id = submit("echo before; sleep 12; echo after", MAKE_ISO)
    wait_for_log(koji, task_id, "job.log", "before")
    koji.hub_stop()
    time.sleep(4)
    koji.hub_start()
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE")
    nvr = build_of(koji, task_id)["nvr"].replace("-", "/")
    log = koji.topdir / "packages" / nvr / "data/logs/image/x86_64/job.log"
    assert "\nafter\n" in log.read_text()


def test_a_build_cancelled_while_it_fetches_leaves_a_cache_that_is_good(
    koji: AnyKoji, submit: Submit
) -> None:
    from harness.proxy import slow_proxy

    with slow_proxy() as proxy:
        proxy.slow.set()
        settings = builder_conf(koji, f"[download]\nproxy = {proxy.url}\n", cache="slow-cache")
        koji.builder_restart(plugin_conf=settings)
        try:
            idle = kojid_only(koji)
            task_id = submit(MAKE_ISO)
            images = koji.work / "slow-cache" / "images"
            deadline = time.monotonic() + 60
            while not (proxy.requests and list(images.glob("*.part"))):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            cancel_and_expect_nothing_left(koji, task_id, idle, cache="slow-cache")
            assert not list(images.glob("sha256-*[0-9a-f]")), "it had not been fetched"
            proxy.slow.clear()
            del proxy.requests[:]
            task_id = submit(MAKE_ISO)
            koji.wait_task(task_id, 300)
            assert state_of(koji, task_id) == ("CLOSED", "COMPLETE"), fault_of(koji, task_id)
            assert len(proxy.requests) == 1, "one image in both roles is fetched once"
        finally:
            koji.builder_restart(plugin_conf=builder_conf(koji))


def test_a_build_cancelled_while_it_boots_leaves_nothing(koji: AnyKoji, submit: Submit) -> None:
    idle = kojid_only(koji)
    task_id = submit(MAKE_ISO)
    wait_for_log(koji, task_id, "task.log", "phase: boot")
    deadline = time.monotonic() + 30
    while not any(f"koji-indirection-task-{task_id}-" in line for line in qemu_of(koji)):
        assert time.monotonic() < deadline, "a VM's name tells its task"
        time.sleep(0.05)
    assert len(job_directories(koji)) >= 2
    cancel_and_expect_nothing_left(koji, task_id, idle)
    assert "phase: job" not in koji.task_log(task_id, "task.log")


def test_a_build_cancelled_while_it_uploads_leaves_nothing(koji: AnyKoji, submit: Submit) -> None:
    idle = kojid_only(koji)
    task_id = submit(f"{RESULTS} && truncate -s 600M results/images/boot.iso")
    iso = f"{build_of_soon(koji, task_id)['nvr']}.x86_64.iso"
    deadline = time.monotonic() + 300
    while iso not in koji.task_files(task_id):
        assert time.monotonic() < deadline
        assert koji.task(task_id)["state"] in (0, 1, 4), fault_of(koji, task_id)
        time.sleep(0.05)
    cancel_and_expect_nothing_left(koji, task_id, idle)


def build_of_soon(koji: AnyKoji, task_id: int) -> Any:
    """The build of a task that has just been made."""
    deadline = time.monotonic() + 60
    while not koji.admin_session().listBuilds(taskID=task_id):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return build_of(koji, task_id)


def test_a_task_that_runs_again_with_a_complete_build_does_what_is_left_to_do(
    koji: AnyKoji, submit: Submit
) -> None:
    from harness.base import HOST

    session = koji.admin_session()
    task_id = submit("echo running; sleep 5", MAKE_ISO, uploaded=True)  # some hub's policy lets it
    wait_for_log(koji, task_id, "job.log", "running")
    session.disableHost(HOST)  # it goes on with what it has, and takes no task that tags
    try:
        deadline = time.monotonic() + 120
        while not [one for one in session.getTaskChildren(task_id) if one["label"] == "tag"]:
            assert time.monotonic() < deadline
            assert koji.task(task_id)["state"] == 1, fault_of(koji, task_id)
            time.sleep(0.2)
        build = build_of(koji, task_id)
        assert state_of(koji, task_id) == ("OPEN", "COMPLETE")
        assert session.listTags(build["nvr"]) == []
        koji.builder_stop()
        # What the next run has to write again.
        koji.sql("DELETE FROM archive_components;")
    finally:
        session.enableHost(HOST)
        koji.builder_stop()
        koji.builder_start(plugin_conf=builder_conf(koji))
    koji.wait_task(task_id, 120)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE")
    assert build_of(koji, task_id)["id"] == build["id"]
    assert build_of(koji, task_id)["completion_time"] == build["completion_time"]
    assert "template_commit" not in build["extra"]["indirection"]
    assert [tag["name"] for tag in session.listTags(build["nvr"])] == ["images-candidate"]
    (iso,) = (
        one for one in session.listArchives(buildID=build["id"]) if one["filename"].endswith(".iso")
    )
    components = session.listArchives(imageID=iso["id"])
    assert [one["filename"] for one in components] == ["tiny.x86_64.qcow2"]


def test_a_scratch_task_that_runs_again_after_all_is_done_ends_well(
    koji: AnyKoji, submit: Submit
) -> None:
    task_id = submit(MAKE_ISO, scratch=True)
    assert koji.wait_task(task_id, 300)["state"] == 2, fault_of(koji, task_id)
    session = koji.admin_session()
    before = session.getTaskResult(task_id)
    koji.sql(RUN_AGAIN, task_id=str(task_id))
    koji.wait_task_state(task_id, "OPEN")
    assert koji.wait_task(task_id, 60)["state"] == 2, fault_of(koji, task_id)
    assert session.getTaskResult(task_id) == before


def test_a_scratch_task_that_runs_again_says_if_its_files_are_gone(
    koji: AnyKoji, submit: Submit
) -> None:
    task_id = submit(MAKE_ISO, scratch=True)
    assert koji.wait_task(task_id, 300)["state"] == 2, fault_of(koji, task_id)
    for iso in (koji.topdir / "scratch").rglob(f"task_{task_id}/*.iso"):
        iso.unlink()
    koji.sql(RUN_AGAIN, task_id=str(task_id))
    koji.wait_task_state(task_id, "OPEN")
    assert koji.wait_task(task_id, 60)["state"] == 5
    fault = fault_of(koji, task_id)
    assert "an earlier run of this scratch task has made live-" in fault
    assert "submit the build again" in fault


def test_a_builder_that_starts_removes_what_a_crash_has_left(koji: AnyKoji, submit: Submit) -> None:
    task_id = submit("echo running; sleep 300")
    wait_for_log(koji, task_id, "job.log", "running")
    directories = job_directories(koji)
    koji.builder_kill()
    for pid in koji.builder_pids():  # the watchdogs too: as if the power had failed
        os.kill(pid, signal.SIGKILL)
    koji.admin_session().cancelTask(task_id)
    runs = runs_of(koji)
    left = [path for path in (*directories, *runs) if path.exists()]
    assert len(left) >= 3
    koji.builder_start(plugin_conf=builder_conf(koji))
    deadline = time.monotonic() + 60
    while any(path.exists() for path in left) or not told_by_kojid(koji, str(runs[0])):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert qemu_of(koji) == []


def told_by_kojid(koji: AnyKoji, text: str) -> bool:
    return any(text in path.read_text(errors="replace") for path in koji.logs.glob("builder*.log"))
