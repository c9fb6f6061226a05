"""A task of Koji's -> what it was made from, as far as its hub still knows it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import taskparts

from koji_indirection import replay, template
from koji_indirection.config import Settings
from koji_indirection.errors import BuildFailed, UsageError
from koji_indirection.localrun import Here, Hub
from koji_indirection.replay import ReplayRequest, order_of, request_from
from koji_indirection.spec import BuildSpec
from koji_indirection.taskinputs import Inputs
from koji_indirection.units import GIB

koji = pytest.importorskip("koji", reason="the library koji is not installed")

TEXT = b"<template><commands><command name='one'>true</command></commands></template>"
SHA256 = hashlib.sha256(TEXT).hexdigest()
SCM = "git+https://h/templates.git#main"
SPEC = {
    "target": "images",
    "name": "live",
    "version": "1",
    "arches": ["x86_64"],
    "input_image": "latest:in@images",
    "utility_image": "task:70",
    "template": "t/live.tdl",
    "template_scm": SCM,
    "build": {"memory_bytes": GIB, "input_filename": "/in.raw"},
}
FREE, CLOSED, FAILED = 0, 2, 5


class FakeHub:
    """Answers from records: tasks, builds, and files of tasks; each image is one archive."""

    def __init__(self) -> None:
        self.tasks: dict[int, dict[str, Any]] = {}
        self.builds: dict[int, dict[str, Any]] = {}
        self.archives: dict[int, dict[str, Any]] = {}
        self.files: dict[int, dict[str, bytes]] = {}
        self.latest = {"before 1000": 1, "now": 2}
        for number in (1, 2, 3):
            self.add_build(number)
        self.add_task(70, state=CLOSED, method="createImage", request=[])
        self.files[70] = {"util.qcow2": b"utility"}

    def add_build(self, number: int, **more: Any) -> None:
        nvr = f"in-{number}-1"
        self.builds[number] = {
            **{"id": number, "build_id": number, "nvr": nvr, "name": "in", "version": str(number)},
            **{"release": "1", "state": 1, "task_id": None, "extra": None, **more},
        }
        self.archives[number * 10] = {
            **{"id": number * 10, "build_id": number, "filename": f"in{number}.qcow2", "size": 5},
            **{"arch": "x86_64", "checksum": f"{number}" * 64, "checksum_type": 2},
        }

    def add_task(self, task_id: int, **more: Any) -> None:
        self.tasks[task_id] = {
            **{"id": task_id, "method": "indirectionBuild", "request": [SPEC], "state": FAILED},
            **{"parent": None, "start_ts": 1000.5, **more},
        }

    def getTaskInfo(self, task_id: int, request: bool = False) -> Any:
        return self.tasks.get(task_id)

    def getTaskChildren(self, task_id: int, request: bool = False) -> Any:
        return [task for task in self.tasks.values() if task["parent"] == task_id]

    def listTaskOutput(self, task_id: int, all_volumes: bool = False) -> Any:
        files = self.files.get(task_id, {})
        return {name: ["DEFAULT"] for name in files} if all_volumes else list(files)

    def downloadTaskOutput(self, task_id: int, name: str) -> bytes:
        return self.files[task_id][name]

    def checkUpload(self, path: str, name: str, **_: Any) -> Any:
        data = self.files[int(path.rpartition("/")[2])].get(name)
        if data is None:
            return None
        return {"size": len(data), "hexdigest": hashlib.sha256(data).hexdigest()}

    def listBuilds(self, taskID: int) -> Any:
        return [build for build in self.builds.values() if build["task_id"] == taskID]

    def getBuild(self, key: int | str) -> Any:
        return self.builds.get(int(key))

    def getArchive(self, archive_id: int) -> Any:
        return self.archives.get(archive_id)

    def listArchives(self, buildID: int, type: str) -> Any:
        return [one for one in self.archives.values() if one["build_id"] == buildID]

    def getLastEvent(self, before: float) -> Any:
        return {"id": f"before {int(before)}"}

    def getLatestBuilds(self, tag: str, package: str, type: str, event: Any = "now") -> Any:
        return [self.builds[self.latest[event]]]


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


def request(**more: Any) -> ReplayRequest:
    return ReplayRequest(**{"task_id": 5, "here": Here(Path("out")), **more})


def inputs(hub: FakeHub, tmp_path: Path, **more: Any) -> Inputs:
    order = order_of(Hub(hub, None, None), request(**more))
    return order.find_inputs(Settings(cache_dir=tmp_path), tmp_path)


def image(hub: FakeHub, number: int, role: str) -> dict[str, Any]:
    """As the build's extra has it."""
    archive = hub.archives[number * 10]
    return {
        **{"arch": "x86_64", "role": role, "reference": "latest:in@images"},
        **{"archive_id": number * 10, "filename": archive["filename"]},
        **{"checksum": archive["checksum"], "checksum_type": 2},
    }


