"""What the hub is given: compared, made again where that helps, and never lost."""

from __future__ import annotations

import dataclasses
import hashlib
import xmlrpc.client
from pathlib import Path
from typing import Any

import pytest
from taskparts import BUILD, DAEMON, Hub, Refused, inputs, source, spec

from koji_indirection import handover, hubcalls, taskrun
from koji_indirection.errors import BuilderFault, BuildFailed
from koji_indirection.taskspec import check_provenance


class Files:
    """The directories of tasks at a hub, which damages the first uploads if told to."""

    def __init__(self, damaged: int = 0) -> None:
        self.damaged = damaged
        self.content: dict[str, bytes] = {}
        self.uploads: list[str] = []

    def daemon(self, work_dir: Path, host: Host | None = None, **answers: Any) -> taskrun.Daemon:
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
    handover.upload_verified(files.daemon(iso.parent), iso, "n-1-2.iso", ISO_SHA256)
    assert files.uploads == ["n-1-2.iso"]


def test_a_damaged_upload_is_made_once_more(iso: Path) -> None:
    files = Files(damaged=1)
    handover.upload_verified(files.daemon(iso.parent), iso, "n-1-2.iso", ISO_SHA256)
    assert files.uploads == ["n-1-2.iso"] * 2
    assert files.content["n-1-2.iso"] == ISO


def test_an_upload_that_is_damaged_twice_is_the_builders_fault(iso: Path) -> None:
    files = Files(damaged=2)
    with pytest.raises(BuilderFault, match=r"n-1-2\.iso, uploaded twice, is not on the hub as"):
        handover.upload_verified(files.daemon(iso.parent), iso, "n-1-2.iso", ISO_SHA256)
    assert len(files.uploads) == 2


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def refusing(files: Files, directory: Path, *errors: Exception) -> taskrun.Daemon:
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
    handover.upload_verified(daemon, iso, "n-1-2.iso", ISO_SHA256)
    assert files.content["n-1-2.iso"] == ISO
    assert waits == list(handover.UPLOAD_WAITS_SECONDS[:3])


def test_an_upload_that_the_hub_never_takes_is_one_fault_with_its_reason(
    iso: Path, waits: list[float]
) -> None:
    traceback = "Traceback ...\n  in upload\nOSError: [Errno 28] No space left on device\n"
    full = xmlrpc.client.Fault(1, traceback)
    daemon = refusing(Files(), iso.parent, *[full] * 99)
    with pytest.raises(BuilderFault) as caught:
        handover.upload_verified(daemon, iso, "n-1-2.iso", ISO_SHA256)
    assert caught.value.message == (
        "n-1-2.iso cannot be uploaded: OSError: [Errno 28] No space left on device"
    )
    assert waits == list(handover.UPLOAD_WAITS_SECONDS)


@pytest.mark.parametrize("code", [1002, 1004, 1006, 1007])
def test_an_upload_for_a_task_that_is_no_longer_ours_is_not_tried_again(
    iso: Path, waits: list[float], code: int
) -> None:
    daemon = refusing(Files(), iso.parent, Refused(code, "not yours"))
    with pytest.raises(Refused):
        handover.upload_verified(daemon, iso, "n-1-2.iso", ISO_SHA256)
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
    assert handover.handed_over(daemon) is None
    handover.complete_build(daemon, BUILD, [entry(), {"faultCode": 1, "faultString": "x"}])
    ((name, task_id, build_id, results),) = host.calls
    assert (name, task_id, build_id) == ("completeImageBuild", 5, 3)
    assert set(results) == {"5"}
    assert handover.handed_over(daemon) == (
        "n-1-2",
        [entry(), {"faultCode": 1, "faultString": "x"}],
    )


def test_half_of_what_was_handed_over_is_nothing(tmp_path: Path) -> None:
    files = Files()
    files.content[handover.HANDOVER] = b'{"nvr": "n-1-2", "entr'
    assert handover.handed_over(files.daemon(tmp_path)) is None


def test_a_build_that_is_complete_is_so_whatever_the_hub_has_answered(tmp_path: Path) -> None:
    host = Host(Refused(1009, "unable to retry call"), Refused(1, "it broke"))
    daemon = Files().daemon(tmp_path, host=host, getBuild={"state": hubcalls.COMPLETE})
    handover.complete_build(daemon, BUILD, [entry()])
    building = Files().daemon(tmp_path, host=host, getBuild={"state": hubcalls.BUILDING})
    with pytest.raises(Refused, match="it broke"):
        handover.complete_build(building, BUILD, [entry()])


def test_a_scratch_task_that_runs_again_has_the_rest_done(tmp_path: Path, iso: Path) -> None:
    for errors in ([], [Refused(1000, "Destination exists: /mnt/koji/scratch/x/n-1-2.iso")]):
        files, host = Files(), Host(*errors)
        daemon = files.daemon(tmp_path, host=host)
        files.upload(iso, "n-1-2.iso")
        assert handover.move_to_scratch_again(daemon, [entry()]) == ["n-1-2.iso"]
        assert [call[0] for call in host.calls] == ["moveImageBuildToScratch"]
        assert files.uploads == ["n-1-2.iso"], "nothing is uploaded over a link"


def test_a_scratch_task_that_runs_again_says_what_is_gone(tmp_path: Path) -> None:
    daemon = Files().daemon(tmp_path, host=Host())
    sentence = "an earlier run of this scratch task has made n-1-2.iso, and now the hub does not"
    with pytest.raises(BuilderFault, match=sentence) as caught:
        handover.move_to_scratch_again(daemon, [entry()])
    assert caught.value.hint == "submit the build again"


def test_a_move_to_scratch_that_fails_is_an_error_unless_only_its_answer_was_lost(
    tmp_path: Path, iso: Path
) -> None:
    files, host = Files(), Host(Refused(1009, "unable to retry call"), Refused(1, "disk full"))
    daemon = files.daemon(tmp_path, host=host)
    files.upload(iso, "n-1-2.iso")
    assert handover.move_to_scratch(daemon, "n-1-2", [entry()]) == ["n-1-2.iso"]
    with pytest.raises(Refused, match="disk full"):
        handover.move_to_scratch(daemon, "n-1-2", [entry()])


def test_results_without_an_arch_that_was_built_are_a_failure() -> None:
    built = {"task_id": 3, "arch": "x86_64", "files": ["a"], "logs": ["b"], "rpmlist": []}
    failed = {"faultCode": 1005, "faultString": "it broke"}
    made_from = {"inputs": [{"role": "input image"}], "template": {"template_sha256": "0"}}
    entries = [failed, {**built, **made_from}]
    assert handover.hub_results(entries) == {"3": built}
    assert handover.provenance(entries) == (made_from["inputs"], made_from["template"])
    with pytest.raises(BuildFailed, match="no arch was built: it broke"):
        handover.hub_results([failed])


def test_what_the_hub_is_told_of_inputs_is_what_its_schema_takes() -> None:
    one = inputs()
    check_provenance(spec(), one.images("x86_64"), one.template_record())
    extra = handover.build_extra(spec(), {"x86_64": one})["indirection"]
    assert extra["template_commit"] == "0123abc"
    assert [image["role"] for image in extra["inputs"]] == ["utility image", "input image"]


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
    listed = handover.rpm_list(hub, source())
    assert [one.get("location") for one in listed] == [None, "fedora"]
    assert hub.calls == [("listRPMs", (), {"imageID": 70})]
    assert handover.rpm_list(hub, source(archive_id=None)) == []
