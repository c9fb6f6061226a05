"""What the builder does around a build, with a stand-in for the hub where one is asked."""

from __future__ import annotations

import configparser
import dataclasses
import hashlib
import importlib.util
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import xmlrpc.client
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from koji_indirection import kojibuild, sources, sweep, template
from koji_indirection.config import _SECTIONS, Download, Settings, load_settings
from koji_indirection.errors import BuilderFault, BuildFailed, UsageError
from koji_indirection.kojibuild import ArchiveTypes, Inputs, LiveLogs, RunDirectory, Unsuitable
from koji_indirection.taskspec import TaskSpec, check_provenance

# As the hub has them: a file's longest end wins.
EXTENSIONS = ("iso", "qcow2", "raw raw.xz", "tar.gz tgz", "json", "vmlinuz", "xml")


class Hub:
    """Answers from attributes; calls are kept."""

    host: Any

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            answer = self.answers[name]
            return answer(*args, **kwargs) if callable(answer) else answer

        return call

    def getArchiveType(self, filename: str) -> dict[str, str] | None:
        parts = filename.lower().split(".")
        for start in range(len(parts)):
            for extensions in EXTENSIONS:
                if ".".join(parts[start:]) in extensions.split():
                    return {"extensions": extensions}
        return None


def spec(**fields: Any) -> TaskSpec:
    values = {
        "target": "images",
        "name": "live",
        "version": "1",
        "arches": ["x86_64"],
        "input_image": "in-1-1",
        "utility_image": "latest:tools@f40",
        "template": "live.tdl",
        "template_scm": "git+https://example.com/t.git#main",
        **fields,
    }
    return TaskSpec.from_dict(values)


def source(role: str = "input image", **fields: Any) -> sources.Source:
    values = {
        "reference": "in-1-1" if role == "input image" else "latest:tools@f40",
        "role": role,
        "nvr": "in-1-1",
        "build_id": 7,
        "archive_id": 70,
        "task_id": None,
        "filename": "in.qcow2",
        "size_bytes": 1000,
        "checksum": "0" * 64,
        "checksum_type": 2,
        "arch": "x86_64",
        "relpath": "packages/in/1/1/images/in.qcow2",
        **fields,
    }
    return sources.Source(**values)


def inputs(**fields: Any) -> Inputs:
    text = b"<template><commands><command name='a'>true</command></commands></template>"
    values = {
        "template": template.parse(text, source="live.tdl"),
        "template_text": text,
        "template_source": "git+https://example.com/t.git#0123abc",
        "input_image": source(),
        "utility_image": source("utility image", archive_id=None, nvr=None, task_id=9),
        **fields,
    }
    return Inputs(**values)


# Names


@pytest.mark.parametrize(
    ("results", "names"),
    [
        (["boot.iso"], ["n-1-2.x86_64.iso"]),
        (["boot.img.raw.xz"], ["n-1-2.x86_64.raw.xz"]),
        (["BOOT.ISO"], ["n-1-2.x86_64.ISO"]),
        (["vmlinuz"], ["n-1-2.x86_64.vmlinuz"]),
        (
            ["boot.iso", "live.iso", "root.tar.gz"],
            ["boot-n-1-2.x86_64.iso", "live-n-1-2.x86_64.iso", "root-n-1-2.x86_64.tar.gz"],
        ),
    ],
)
def test_results_are_named_after_the_build_and_its_arch(
    results: list[str], names: list[str]
) -> None:
    assert kojibuild.archive_names(results, "n-1-2", "x86_64", ArchiveTypes(Hub())) == names


def test_a_result_of_no_known_type_is_told_with_what_koji_takes() -> None:
    with pytest.raises(BuildFailed, match=r"boot\.efi is of no type that this Koji accepts"):
        kojibuild.archive_names(["boot.efi"], "n-1-2", "x86_64", ArchiveTypes(Hub()))


