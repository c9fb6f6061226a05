"""What a builder knows and nobody else may: not in logs, manifests, faults, or in the guest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from taskflow import (
    MAKE_ISO,
    Submit,
    build_of,
    builder_conf,
    fault_of,
    state_of,
    submitting,
    with_images,
)

if TYPE_CHECKING:
    from harness.base import AnyKoji

WORD = "hunter2"
# The word itself is not in the template. Nowhere in the guest's files, environment or arguments;
# programs and modules are passed over, which take an emulated grep minutes.
LOOK = """
word=hunter; word=${word}2
places=$(ls -d /* | grep -v -e proc -e sys -e dev)
found=$(find $places -type f -size -200k -exec grep -Fls "$word" {} +)
found="$found $(env | grep "$word"; grep -ls "$word" /proc/[0-9]*/environ)"
[ "$found" = " " ] || { echo "found: $found"; exit 9; }
grep -q "$word" /proc/cmdline && exit 9
true
"""


@pytest.fixture(scope="module")
def koji(any_koji: AnyKoji) -> Iterator[AnyKoji]:
    with with_images(any_koji) as koji:
        yield koji


@pytest.fixture
def submit(koji: AnyKoji) -> Iterator[Submit]:
    with submitting(koji) as submit:
        yield submit


@contextmanager
def builder_with(koji: AnyKoji, topurl: str, more: str) -> Iterator[None]:
    koji.builder_restart(
        settings={"topurl": topurl, "max_retries": "2"},
        plugin_conf=builder_conf(koji, more, cache="quiet-cache"),
    )
    try:
        yield
    finally:
        koji.builder_restart(plugin_conf=builder_conf(koji))


def told_by(koji: AnyKoji, task_id: int) -> dict[str, str]:
    """All that users can get at of a task and its build, by where it is."""
    session = koji.admin_session()
    told = {name: koji.task_log(task_id, name) for name in koji.task_files(task_id)}
    told["task"] = json.dumps(koji.task(task_id)["request"])
    for build in session.listBuilds(taskID=task_id):
        told["build"] = repr(session.getBuild(build["build_id"]))
        directory = koji.topdir / "packages" / build["nvr"].replace("-", "/")
        for path in directory.rglob("*"):
            if path.is_file():
                told[str(path)] = path.read_text(errors="replace")
    if koji.task(task_id)["state"] == 5:
        told["fault"] = fault_of(koji, task_id)
    return told


def with_the_word(told: dict[str, Any]) -> list[str]:
    return [where for where, text in told.items() if WORD in text]


def test_passwords_of_a_builders_urls_reach_neither_users_nor_guests(
    koji: AnyKoji, submit: Submit
) -> None:
    from harness.base import PASSWORD
    from harness.proxy import slow_proxy

    host = koji.topurl.partition("//")[2]
    with slow_proxy() as proxy:
        address = proxy.url.replace("//", f"//me:{WORD}@")
        more = f"[download]\nproxy = {address}\nretries = 0\n"
        with builder_with(koji, f"http://me:{WORD}@{host}", more):
            built = submit(LOOK, MAKE_ISO)
            koji.wait_task(built, 300)
            assert state_of(koji, built) == ("CLOSED", "COMPLETE"), fault_of(koji, built)
            assert proxy.requests, "images came through the proxy"
            told = told_by(koji, built)
            assert {"task.log", "job.log", "build", "task"} <= set(told)
            assert with_the_word(told) == []
            own = re.compile(rf"\b{PASSWORD}\b")  # of the builder, at the hub
            assert [where for where, text in told.items() if own.search(text)] == []
            assert f"http://***@{host}" in told["task.log"], "it has been cut out"
            assert build_of(koji, built)["extra"]["indirection"]
    # The proxy has gone.
    with builder_with(koji, f"http://me:{WORD}@{host}", more):
        (koji.work / "quiet-cache" / "images").rename(koji.work / "quiet-cache" / "old")
        failed = submit(MAKE_ISO)
        koji.wait_task(failed, 120)
        assert state_of(koji, failed) == ("FAILED", "FAILED")
        assert f"from http://***@{host}" in fault_of(koji, failed)
        assert with_the_word(told_by(koji, failed)) == []
    logs = {path.name: path.read_text(errors="replace") for path in koji.logs.glob("builder*.log")}
    assert logs
    assert with_the_word(logs) == [], "nor kojid's own log"
