"""Rules of Koji that our plugins live by and that the traces do not show, on each Koji.

They are why a scenario that passes on the stand-in passes on a real hub.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.base import AnyKoji

HUB = """
import kojihub
from koji.plugin import export

@export
def makeRuleTask(parent=None, label=None):
    return kojihub.kojihub.make_task("sleep", [1], channel="image")
"""


@pytest.fixture(scope="module")
def hub(any_koji: AnyKoji) -> Iterator[AnyKoji]:
    """Without a builder: the test is the builder."""
    any_koji.builder_stop()
    try:
        with any_koji.plugins(name="rules", hub=HUB):
            yield any_koji
    finally:
        any_koji.builder_start()


@pytest.fixture
def host(hub: AnyKoji) -> Iterator[Any]:
    from harness.base import HOST

    session = hub._session(HOST)
    session.exclusiveSession(force=True)
    yield session
    session.logout()


@pytest.fixture
def task(hub: AnyKoji, host: Any) -> Iterator[int]:
    """Open, on the host."""
    admin = hub.admin_session()
    task_id: int = admin.makeRuleTask()
    assert host.host.openTask(task_id)
    yield task_id
    admin.cancelTask(task_id)


def upload(session: Any, directory: str, path: Path, name: str | None = None) -> None:
    with warnings.catch_warnings():
        # The library leaves the file to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        session.uploadWrapper(str(path), directory, name)


def task_directory(task_id: int) -> str:
    import koji

    path: str = koji.pathinfo.taskrelpath(task_id)
    return path


# Sessions


def test_a_renewed_session_has_its_tasks_and_must_go_on_counting_its_calls(
    hub: AnyKoji, host: Any, task: int
) -> None:
    """koji's client begins at zero again, and the hub does not."""
    import koji

    child = host.subsession()
    for _ in range(3):
        child.host.setTaskWeight(task, 1.5)
    expire(hub)
    with pytest.raises(koji.SequenceError):
        child.host.setTaskWeight(task, 2.0)
    child.callnum += 1000
    child.host.setTaskWeight(task, 2.0)
    assert hub.task(task)["weight"] == 2.0
    child.rsession.close()


def expire(hub: AnyKoji) -> None:
    """The builder's subsessions, as the hub does after SessionRenewalTimeout."""
    hub.sql(
        """
        UPDATE sessions SET expired = TRUE WHERE closed = FALSE AND master IS NOT NULL
            AND user_id = (SELECT id FROM users WHERE name = 'builder.test');
        """
    )


def test_a_wrong_password_and_a_closed_session_are_authentication_errors(hub: AnyKoji) -> None:
    import koji

    wrong = koji.ClientSession(hub.server, {"user": "kojiadmin", "password": "wrong"})
    with pytest.raises(koji.AuthError, match="invalid username or password"):
        wrong.login()
    session = hub.admin_session()
    info = session.sinfo
    session.logout()
    session.setSession(info)
    with pytest.raises(koji.AuthError, match="Invalid session or bad credentials"):
        session.getLoggedInUser()


def test_a_call_that_has_changed_something_cannot_be_made_again(hub: AnyKoji) -> None:
    import koji

    session = hub.admin_session()
    session.opts["max_retries"] = 1
    session.cancelTask(session.makeRuleTask())
    session.callnum -= 1
    with pytest.raises(koji.RetryError, match="unable to retry call"):
        session.makeRuleTask()
    session.callnum -= 2
    with pytest.raises(koji.SequenceError):
        session.makeRuleTask()


def test_a_call_that_has_only_read_can_be_made_again(hub: AnyKoji) -> None:
    session = hub.admin_session()
    assert session.getAPIVersion() == 1
    session.callnum -= 1
    assert session.getAPIVersion() == 1


def test_who_takes_the_lock_locks_out_the_subsessions_of_who_had_it(hub: AnyKoji) -> None:
    import koji
    from harness.base import HOST

    first = hub._session(HOST)
    first.exclusiveSession(force=True)
    child = first.subsession()
    assert child.host.getID() == first.host.getID()
    second = hub._session(HOST)
    with pytest.raises(koji.AuthLockError):
        second.exclusiveSession()
    second.exclusiveSession(force=True)
    with pytest.raises(koji.AuthLockError):
        child.getAPIVersion()
    with pytest.raises(koji.AuthError, match="Invalid session"):
        first.getAPIVersion()
    second.logout()


def test_calls_of_hosts_are_for_hosts_that_have_the_lock(hub: AnyKoji) -> None:
    import koji
    from harness.base import HOST

    with pytest.raises(koji.AuthError, match="is not a host"):
        hub.admin_session().host.getID()
    with pytest.raises(koji.AuthError, match="exclusive session"):
        hub._session(HOST).host.getID()