@pytest.mark.parametrize(
    "pattern", ["/r/boot.iso", "/r/*.iso", "/r/*", "/r/a.*", "/r/v[12].tar.gz"]
)
def test_patterns_that_may_be_archives_pass_before_the_vm_starts(pattern: str) -> None:
    ArchiveTypes(Hub()).check_patterns([pattern])


@pytest.mark.parametrize("pattern", ["/r/boot.efi", "/r/*.wim", "/r.iso/boot"])
def test_patterns_that_cannot_be_archives_are_refused_before_the_vm_starts(pattern: str) -> None:
    with pytest.raises(BuildFailed):
        ArchiveTypes(Hub()).check_patterns([pattern])


# The host


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
    return kojibuild.task_settings(path, spec(**fields), Path("/task"))


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    return tmp_path / "indirection.conf"


def test_a_task_works_in_its_own_directory_unless_the_file_names_another(conf: Path) -> None:
    assert kojibuild.task_settings(conf, spec(), Path("/task")).work_dir == Path("/task")
    assert settings_from(conf, "[indirection]\nwork_dir =\n").work_dir == Path("/task")
    assert settings_from(conf, "[indirection]\nwork_dir = /big\n").work_dir == Path("/big")


def test_the_spec_chooses_the_accelerator_where_the_host_leaves_it_open(conf: Path) -> None:
    assert settings_from(conf, "", accel="tcg").accel == "tcg"
    assert settings_from(conf, "[indirection]\naccel = tcg\n").accel == "tcg"
    asked = {"accel": "kvm"}
    settings = settings_from(conf, "[indirection]\naccel = tcg\n", **asked)
    with pytest.raises(Unsuitable, match="asks for kvm, this host is set to tcg"):
        kojibuild.require_host(spec(**asked), "x86_64", settings)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[indirection]\nacel = tcg\n", "has no key 'acel'"), ("acel", "is not an ini file")],
)
def test_a_settings_file_with_a_mistake_is_the_builders_fault(
    conf: Path, text: str, reason: str
) -> None:
    with pytest.raises(BuilderFault, match=reason):
        settings_from(conf, text)
    assert kojibuild.runs_directory(conf).name == "runs"


def test_a_host_without_enough_memory_or_space_is_unsuitable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(accel="tcg", work_dir=tmp_path, cache_dir=tmp_path)
    small = spec(build={"memory_bytes": 256 * 2**20})
    kojibuild.require_host(small, "x86_64", settings)
    monkeypatch.setattr(kojibuild, "_available_memory_bytes", lambda: 2**20)
    with pytest.raises(Unsuitable, match=r"of memory, 1.* are free"):
        kojibuild.require_host(small, "x86_64", settings)
    with pytest.raises(Unsuitable, match="the build needs"):
        kojibuild.require_space(inputs(input_image=source(size_bytes=2**60)), settings)


def test_a_build_above_a_limit_is_refused_for_good_and_an_unknown_network_softly(
    tmp_path: Path,
) -> None:
    settings = Settings(accel="tcg", work_dir=tmp_path, cache_dir=tmp_path, max_cpus=2)
    with pytest.raises(UsageError, match=r"cpus is 3, above this machine's limit of 2 \(max_cpus"):
        kojibuild.require_host(spec(build={"cpus": 3}), "x86_64", settings)
    asks = spec(build={"network": "lan", "memory_bytes": 128 * 2**20})
    with pytest.raises(Unsuitable, match="asks for the network lan, this host allows none"):
        kojibuild.require_host(asks, "x86_64", settings)
    kojibuild.require_host(asks, "x86_64", dataclasses.replace(settings, networks=("lan",)))


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
    with pytest.raises(KeyboardInterrupt), kojibuild.interrupted_once():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            ended.append(True)
    assert ended
    assert signal.getsignal(signal.SIGTERM) == before


# Target and build


