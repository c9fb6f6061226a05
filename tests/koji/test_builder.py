"""The builder plugin on a real hub and kojid, with real VMs: what a user sees of each build."""

from __future__ import annotations

import itertools
import json
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lxml import etree
from lxml.builder import E

from koji_indirection import accel

if TYPE_CHECKING:
    from harness.base import AnyKoji as RealKoji

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
    return kojihub.kojihub.make_task("indirectionBuild", [spec], channel="image")
"""

Submit = Callable[..., int]
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def koji(any_koji: RealKoji) -> Iterator[RealKoji]:
    """The real Koji with our builder plugin, and the tiny image as the build INPUT."""
    if not TINY.exists():
        pytest.skip(f"there is no {TINY}: run make images")
    from harness.base import ImageFile

    other = ImageFile(TINY, arch="i686", name="tiny.i686.qcow2")  # which runs on x86_64 as well
    any_koji.import_image_build(INPUT, [ImageFile(TINY, name="tiny.x86_64.qcow2"), other])
    put_rpms(any_koji)
    with any_koji.plugins(name="indirection_tasks", hub=HUB):
        any_koji.builder_restart(plugin_conf=builder_conf(any_koji))
        yield any_koji
    any_koji.builder_restart()


def put_rpms(koji: RealKoji) -> None:
    """Into the input image: one that Koji built, one of a repository elsewhere.

    Content generators may not import the second kind, so it is done behind the hub's back.
    """
    koji.admin_session().createExternalRepo("elsewhere", "http://example.com/repo")
    koji.sql(
        """
        INSERT INTO rpminfo (build_id, draft, external_repo_id, name,
            version, release, arch, payloadhash, size, buildtime)
            SELECT build.id, FALSE, 0, 'bash', '5', '1', 'x86_64', 'aa', 10, 20
            FROM build JOIN package ON package.id = pkg_id WHERE name = 'tiny';
        INSERT INTO rpminfo (build_id, draft, external_repo_id, name,
            version, release, arch, payloadhash, size, buildtime)
            SELECT NULL, NULL, id, 'kernel', '6', '1', 'x86_64', 'bb', 3000000000, 20
            FROM external_repo WHERE name = 'elsewhere';
        INSERT INTO archive_rpm_components (archive_id, rpm_id)
            SELECT archiveinfo.id, rpminfo.id FROM archiveinfo, rpminfo
            WHERE filename = 'tiny.x86_64.qcow2';
        """
    )


def builder_conf(koji: RealKoji) -> str:
    return f"[indirection]\ncache_dir = {koji.work / 'builder-cache'}\n"


@pytest.fixture
def submit(koji: RealKoji) -> Iterator[Submit]:
    """Make a task, of an SCM template unless it is a scratch build; it is cancelled afterwards."""
    session = koji.admin_session()
    made = []

    def submit(*commands: str, **fields: Any) -> int:
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
        if spec["scratch"]:
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


def repository(koji: RealKoji, content: bytes) -> str:
    """The URL of a new git repository with the template."""
    return koji.git_repository(f"template-{next(_numbers)}", {"live.tdl": content})


def upload(session: Any, content: bytes, koji: RealKoji) -> str:
    directory = f"cli-indirection/{time.time()}.{next(_numbers)}"
    path = koji.work / "live.tdl"
    path.write_bytes(content)
    with warnings.catch_warnings():
        # The library leaves the file to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        session.uploadWrapper(str(path), directory)
    return directory


def build_of(koji: RealKoji, task_id: int) -> Any:
    (build,) = koji.admin_session().listBuilds(taskID=task_id)
    return koji.admin_session().getBuild(build["build_id"])


def state_of(koji: RealKoji, task_id: int) -> tuple[str, str]:
    """Of the task, and of its build."""
    from koji import BUILD_STATES, TASK_STATES

    return (
        TASK_STATES[koji.task(task_id)["state"]],
        BUILD_STATES[build_of(koji, task_id)["state"]],
    )


def wait_for_log(koji: RealKoji, task_id: int, name: str, text: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while name not in koji.task_files(task_id) or text not in koji.task_log(task_id, name):
        assert time.monotonic() < deadline, f"no {text!r} in {name} of task {task_id}"
        assert koji.task(task_id)["state"] in (0, 1, 4), "the task has ended"
        time.sleep(0.2)


def qemu_of(koji: RealKoji) -> list[str]:
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


def fault_of(koji: RealKoji, task_id: int) -> str:
    from koji import GenericError

    with pytest.raises(GenericError) as caught:
        koji.admin_session().getTaskResult(task_id)
    return str(caught.value)


def test_a_build_is_complete_tagged_and_says_what_it_was_made_from(
    koji: RealKoji, submit: Submit
) -> None:
    task_id = submit("echo hello from the guest", MAKE_ISO)
    wait_for_log(koji, task_id, "job.log", "hello from the guest")
    assert state_of(koji, task_id) == ("OPEN", "BUILDING"), "the log was there while it ran"
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE"), koji.logs

    session = koji.anonymous_session()
    build = build_of(koji, task_id)
    nvr = build["nvr"]
    assert [tag["name"] for tag in session.listTags(nvr)] == ["images-candidate"]
    archives = {one["filename"]: one for one in session.listArchives(buildID=build["id"])}
    iso, manifest = f"{nvr}.x86_64.iso", f"{nvr}.x86_64.manifest.json"
    assert set(archives) == {iso, manifest}
    assert session.listArchives(buildID=build["id"], type="image")[0]["arch"] == "x86_64"

    images = f"{koji.topurl}/packages/{nvr.replace('-', '/')}/images"
    with urllib.request.urlopen(f"{images}/{manifest}") as answer:
        record = json.load(answer)
    assert record["outcome"] == "built"
    assert [one["sha256"] for one in record["outputs"]] == [archives[iso]["checksum"]]

    logs = koji.topdir / "packages" / nvr.replace("-", "/") / "data/logs/image/x86_64"
    names = {path.name for path in logs.iterdir()}
    assert names >= {"job.log", "console.log", "build.log", "task.log", "template.log"}
    assert "hello from the guest" in (logs / "job.log").read_text()
    assert "mount /dev/vdb1 /mnt" in (logs / "template.log").read_text()

    made_from = build["extra"]["indirection"]
    assert [(one["role"], one["nvr"]) for one in made_from["inputs"]] == [
        ("utility image", INPUT),
        ("input image", INPUT),
    ]
    assert sorted(
        (rpm["nvr"], rpm["external_repo_name"])
        for rpm in session.listRPMs(imageID=archives[iso]["id"])
    ) == [("bash-5-1", "INTERNAL"), ("kernel-6-1", "elsewhere")]
    commit = build["source"].rpartition("#")[2]
    assert len(commit) == 40, "not the branch"
    assert made_from["template_commit"] == commit
    components = session.listArchives(imageID=archives[iso]["id"])
    assert [one["filename"] for one in components] == ["tiny.x86_64.qcow2"]


def test_each_of_several_arches_has_a_subtask_and_its_own_file(
    koji: RealKoji, submit: Submit
) -> None:
    task_id = submit(MAKE_ISO, arches=["x86_64", "i686"])
    koji.wait_task(task_id, 400)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE"), koji.logs
    build = build_of(koji, task_id)
    session = koji.anonymous_session()
    assert {
        one["filename"].removeprefix(build["nvr"]): one["arch"]
        for one in session.listArchives(buildID=build["id"], type="image")
        if one["filename"].endswith(".iso")
    } == {".x86_64.iso": "x86_64", ".i686.iso": "i686"}
    children = session.getTaskChildren(task_id)
    assert {one["label"] for one in children} == {"x86_64", "i686", "tag"}
    logs = koji.topdir / "packages" / build["nvr"].replace("-", "/") / "data/logs/image"
    assert (logs / "x86_64/job.log").exists()
    assert (logs / "i686/job.log").exists()


@pytest.mark.parametrize(
    ("can_fail", "states"), [([], ("FAILED", "FAILED")), (["i686"], ("CLOSED", "COMPLETE"))]
)
def test_an_arch_that_fails_fails_the_build_unless_it_may(
    koji: RealKoji, submit: Submit, can_fail: list[str], states: tuple[str, str]
) -> None:
    task_id = submit(
        MAKE_ISO,
        arches=["x86_64", "i686"],
        can_fail=can_fail,
        arch_build={"i686": {"results": ["/results/other.iso"]}},
    )
    koji.wait_task(task_id, 400)
    assert state_of(koji, task_id) == states
    if can_fail:
        build = build_of(koji, task_id)
        archives = koji.anonymous_session().listArchives(buildID=build["id"], type="image")
        assert {one["arch"] for one in archives} == {"x86_64"}
    else:
        assert "the result /results/other.iso is missing" in fault_of(koji, task_id)


def test_a_scratch_build_leaves_its_files_and_no_build(koji: RealKoji, submit: Submit) -> None:
    task_id = submit(
        f"{MAKE_ISO} && echo {{}} >results/images/list.json",
        scratch=True,
        build={"results": ["/results/images/boot.iso", "/results/images/*.json"]},
    )
    assert koji.wait_task(task_id, 300)["state"] == 2, fault_of(koji, task_id)
    assert koji.admin_session().listBuilds(taskID=task_id) == []
    scratch = koji.topdir / "scratch" / "kojiadmin" / f"task_{task_id}"
    names = {path.name.split("-", 1)[0] for path in scratch.iterdir() if path.suffix != ".log"}
    assert names == {"boot", "list", "live"}
    assert (scratch / "job.log").exists()


def test_a_command_that_fails_fails_task_and_build_and_keeps_the_logs(
    koji: RealKoji, submit: Submit
) -> None:
    task_id = submit("echo about to fail; exit 3")
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("FAILED", "FAILED")
    fault = fault_of(koji, task_id)
    assert fault.startswith("build failed: command 'step1' exited with status 3")
    assert "Traceback" not in fault
    assert "about to fail" in koji.task_log(task_id, "job.log")
    (manifest,) = (name for name in koji.task_files(task_id) if name.endswith("manifest.json"))
    assert json.loads(koji.task_log(task_id, manifest))["outcome"] == "build failed"


def test_a_missing_result_fails_the_build(koji: RealKoji, submit: Submit) -> None:
    task_id = submit("true")
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("FAILED", "FAILED")
    assert "the result /results/images/boot.iso is missing" in fault_of(koji, task_id)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"build": {"results": ["/results/boot.efi"]}}, "boot.efi is of no type that this Koji"),
        ({"target": "nowhere"}, "there is no build target nowhere"),
        ({"name": "unlisted"}, "the package unlisted is not in the list of the tag"),
        ({"input_image": "tiny-7-7"}, "input image tiny-7-7: there is no such build"),
        ({"template": "dead.tdl"}, "there is no template dead.tdl in the checkout"),
        ({"arches": ["x86_64", "ppc64le"]}, "ppc64le is not an arch of the build tag"),
        ({"arches": ["x86_64", "aarch64"]}, "there is no image for aarch64, only for"),
        ({"tempalte": "x"}, "did you mean 'template'"),
    ],
)
def test_what_cannot_work_fails_at_once_and_makes_no_build(
    koji: RealKoji, submit: Submit, fields: dict[str, Any], reason: str
) -> None:
    task_id = submit(MAKE_ISO, **fields)
    koji.wait_task(task_id, 60)
    fault = fault_of(koji, task_id)
    assert reason in fault
    assert "Traceback" not in fault
    assert koji.admin_session().listBuilds(taskID=task_id) == []


def test_a_template_repository_that_is_not_allowed_is_refused(
    koji: RealKoji, submit: Submit
) -> None:
    task_id = submit(MAKE_ISO, template_scm="git+http://localhost/x.git#main")
    koji.wait_task(task_id, 60)
    assert "is not in the list of allowed SCMs" in fault_of(koji, task_id)


def test_a_host_without_what_the_build_needs_refuses_softly(
    koji: RealKoji, submit: Submit, tmp_path: Path
) -> None:
    if accel.choose("auto", cache_dir=tmp_path).kind == "kvm":
        pytest.skip("this host has KVM")
    task_id = submit(MAKE_ISO, accel="kvm")
    deadline = time.monotonic() + 30
    while not koji.refusals(task_id):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (refusal,) = koji.refusals(task_id)
    assert refusal["soft"]
    assert "KVM was asked for but cannot be used" in refusal["msg"]


def test_a_cancelled_build_leaves_no_vm_after_five_seconds(koji: RealKoji, submit: Submit) -> None:
    task_id = submit("echo running; sleep 300")
    wait_for_log(koji, task_id, "job.log", "running")
    assert qemu_of(koji)
    koji.admin_session().cancelTask(task_id)
    started = time.monotonic()
    while qemu_of(koji):
        assert time.monotonic() < started + 5
        time.sleep(0.1)
    assert state_of(koji, task_id) == ("CANCELED", "CANCELED")


def test_a_build_goes_on_where_its_builder_was_restarted(koji: RealKoji, submit: Submit) -> None:
    task_id = submit("echo running; sleep 8", MAKE_ISO)
    wait_for_log(koji, task_id, "job.log", "running")
    before = build_of(koji, task_id)
    koji.builder_stop()
    assert qemu_of(koji) == []
    assert state_of(koji, task_id)[1] == "BUILDING"
    koji.builder_start(plugin_conf=builder_conf(koji))
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE")
    assert build_of(koji, task_id)["id"] == before["id"], "one build, not two"


def test_what_a_killed_builder_leaves_running_ends_itself(koji: RealKoji, submit: Submit) -> None:
    task_id = submit("echo running; sleep 8", MAKE_ISO)
    wait_for_log(koji, task_id, "job.log", "running")
    before = build_of(koji, task_id)
    koji.builder_kill()
    orphans = koji.builder_pids()
    assert orphans
    koji.builder_start(plugin_conf=builder_conf(koji))
    deadline = time.monotonic() + 15
    while set(orphans) & set(koji.builder_pids()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE")
    assert build_of(koji, task_id)["id"] == before["id"]


def test_a_hub_that_restarts_meanwhile_delays_nothing_and_misses_nothing(
    koji: RealKoji, submit: Submit
) -> None:
    task_id = submit("echo before; sleep 12; echo after", MAKE_ISO)
    wait_for_log(koji, task_id, "job.log", "before")
    koji.hub_stop()
    time.sleep(4)
    koji.hub_start()
    koji.wait_task(task_id, 300)
    assert state_of(koji, task_id) == ("CLOSED", "COMPLETE")
    nvr = build_of(koji, task_id)["nvr"].replace("-", "/")
    log = koji.topdir / "packages" / nvr / "data/logs/image/x86_64/job.log"
    assert "\nafter\n" in log.read_text()
