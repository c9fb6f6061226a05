"""What the builder does around a build, with a stand-in for the hub where one is asked."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from pathlib import Path
from typing import IO, Any

import pytest
from taskparts import BUILD, DAEMON, Hub, Refused, inputs, source, spec

from koji_indirection import kojibuild
from koji_indirection.errors import BuilderFault, BuildFailed, UsageError
from koji_indirection.kojibuild import ArchiveTypes, LiveLogs

# --- names of results -------------------------------------------------------------------------


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


# --- target and build -------------------------------------------------------------------------


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


# --- live logs and evidence -------------------------------------------------------------------


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


def test_errors_name_images_as_koji_does() -> None:
    path = Path("/var/cache/koji-indirection/images/sha256-00")
    with pytest.raises(BuildFailed) as caught, kojibuild._as_users_know_it({path: source()}):
        raise BuildFailed(f"input image {path} is no disk", f"try `file {path}`")
    assert str(caught.value) == "input image in.qcow2 of in-1-1 is no disk (try `file in.qcow2`)"