def target_hub(**answers: Any) -> Hub:
    target = {"build_tag": 1, "build_tag_name": "b", "dest_tag": 2, "dest_tag_name": "d"}
    defaults = {
        "getBuildTarget": target,
        "getBuildConfig": {"arches": "x86_64 i686"},
        "getPackageConfig": {"blocked": False},
    }
    return Hub(**{**defaults, **answers})


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"getBuildTarget": None}, "there is no build target images"),
        ({"getBuildConfig": {"arches": None}}, "x86_64 is not an arch of the build tag b"),
        ({"getPackageConfig": None}, "live is not in the list of the tag d"),
        ({"getPackageConfig": {"blocked": True}}, "live is blocked in the tag d"),
    ],
)
def test_a_target_that_cannot_take_the_build_is_told(answers: Any, reason: str) -> None:
    pytest.importorskip("koji")
    with pytest.raises(UsageError, match=reason):
        kojibuild.check_target(target_hub(**answers), spec())


def test_a_scratch_build_needs_no_package_in_the_tag() -> None:
    pytest.importorskip("koji")
    hub = target_hub(getPackageConfig=None)
    assert kojibuild.check_target(hub, spec(scratch=True))["dest_tag"] == 2


def test_a_task_that_runs_again_finds_its_build_and_no_failed_one() -> None:
    builds = [{"build_id": 1, "state": 3}, {"build_id": 2, "state": 0}]
    hub = Hub(listBuilds=builds, getBuild=lambda build_id: {"id": build_id})
    assert kojibuild.own_build(hub, 5) == {"id": 2}
    assert kojibuild.own_build(Hub(listBuilds=builds[:1]), 5) is None


# Inputs


def test_what_the_hub_is_told_of_inputs_is_what_its_schema_takes() -> None:
    one = inputs()
    check_provenance(spec(), one.images("x86_64"), one.template_record())
    extra = kojibuild.build_extra(spec(), {"x86_64": one})["indirection"]
    assert extra["template_commit"] == "0123abc"
    assert [image["role"] for image in extra["inputs"]] == ["utility image", "input image"]


def test_pinned_inputs_survive_the_wire() -> None:
    pinned = inputs().pinned()
    assert sources.Source(**pinned["input_image"]) == source()


TARGET = {"build_tag": 1, "build_tag_name": "f44-build"}


def test_the_build_tags_repository_comes_after_those_of_the_spec() -> None:
    pytest.importorskip("koji")
    asked = spec(
        arches=["x86_64", "i686"],
        tag_repo=True,
        build={"network": "user", "repos": ["http://example.com/extra"]},
    )
    place = kojibuild.tag_repo_of(Hub(getRepo={"id": 77}), TARGET)
    daemon = dataclasses.replace(DAEMON, topurl="https://koji.example.com/files/")
    found = inputs(tag_repo=place)
    for arch, directory in (("x86_64", "x86_64"), ("i686", "i386")):
        assert kojibuild.build_spec(daemon, asked, arch, found).repos == (
            "http://example.com/extra",
            f"https://koji.example.com/files/repos/f44-build/77/{directory}",
        )
    assert kojibuild.build_spec(daemon, asked, "x86_64", inputs()) == asked.build
    with pytest.raises(BuilderFault, match="there is no topurl here"):
        kojibuild.build_spec(DAEMON, asked, "x86_64", found)
    secret = dataclasses.replace(DAEMON, topurl="https://me:hunter2@koji.example.com/kojifiles")
    with pytest.raises(BuilderFault, match="no address that guests may know"):
        kojibuild.build_spec(secret, asked, "x86_64", found)


def test_a_build_tag_without_a_repository_is_told() -> None:
    with pytest.raises(BuildFailed, match="the build tag f44-build has no repository") as caught:
        kojibuild.tag_repo_of(Hub(getRepo=None), TARGET)
    assert caught.value.hint == "have one made with: koji regen-repo f44-build"