def pinned(hub: FakeHub) -> dict[str, Any]:
    def source(role: str) -> dict[str, Any]:
        record = image(hub, 3, role)
        return {
            **record,
            **{"nvr": "in-3-1", "build_id": 3, "task_id": None, "size_bytes": 5},
            "relpath": "packages/in/3/1/images/in3.qcow2",
        }

    return {
        "template_source": "git+https://h/templates.git#cafe",
        "template_sha256": SHA256,
        "tag_repo": None,
        "input_image": source("input image"),
        "utility_image": source("utility image"),
    }


# The command line


def test_the_options_are_those_of_the_guest_and_this_machine(tmp_path: Path) -> None:
    template = tmp_path / "fixed.tdl"
    template.write_bytes(TEXT)
    asked = request_from(
        [
            *("5", "--output=out", "--arch=x86_64", f"--template={template}", "--memory=4G"),
            *("--results=/a.iso", "--results=/b.iso", "--command-timeout=", "--accel=tcg"),
            *("--verbose", "--json"),
        ]
    )
    assert asked == request(
        arch="x86_64",
        template_file=template,
        here=Here(Path("out"), verbose=True),
        changes={
            "memory_bytes": 4 * GIB,
            "results": ("/a.iso", "/b.iso"),
            "command_timeout_seconds": None,
            "accel": "tcg",
        },
        json=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "TASK_ID is missing"),
        (["0", "--output=x"], "'0' is no task's id"),
        (["99999999999999999999999999", "--output=x"], "is no task's id"),
        (["5"], "--output is missing"),
        (["5", "--output="], "--output is missing"),
        (["5", "--output=x", "--memry=1G"], "--memry (did you mean --memory?)"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        request_from(arguments)
    assert message in str(caught.value)


# Which build it is


def test_changes_count_for_more_than_the_task(hub: FakeHub) -> None:
    hub.add_task(5)
    changes = {"input_device": "vdc", "workspace_device": "vdb", "cpus": 2, "accel": "tcg"}
    order = order_of(Hub(hub, None, None), request(changes=changes))
    assert order.build == BuildSpec(memory_bytes=GIB, input_device="vdc", cpus=2)
    assert order.spec.accel == "tcg"
    default = order_of(Hub(hub, None, None), request(changes={"memory_bytes": None}))
    assert default.build == BuildSpec(input_filename="/in.raw")


def test_of_a_task_with_several_arches_one_is_chosen(hub: FakeHub) -> None:
    own = {"arch_build": {"aarch64": {"memory_bytes": 2 * GIB}}}
    hub.add_task(5, request=[{**SPEC, "arches": ["x86_64", "aarch64"], **own}])
    with pytest.raises(UsageError, match="several arches: x86_64, aarch64"):
        order_of(Hub(hub, None, None), request())
    with pytest.raises(UsageError, match="task 5 does not build i686"):
        order_of(Hub(hub, None, None), request(arch="i686"))
    order = order_of(Hub(hub, None, None), request(arch="aarch64"))
    assert (order.arch, order.build.memory_bytes) == ("aarch64", 2 * GIB)


def test_what_is_no_indirection_build_is_told(hub: FakeHub) -> None:
    with pytest.raises(UsageError, match="there is no task 5"):
        order_of(Hub(hub, None, None), request())
    hub.add_task(5, method="buildArch", request=["x.src.rpm"])
    with pytest.raises(UsageError, match="task 5 is a buildArch task, and no indirection build"):
        order_of(Hub(hub, None, None), request())
    hub.add_task(5, request=[{**SPEC, "of_a_newer_version": 1}])
    with pytest.raises(BuildFailed, match=r"task 5 cannot be replayed: .*of_a_newer_version"):
        order_of(Hub(hub, None, None), request())


# The images


def nvrs(found: Inputs) -> list[str | None]:
    return [found.input_image.nvr, found.utility_image.nvr]


@pytest.mark.parametrize("task_id", [5, 6])
def test_a_subtask_and_its_parent_have_what_the_subtask_was_told(
    hub: FakeHub, tmp_path: Path, task_id: int
) -> None:
    hub.add_task(5, request=[{**SPEC, "arches": ["x86_64", "aarch64"]}])
    told = [hub.tasks[5]["request"][0], "x86_64", "live-1-1", pinned(hub)]
    hub.add_task(6, method="indirectionBuildArch", parent=5, request=told)
    hub.files[6] = {"template.log": TEXT}
    found = inputs(hub, tmp_path, task_id=task_id, arch="x86_64")
    assert nvrs(found) == ["in-3-1", "in-3-1"]
    assert found.input_image.reference == "latest:in@images"
    assert found.template_text == TEXT
    assert found.template_source == "template.log of task 6"
    with pytest.raises(UsageError, match=r"task 6 is for x86_64, not for aarch64 \(.* task 5"):
        inputs(hub, tmp_path, task_id=6, arch="aarch64")


def test_a_subtask_that_was_told_of_no_image_is_replayed_from_its_references_and_that_template(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def template_in(url: str, name: str, directory: Path) -> tuple[bytes, str]:
        asked.append(url)
        return TEXT, url

    monkeypatch.setattr(replay, "template_in", template_in)
    commit = SCM.replace("main", "cafe")
    parsed = template.parse(TEXT, source="live.tdl")
    of_another_arch = taskparts.inputs(template=parsed, template_source=commit)
    told = of_another_arch.without_image("there was no image for x86_64")
    hub.add_task(6, method="indirectionBuildArch", request=[SPEC, "x86_64", "live-1-1", told])
    found = inputs(hub, tmp_path, task_id=6)
    assert (found.input_image.nvr, found.utility_image.task_id) == ("in-1-1", 70)
    assert asked == [commit]
    told["template_sha256"] = "0" * 64
    with pytest.raises(BuildFailed, match="is not the one any more that the task has used"):
        inputs(hub, tmp_path, task_id=6)


def test_a_task_with_a_build_has_what_the_build_says(hub: FakeHub, tmp_path: Path) -> None:
    hub.add_task(5)
    hub.files[5] = {"template.log": TEXT}
    record = {"inputs": [image(hub, 3, "utility image"), image(hub, 2, "input image")]}
    hub.add_build(50, task_id=5, state=3, extra={"indirection": record})
    assert nvrs(inputs(hub, tmp_path)) == ["in-2-1", "in-3-1"]


def test_a_task_without_a_build_has_what_its_manifest_says(hub: FakeHub, tmp_path: Path) -> None:
    hub.add_task(5)
    manifest = {
        "template": {"sha256": SHA256, "source": None},
        "input_image": {"koji": image(hub, 3, "input image")},
        "utility_image": {"koji": image(hub, 3, "utility image")},
    }
    name = "live-1-1.x86_64.manifest.json"
    hub.files[5] = {"template.log": TEXT, name: json.dumps(manifest).encode()}
    assert nvrs(inputs(hub, tmp_path)) == ["in-3-1", "in-3-1"]


def test_else_the_references_mean_what_they_meant_when_the_task_started(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.add_task(5)
    hub.files[5] = {"template.log": TEXT}
    found = inputs(hub, tmp_path)
    assert found.input_image.nvr == "in-1-1"
    assert (found.utility_image.task_id, found.utility_image.filename) == (70, "util.qcow2")
    hub.add_task(5, start_ts=None, state=FREE)
    assert inputs(hub, tmp_path).input_image.nvr == "in-2-1"


def test_an_image_that_is_gone_or_another_one_is_told(hub: FakeHub, tmp_path: Path) -> None:
    hub.add_task(5)
    hub.files[5] = {"template.log": TEXT}
    record = {"inputs": [image(hub, 3, "utility image"), image(hub, 3, "input image")]}
    hub.add_build(50, task_id=5, extra={"indirection": record})
    hub.archives[30]["checksum"] = "f" * 64
    with pytest.raises(BuildFailed, match="it is not the file any more that the task has used"):
        inputs(hub, tmp_path)
    hub.builds[3]["state"] = 2
    with pytest.raises(BuildFailed, match="the build in-3-1 was deleted"):
        inputs(hub, tmp_path)
    del hub.archives[30]
    with pytest.raises(BuildFailed, match="Koji has no archive 30 any more"):
        inputs(hub, tmp_path)


def test_a_tasks_output_that_has_expired_is_told(hub: FakeHub, tmp_path: Path) -> None:
    hub.add_task(5)
    hub.files[5] = {"template.log": TEXT}
    del hub.files[70]["util.qcow2"]
    with pytest.raises(BuildFailed, match=r"utility image task:70: .* expired"):
        inputs(hub, tmp_path)


# The template


def test_a_template_of_ones_own_counts_for_more(hub: FakeHub, tmp_path: Path) -> None:
    hub.add_task(5)
    mine = tmp_path / "mine.tdl"
    mine.write_bytes(TEXT.replace(b"true", b"false"))
    assert inputs(hub, tmp_path, template_file=mine).template_text == mine.read_bytes()


def test_without_the_log_it_comes_from_the_commit_that_was_used(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def template_in(url: str, name: str, directory: Path) -> tuple[bytes, str]:
        asked.append((url, name))
        return TEXT, url

    monkeypatch.setattr(replay, "template_in", template_in)
    hub.add_task(5)
    inputs(hub, tmp_path)
    record = {
        "inputs": [image(hub, 3, "utility image"), image(hub, 3, "input image")],
        "template_commit": "cafe",
        "template_sha256": SHA256,
    }
    hub.add_build(50, task_id=5, extra={"indirection": record})
    hub.files[5] = {"template.log": b"cut off"}
    inputs(hub, tmp_path)
    commit = SCM.replace("main", "cafe")
    assert asked == [(SCM, "t/live.tdl"), (commit, "t/live.tdl")]

    record["template_sha256"] = "0" * 64
    with pytest.raises(BuildFailed, match="is not the one any more that the task has used"):
        inputs(hub, tmp_path)