def test_calls_that_are_none_are_told_from_calls_with_wrong_parameters(hub: AnyKoji) -> None:
    import koji

    with pytest.raises(koji.GenericError, match="Invalid method: noSuchCall"):
        hub.anonymous_session().noSuchCall()
    with pytest.raises(koji.ParameterError):
        hub.anonymous_session().getTaskInfo()


def test_of_several_calls_at_once_each_fails_for_itself(hub: AnyKoji) -> None:
    session = hub.admin_session()
    session.multicall = True
    session.getAPIVersion()
    session.getBuild("no-such-1", strict=True)
    session.getAPIVersion()
    first, second, third = session.multiCall()
    assert (first, third) == ([1], [1])
    assert second["faultCode"] == 1000


# Uploads


def test_an_upload_is_checked_by_the_hub(hub: AnyKoji, tmp_path: Path) -> None:
    from hashlib import sha256

    file = tmp_path / "some.file"
    file.write_bytes(b"x" * 3_000_000)
    session = hub.user_session("alice")
    upload(session, "rules/upload", file)
    told = hub.anonymous_session().checkUpload("rules/upload", "some.file", verify="sha256")
    assert (told["size"], told["hexdigest"]) == (3_000_000, sha256(file.read_bytes()).hexdigest())
    assert session.checkUpload("rules/upload", "other.file") is None


def test_an_upload_directory_is_its_first_users(hub: AnyKoji, tmp_path: Path) -> None:
    import koji

    file = tmp_path / "some.file"
    file.write_bytes(b"x")
    upload(hub.user_session("alice"), "rules/owned", file)
    with pytest.raises(koji.GenericError, match="not owner"):
        upload(hub.user_session("bob"), "rules/owned", file)
    for directory in ("../outside", "tasks/1"):
        with pytest.raises(koji.GenericError, match=r"Invalid .*upload directory"):
            upload(hub.user_session("alice"), directory, file)


def test_only_the_host_of_an_open_task_uploads_to_it(
    hub: AnyKoji, host: Any, task: int, tmp_path: Path
) -> None:
    import koji

    file = tmp_path / "task.log"
    file.write_text("hello\n")
    directory = task_directory(task)
    upload(host, directory, file)
    assert hub.task_log(task, "task.log") == "hello\n"
    with pytest.raises(koji.AuthError):
        upload(hub.admin_session(), directory, file)
    hub.admin_session().cancelTask(task)
    with pytest.raises(koji.ActionNotAllowed, match="does not own task"):
        upload(host, directory, file)


# Tasks


def test_a_label_is_given_once(host: Any, task: int) -> None:
    first = host.host.subtask(method="sleep", arglist=[1], parent=task, label="one")
    assert host.host.subtask(method="sleep", arglist=[2], parent=task, label="one") == first
    assert host.host.subtask(method="sleep", arglist=[2], parent=task, label="two") != first


def test_a_cancelled_task_is_cancelled_with_its_subtasks_and_its_build(
    hub: AnyKoji, host: Any, task: int
) -> None:
    import koji

    child = host.host.subtask(method="sleep", arglist=[1], parent=task, label="one")
    build = host.host.initImageBuild(task, image(hub, "cancelled"))
    hub.admin_session().cancelTask(task)
    canceled = koji.TASK_STATES["CANCELED"]
    assert [hub.task(one)["state"] for one in (task, child)] == [canceled, canceled]
    assert host.getBuild(build["id"])["state"] == koji.BUILD_STATES["CANCELED"]
    with pytest.raises(koji.GenericError, match="is canceled"):
        host.getTaskResult(task)


def test_another_users_task_is_not_cancelled(hub: AnyKoji, host: Any, task: int) -> None:
    import koji

    with pytest.raises(koji.ActionNotAllowed, match="not owner"):
        hub.user_session("alice").cancelTask(task)


def test_a_task_has_no_result_before_its_end(hub: AnyKoji, host: Any, task: int) -> None:
    import koji

    with pytest.raises(koji.GenericError, match=f"Task {task} is not finished"):
        host.getTaskResult(task)


# Builds

_number = iter(range(1, 1000))


def image(hub: AnyKoji, name: str) -> dict[str, Any]:
    return {"name": f"rules-{name}", "version": "1", "release": f"{next(_number)}", "epoch": 0}


@pytest.fixture
def complete(host: Any, task: int, hub: AnyKoji, tmp_path: Path) -> Callable[..., Any]:
    """Upload these files, make and complete a build of them; the build."""

    def complete(*names: str, **changes: Any) -> Any:
        build = host.host.initImageBuild(task, image(hub, "build"))
        for name in names:
            (tmp_path / name).write_text(f"content of {name}\n")
            upload(host, task_directory(task), tmp_path / name)
        entry = {
            "task_id": task,
            "arch": "x86_64",
            "files": [name for name in names if not name.endswith(".log")],
            "logs": [],
            "rpmlist": [],
            **changes,
        }
        results = {"1": {key: value for key, value in entry.items() if value is not None}}
        try:
            host.host.completeImageBuild(task, build["id"], results)
        finally:
            build = host.getBuild(build["id"])
        return build

    return complete