def test_the_manifest_is_told_where_everything_is_from() -> None:
    origin = inputs().origin()
    assert origin.template == "git+https://example.com/t.git#0123abc"
    assert origin.input_image is not None
    assert origin.input_image.archive_id == 70
    assert origin.input_image.checksum_type == "sha256"
    assert origin.utility_image is not None
    assert (origin.utility_image.role, origin.utility_image.task_id) == ("utility image", 9)


def test_errors_name_images_as_koji_does() -> None:
    path = Path("/var/cache/koji-indirection/images/sha256-00")
    with pytest.raises(BuildFailed) as caught, kojibuild._as_users_know_it({path: source()}):
        raise BuildFailed(f"input image {path} is no disk", f"try `file {path}`")
    assert str(caught.value) == "input image in.qcow2 of in-1-1 is no disk (try `file in.qcow2`)"


def test_a_link_in_a_checkout_does_not_lead_out(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "sub").mkdir(parents=True)
    (checkout / "sub" / "real.tdl").write_text("x")
    (checkout / "inside.tdl").symlink_to("sub/real.tdl")
    (checkout / "outside.tdl").symlink_to("/etc/passwd")
    (checkout / "up").symlink_to("..")
    inside = kojibuild.file_in_checkout(checkout, "inside.tdl")
    assert inside == (checkout / "sub" / "real.tdl").resolve()
    for name in ("outside.tdl", "up/anything.tdl", ".git/config"):
        with pytest.raises(BuildFailed, match="leads out of its checkout"):
            kojibuild.file_in_checkout(checkout, name)
    with pytest.raises(BuildFailed, match="there is no template none"):
        kojibuild.file_in_checkout(checkout, "none")


def test_the_list_of_rpms_has_the_place_of_those_that_koji_did_not_build() -> None:
    rpm = {
        **dict.fromkeys(("name", "version", "release", "arch", "payloadhash", "nvr"), "x"),
        **dict.fromkeys(("epoch", "size", "buildtime"), 1),
        "draft": False,
        "external_repo_id": 0,
        "external_repo_name": "INTERNAL",
    }
    external = {**rpm, "external_repo_id": 3, "external_repo_name": "fedora"}
    hub = Hub(listRPMs=[rpm, external, {**rpm, "draft": True}])
    listed = kojibuild.rpm_list(hub, source())
    assert [one.get("location") for one in listed] == [None, "fedora"]
    assert hub.calls == [("listRPMs", (), {"imageID": 70})]
    assert kojibuild.rpm_list(hub, source(archive_id=None)) == []


def test_results_without_an_arch_that_was_built_are_a_failure() -> None:
    built = {"task_id": 3, "arch": "x86_64", "files": ["a"], "logs": ["b"], "rpmlist": []}
    failed = {"faultCode": 1005, "faultString": "it broke"}
    made_from = {"inputs": [{"role": "input image"}], "template": {"template_sha256": "0"}}
    entries = [failed, {**built, **made_from}]
    assert kojibuild.hub_results(entries) == {"3": built}
    assert kojibuild.provenance(entries) == (made_from["inputs"], made_from["template"])
    with pytest.raises(BuildFailed, match="no arch was built: it broke"):
        kojibuild.hub_results([failed])


# What the hub is given


class Files:
    """The directories of tasks at a hub, which damages the first uploads if told to."""

    def __init__(self, damaged: int = 0) -> None:
        self.damaged = damaged
        self.content: dict[str, bytes] = {}
        self.uploads: list[str] = []

    def daemon(self, work_dir: Path, host: Host | None = None, **answers: Any) -> kojibuild.Daemon:
        hub = Hub(
            checkUpload=self.check,
            listTaskOutput=lambda task_id: sorted(self.content),
            downloadTaskOutput=lambda task_id, name: self.content[name],
            **answers,
        )
        hub.host = host
        return dataclasses.replace(DAEMON, session=hub, work_dir=work_dir, upload=self.upload)

    def upload(self, path: Path, name: str) -> None:
        self.uploads.append(name)
        self.content[name] = path.read_bytes()
        if self.damaged:
            self.damaged -= 1
            self.content[name] += b"!"

    def check(self, directory: str, name: str, verify: str) -> dict[str, Any] | None:
        assert (directory, verify) == ("tasks/5/5", "sha256")
        if name not in self.content:
            return None
        digest = hashlib.sha256(self.content[name]).hexdigest()
        return {"size": len(self.content[name]), "hexdigest": digest}


