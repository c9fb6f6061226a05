"""The builder plugin's file: with and without what it needs, under new and old kojids."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from taskparts import Hub, inputs, spec

from koji_indirection import sweep
from koji_indirection.errors import BuilderFault
from koji_indirection.taskrun import Unsuitable

koji = pytest.importorskip("koji", reason="the library koji is not installed")
pytest.importorskip("koji.tasks")

PLUGIN = Path(__file__).parents[2] / "builder" / "indirection.py"
RUN_TASK = """
import runpy, sys, types
for name in sys.argv[2:]:
    sys.modules[name] = None  # as if it were not installed
import koji
plugin = runpy.run_path(sys.argv[1])
options = types.SimpleNamespace(workdir="/nowhere")
params = [{"arches": ["x86_64"]}]
task = plugin["IndirectionBuildTask"](1, "indirectionBuild", params, None, options)
print(task.weight() > 0, task.checkHost({"arches": "x86_64"}))
try:
    task.handler(*task.params)
except koji.GenericError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        (["koji_indirection"], "this builder cannot do indirection builds: import of koji_indir"),
        (["lxml"], "this builder cannot do indirection builds: import of lxml"),
        (["jsonschema", "libvirt", "guestfs", "oslo_utils"], "task spec: target is missing"),
    ],
)
def test_the_plugin_loads_without_what_it_needs_and_says_so_when_a_task_comes(
    missing: list[str], reason: str
) -> None:
    argv = [sys.executable, "-c", RUN_TASK, str(PLUGIN), *missing]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True True\n")
    assert reason in done.stdout


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    return tmp_path / "indirection.conf"


@pytest.fixture
def new_kojid(monkeypatch: pytest.MonkeyPatch, conf: Path) -> Any:
    """The plugin in a kojid since 1.34, in which a task that runs can be refused."""
    monkeypatch.setattr(
        koji.tasks, "RefuseTask", type("RefuseTask", (Exception,), {}), raising=False
    )
    return _plugin(monkeypatch, conf)


@pytest.fixture
def old_kojid(monkeypatch: pytest.MonkeyPatch, conf: Path) -> Any:
    """The plugin in a kojid before 1.34, in which it cannot."""
    monkeypatch.delattr(koji.tasks, "RefuseTask", raising=False)
    return _plugin(monkeypatch, conf)


def _plugin(monkeypatch: pytest.MonkeyPatch, conf: Path) -> Any:
    monkeypatch.setattr(sweep, "start", lambda config, logger: None)
    description = importlib.util.spec_from_file_location("kojids_plugin", PLUGIN)
    assert description is not None
    assert description.loader is not None
    plugin: Any = importlib.util.module_from_spec(description)
    description.loader.exec_module(plugin)
    plugin.CONFIG = conf
    return plugin


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the spec is for x86_64")
def test_an_old_kojid_refuses_softly_before_it_takes_a_task(
    old_kojid: Any, conf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = spec(build={"network": "lan", "memory_bytes": 128 * 2**20}).to_dict()
    options = SimpleNamespace(workdir="/nowhere")
    whole = old_kojid.IndirectionBuildTask(5, "indirectionBuild", [wanted], None, options)
    params = [wanted, "x86_64", "live-1-1", {}]
    part = old_kojid.IndirectionBuildArchTask(6, "indirectionBuildArch", params, None, options)
    host = {"arches": "x86_64"}

    conf.write_text("[indirection]\naccel = tcg\n")
    assert not whole.checkHost(host)
    assert not part.checkHost(host)
    assert "task 6 is left to other hosts: the build asks for the network lan" in caplog.text
    conf.write_text("[indirection]\naccel = tcg\n[guest]\nnetworks = lan\n")
    assert whole.checkHost(host)
    assert part.checkHost(host)
    conf.write_text("[nonsense]")
    assert whole.checkHost(host), "the task itself tells what is wrong"


def test_in_an_old_kojid_a_host_that_turns_out_to_be_unsuitable_is_a_fault(old_kojid: Any) -> None:
    hub = Hub(cancelTaskChildren=None)
    failed = []
    hub.host = SimpleNamespace(failBuild=lambda task_id, build_id: failed.append(build_id))
    options = SimpleNamespace(workdir="/nowhere")
    task = old_kojid.IndirectionBuildTask(5, "indirectionBuild", [{}], hub, options)
    with (
        pytest.raises(BuilderFault, match="no space"),
        task._failing({"id": 3}),
        old_kojid._refusals(),
    ):
        raise Unsuitable("no space")
    assert failed == [3]


@pytest.mark.parametrize("kojid", ["old_kojid", "new_kojid"])
def test_an_arch_without_an_image_fails_with_that_reason_on_a_host_that_would_not_suit(
    request: pytest.FixtureRequest, conf: Path, tmp_path: Path, kojid: str
) -> None:
    plugin = request.getfixturevalue(kojid)
    conf.write_text("[indirection]\naccel = tcg\n")
    wanted = spec(build={"network": "lan"}).to_dict()
    options = SimpleNamespace(workdir=str(tmp_path))

    def task(pinned: dict[str, Any]) -> Any:
        params = [wanted, "x86_64", "live-1-1", pinned]
        return plugin.IndirectionBuildArchTask(6, "indirectionBuildArch", params, Hub(), options)

    lost = task(inputs().without_image("there is no image for x86_64"))
    assert lost.checkHost({"arches": "x86_64"})
    with pytest.raises(koji.BuildError, match="build failed: there is no image for x86_64"):
        lost.handler(*lost.params)
    other = task(inputs().pinned())
    with pytest.raises(plugin.RefuseTask or koji.GenericError, match="asks for the network lan"):
        other.handler(*other.params)
