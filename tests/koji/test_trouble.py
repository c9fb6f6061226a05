"""Hub and network trouble, on any Koji of the tests: a front before the hub or topurl makes it."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from harness.front import (
    Answer,
    CutRequest,
    Endless,
    Front,
    Hang,
    LoseAnswer,
    Request,
    Trouble,
    front_of,
)
from taskflow import (
    MAKE_ISO,
    RESULTS,
    TINY,
    Submit,
    builder_conf,
    fault_of,
    qemu_of,
    state_of,
    wait_for_log,
)

if TYPE_CHECKING:
    from harness.base import AnyKoji

# As the hub does after SessionRenewalTimeout; those of tasks.
EXPIRE = """
UPDATE sessions SET expired = TRUE WHERE closed = FALSE AND master IS NOT NULL
    AND user_id = (SELECT id FROM users WHERE name = 'builder.test');
"""
# Calls of a task's process; the daemon's own and those of tagBuild are Koji's business.
CALLS_OF_THE_TASK = {
    "getBuildTarget",
    "getBuildConfig",
    "getArchiveType",
    "listArchives",
    "listBuilds",
    "host.initImageBuild",
    "checkUpload",
    "listTaskOutput",
    "host.completeImageBuild",
    "host.recordIndirectionInputs",
    "host.subtask",
    "host.taskSetWait",
    "host.taskWait",
}


@contextmanager
def fronts(koji: AnyKoji, cache: str, more: str, **settings: str) -> Iterator[tuple[Front, Front]]:
    """A builder that has the first before its hub and the second before topurl."""
    with front_of(koji.server) as hub, front_of(koji.topurl) as topurl:
        koji.builder_restart(
            settings={"server": f"{hub.url}/kojihub", "topurl": topurl.url, **settings},
            plugin_conf=builder_conf(koji, more, cache=cache),
        )
        try:
            yield hub, topurl
        finally:
            hub.trouble = topurl.trouble = no_trouble
            koji.builder_restart(plugin_conf=builder_conf(koji))


def no_trouble(request: Request) -> Trouble | None:
    return None


@pytest.fixture(scope="module")
def impatient(koji: AnyKoji) -> Iterator[tuple[Front, Front]]:
    more = "[download]\nretries = 1\nretry_wait = 1\nread_timeout = 1\n[hub]\ntimeout = 3\n"
    with fronts(koji, "impatient-cache", more, max_retries="2") as both:
        yield both


@pytest.fixture
def hub(impatient: tuple[Front, Front]) -> Iterator[Front]:
    yield impatient[0]
    impatient[0].trouble = no_trouble


@pytest.fixture
def topurl(impatient: tuple[Front, Front]) -> Iterator[Front]:
    yield impatient[1]
    impatient[1].trouble = no_trouble


class EachOnce:
    """The answer of each of these calls is lost once."""

    def __init__(self, calls: set[str]) -> None:
        self.left = set(calls)

    def __call__(self, request: Request) -> Trouble | None:
        if request.call not in self.left:
            return None
        self.left.remove(request.call)
        return LoseAnswer()


class CutUploads:
    """Of the first uploads each is cut at another byte, or its answer is lost."""

    def __init__(self, end: str, cuts: int, seed: int) -> None:
        self.end = end
        self.cuts = cuts
        self.random = random.Random(seed)

    def __call__(self, request: Request) -> Trouble | None:
        if not (request.call.startswith("upload ") and request.call.endswith(self.end)):
            return None
        if self.cuts == 0 or not request.size:
            return None
        self.cuts -= 1
        if self.cuts % 4 == 0:
            return LoseAnswer()
        return CutRequest(self.random.choice([0, 1, request.size // 2, request.size - 1]))


def test_a_hub_in_every_kind_of_trouble_costs_the_running_guest_nothing(
    koji: AnyKoji, submit: Submit
) -> None:
    ticks = "i=0; while [ $i -lt 30 ]; do i=$((i+1)); echo tick $i; sleep 0.5; done"
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with fronts(koji, "builder-cache", "[hub]\ntimeout = 3\n") as (front, _):
        losing = EachOnce(CALLS_OF_THE_TASK)
        front.trouble = losing
        task_id = submit(
            f"echo before; {ticks}",
            f"{RESULTS} && head -c 2500000 /dev/urandom >results/images/boot.iso",
        )
        wait_for_log(koji, task_id, "job.log", "before")
        front.refuse()
        time.sleep(2)
        front.listen()
        for trouble in (Answer(502), Answer(200), Hang()):
            front.trouble = lambda request, trouble=trouble: trouble
            time.sleep(2)
        front.trouble = no_trouble
        koji.sql(EXPIRE)
        wait_for_log(koji, task_id, "job.log", "tick 20")
        logs = CutUploads("job.log", 6, seed)
        files = CutUploads(".iso", 8, seed)
        front.trouble = lambda request: logs(request) or files(request) or losing(request)
        koji.wait_task(task_id, 300)
        assert state_of(koji, task_id) == ("CLOSED", "COMPLETE"), koji.logs
        assert (losing.left, logs.cuts, files.cuts) == (set(), 0, 0), "all of it has happened"
    (build,) = koji.admin_session().listBuilds(taskID=task_id)
    assert [tag["name"] for tag in koji.admin_session().listTags(build["nvr"])] == [
        "images-candidate"
    ]
    directory = koji.topdir / "packages" / build["nvr"].replace("-", "/")
    log = (directory / "data/logs/image/x86_64/job.log").read_text().splitlines()
    assert [line for line in log if line.startswith("tick ")] == [f"tick {i}" for i in range(1, 31)]
    iso = directory / "images" / f"{build['nvr']}.x86_64.iso"
    archives = koji.admin_session().listArchives(buildID=build["build_id"])
    (archive,) = (one for one in archives if one["filename"] == iso.name)
    assert archive["size"] == 2500000
    assert hashlib.sha256(iso.read_bytes()).hexdigest() == archive["checksum"]


@pytest.mark.parametrize(
    ("call", "trouble", "words"),
    [
        ("getBuildConfig", Answer(502), "502"),
        ("getBuildTarget", Hang(), "timed out"),
        ("listArchives", Answer(200), "did not answer listArchives"),
        ("host.initImageBuild", LoseAnswer(), "did not answer host.initImageBuild"),
    ],
)
def test_a_hub_that_never_answers_a_call_is_one_fault_and_leaves_no_build(
    koji: AnyKoji, submit: Submit, hub: Front, call: str, trouble: Trouble, words: str
) -> None:
    hub.trouble = lambda request: trouble if request.call == call else None
    before = len(hub.troubled())
    task_id = submit(MAKE_ISO)
    koji.wait_task(task_id, 120)
    fault = fault_of(koji, task_id)
    assert fault.startswith("builder fault: the Koji hub did not answer")
    assert words in fault
    assert "Traceback" not in fault
    assert len(fault.splitlines()) == 1
    assert len(hub.troubled()) >= before + 3, "it was asked again"
    builds = koji.admin_session().listBuilds(taskID=task_id)
    assert {build["state"] for build in builds} <= {3}, "FAILED, if there is one"


IMAGE_BYTES = TINY.stat().st_size if TINY.exists() else 0


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (Answer(302, location="/loop"), "redirects more than 5 times"),
        (Answer(302, location="file:///etc/passwd"), "which is no HTTP address"),
        (Answer(200, body=bytes(IMAGE_BYTES)), "is not what the hub describes: its sha256 is"),
        (Endless(), "is not what the hub describes: its sha256 is"),
        (Hang(after=bytes(1000), length=IMAGE_BYTES), "timed out"),
    ],
)
def test_a_topurl_that_serves_anything_but_the_image_is_one_fault(
    koji: AnyKoji, submit: Submit, topurl: Front, trouble: Trouble, words: str
) -> None:
    topurl.trouble = lambda request: trouble if request.call.endswith((".qcow2", "/loop")) else None
    before = len(topurl.troubled())
    task_id = submit(MAKE_ISO)
    koji.wait_task(task_id, 120)
    assert state_of(koji, task_id) == ("FAILED", "FAILED")
    fault = fault_of(koji, task_id)
    assert fault.startswith("builder fault: ")
    assert words in fault
    assert "Traceback" not in fault
    again = len(topurl.troubled()) - before > 1
    assert again == ("no HTTP address" not in words), "it was asked again where that may help"
    images = koji.work / "impatient-cache" / "images"
    assert not [path.name for path in images.iterdir() if "lock" not in path.name]
    assert qemu_of(koji) == []