ISO = b"an iso"
ISO_SHA256 = hashlib.sha256(ISO).hexdigest()


@pytest.fixture
def iso(tmp_path: Path) -> Path:
    path = tmp_path / "boot.iso"
    path.write_bytes(ISO)
    return path


def test_an_upload_is_compared_with_what_was_collected(iso: Path) -> None:
    files = Files()
    kojibuild.upload_verified(files.daemon(iso.parent), iso, "n-1-2.iso", ISO_SHA256)
    assert files.uploads == ["n-1-2.iso"]


def test_a_damaged_upload_is_made_once_more(iso: Path) -> None:
    files = Files(damaged=1)
    kojibuild.upload_verified(files.daemon(iso.parent), iso, "n-1-2.iso", ISO_SHA256)
    assert files.uploads == ["n-1-2.iso"] * 2
    assert files.content["n-1-2.iso"] == ISO


def test_an_upload_that_is_damaged_twice_is_the_builders_fault(iso: Path) -> None:
    files = Files(damaged=2)
    with pytest.raises(BuilderFault, match=r"n-1-2\.iso, uploaded twice, is not on the hub as"):
        kojibuild.upload_verified(files.daemon(iso.parent), iso, "n-1-2.iso", ISO_SHA256)
    assert len(files.uploads) == 2


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def refusing(files: Files, directory: Path, *errors: Exception) -> kojibuild.Daemon:
    """A hub that raises these errors, one for each of the first uploads."""
    left = list(errors)

    def upload(path: Path, name: str) -> None:
        if left:
            raise left.pop(0)
        files.upload(path, name)

    return dataclasses.replace(files.daemon(directory), upload=upload)


def test_an_upload_is_made_again_while_the_hub_has_no_place_or_a_lock(
    iso: Path, waits: list[float]
) -> None:
    files = Files()
    trouble = (
        Refused(1001, "[Errno 11] Resource temporarily unavailable"),
        Refused(1, "Traceback ...\nOSError: [Errno 28] No space left on device"),
        Refused(1000, "server returned wrong chunk size: 5 != 6"),
    )
    daemon = refusing(files, iso.parent, *trouble)
    kojibuild.upload_verified(daemon, iso, "n-1-2.iso", ISO_SHA256)
    assert files.content["n-1-2.iso"] == ISO
    assert waits == list(kojibuild.UPLOAD_WAITS_SECONDS[:3])


def test_an_upload_that_the_hub_never_takes_is_one_fault_with_its_reason(
    iso: Path, waits: list[float]
) -> None:
    traceback = "Traceback ...\n  in upload\nOSError: [Errno 28] No space left on device\n"
    full = xmlrpc.client.Fault(1, traceback)
    daemon = refusing(Files(), iso.parent, *[full] * 99)
    with pytest.raises(BuilderFault) as caught:
        kojibuild.upload_verified(daemon, iso, "n-1-2.iso", ISO_SHA256)
    assert caught.value.message == (
        "n-1-2.iso cannot be uploaded: OSError: [Errno 28] No space left on device"
    )
    assert waits == list(kojibuild.UPLOAD_WAITS_SECONDS)


@pytest.mark.parametrize("code", [1002, 1004, 1006, 1007])
def test_an_upload_for_a_task_that_is_no_longer_ours_is_not_tried_again(
    iso: Path, waits: list[float], code: int
) -> None:
    daemon = refusing(Files(), iso.parent, Refused(code, "not yours"))
    with pytest.raises(Refused):
        kojibuild.upload_verified(daemon, iso, "n-1-2.iso", ISO_SHA256)
    assert waits == []


