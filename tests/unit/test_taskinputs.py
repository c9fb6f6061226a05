"""What a task builds from: on its way to the hub, to subtasks, into the manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from taskparts import DAEMON, Hub, inputs, source, spec

from koji_indirection import sources, taskinputs
from koji_indirection.config import Download, Settings
from koji_indirection.errors import BuilderFault, BuildFailed


def test_an_arch_that_can_fail_may_have_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "live.tdl"
    path.write_bytes(inputs().template_text)
    daemon = dataclasses.replace(
        DAEMON, work_dir=tmp_path / "task", checkout=lambda url, directory: (tmp_path, url)
    )

    def resolve(session: Any, reference: Any, arch: str, **_: Any) -> sources.Source:
        if arch == "s390x":
            raise BuildFailed(f"there is no image for {arch}")
        return source(arch=arch)

    monkeypatch.setattr(sources, "resolve", resolve)

    def find(**fields: Any) -> Any:
        shutil.rmtree(daemon.work_dir, ignore_errors=True)
        return taskinputs.find_inputs(daemon, spec(**fields), {}, Settings())

    found, no_image = find(arches=["x86_64", "s390x"], can_fail=["s390x"])
    assert set(found) == {"x86_64"}
    assert no_image == {"s390x": "there is no image for s390x"}
    told = found["x86_64"].without_image(no_image["s390x"])
    with pytest.raises(BuildFailed, match="there is no image for s390x"):
        taskinputs.require_image(told)
    for fields in ({"arches": ["x86_64", "s390x"]}, {"arches": ["s390x"], "can_fail": ["s390x"]}):
        with pytest.raises(BuildFailed, match="there is no image for s390x"):
            find(**fields)


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
    place = taskinputs.tag_repo_of(Hub(getRepo={"id": 77}), TARGET)
    daemon = dataclasses.replace(DAEMON, topurl="https://koji.example.com/files/")
    found = inputs(tag_repo=place)
    for arch, directory in (("x86_64", "x86_64"), ("i686", "i386")):
        assert taskinputs.build_spec(daemon, asked, arch, found).repos == (
            "http://example.com/extra",
            f"https://koji.example.com/files/repos/f44-build/77/{directory}",
        )
    assert taskinputs.build_spec(daemon, asked, "x86_64", inputs()) == asked.build
    with pytest.raises(BuilderFault, match="there is no topurl here"):
        taskinputs.build_spec(DAEMON, asked, "x86_64", found)
    secret = dataclasses.replace(DAEMON, topurl="https://me:hunter2@koji.example.com/kojifiles")
    with pytest.raises(BuilderFault, match="no address that guests may know"):
        taskinputs.build_spec(secret, asked, "x86_64", found)


def test_a_build_tag_without_a_repository_is_told() -> None:
    with pytest.raises(BuildFailed, match="the build tag f44-build has no repository") as caught:
        taskinputs.tag_repo_of(Hub(getRepo=None), TARGET)
    assert caught.value.hint == "have one made with: koji regen-repo f44-build"


def test_the_manifest_is_told_where_everything_is_from() -> None:
    origin = inputs().origin()
    assert origin.template == "git+https://example.com/t.git#0123abc"
    assert origin.input_image is not None
    assert origin.input_image.archive_id == 70
    assert origin.input_image.checksum_type == "sha256"
    assert origin.utility_image is not None
    assert (origin.utility_image.role, origin.utility_image.task_id) == ("utility image", 9)


def test_a_checkout_that_hangs_is_a_fault_and_its_programs_are_killed() -> None:
    settings = Settings(download=Download(checkout_timeout_seconds=0.3))
    marker = f"{os.getpid()}1"
    with (
        pytest.raises(BuilderFault, match=r"could not be checked out within 0.3 s"),
        taskinputs.checkout_deadline(settings),
    ):
        for _ in range(2):  # as Koji's SCM runs one git after the other
            subprocess.run(["sh", "-c", f"sleep {marker} & wait"])
        raise RuntimeError("git was killed")
    deadline = time.monotonic() + 10
    while _is_running(marker):  # what was killed may take a moment to be gone
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_running(marker: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if marker.encode() in path.read_bytes():
                return True
    return False


def test_a_checkout_in_time_is_left_alone() -> None:
    with taskinputs.checkout_deadline(Settings()):
        subprocess.run(["true"], check=True)
    with pytest.raises(RuntimeError, match="own"), taskinputs.checkout_deadline(Settings()):
        raise RuntimeError("its own reason")


def test_a_link_in_a_checkout_does_not_lead_out(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "sub").mkdir(parents=True)
    (checkout / "sub" / "real.tdl").write_text("x")
    (checkout / "inside.tdl").symlink_to("sub/real.tdl")
    (checkout / "outside.tdl").symlink_to("/etc/passwd")
    (checkout / "up").symlink_to("..")
    inside = taskinputs.file_in_checkout(checkout, "inside.tdl")
    assert inside == (checkout / "sub" / "real.tdl").resolve()
    for name in ("outside.tdl", "up/anything.tdl", ".git/config"):
        with pytest.raises(BuildFailed, match="leads out of its checkout"):
            taskinputs.file_in_checkout(checkout, name)
    with pytest.raises(BuildFailed, match="there is no template none"):
        taskinputs.file_in_checkout(checkout, "none")
