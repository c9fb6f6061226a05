"""The hub stumbles: what is asked again, and what must not be."""

from __future__ import annotations

import xmlrpc.client
from typing import Any

import pytest

from koji_indirection import hubcalls
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
        self.opts = {"timeout": 5}

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


def test_all_else_is_the_sessions_own() -> None:
    session = Session()
    patient = PatientSession(session)
    assert patient.opts is session.opts
    assert patient.uploadWrapper("a", "b")[0] == "uploadWrapper"