def entry(**fields: Any) -> dict[str, Any]:
    return {
        "task_id": 5,
        "arch": "x86_64",
        "files": ["n-1-2.iso"],
        "checksums": {"n-1-2.iso": ISO_SHA256},
        "logs": ["job.log"],
        "rpmlist": [],
        "inputs": [],
        "template": {},
        **fields,
    }


BUILD = {"id": 3, "name": "n", "version": "1", "release": "2"}


class Refused(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.faultCode = code


class Host:
    """The hub's calls for builders; each raises what is left in `errors`."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> None:
            self.calls.append((name, *args))
            if self.errors:
                raise self.errors.pop(0)

        return call


def test_what_is_handed_over_is_kept_for_a_run_after_this_one(tmp_path: Path) -> None:
    files, host = Files(), Host()
    daemon = files.daemon(tmp_path, host=host)
    assert kojibuild.handed_over(daemon) is None
    kojibuild.complete_build(daemon, BUILD, [entry(), {"faultCode": 1, "faultString": "x"}])
    ((name, task_id, build_id, results),) = host.calls
    assert (name, task_id, build_id) == ("completeImageBuild", 5, 3)
    assert set(results) == {"5"}
    assert kojibuild.handed_over(daemon) == (
        "n-1-2",
        [entry(), {"faultCode": 1, "faultString": "x"}],
    )


def test_half_of_what_was_handed_over_is_nothing(tmp_path: Path) -> None:
    files = Files()
    files.content[kojibuild.HANDOVER] = b'{"nvr": "n-1-2", "entr'
    assert kojibuild.handed_over(files.daemon(tmp_path)) is None


def test_a_build_that_is_complete_is_so_whatever_the_hub_has_answered(tmp_path: Path) -> None:
    host = Host(Refused(1009, "unable to retry call"), Refused(1, "it broke"))
    daemon = Files().daemon(tmp_path, host=host, getBuild={"state": kojibuild.COMPLETE})
    kojibuild.complete_build(daemon, BUILD, [entry()])
    building = Files().daemon(tmp_path, host=host, getBuild={"state": kojibuild.BUILDING})
    with pytest.raises(Refused, match="it broke"):
        kojibuild.complete_build(building, BUILD, [entry()])


def test_a_scratch_task_that_runs_again_has_the_rest_done(tmp_path: Path, iso: Path) -> None:
    for errors in ([], [Refused(1000, "Destination exists: /mnt/koji/scratch/x/n-1-2.iso")]):
        files, host = Files(), Host(*errors)
        daemon = files.daemon(tmp_path, host=host)
        files.upload(iso, "n-1-2.iso")
        assert kojibuild.move_to_scratch_again(daemon, [entry()]) == ["n-1-2.iso"]
        assert [call[0] for call in host.calls] == ["moveImageBuildToScratch"]
        assert files.uploads == ["n-1-2.iso"], "nothing is uploaded over a link"


def test_a_scratch_task_that_runs_again_says_what_is_gone(tmp_path: Path) -> None:
    daemon = Files().daemon(tmp_path, host=Host())
    sentence = "an earlier run of this scratch task has made n-1-2.iso, and now the hub does not"
    with pytest.raises(BuilderFault, match=sentence) as caught:
        kojibuild.move_to_scratch_again(daemon, [entry()])
    assert caught.value.hint == "submit the build again"


def test_a_move_to_scratch_that_fails_is_an_error_unless_only_its_answer_was_lost(
    tmp_path: Path, iso: Path
) -> None:
    files, host = Files(), Host(Refused(1009, "unable to retry call"), Refused(1, "disk full"))
    daemon = files.daemon(tmp_path, host=host)
    files.upload(iso, "n-1-2.iso")
    assert kojibuild.move_to_scratch(daemon, "n-1-2", [entry()]) == ["n-1-2.iso"]
    with pytest.raises(Refused, match="disk full"):
        kojibuild.move_to_scratch(daemon, "n-1-2", [entry()])


# Live logs


class Uploads:
    """What has arrived at the hub; `errors` are raised first."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.files: dict[str, bytes] = {}

    def __call__(self, file: IO[bytes], name: str) -> None:
        position = file.tell()
        data = file.read()
        if self.errors:
            raise self.errors.pop(0)
        self.files[name] = self.files.get(name, b"")[:position] + data

    def wait_for(self, name: str, data: bytes) -> None:
        deadline = time.monotonic() + 5
        while self.files.get(name) != data:
            assert time.monotonic() < deadline, self.files
            time.sleep(0.01)


def always() -> bool:
    return True


def never_lost() -> None:
    raise AssertionError("the task was ours")


def test_logs_are_uploaded_while_they_grow_and_whole_at_the_end(tmp_path: Path) -> None:
    uploads = Uploads()
    with LiveLogs(tmp_path, uploads, always, never_lost, 0.02):
        with (tmp_path / "job.log").open("wb", buffering=0) as job:
            job.write(b"one\n")
            uploads.wait_for("job.log", b"one\n")
            job.write(b"two\n")
        (tmp_path / "late.log").write_text("late")
        (tmp_path / "screenshot.png").write_text("no log")
    assert uploads.files == {"job.log": b"one\ntwo\n", "late.log": b"late"}


def test_a_hub_that_is_away_for_a_while_misses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uploads = Uploads(OSError("away"), OSError("away"), OSError("still away"))
    (tmp_path / "job.log").write_text("all of it")
    with caplog.at_level(logging.WARNING), LiveLogs(tmp_path, uploads, always, never_lost, 0.01):
        uploads.wait_for("job.log", b"all of it")
    assert [record.message for record in caplog.records] == [
        "logs cannot be uploaded for now: away"
    ]


@pytest.mark.parametrize("code", [1002, 1004, 1006, 1007])
def test_a_task_that_is_no_longer_ours_is_given_up_at_once(tmp_path: Path, code: int) -> None:
    class Refused(Exception):
        faultCode = code

    lost = threading.Event()
    (tmp_path / "job.log").write_text("x")
    with LiveLogs(tmp_path, Uploads(Refused(), Refused()), always, lost.set, 0.01):
        assert lost.wait(5)


def test_a_cancelled_task_is_given_up_even_if_it_says_nothing(tmp_path: Path) -> None:
    lost = threading.Event()
    with LiveLogs(tmp_path, Uploads(), lambda: False, lost.set, 0.01):
        assert lost.wait(5)


def test_an_interrupt_does_not_wait_for_an_upload(tmp_path: Path) -> None:
    stuck = threading.Event()
    (tmp_path / "job.log").write_text("x")
    started = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        LiveLogs(
            tmp_path, lambda file, name: bool(stuck.wait(30)) or None, always, never_lost, 0.01
        ),
    ):
        time.sleep(0.1)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 3
    stuck.set()


