"""What tests of the builder plugin share: a Koji with images, tasks, and what a builder runs."""

from __future__ import annotations

import glob
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lxml import etree
from lxml.builder import E

if TYPE_CHECKING:
    from harness.base import AnyKoji

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / ".cache/images/tiny.qcow2"

INPUT = "tiny-1-1"
NAME = "live"
RESULTS = "mount /dev/vdb1 /mnt && cd /mnt && mkdir -p results/images"
MAKE_ISO = f"{RESULTS} && echo made >results/images/boot.iso"
SMALL = {"memory_bytes": 256 * 2**20, "cpus": 1, "workspace_size_bytes": 2**30}

# Past what our hub plugin would refuse already: the builder must not rely on it.
HUB = """
import kojihub
from koji.plugin import export

@export
def makeIndirectionTask(spec):
    arguments = [spec, spec["target"], {"scratch": spec["scratch"]}]
    return kojihub.kojihub.make_task("indirectionBuild", arguments, channel="image")
"""
Submit = Callable[..., int]
_numbers = itertools.count(1)


@contextmanager
def with_images(any_koji: AnyKoji) -> Iterator[AnyKoji]:
    """A Koji with our builder plugin, and the tiny image as the build INPUT."""
    if not TINY.exists():
        pytest.skip(f"there is no {TINY}: run make images")
    from harness.base import ImageFile

    if any_koji.anonymous_session().getBuild(INPUT) is None:
        other = ImageFile(TINY, arch="i686", name="tiny.i686.qcow2")  # runs on x86_64 as well
        any_koji.import_image_build(INPUT, [ImageFile(TINY, name="tiny.x86_64.qcow2"), other])
        put_rpms(any_koji)
    with any_koji.plugins(name="indirection_tasks", hub=HUB):
        any_koji.builder_restart(plugin_conf=builder_conf(any_koji))
        yield any_koji
    any_koji.builder_restart()


def put_rpms(koji: AnyKoji) -> None:
    """Into the input image: one that Koji built, one of a repository elsewhere.

    Content generators may not import the second kind, so it is done behind the hub's back.
    """
    session = koji.admin_session()
    session.createExternalRepo("elsewhere", "http://example.com/repo")
    build_id = session.getBuild(INPUT)["id"]
    koji.sql(
        f"""
        INSERT INTO rpminfo (build_id, draft, external_repo_id, name,
            version, release, arch, payloadhash, size, buildtime)
            VALUES ({build_id}, FALSE, 0, 'bash', '5', '1', 'x86_64', 'aa', 10, 20);
        INSERT INTO rpminfo (build_id, draft, external_repo_id, name,
            version, release, arch, payloadhash, size, buildtime)
            SELECT NULL, NULL, id, 'kernel', '6', '1', 'x86_64', 'bb', 3000000000, 20
            FROM external_repo WHERE name = 'elsewhere';
        INSERT INTO archive_rpm_components (archive_id, rpm_id)
            SELECT archiveinfo.id, rpminfo.id FROM archiveinfo, rpminfo
            WHERE archiveinfo.build_id = {build_id} AND filename = 'tiny.x86_64.qcow2';
        """
    )


def builder_conf(koji: AnyKoji, more: str = "", cache: str = "builder-cache") -> str:
    return f"[indirection]\ncache_dir = {koji.work / cache}\n[guest]\nnetworks = lan\n{more}"


@contextmanager
def submitting(koji: AnyKoji) -> Iterator[Submit]:
    """Make a task, of an SCM template unless that is uploaded; it is cancelled afterwards."""
    session = koji.admin_session()
    made = []

    def submit(*commands: str, uploaded: bool = False, **fields: Any) -> int:
        spec = {
            "target": "images",
            "name": NAME,
            "version": f"{next(_numbers)}",
            "arches": ["x86_64"],
            "input_image": INPUT,
            "utility_image": INPUT,
            "template": "live.tdl",
            "scratch": False,
            **fields,
        }
        spec["build"] = {**SMALL, **fields.get("build", {})}
        if uploaded or spec["scratch"]:
            spec["template_upload"] = upload(session, template(commands), koji)
        else:
            spec.setdefault("template_scm", repository(koji, template(commands)))
        made.append(session.makeIndirectionTask(spec))
        return int(made[-1])

    yield submit
    for task_id in made:
        session.cancelTask(task_id)


