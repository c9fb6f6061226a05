"""The Kojis for tests themselves: a hub, a builder, and nothing left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness.processes import Processes, kept, marked

if TYPE_CHECKING:
    from harness.base import AnyKoji

HARNESS = Path(__file__).parent

HUB_PROBE = '''
import koji
import kojihub
from koji.plugin import export

@export
def harnessProbe(seconds, refuse=""):
    """Make a task that sleeps, or that its host refuses."""
    kojihub.kojihub.assert_policy("harness_probe", {})
    return kojihub.kojihub.make_task("harnessProbe", [seconds, refuse], channel="image")

@export
def harnessConfig():
    return koji.read_config_files("/etc/koji-hub/plugins/indirection.conf").sections()
'''

BUILDER_PROBE = """
import os
import time

import koji
from koji.tasks import BaseTaskHandler, RefuseTask

class HarnessProbeTask(BaseTaskHandler):
    Methods = ["harnessProbe"]

    def checkHost(self, hostdata):
        if self.params[1] == "check":
            raise RefuseTask("not this host")
        return True

    def handler(self, seconds, refuse):
        if refuse == "handler":
            raise RefuseTask("not now")
        path = os.path.join(self.workdir, "probe.log")
        with open(path, "w") as log:
            log.write("hello from the builder\\n")
        self.uploadFile(path)
        time.sleep(seconds)
        config = koji.read_config_files("/etc/kojid/plugins/indirection.conf")
        return {"handler": os.getpid(), "sections": config.sections()}