def test_the_task_log_has_the_reason_as_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "task.log"
    with pytest.raises(BuilderFault), kojibuild.task_log(path):
        logging.getLogger("koji_indirection.sources").info("fetching")
        raise BuilderFault("no room", "free some")
    assert "INFO fetching" in path.read_text()
    assert path.read_text().endswith("ERROR builder fault: no room (free some)\n")


def test_evidence_of_a_failed_build_is_kept_and_hides_no_reason(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "logs" / "screenshot.png").write_text("png")
    sent = []

    def upload(path: Path, name: str) -> None:
        sent.append(name)
        raise OSError("away")

    daemon = dataclasses.replace(DAEMON, upload=upload)
    kojibuild._keep_evidence(daemon, tmp_path, "n-1-2.x86_64.manifest.json")
    assert sent == ["n-1-2.x86_64.manifest.json", "screenshot.png"]


DAEMON = kojibuild.Daemon(
    session=Hub(),
    task_id=5,
    topurl=None,
    topdir=None,
    work_dir=Path("/nowhere"),
    checkout=lambda url, directory: (directory, url),
    upload=lambda path, name: None,
    append=lambda file, name: None,
)


# The plugin's file

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
    pytest.importorskip("koji")
    argv = [sys.executable, "-c", RUN_TASK, str(PLUGIN), *missing]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True True\n")
    assert reason in done.stdout


