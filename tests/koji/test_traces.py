"""The stand-in hub, held to conversations that a real hub has had; they are in traces/.

The same calls in the same order must get the same answers and the same faults. Only what
cannot be the same may differ, and still must be of the same kind: times, keys, checksums.
Ids are the same: before a call that makes something the test sets what the next id is.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import pytest

if TYPE_CHECKING:
    from standin.standin import StandInKoji

TRACES = sorted((Path(__file__).parent / "traces").glob("*.jsonl"))
BUILDER = "rigbuilder"
KEY = "of-the-test"

# What a plugin of the hub on which the traces were recorded did.
HUB = """
import kojihub
from koji.context import context
from koji.plugin import export

@export
def probeImage(name, version, arches, target, opts=None):
    context.session.assertPerm("image")
    return kojihub.make_task("probeImage", [name, version, arches, target, opts], channel="image")
"""

# What was there already when a recording began.
BEFORE = """
    INSERT INTO users (id, name, password, usertype) VALUES
        (2, 'alice', 'secret', 0), (3, 'rigbuilder', 'secret', 1);
    INSERT INTO user_perms (user_id, perm_id) SELECT 2, id FROM permissions WHERE name = 'image';
    INSERT INTO host (id, user_id, name, arches, capacity, ready, update_time)
        VALUES (1, 3, 'rigbuilder', 'x86_64 aarch64', 8.0, TRUE, 1.5);
    INSERT INTO host_channels (host_id, channel_id) SELECT 1, id FROM channels;
    INSERT INTO tag (id, name, arches) VALUES (1, 'rig-build', 'x86_64 aarch64'),
        (2, 'rig-dest', '');
    INSERT INTO build_target (id, name, build_tag, dest_tag) VALUES (1, 'rig', 1, 2);
    INSERT INTO package (id, name) VALUES (1, 'other'), (2, 'probe');
    INSERT INTO tag_packages (tag_id, package_id, owner) VALUES (2, 2, 1);
    INSERT INTO content_generator (id, name) VALUES (1, 'rigcg');
    INSERT INTO cg_users (cg_id, user_id) VALUES (1, 3);
    INSERT INTO events (id, time) VALUES (11, 1.5), (17, 1.5);
    INSERT INTO build (id, pkg_id, version, release, epoch, state, task_id, owner, create_event,
        start_time, completion_time)
        VALUES (1, 2, '1.0', '1', 0, 1, 1, 2, 11, 1.5, 1.5),
            (4, 2, '2.0', '1', 0, 1, 14, 2, 17, 1.5, 1.5);
    INSERT INTO archiveinfo (id, type_id, btype_id, build_id, filename, size, checksum,
        checksum_type, extra)
        SELECT 1, archivetypes.id, btype.id, 1, 'probe-1.0-1.x86_64-boot.iso', 3032774,
            '614a2b6522a442d56af45cf0433564e51821ea57cf69c85ad483deb7a91726ca', 2, NULL
            FROM archivetypes, btype WHERE archivetypes.name = 'iso' AND btype.name = 'image'
        UNION ALL SELECT 6, archivetypes.id, btype.id, 4, 'probe-2.0-1.x86_64-boot.iso', 3032774,
            '1f2d93ae62846fd4560791a3eddcc739292fe95876b62b402ec677436b140e40', 2,
            '{"image": {"arch": "x86_64"}, "sbom": "x"}'
            FROM archivetypes, btype WHERE archivetypes.name = 'iso' AND btype.name = 'image';
    INSERT INTO image_archives (archive_id, arch) VALUES (1, 'x86_64'), (6, 'x86_64');