def template(commands: Sequence[str]) -> bytes:
    elements = (E.command(text, name=f"step{at}") for at, text in enumerate(commands, 1))
    data: bytes = etree.tostring(E.template(E.commands(*elements)))
    return data


def repository(koji: AnyKoji, content: bytes) -> str:
    """The URL of a new git repository with the template."""
    return koji.git_repository(f"template-{next(_numbers)}", {"live.tdl": content})


def upload(session: Any, content: bytes, koji: AnyKoji) -> str:
    directory = f"cli-indirection/{time.time()}.{next(_numbers)}"
    path = koji.work / "live.tdl"
    path.write_bytes(content)
    with warnings.catch_warnings():
        # The library leaves the file to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        session.uploadWrapper(str(path), directory)
    return directory


def build_of(koji: AnyKoji, task_id: int) -> Any:
    (build,) = koji.admin_session().listBuilds(taskID=task_id)
    return koji.admin_session().getBuild(build["build_id"])


def state_of(koji: AnyKoji, task_id: int) -> tuple[str, str]:
    """Of the task, and of its build."""
    from koji import BUILD_STATES, TASK_STATES

    return (
        TASK_STATES[koji.task(task_id)["state"]],
        BUILD_STATES[build_of(koji, task_id)["state"]],
    )


def wait_for_log(koji: AnyKoji, task_id: int, name: str, text: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while name not in koji.task_files(task_id) or text not in koji.task_log(task_id, name):
        assert time.monotonic() < deadline, f"no {text!r} in {name} of task {task_id}"
        assert koji.task(task_id)["state"] in (0, 1, 4), "the task has ended"
        time.sleep(0.2)


def qemu_of(koji: AnyKoji) -> list[str]:
    """Command lines of VMs whose disks are in this Koji's builder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "qemu" in line.split(" ")[0] and str(koji.work) in line:
            found.append(line)
    return found


def kojid_only(koji: AnyKoji) -> set[int]:
    """The processes of a builder that has nothing to do."""
    deadline = time.monotonic() + 20
    while qemu_of(koji) or runs_of(koji):
        assert time.monotonic() < deadline, "an earlier task goes on"
        time.sleep(0.2)
    return set(koji.builder_pids())


def runs_of(koji: AnyKoji) -> list[Path]:
    """The directories of runs of tasks, with their overlays and workspaces."""
    work = koji.work / "builder" / "work"
    names = glob.glob(f"{work}/tasks/*/*/run-*")  # noqa: PTH207 - that fails on what vanishes
    return [Path(name) for name in names]


def job_directories(koji: AnyKoji) -> set[Path]:
    """What the watchdogs of builds that run guard, wherever it is."""
    guarded = set()
    for pid in koji.builder_pids():
        line = Path(f"/proc/{pid}/cmdline")
        words = line.read_bytes().decode().split("\0") if line.exists() else []
        if "koji_indirection.jobdir" in words:
            guarded.update(Path(word) for word in words[3:] if word)
    return guarded


def cancel_and_expect_nothing_left(
    koji: AnyKoji, task_id: int, idle: set[int], cache: str = "builder-cache"
) -> None:
    directories = job_directories(koji)
    koji.admin_session().cancelTask(task_id)
    deadline = time.monotonic() + 15

    def left() -> list[object]:
        return [
            *qemu_of(koji),
            *(set(koji.builder_pids()) - idle),
            *runs_of(koji),
            *(path for path in directories if path.exists()),
            *(koji.work / cache / "images").glob("*.part"),
        ]

    while left():
        assert time.monotonic() < deadline, left()
        time.sleep(0.1)
    assert state_of(koji, task_id) == ("CANCELED", "CANCELED")


def fault_of(koji: AnyKoji, task_id: int) -> str:
    from koji import GenericError

    with pytest.raises(GenericError) as caught:
        koji.admin_session().getTaskResult(task_id)
    return str(caught.value)