@pytest.fixture
def old_kojid(monkeypatch: pytest.MonkeyPatch, conf: Path) -> Any:
    """The plugin in a kojid before 1.34, in which a task that runs cannot be refused."""
    tasks = pytest.importorskip("koji.tasks")
    monkeypatch.delattr(tasks, "RefuseTask", raising=False)
    monkeypatch.setattr(sweep, "start", lambda config, logger: None)
    description = importlib.util.spec_from_file_location("old_kojids_plugin", PLUGIN)
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


def test_a_checkout_that_hangs_is_a_fault_and_its_programs_are_killed() -> None:
    settings = Settings(download=Download(checkout_timeout_seconds=0.3))
    marker = f"{os.getpid()}1"
    with (
        pytest.raises(BuilderFault, match=r"could not be checked out within 0.3 s"),
        kojibuild.checkout_deadline(settings),
    ):
        for _ in range(2):  # as Koji's SCM runs one git after the other
            subprocess.run(["sh", "-c", f"sleep {marker} & wait"])
        raise RuntimeError("git was killed")
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in lines if marker.encode() in line]


def test_a_checkout_in_time_is_left_alone() -> None:
    with kojibuild.checkout_deadline(Settings()):
        subprocess.run(["true"], check=True)
    with pytest.raises(RuntimeError, match="own"), kojibuild.checkout_deadline(Settings()):
        raise RuntimeError("its own reason")


# --- subtasks ---------------------------------------------------------------------------------


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
        return kojibuild.wait_for_subtasks(daemon, sorted(self.subtasks), can_fail)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kojibuild, "_SUBTASKS_SECONDS", 0.01)


def later(action: Callable[[], object]) -> None:
    threading.Timer(0.1, action).start()


def test_subtasks_are_waited_for_and_give_their_results_in_order(at_once: None) -> None:
    parent = Parent(t7="closed", t8="open")
    later(lambda: parent.subtasks.update({8: "closed"}))
    assert parent.wait() == ["closed", "closed"]
    assert Parent(t7="failed", t8="closed").wait(can_fail=(7,)) == ["failed", "closed"]


def test_kojid_wakes_who_waits_for_subtasks() -> None:
    parent = Parent(t7="open")
    handler = signal.getsignal(signal.SIGUSR2)

    def end() -> None:
        parent.subtasks[7] = "closed"
        os.kill(os.getpid(), signal.SIGUSR2)

    later(end)
    started = time.monotonic()
    assert parent.wait() == ["closed"]
    assert time.monotonic() - started < kojibuild._SUBTASKS_SECONDS
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


def test_a_build_is_found_again_when_only_the_answer_to_its_making_was_lost() -> None:
    class Lost:
        def initImageBuild(self, task_id: int, info: dict[str, Any]) -> None:
            raise Refused(1009, "unable to retry call 7")

    found = [{"build_id": 3, "state": 0}]
    hub = Hub(listBuilds=lambda taskID: found, getBuild=lambda build: BUILD, getNextRelease="2")
    hub.host = Lost()
    found_for = {"x86_64": inputs()}
    assert kojibuild.init_build(hub, 5, spec(), found_for) == BUILD
    del found[:]
    with pytest.raises(Refused):
        kojibuild.init_build(hub, 5, spec(), found_for)