"""

# The table whose next id a call takes, and where its answer has that id.
MAKES = {
    "login": ("sessions", "session-id"),
    "subsession": ("sessions", "session-id"),
    "probeImage": ("task", None),
    "makeTask": ("task", None),
    "host.subtask": ("task", None),
    "host.initImageBuild": ("build", "id"),
    "CGInitBuild": ("build", "build_id"),
}
# A hub answers these in whatever order its database has them.
UNORDERED = {
    "getTaskChildren": lambda one: one["id"],
    "host.getHostTasks": lambda one: one["id"],
    "host.taskWait": None,  # two lists of ids
}
SECRETS = ("session-key", "token")
TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?\+00:00")


class Replay:
    """One trace, played to a hub call by call."""

    def __init__(self, koji: StandInKoji, path: Path) -> None:
        self.koji = koji
        self.calls = [json.loads(line) for line in path.read_text().splitlines()]
        self.differences: list[str] = []
        self._keys: dict[str, str] = {}
        self._contents = dict[tuple[str, str], bytearray]()
        self._replaced: dict[str, str] = {}
        self._read_contents()

    def _read_contents(self) -> None:
        """Of the files that were uploaded, what was downloaded again; the rest is made up."""
        for call in self.calls:
            if call.get("method") == "downloadTaskOutput":
                task_id, name, options = call["params"]
                content = self._contents.setdefault(
                    (f"tasks/{task_id}/{task_id}", name), bytearray()
                )
                data = base64.b64decode(call["ret"])
                content[options["offset"] : options["offset"] + len(data)] = data

    def prepare(self) -> None:
        """The state of the hub when the recording began, with the sessions that were open then."""
        self.koji.sql(BEFORE)
        opened = {
            str(call["ret"]["session-id"])
            for call in self.calls
            if call.get("method") in ("login", "subsession")
        }
        for number in sorted({call["sess"] for call in self.calls if call["sess"]} - opened):
            self._keys[number] = KEY
            self.koji.sql(
                "INSERT INTO sessions (id, user_id, key, exclusive)"
                f" VALUES ({number}, 3, :'key', TRUE);",
                key=KEY,
            )
        build = min((self._made(call)[1] for call in self._that_make("build")), default=0)
        if build:
            event = self._event_of(build)
            self.koji.sql(
                f"DELETE FROM archiveinfo WHERE build_id >= {build};"
                f"DELETE FROM build WHERE id >= {build}; DELETE FROM events WHERE id >= {event};"
            )
            self._next_is("events", event)
        archives = self._values("id", of="listArchives")
        self._next_is("archiveinfo", max(archives, default=1))

    def _that_make(self, table: str) -> list[Any]:
        return [one for one in self.calls if MAKES.get(one.get("method"), ("",))[0] == table]

    def _event_of(self, build: int) -> int:
        """When it was made; if nobody asked, some time after what was there."""
        asked = [one["ret"] for one in self.calls if one.get("method") in ("getBuild", "CGImport")]
        return next((one["creation_event_id"] for one in asked if one["id"] == build), 100)

    def _values(self, key: str, *, of: str) -> list[Any]:
        """In the lists that this call answered."""
        return [one[key] for call in self.calls if call.get("method") == of for one in call["ret"]]

    def _made(self, call: Mapping[str, Any]) -> tuple[str, int]:
        """The table, and the id; 0 of what was refused."""
        table, key = MAKES[call["method"]]
        answer = call.get("ret", 0)
        return table, answer[key] if key and answer else answer

    def _scheduler_is_due(self, due: bool) -> None:
        """It runs once in a while; whether it did then is a matter of time."""
        self.koji.sql(
            "INSERT OR REPLACE INTO scheduler_sys_data (name, data)"
            f" VALUES ('last_run_ts', {0 if due else time.time() + 3600});"
        )

    def _next_is(self, table: str, number: int) -> None:
        self.koji.sql(
            f"DELETE FROM sqlite_sequence WHERE name = '{table}';"
            f"INSERT INTO sqlite_sequence (name, seq) VALUES ('{table}', {number - 1});"
        )

    def play(self) -> None:
        connection = http.client.HTTPConnection(self.koji.server.split("/")[2], timeout=60)
        for number, call in enumerate(self.calls, 1):
            answer = (
                self._upload(connection, call) if "upload" in call else self._call(connection, call)
            )
            expected = {key: call[key] for key in ("ret", "fault") if key in call}
            for difference in self._compare(call.get("method", "upload"), expected, answer):
                what = call.get("method") or call["upload"]
                self.differences.append(f"line {number}, {what}: {difference}")
        connection.close()

    def _headers(self, call: Mapping[str, Any]) -> dict[str, str]:
        if call["sess"] is None:
            return {}
        return {
            "Koji-Session-Id": call["sess"],
            "Koji-Session-Key": self._keys[call["sess"]],
            "Koji-Session-Callnum": call["callnum"],
        }

    def _call(self, connection: http.client.HTTPConnection, call: Mapping[str, Any]) -> Any:
        from koji import xmlrpcplus

        if "ret" in call and call["method"] in MAKES:
            self._next_is(*self._made(call))
        if call["method"] == "host.getTasks":
            self._scheduler_is_due(bool(call["ret"]))
        params = tuple(self._as_here(call["params"]))
        body = xmlrpcplus.dumps(params, methodname=call["method"])
        headers = {**self._headers(call), "Content-Type": "text/xml"}
        answer = self._send(connection, "/kojihub", body.encode(), headers)
        if call["method"] in ("login", "subsession") and "ret" in answer:
            self._keys[str(answer["ret"]["session-id"])] = answer["ret"]["session-key"]
        if call["method"] == "CGInitBuild" and "ret" in answer:
            self._replaced[call["ret"]["token"]] = answer["ret"]["token"]
        return answer

    def _upload(self, connection: http.client.HTTPConnection, call: Mapping[str, Any]) -> Any:
        import koji.util

        query = {key: values[0] for key, values in parse_qs(call["upload"]).items()}
        offset, length = int(query["offset"]), int(call["clen"])
        content = self._contents.setdefault((query["filepath"], query["filename"]), bytearray())
        if len(content) < offset + length:
            content.extend(b"hello\n" if length == 6 else b"x" * (offset + length - len(content)))
        data = bytes(content[offset : offset + length])
        headers = {**self._headers(call), "Content-Type": "application/octet-stream"}
        answer = self._send(connection, f"/kojihub?{call['upload']}", data, headers)
        if "ret" in answer and "ret" in call:
            checksum = koji.util.adler32_constructor(data).hexdigest()
            assert answer["ret"]["hexdigest"] == checksum, "of what was sent"
            call["ret"]["hexdigest"] = checksum
        return answer

    def _send(
        self,
        connection: http.client.HTTPConnection,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
    ) -> dict[str, Any]:
        from koji import xmlrpcplus

        connection.request("POST", path, body, dict(headers))
        response = connection.getresponse()
        assert response.getheader("Koji-Version")
        try:
            ((value,), _) = xmlrpcplus.loads(response.read())
        except xmlrpcplus.Fault as fault:
            return {"fault": [fault.faultCode, fault.faultString]}
        return {"ret": value}

    # Comparing

    def _as_here(self, value: Any) -> Any:
        """With the token of this hub, and checksums of files whose content nobody has any more."""
        if isinstance(value, dict):
            if value.get("filename") and "filesize" in value and "archive_id" not in value:
                for (_, name), content in self._contents.items():
                    if name == value["filename"]:
                        self._replaced[value["checksum"]] = sha256(content).hexdigest()
            return {key: self._as_here(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._as_here(one) for one in value]
        if isinstance(value, str):
            for old, new in self._replaced.items():
                value = value.replace(old, new)
        return value

    def _compare(self, method: str, expected: Any, answer: Any) -> Iterator[str]:
        expected = self._as_here(expected)
        if method in UNORDERED and "ret" in expected and "ret" in answer:
            key = UNORDERED[method]
            if key is None:
                expected["ret"] = [sorted(one) for one in expected["ret"]]
                answer["ret"] = [sorted(one) for one in answer["ret"]]
            else:
                expected["ret"].sort(key=key)
                answer["ret"].sort(key=key)
        yield from differences(expected, answer, method)


def differences(expected: Any, answer: Any, where: str) -> Iterator[str]:
    """How an answer is not the expected one; types count, so 1 is neither 1.0 nor True."""
    key = where.rpartition(".")[2]
    if type(expected) is not type(answer):
        yield f"{where} is {answer!r}, and was {expected!r}"
    elif isinstance(expected, dict):
        for name in sorted(set(expected) ^ set(answer)):
            yield f"{where}.{name} is {'missing' if name in expected else 'new'}"
        for name in sorted(set(expected) & set(answer)):
            yield from differences(expected[name], answer[name], f"{where}.{name}")
    elif isinstance(expected, list):
        if len(expected) != len(answer):
            yield f"{where} has {answer!r}, and had {expected!r}"
        for number, (one, other) in enumerate(zip(expected, answer)):
            yield from differences(one, other, f"{where}[{number}]")
    elif key.endswith("_time") and isinstance(expected, str):
        if not TIME.fullmatch(answer):
            yield f"{where} is {answer!r}, which is no time"
    elif key not in SECRETS and not (key.endswith(("_ts", "mtime")) and isinstance(answer, float)):  # noqa: SIM102
        if expected != answer:
            yield f"{where} is {answer!r}, and was {expected!r}"


@pytest.fixture
def koji(request: pytest.FixtureRequest) -> Iterator[StandInKoji]:
    """A hub alone, with nothing in it but its admin."""
    from standin.standin import running_stand_in_hub

    with running_stand_in_hub(plugin=HUB) as koji:
        yield koji


ANSWER = {"ret": {"id": 5, "label": None, "weight": 1.0, "waiting": False, "create_ts": 1.5}}
FAULT = {"fault": [1004, "host 1 does not own task 48"]}


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        (ANSWER, {"ret": {key: ANSWER["ret"][key] for key in ANSWER["ret"] if key != "label"}}),
        (ANSWER, {"ret": {**ANSWER["ret"], "other": 1}}),
        (ANSWER, {"ret": {**ANSWER["ret"], "id": 6}}),
        (ANSWER, {"ret": {**ANSWER["ret"], "label": ""}}),
        (ANSWER, {"ret": {**ANSWER["ret"], "weight": 1}}),
        (ANSWER, {"ret": {**ANSWER["ret"], "waiting": 0}}),
        (ANSWER, {"ret": {**ANSWER["ret"], "create_ts": None}}),
        (ANSWER, {"ret": None}),
        (ANSWER, FAULT),
        (FAULT, {"fault": [1000, FAULT["fault"][1]]}),
        (FAULT, {"fault": [1004, "not allowed"]}),
        (FAULT, {"ret": None}),
        ({"ret": [1, 2]}, {"ret": [1]}),
        ({"ret": {"create_time": "2026-11-23 04:47:06+00:00"}}, {"ret": {"create_time": "then"}}),
    ],
)
def test_a_difference_is_noticed(expected: Any, answer: Any) -> None:
    assert list(differences(expected, answer, "call"))
    assert not list(differences(expected, expected, "call"))


@pytest.mark.parametrize("trace", TRACES, ids=lambda path: path.stem)
def test_the_stand_in_answers_as_the_real_hub_did(koji: StandInKoji, trace: Path) -> None:
    replay = Replay(koji, trace)
    replay.prepare()
    replay.play()
    assert replay.differences == []