"""


@pytest.fixture(scope="module")
def probed_koji(any_koji: AnyKoji) -> Iterator[AnyKoji]:
    with any_koji.plugins(name="harness_probe", hub=HUB_PROBE, builder=BUILDER_PROBE):
        yield any_koji


def test_the_hub_answers(any_koji: AnyKoji) -> None:
    assert any_koji.anonymous_session().getAPIVersion() == 1


def test_the_builder_has_checked_in_and_is_ready(any_koji: AnyKoji) -> None:
    (host,) = any_koji.admin_session().listHosts()
    assert host["ready"]
    assert time.time() - host["update_ts"] < 60


def test_our_plugins_are_loaded_where_they_exist(any_koji: AnyKoji) -> None:
    from harness.base import REPOSITORY

    methods = [method["name"] for method in any_koji.admin_session()._listapi()]
    assert ("indirectionBuild" in methods) == (REPOSITORY / "hub/indirection.py").exists()


def test_a_user_has_the_permissions_that_were_asked_for(any_koji: AnyKoji) -> None:
    session = any_koji.user_session("alice", perms=["image", "tag"])
    assert sorted(session.getPerms()) == ["image", "tag"]
    assert any_koji.user_session("mallory", perms=[]).getPerms() == []


def test_an_imported_image_build_is_complete_and_served(any_koji: AnyKoji, tmp_path: Path) -> None:
    import koji
    from harness.base import DEST_TAG, ImageFile

    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(os.urandom(3 * 1024 * 1024))
    nvr = "harness-image-1.0-1"
    build = any_koji.import_image_build(
        nvr,
        [ImageFile(disk, name="h.x86_64.qcow2"), ImageFile(disk, "aarch64", "h.aarch64.qcow2")],
        tag=DEST_TAG,
    )
    session = any_koji.anonymous_session()
    assert session.getBuild(nvr)["state"] == koji.BUILD_STATES["COMPLETE"]
    assert [tag["name"] for tag in session.listTags(nvr)] == [DEST_TAG]
    archives = session.listArchives(buildID=build["id"], type="image")
    assert {(archive["filename"], archive["arch"]) for archive in archives} == {
        ("h.x86_64.qcow2", "x86_64"),
        ("h.aarch64.qcow2", "aarch64"),
    }
    directory = koji.PathInfo(topdir=any_koji.topurl).imagebuild(build)
    with urllib.request.urlopen(f"{directory}/h.x86_64.qcow2") as answer:
        assert answer.read() == disk.read_bytes()


def test_the_command_line_talks_to_this_hub(any_koji: AnyKoji) -> None:
    any_koji.user_session("alice")
    done = any_koji.cli("moshimoshi", user="alice")
    assert done.returncode == 0, done.stderr
    assert "alice" in done.stdout
    assert any_koji.server in done.stdout


def test_a_task_of_a_builder_plugin_closes(probed_koji: AnyKoji) -> None:
    import koji

    session = probed_koji.admin_session()
    task_id = session.harnessProbe(0)
    assert probed_koji.wait_task(task_id, 30)["state"] == koji.TASK_STATES["CLOSED"]
    assert session.getTaskResult(task_id)["sections"] == []
    assert probed_koji.task_files(task_id) == ["probe.log"]
    assert probed_koji.task_log(task_id, "probe.log") == "hello from the builder\n"
    assert "Assigning task" in probed_koji.scheduler_log(task_id)


def test_a_task_that_checkhost_refuses_is_refused_for_good_and_without_its_reason(
    probed_koji: AnyKoji,
) -> None:
    refusal = _refusal(probed_koji, "check")
    assert (refusal["soft"], refusal["by_host"]) == (False, True)
    assert refusal["msg"] == "failed host check"


def test_a_task_that_its_handler_refuses_is_refused_softly_with_its_reason(
    probed_koji: AnyKoji,
) -> None:
    refusal = _refusal(probed_koji, "handler")
    assert (refusal["soft"], refusal["by_host"]) == (True, True)
    assert refusal["msg"] == "not now"


def _refusal(koji: AnyKoji, where: str) -> Any:
    """The hub keeps a refused task until some host wants it; so it is cancelled here."""
    session = koji.admin_session()
    task_id = session.harnessProbe(0, where)
    deadline = time.monotonic() + 30
    while not koji.refusals(task_id) and time.monotonic() < deadline:
        time.sleep(0.2)
    session.cancelTask(task_id)
    (refusal,) = koji.refusals(task_id)
    return refusal


def test_koji_watch_task_ends_with_the_task(probed_koji: AnyKoji) -> None:
    task_id = probed_koji.admin_session().harnessProbe(2)
    done = probed_koji.cli("watch-task", task_id, timeout_seconds=60)
    assert done.returncode == 0, done.stderr
    assert "closed" in done.stdout


def test_the_hub_restarts_with_another_policy_and_back(probed_koji: AnyKoji) -> None:
    import koji

    session = probed_koji.admin_session()
    probed_koji.hub_restart(
        policy={"harness_probe": "all :: deny nobody may probe"}, plugin_conf="[indirection]\n"
    )
    with pytest.raises(koji.ActionNotAllowed, match="nobody may probe"):
        session.harnessProbe(0)
    assert session.harnessConfig() == ["indirection"]
    probed_koji.hub_restart()
    assert session.harnessConfig() == []
    assert probed_koji.wait_task(session.harnessProbe(0), 60)


def test_a_hub_that_is_away_refuses_connections_and_a_running_task_survives_it(
    probed_koji: AnyKoji,
) -> None:
    import koji

    task_id = probed_koji.admin_session().harnessProbe(3)
    probed_koji.wait_task_state(task_id, "OPEN")
    probed_koji.hub_stop()
    with pytest.raises(OSError):
        urllib.request.urlopen(probed_koji.server)
    time.sleep(4)
    probed_koji.hub_start()
    assert probed_koji.wait_task(task_id, 60)["state"] == koji.TASK_STATES["CLOSED"]


def _wait_until_it_runs(koji: AnyKoji, task_id: int) -> None:
    """A task is OPEN before kojid forks for it."""
    deadline = time.monotonic() + 30
    while not koji.task_files(task_id):
        assert time.monotonic() < deadline, "the task did not start to run"
        time.sleep(0.1)


def test_a_killed_builder_leaves_its_task_to_the_next_one(probed_koji: AnyKoji) -> None:
    import koji

    session = probed_koji.admin_session()
    task_id = session.harnessProbe(8)
    _wait_until_it_runs(probed_koji, task_id)
    probed_koji.builder_kill()
    assert len(probed_koji.builder_pids()) == 1, "the task's process goes on as an orphan"
    probed_koji.builder_start(plugin_conf="[indirection]\n")
    assert probed_koji.wait_task(task_id, 60)["state"] == koji.TASK_STATES["CLOSED"]
    probed_koji.builder_restart()


def test_a_stopped_builder_leaves_no_process_and_is_not_ready(probed_koji: AnyKoji) -> None:
    session = probed_koji.admin_session()
    task_id = session.harnessProbe(300)
    _wait_until_it_runs(probed_koji, task_id)
    probed_koji.builder_stop()
    assert probed_koji.builder_pids() == []
    assert not session.getHost("builder.test")["ready"]
    session.cancelTask(task_id)
    probed_koji.builder_start()


def test_a_broken_plugin_is_told_with_the_log(probed_koji: AnyKoji) -> None:
    from harness.processes import StartFailed

    try:
        with (
            pytest.raises(StartFailed, match="never loads"),
            probed_koji.plugins(name="broken", builder="raise RuntimeError('never loads')"),
        ):
            pass
    finally:
        probed_koji.builder_restart()


# The end of a harness, seen from outside

ANOTHER = """
import sys, time
from {module} import {function}
with {function}() as koji:
    print(koji.work, koji.logs, flush=True)
    {then}