def test_files_and_all_logs_of_a_task_become_its_builds(
    hub: AnyKoji, host: Any, complete: Callable[..., Any]
) -> None:
    build = complete("boot.iso", "record.json", "job.log")
    assert build["state"] == 1
    names = {one["filename"]: one["type_name"] for one in host.listArchives(build["id"])}
    assert names == {"boot.iso": "iso", "record.json": "json"}
    directory = hub.topdir / "packages" / "rules-build" / "1" / build["release"]
    assert (directory / "images" / "boot.iso").read_text() == "content of boot.iso\n"
    assert (directory / "data/logs/image/x86_64/job.log").is_file()


def test_an_entry_without_a_task_id_is_passed_over(host: Any, complete: Callable[..., Any]) -> None:
    build = complete("boot.iso", task_id=None)
    assert build["state"] == 1
    assert host.listArchives(build["id"]) == []


def test_files_of_a_scratch_build_are_moved_once(
    hub: AnyKoji, host: Any, task: int, tmp_path: Path
) -> None:
    import koji

    (tmp_path / "boot.iso").write_text("an iso\n")
    upload(host, task_directory(task), tmp_path / "boot.iso")
    entry = {"task_id": task, "arch": "x86_64", "files": ["boot.iso"], "logs": [], "rpmlist": []}
    host.host.moveImageBuildToScratch(task, {"1": entry})
    assert len(list((hub.topdir / "scratch").rglob(f"task_{task}/boot.iso"))) == 1
    # The plugin tells by this word that an earlier run of its task has moved them.
    with pytest.raises(koji.GenericError, match="exists"):
        host.host.moveImageBuildToScratch(task, {"1": entry})


def test_a_file_of_no_known_type_leaves_the_build_as_it_was(
    hub: AnyKoji, host: Any, task: int, complete: Callable[..., Any]
) -> None:
    import koji

    with pytest.raises(koji.BuildError, match=r"boot\.efi"):
        complete("boot.efi")
    (build,) = hub.admin_session().listBuilds(taskID=task)
    assert build["state"] == koji.BUILD_STATES["BUILDING"]
    host.host.failBuild(task, build["build_id"])
    with pytest.raises(koji.GenericError, match="cannot update build"):
        host.host.failBuild(task, build["build_id"])


def test_a_build_is_made_again_by_its_own_task_only(hub: AnyKoji, host: Any, task: int) -> None:
    import koji

    info = image(hub, "again")
    build = host.host.initImageBuild(task, info)
    assert host.host.initImageBuild(task, info)["id"] == build["id"]
    other = hub.admin_session().makeRuleTask()
    assert host.host.openTask(other)
    with pytest.raises(koji.GenericError, match="already in progress"):
        host.host.initImageBuild(other, info)
    host.host.failBuild(task, build["id"])
    assert host.host.initImageBuild(other, info)["id"] == build["id"], "a failed one makes room"
    hub.admin_session().cancelTask(other)


@pytest.mark.parametrize(
    "name",
    ["a.iso", "a.qcow2", "a.raw", "a.raw.xz", "a.tar.gz", "a.json", "a.xml", "a.ks", "vmlinuz"],
)
def test_a_type_is_known_by_its_longest_extension(hub: AnyKoji, name: str) -> None:
    kind = hub.anonymous_session().getArchiveType(filename=name)
    assert name.split(".", 1)[-1] in kind["extensions"].split()


@pytest.mark.parametrize("name", ["a.efi", "a.log", "a.bin", "a.zst", "a.raw.zst", "a.html", "a"])
def test_other_types_are_not_known(hub: AnyKoji, name: str) -> None:
    assert hub.anonymous_session().getArchiveType(filename=name) is None


def test_the_latest_build_of_a_tag_is_the_last_one_that_was_tagged(
    hub: AnyKoji, tmp_path: Path
) -> None:
    from harness.base import BUILD_TAG, DEST_TAG, ImageFile

    for release in ("2", "1"):
        file = tmp_path / f"latest.{release}.iso"
        file.write_text(release)
        hub.import_image_build(f"rules-latest-1-{release}", [ImageFile(file)], tag=DEST_TAG)
    session = hub.anonymous_session()
    (latest,) = session.getLatestBuilds(BUILD_TAG, package="rules-latest")
    assert latest["nvr"] == "rules-latest-1-1", "inherited"
    tagged = session.listTagged(DEST_TAG, package="rules-latest")
    assert [one["nvr"] for one in tagged] == ["rules-latest-1-1", "rules-latest-1-2"]
    assert session.getNextRelease({"name": "rules-latest", "version": "1"}) == "2"
