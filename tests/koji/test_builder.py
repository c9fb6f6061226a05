"""The builder plugin on any Koji of the tests, with real VMs: what a user sees of each build."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from taskflow import (
    INPUT,
    MAKE_ISO,
    RESULTS,
    Submit,
    build_of,
    builder_conf,
    fault_of,
    state_of,
    wait_for_log,
)

from koji_indirection import accel

if TYPE_CHECKING:
    from harness.base import AnyKoji


def test_a_build_is_complete_tagged_and_says_what_it_was_made_from(
    koji: AnyKoji, submit: Submit
) -> None:
    task_id = submit("echo hello from the guest", MAKE_ISO)
    wait_for_log(koji, task_id, "job.log", "hello from the guest")
    assert state_of(koji, task_id) == ("OPEN", "BUILDING"), "the log was there while it ran"
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE"), koji.logs

    session = koji.anonymous_session()
    build = build_of(koji, task_id)
    nvr = build["nvr"]
    assert [tag["name"] for tag in session.listTags(nvr)] == ["images-candidate"]
    archives = {one["filename"]: one for one in session.listArchives(buildID=build["id"])}
    iso, manifest = f"{nvr}.x86_64.iso", f"{nvr}.x86_64.manifest.json"
    assert set(archives) == {iso, manifest}
    assert session.listArchives(buildID=build["id"], type="image")[0]["arch"] == "x86_64"

    images = f"{koji.topurl}/packages/{nvr.replace('-', '/')}/images"
    with urllib.request.urlopen(f"{images}/{manifest}") as answer:
        record = json.load(answer)
    assert record["outcome"] == "built"
    assert [one["sha256"] for one in record["outputs"]] == [archives[iso]["checksum"]]

    logs = koji.topdir / "packages" / nvr.replace("-", "/") / "data/logs/image/x86_64"
    names = {path.name for path in logs.iterdir()}
    assert names >= {"job.log", "console.log", "build.log", "task.log", "template.log"}
    assert "hello from the guest" in (logs / "job.log").read_text()
    assert "mount /dev/vdb1 /mnt" in (logs / "template.log").read_text()

    made_from = build["extra"]["indirection"]
    assert [(one["role"], one["nvr"]) for one in made_from["inputs"]] == [
        ("utility image", INPUT),
        ("input image", INPUT),
    ]
    assert sorted(
        (rpm["nvr"], rpm["external_repo_name"])
        for rpm in session.listRPMs(imageID=archives[iso]["id"])
    ) == [("bash-5-1", "INTERNAL"), ("kernel-6-1", "elsewhere")]
    commit = build["source"].rpartition("#")[2]
    assert len(commit) == 40, "not the branch"
    assert made_from["template_commit"] == commit
    components = session.listArchives(imageID=archives[iso]["id"])
    assert [one["filename"] for one in components] == ["tiny.x86_64.qcow2"]


def test_each_of_several_arches_has_a_subtask_and_its_own_file(
    koji: AnyKoji, submit: Submit
) -> None:
    task_id = submit(MAKE_ISO, arches=["x86_64", "i686"])
    koji.wait_task(task_id, 400)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE"), koji.logs
    build = build_of(koji, task_id)
    session = koji.anonymous_session()
    assert {
        one["filename"].removeprefix(build["nvr"]): one["arch"]
        for one in session.listArchives(buildID=build["id"], type="image")
        if one["filename"].endswith(".iso")
    } == {".x86_64.iso": "x86_64", ".i686.iso": "i686"}
    children = session.getTaskChildren(task_id)
    assert {one["label"] for one in children} == {"x86_64", "i686", "tag"}
    logs = koji.topdir / "packages" / build["nvr"].replace("-", "/") / "data/logs/image"
    assert (logs / "x86_64/job.log").exists()
    assert (logs / "i686/job.log").exists()


@pytest.mark.parametrize(
    ("can_fail", "states"), [([], ("FAILED", "FAILED")), (["i686"], ("CLOSED", "COMPLETE"))]
)
def test_an_arch_that_fails_fails_the_build_unless_it_may(
    koji: AnyKoji, submit: Submit, can_fail: list[str], states: tuple[str, str]
) -> None:
    task_id = submit(
        MAKE_ISO,
        arches=["x86_64", "i686"],
        can_fail=can_fail,
        arch_build={"i686": {"results": ["/results/other.iso"]}},
    )
    koji.wait_task(task_id, 400)
    assert state_of(koji, task_id) == states
    if can_fail:
        build = build_of(koji, task_id)
        archives = koji.anonymous_session().listArchives(buildID=build["id"], type="image")
        assert {one["arch"] for one in archives} == {"x86_64"}
    else:
        assert "the result /results/other.iso is missing" in fault_of(koji, task_id)


def test_an_arch_without_an_image_fails_alone_where_it_may(koji: AnyKoji, submit: Submit) -> None:
    task_id = submit(
        MAKE_ISO,
        arches=["x86_64", "i686"],
        can_fail=["i686"],
        input_archive="tiny.x86_64.*",
    )
    koji.wait_task(task_id, 400)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE"), fault_of(koji, task_id)
    children = koji.anonymous_session().getTaskChildren(task_id)
    (failed,) = (one["id"] for one in children if one["label"] == "i686")
    assert "there is no image for i686, only for x86_64" in fault_of(koji, failed)


def test_a_scratch_build_leaves_its_files_and_no_build(koji: AnyKoji, submit: Submit) -> None:
    task_id = submit(
        f"{MAKE_ISO} && echo {{}} >results/images/list.json",
        scratch=True,
        build={"results": ["/results/images/boot.iso", "/results/images/*.json"]},
    )
    assert koji.wait_task(task_id, 300)["state"] == 2, fault_of(koji, task_id)
    assert koji.admin_session().listBuilds(taskID=task_id) == []
    scratch = koji.topdir / "scratch" / "kojiadmin" / f"task_{task_id}"
    names = {path.name.split("-", 1)[0] for path in scratch.iterdir() if path.suffix != ".log"}
    assert names == {"boot", "list", "live"}
    assert (scratch / "job.log").exists()


def test_a_command_that_fails_fails_task_and_build_and_keeps_the_logs(
    koji: AnyKoji, submit: Submit, tmp_path: Path
) -> None:
    task_id = submit("echo about to fail; exit 3")
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("FAILED", "FAILED")
    fault = fault_of(koji, task_id)
    assert fault.startswith("build failed: command 'step1' exited with status 3")
    assert "Traceback" not in fault
    assert "about to fail" in koji.task_log(task_id, "job.log")
    (manifest,) = (name for name in koji.task_files(task_id) if name.endswith("manifest.json"))
    assert json.loads(koji.task_log(task_id, manifest))["outcome"] == "build failed"

    options = {
        "output": tmp_path / "out",
        "work-dir": tmp_path / "work",
        "cache-dir": koji.work / "cli-cache",
    }
    replayed = koji.cli(
        *("indirection-replay", task_id, *(f"--{name}={path}" for name, path in options.items())),
        user="nobody",
        timeout_seconds=600,
    )
    assert replayed.returncode == 1
    assert replayed.stderr.splitlines()[-1] == fault
    assert "about to fail" in (tmp_path / "out/logs/job.log").read_text()


def test_a_missing_result_fails_the_build(koji: AnyKoji, submit: Submit) -> None:
    task_id = submit("true")
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("FAILED", "FAILED")
    assert "the result /results/images/boot.iso is missing" in fault_of(koji, task_id)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"build": {"results": ["/results/boot.efi"]}}, "boot.efi is of no type that this Koji"),
        ({"target": "nowhere"}, "there is no build target nowhere"),
        ({"name": "unlisted"}, "the package unlisted is not in the list of the tag"),
        ({"input_image": "tiny-7-7"}, "input image tiny-7-7: there is no such build"),
        ({"template": "dead.tdl"}, "there is no template dead.tdl in the checkout"),
        ({"arches": ["x86_64", "ppc64le"]}, "ppc64le is not an arch of the build tag"),
        ({"arches": ["x86_64", "aarch64"]}, "there is no image for aarch64, only for"),
        (
            {"tag_repo": True, "build": {"network": "lan"}},
            "the build tag images-build has no repository that is ready",
        ),
        ({"tempalte": "x"}, "did you mean 'template'"),
        (
            {"build": {"workspace_size_bytes": 1025 * 2**30}},
            "workspace size is 1025 GiB, above this machine's limit of 1 TiB (max_workspace_size)",
        ),
    ],
)
def test_what_cannot_work_fails_at_once_and_makes_no_build(
    koji: AnyKoji, submit: Submit, fields: dict[str, Any], reason: str
) -> None:
    task_id = submit(MAKE_ISO, **fields)
    koji.wait_task(task_id, 60)
    fault = fault_of(koji, task_id)
    assert reason in fault
    assert "Traceback" not in fault
    assert koji.admin_session().listBuilds(taskID=task_id) == []


def test_a_template_repository_that_is_not_allowed_is_refused(
    koji: AnyKoji, submit: Submit
) -> None:
    task_id = submit(MAKE_ISO, template_scm="git+http://localhost/x.git#main")
    koji.wait_task(task_id, 60)
    assert "is not in the list of allowed SCMs" in fault_of(koji, task_id)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"accel": "kvm"}, "KVM was asked for but cannot be used"),
        ({"build": {"network": "wan"}}, "asks for the network wan, this host allows lan"),
    ],
)
def test_a_host_without_what_the_build_needs_refuses_softly(
    koji: AnyKoji, submit: Submit, tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    if "accel" in fields and accel.choose("auto", cache_dir=tmp_path).kind == "kvm":
        pytest.skip("this host has KVM")
    task_id = submit(MAKE_ISO, **fields)
    deadline = time.monotonic() + 30
    while not koji.refusals(task_id):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (refusal,) = koji.refusals(task_id)
    assert refusal["soft"]
    assert reason in refusal["msg"]


def test_images_are_named_in_every_way_that_koji_has(koji: AnyKoji, submit: Submit) -> None:
    """By build, by latest build in a tag that inherits it, by scratch and by closed task."""
    session = koji.admin_session()
    session.createTag("images-child", parent="images-candidate")
    koji.add_package("tiny")
    session.tagBuildBypass("images-candidate", INPUT)
    # The partition table makes it a disk.
    raw = f"{RESULTS} && head -c 1048576 input_image.raw >results/disk.raw"
    mark = "dd of=results/disk.raw bs=1024 seek=512 conv=notrunc"
    utility = {
        "utility_image": "latest:tiny@images-child",
        "build": {"results": ["/results/*.raw"]},
    }

    def made_by(task_id: int) -> int:
        assert koji.wait_task(task_id, 300)["state"] == 2, fault_of(koji, task_id)
        return task_id

    scratch = submit(
        f"{raw} && echo made by scratch | {mark}",
        **utility,
        scratch=True,
        input_image=f"build:{session.getBuild(INPUT)['id']}",
    )
    made_by(scratch)
    closed = submit(
        f"{raw} && grep -q 'made by scratch' input_image.raw && echo made by closed | {mark}",
        **utility,
        skip_tag=True,
        input_image=f"task:{scratch}",
    )
    made_by(closed)
    build = build_of(koji, closed)
    assert session.listTags(build["nvr"]) == [], "it was to be left untagged"
    inputs = {one["role"]: one for one in build["extra"]["indirection"]["inputs"]}
    assert inputs["input image"]["task_id"] == scratch
    assert inputs["utility image"]["nvr"] == INPUT
    made_by(
        submit(
            f"{raw} && grep -q 'made by closed' input_image.raw",
            **utility,
            scratch=True,
            input_image=f"task:{closed}",
        )
    )


def test_images_are_read_in_place_where_the_tree_of_koji_is_mounted(
    koji: AnyKoji, submit: Submit
) -> None:
    mounted = {"topdir": str(koji.topdir), "topurl": "http://127.0.0.1:1/nobody-is-here"}
    conf = builder_conf(koji, cache="unused-cache")
    (image,) = (koji.topdir / "packages" / INPUT.replace("-", "/")).rglob("tiny.x86_64.qcow2")
    before = as_it_is(image)
    koji.builder_restart(settings=mounted, plugin_conf=conf)
    try:
        scratch = submit(MAKE_ISO, scratch=True)  # whose template is read in place, too
        assert koji.wait_task(scratch, 300)["state"] == 2, fault_of(koji, scratch)
        assert f"reading it in place, {image}" in koji.task_log(scratch, "task.log")
        assert not (koji.work / "unused-cache" / "images").exists()
        assert as_it_is(image) == before
    finally:
        koji.builder_restart(plugin_conf=builder_conf(koji))


def as_it_is(path: Path) -> tuple[int, ...]:
    """All that a build could change of an image, which libvirt would like to own."""
    status = path.stat()
    return status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns


def test_the_manifest_names_template_and_images_as_koji_does(koji: AnyKoji, submit: Submit) -> None:
    task_id = submit("exit 1", build={"results": ["/results/*.iso"]})
    koji.wait_task(task_id, 300)
    nvr = build_of(koji, task_id)["nvr"]
    record = json.loads(koji.task_log(task_id, f"{nvr}.x86_64.manifest.json"))
    (archive,) = (
        one
        for one in koji.anonymous_session().listArchives(buildID=koji_id(koji, INPUT))
        if one["filename"] == "tiny.x86_64.qcow2"
    )
    assert record["input_image"]["koji"] == {
        "reference": INPUT,
        "role": "input image",
        "nvr": INPUT,
        "build_id": archive["build_id"],
        "archive_id": archive["id"],
        "task_id": None,
        "filename": "tiny.x86_64.qcow2",
        "arch": "x86_64",
        "checksum": archive["checksum"],
        "checksum_type": "sha256",
    }
    assert record["input_image"]["sha256"] == archive["checksum"]
    assert record["utility_image"]["koji"]["role"] == "utility image"
    assert record["template"]["source"] == build_of(koji, task_id)["source"]


def koji_id(koji: AnyKoji, nvr: str) -> int:
    return int(koji.anonymous_session().getBuild(nvr)["id"])


def test_a_guest_that_does_not_come_up_leaves_its_picture_and_a_manifest(
    koji: AnyKoji, submit: Submit
) -> None:
    task_id = submit(MAKE_ISO, build={"boot_timeout_seconds": 3})
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("FAILED", "FAILED")
    assert fault_of(koji, task_id).startswith("builder fault: ")
    files = koji.task_files(task_id)
    assert "screenshot.png" in files
    picture = koji.admin_session().downloadTaskOutput(task_id, "screenshot.png")
    assert picture.startswith(b"\x89PNG")
    (manifest,) = (name for name in files if name.endswith("manifest.json"))
    assert json.loads(koji.task_log(task_id, manifest))["outcome"] == "builder fault"
    assert koji.task_log(task_id, "task.log").rstrip().splitlines()[-1].count("builder fault: ")


def test_the_output_of_the_guest_is_followed_with_watch_logs(koji: AnyKoji, submit: Submit) -> None:
    task_id = submit("echo one; sleep 4; echo two; sleep 6", MAKE_ISO)
    states: dict[str, int] = {}
    with subprocess.Popen(
        koji.cli_argv("watch-logs", task_id),
        env=koji.cli_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        limit = threading.Timer(300, watching.kill)
        limit.start()
        for line in watching.stdout:
            if line.strip() in ("one", "two"):
                states[line.strip()] = koji.task(task_id)["state"]
        limit.cancel()
    assert watching.returncode == 0
    assert states == {"one": 1, "two": 1}, "both were seen while the task was open"
    koji.wait_task(task_id, 60)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE")


def test_a_template_repository_can_be_allowed_by_the_hubs_policy(
    koji: AnyKoji, submit: Submit
) -> None:
    by_policy = {
        "allowed_scms": "",
        "allowed_scms_use_config": "False",
        "allowed_scms_use_policy": "True",
    }
    rules = "match scm_host 127.0.0.1* && bool scratch :: deny\nmatch scm_host 127.0.0.1* :: allow"
    koji.builder_restart(settings=by_policy, plugin_conf=builder_conf(koji))
    koji.hub_restart(policy={"build_from_scm": f"{rules}\nall :: deny nowhere else"})
    try:
        # A result of no type: refused after the checkout, and before anything is fetched.
        allowed = submit(MAKE_ISO, build={"results": ["/results/boot.efi"]})
        denied = submit(MAKE_ISO, template_scm="git+http://localhost/x.git#main")
        koji.wait_task(allowed, 60)
        koji.wait_task(denied, 60)
        assert "boot.efi is of no type" in fault_of(koji, allowed)
        assert "is not allowed, reason: nowhere else" in fault_of(koji, denied)
    finally:
        koji.hub_restart()
        koji.builder_restart(plugin_conf=builder_conf(koji))