"""
FUNCTIONS = {
    "stand-in": ("standin.standin", "running_stand_in"),
    "real": ("realkoji.real", "running_koji"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_harness_that_a_signal_ends(
    any_koji: AnyKoji, number: signal.Signals
) -> None:
    harness = _start_another(any_koji, "time.sleep(300)")
    work, logs = harness.stdout.readline().split()
    assert _marked(work), "it runs"
    harness.send_signal(number)
    harness.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while (Path(work).exists() or _marked(work)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(work).exists()
    assert _marked(work) == []
    assert (Path(logs) / "hub.log").exists(), "of use to whoever asks why"
    subprocess.run(["rm", "-r", logs], check=True)


# As libvirt starts it: without our environment, so without the mark.
BUILDING = """
import subprocess, time
from pathlib import Path
from koji_indirection.jobdir import job_directory
with job_directory(Path("jobs")) as job:
    sleeping = ["./qemu-system-fake", "-c", "import time; time.sleep(300)", str(job.path)]
    print(subprocess.Popen(sleeping, env={}, start_new_session=True).pid, flush=True)
    time.sleep(300)
"""


def test_the_vm_of_a_build_that_is_still_running_goes_too(tmp_path: Path) -> None:
    work, logs = tmp_path / "work", tmp_path / "logs"
    work.mkdir()
    logs.mkdir()
    (work / "qemu-system-fake").symlink_to(sys.executable)
    koji = Processes(work, logs)
    with kept(work):
        building = koji.start("builder", [sys.executable, "-c", BUILDING])
        koji.wait_until("builder", building, lambda: koji.log_tail("builder"), 60)
        vm = Path("/proc", koji.log_tail("builder"), "cmdline")
        assert b"qemu-system-fake" in vm.read_bytes()
    koji.reap()
    assert not vm.exists() or not vm.read_bytes()


def test_a_failure_keeps_the_logs_and_says_where(any_koji: AnyKoji) -> None:
    harness = _start_another(any_koji, "sys.exit('a test failed')")
    out, err = harness.communicate(timeout=60)
    work, logs = out.split()
    assert not Path(work).exists()
    assert f"the logs of the test Koji are in {logs}" in err
    assert {"hub.log", "builder.log", "topurl.log"} <= {path.name for path in Path(logs).iterdir()}
    subprocess.run(["rm", "-r", logs], check=True)


def test_without_a_koji_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from realkoji import install

    monkeypatch.delenv("KOJI_TEST_ROOT", raising=False)
    monkeypatch.setattr(install, "_installed", lambda: None)
    assert "KOJI_TEST_ROOT" in (install.missing() or "")


@pytest.mark.real_koji
@pytest.mark.usefixtures("real_koji")
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from realkoji import install

    monkeypatch.setitem(install.MODULES, "no_such_module", "python3-no-such-module")
    assert "no_such_module (python3-no-such-module)" in (install.missing() or "")


def test_a_root_that_is_no_koji_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from realkoji import install

    monkeypatch.setenv("KOJI_TEST_ROOT", str(tmp_path))
    with pytest.raises(install.WrongRoot, match=r"there is no .*/kojihub$"):
        install.missing()


def _start_another(like: AnyKoji, then: str) -> Any:
    module, function = FUNCTIONS[like.name]
    return subprocess.Popen(
        [sys.executable, "-c", ANOTHER.format(module=module, function=function, then=then)],
        env={**os.environ, "PYTHONPATH": str(HARNESS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _marked(work: str) -> list[int]:
    return marked(Path(work))
