"""The hub stumbles: what is asked again, and what must not be."""

from __future__ import annotations

import xmlrpc.client
from typing import Any

import pytest

from koji_indirection import hubcalls
from koji_indirection.errors import BuilderFault
from koji_indirection.hubcalls import PatientSession

# As PostgreSQL's complaint came through a hub.
DEADLOCK = xmlrpc.client.Fault(
    1,
    "<class 'psycopg2.errors.DeadlockDetected'>: deadlock detected\n"
    "DETAIL:  Process 7 waits for ShareLock on transaction 9; blocked by process 8.\n",
)


class Method:
    """A call of a session, as koji.ClientSession makes them: with names below it."""

    def __init__(self, session: Session, name: str) -> None:
        self.session = session
        self.name = name

    def __getattr__(self, part: str) -> Method:
        return Method(self.session, f"{self.name}.{part}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.session.calls.append(self.name)
        if self.session.errors:
            raise self.session.errors.pop(0)
        return (self.name, args, kwargs)


class Session:
    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls: list[str] = []
        self.opts: dict[str, float] = {"timeout": 5}
        self.callnum = 0

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def test_a_call_that_lost_in_a_deadlock_is_made_again(waits: list[float]) -> None:
    session = Session(DEADLOCK, DEADLOCK)
    answer = PatientSession(session).host.taskSetWait(5, [6, 7])
    assert answer == ("host.taskSetWait", (5, [6, 7]), {})
    assert session.calls == ["host.taskSetWait"] * 3
    assert waits == list(hubcalls.WAITS_SECONDS[:2])


def test_a_file_that_the_hub_still_writes_is_asked_for_again() -> None:
    koji = pytest.importorskip("koji")
    session = Session(koji.LockError("[Errno 11] Resource temporarily unavailable"))
    assert PatientSession(session).checkUpload("tasks/1/1", "x", verify="sha256")[0] == (
        "checkUpload"
    )


@pytest.mark.parametrize(
    "error",
    [
        xmlrpc.client.Fault(1, "<class 'KeyError'>: 'task_id'"),
        xmlrpc.client.Fault(1004, "deadlock detected in the wording of a refusal"),
        OSError("koji's own client has tried that often enough: deadlock detected"),
    ],
)
def test_other_errors_are_final(error: Exception, waits: list[float]) -> None:
    session = Session(error)
    with pytest.raises(type(error)):
        PatientSession(session).getBuild(1)
    assert (session.calls, waits) == (["getBuild"], [])


@pytest.mark.parametrize("name", ["completeImageBuild", "moveImageBuildToScratch"])
def test_what_moves_files_is_never_repeated(name: str) -> None:
    session = Session(DEADLOCK)
    with pytest.raises(xmlrpc.client.Fault, match="deadlock"):
        getattr(PatientSession(session).host, name)(1, {})
    assert session.calls == [f"host.{name}"]


def test_patience_ends(waits: list[float]) -> None:
    session = Session(*[DEADLOCK] * 20)
    with pytest.raises(xmlrpc.client.Fault, match="deadlock"):
        PatientSession(session).getBuild(1)
    assert waits == list(hubcalls.WAITS_SECONDS)
    assert len(session.calls) == len(waits) + 1


def fault(code: int, text: str = "") -> xmlrpc.client.Fault:
    return xmlrpc.client.Fault(code, text)


def test_a_call_whose_answer_was_lost_is_made_again_where_that_changes_nothing() -> None:
    session = Session(fault(1009, "unable to retry call 7"))
    assert PatientSession(session).host.subtask(label="tag")[0] == "host.subtask"
    assert len(session.calls) == 2
    for name in ("initImageBuild", "completeImageBuild"):
        session = Session(fault(1009))
        with pytest.raises(xmlrpc.client.Fault):
            getattr(PatientSession(session).host, name)(1, {})
        assert len(session.calls) == 1


@pytest.mark.parametrize("name", ["getBuild", "uploadWrapper", "rawUpload"])
def test_a_renewed_session_counts_on_from_beyond_its_old_number(name: str) -> None:
    session = Session(fault(1008, "812 > 0 (session 5)"))
    session.callnum = 0
    assert getattr(PatientSession(session), name)(1)[0] == name
    assert session.callnum > 812
    assert len(session.calls) == 2


def test_no_answer_is_one_fault_that_names_the_call() -> None:
    requests = pytest.importorskip("requests")
    for error in (
        requests.exceptions.ConnectionError("refused\nor so"),
        requests.exceptions.ReadTimeout("read timeout=300"),
        requests.exceptions.HTTPError("502 Bad Gateway for url: http://me:hunter2@hub/kojihub"),
        xmlrpc.client.ResponseError(),
    ):
        with pytest.raises(BuilderFault, match="the Koji hub did not answer uploadWrapper: ") as it:
            PatientSession(Session(error)).uploadWrapper("a", "b")
        assert "\n" not in str(it.value)
        assert "hunter2" not in str(it.value)


def test_a_silent_hub_is_waited_for_so_long_and_longer_while_it_reads_images() -> None:
    seen: dict[str, float] = {}

    class Noting(Method):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            seen[self.name] = self.session.opts["timeout"]

        def __getattr__(self, part: str) -> Method:
            return Noting(self.session, f"{self.name}.{part}")

    class Hub(Session):
        def __getattr__(self, name: str) -> Method:
            return Noting(self, name)

    hub = Hub()
    hub.opts = {"timeout": 43200}
    patient = PatientSession(hub, 300, 7200)
    patient.checkUpload("tasks/1/1", "x", verify="sha256")
    patient.host.completeImageBuild(1, 2, {})
    patient.getBuild(1)
    patient.uploadWrapper("a", "b")
    assert seen == {
        "checkUpload": 7200,
        "host.completeImageBuild": 7200,
        "getBuild": 300,
        "uploadWrapper": 300,
    }
    hub.opts = {"timeout": 60}
    assert PatientSession(hub, 300, 7200).opts == {"timeout": 60}, "kojid.conf has a shorter one"


def test_all_else_is_the_sessions_own() -> None:
    session = Session()
    patient = PatientSession(session)
    assert patient.opts is session.opts
    assert patient.getUser("a")[0] == "getUser"
