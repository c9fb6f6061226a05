"""`koji indirection-build`, the command itself, against a real hub whose builder is played here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.base import AnyKoji as RealKoji

NOBODY_LISTENS = "--server=http://127.0.0.1:1/kojihub"
SCM = "git://127.0.0.1/templates.git#main"
TEMPLATE = "<template><commands><command name='make'>true</command></commands></template>"
WHAT = ("images", "live", "1.cli")
INPUTS = ("--arch=x86_64", "--input-image=in-1-1", "--utility-image=build:7")
ENOUGH = (*WHAT, *INPUTS, "--template=t/live.tdl", f"--template-scm={SCM}")
SPEC = {
    "target": "images",
    "name": "live",
    "version": "1.cli",
    "arches": ["x86_64"],
    "input_image": "in-1-1",
    "utility_image": "build:7",
    "template": "t/live.tdl",
    "template_scm": SCM,
}


@pytest.fixture(scope="module")
def hub(any_koji: RealKoji) -> Iterator[RealKoji]:
    """Without a builder, so that a task is free until a test has done with it."""
    any_koji.user_session("alice")
    any_koji.builder_stop()
    try:
        yield any_koji
    finally:
        admin = any_koji.admin_session()
        for task_id in tasks(any_koji):
            admin.cancelTask(task_id)
        any_koji.builder_start()


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "live.tdl"
    path.write_text(TEMPLATE)
    return path


def run(hub: RealKoji, *arguments: object, user: str = "alice") -> subprocess.CompletedProcess[str]:
    return hub.cli("indirection-build", *arguments, user=user, stdin=subprocess.DEVNULL)


def tasks(hub: RealKoji) -> list[int]:
    free = hub.admin_session().listTasks({"method": "indirectionBuild", "state": [0, 1, 4]})
    return [task["id"] for task in free]


def wire(hub: RealKoji, task_id: int) -> Any:
    """The spec of a task, as a builder gets it."""
    (spec,) = hub.task(task_id)["request"]
    return spec


def whole(**fields: Any) -> Any:
    """With what the library adds."""
    from koji_indirection.taskspec import TaskSpec

    return TaskSpec.from_dict({**SPEC, **fields}).to_dict()


# Without a hub


def test_help_needs_no_server(hub: RealKoji) -> None:
    done = hub.cli(NOBODY_LISTENS, "indirection-build", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "koji indirection-build [options] TARGET NAME VERSION" in done.stdout
    assert "--utility-image=REF" in done.stdout


def test_koji_help_lists_the_command(hub: RealKoji) -> None:
    done = hub.cli(NOBODY_LISTENS, "help", "build")
    assert "indirection-build         Make an image with the tools that are" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--utilty-image=x"], "no such option: --utilty-image (did you mean --utility-image?)"),
        (WHAT, "--arch, --input-image and --template are missing"),
        ([*ENOUGH, "--memory=3GB"], "--memory: '3GB' is not a size"),
        ([*WHAT, *INPUTS, "--template=/no/such.tdl"], "/no/such.tdl does not exist"),
    ],
)
def test_usage_errors_need_no_login(hub: RealKoji, arguments: Any, message: str) -> None:
    done = hub.cli(NOBODY_LISTENS, "indirection-build", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage error: ")
    assert message in done.stderr
    assert done.stdout == ""


def test_without_the_library_other_commands_work_and_this_one_says_why(
    hub: RealKoji, tmp_path: Path
) -> None:
    (tmp_path / "koji_indirection.py").write_text("raise ImportError('it is not here')")
    environment = hub.cli_environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment['PYTHONPATH']}"

    def koji(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = hub.cli_argv(*arguments)
        return subprocess.run(argv, env=environment, capture_output=True, text=True)

    assert koji("list-targets").returncode == 0
    done = koji("indirection-build", "--help")
    assert done.returncode == 3
    assert "it is not here (install the Python module koji_indirection" in done.stderr


# Submitting


def test_a_task_has_exactly_the_spec_that_was_asked_for(hub: RealKoji) -> None:
    done = run(
        *(hub, *ENOUGH, "--arch=aarch64", "--can-fail=aarch64", "--release=7", "--memory=4G"),
        *("--collect-log=/program.log", "--accel=tcg", "--scratch", "--nowait", "--json"),
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer == {"task_id": answer["task_id"], "state": None, "build": None}
    assert f"Created task: {answer['task_id']}\n" in done.stderr
    assert wire(hub, answer["task_id"]) == whole(
        arches=["x86_64", "aarch64"],
        can_fail=["aarch64"],
        release="7",
        accel="tcg",
        scratch=True,
        build={"memory_bytes": 4 * 2**30, "collect_logs": ["/program.log"]},
    )


def test_nowait_prints_the_id_and_with_quiet_nothing_else(hub: RealKoji) -> None:
    done = run(hub, *ENOUGH, "--nowait")
    created, info = done.stdout.splitlines()
    task_id = int(created.removeprefix("Created task: "))
    assert info.startswith("Task info: http://")
    assert info.endswith(f"/web/taskinfo?taskID={task_id}")
    quiet = run(hub, *ENOUGH, "--nowait", "--quiet")
    assert wire(hub, int(quiet.stdout)) == wire(hub, task_id) == whole()


def test_in_the_background_it_waits_only_when_told_to(hub: RealKoji) -> None:
    done = run(hub, *ENOUGH)
    assert done.returncode == 0
    assert "Watching tasks" not in done.stdout


@pytest.mark.parametrize(("option", "more"), [("--background", 5), ("--priority=7", 7), ("", 0)])
def test_the_priority_is_relative_to_the_default(hub: RealKoji, option: str, more: int) -> None:
    import koji

    done = run(hub, *ENOUGH, "--nowait", "--quiet", *([option] if option else []))
    assert hub.task(int(done.stdout))["priority"] == koji.PRIO_DEFAULT + more


def test_a_local_template_is_uploaded(hub: RealKoji, template: Path) -> None:
    done = run(hub, *WHAT, *INPUTS, f"--template={template}", "--scratch", "--nowait", "--quiet")
    assert done.returncode == 0, done.stderr
    spec = wire(hub, int(done.stdout))
    assert spec["template"] == "live.tdl"
    assert (hub.topdir / "work" / spec["template_upload"] / "live.tdl").read_text() == TEMPLATE


def test_the_upload_shows_progress_on_a_terminal_unless_told_not_to(
    hub: RealKoji, template: Path
) -> None:
    arguments = [*WHAT, *INPUTS, f"--template={template}", "--scratch", "--nowait"]
    assert "[=======" in on_a_terminal(hub, *arguments)
    assert "[=======" not in on_a_terminal(hub, *arguments, "--noprogress")
    assert "[=======" not in run(hub, *arguments).stdout


def on_a_terminal(hub: RealKoji, *arguments: object) -> str:
    code = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    argv = hub.cli_argv("indirection-build", *arguments, user="alice")
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        env=hub.cli_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Created task: " in done.stdout
    return done.stdout


@pytest.mark.parametrize("section", ["image-build-indirection", "indirection-build"])
def test_an_old_config_file_works_unchanged(hub: RealKoji, tmp_path: Path, section: str) -> None:
    path = tmp_path / "old.conf"
    path.write_text(
        f"""
[{section}]
name = live
version = 1.cli
target = images
arch = x86_64
base_image_build = in-1-1
utility_image_build = 7
indirection_template = live.tdl
indirection_template_url = {SCM}
results_loc = results/images/boot.iso
scratch = false
wait = false
"""
    )
    done = run(hub, "--config", path, "--quiet")
    assert done.returncode == 0, done.stderr
    assert wire(hub, int(done.stdout)) == whole(template="live.tdl")


def test_a_new_config_file_has_arches_of_their_own_and_is_overridden_by_options(
    hub: RealKoji, tmp_path: Path
) -> None:
    path = tmp_path / "live.conf"
    path.write_text(
        f"""
[indirection-build]
target = images
name = live
version = 40
arch = x86_64 aarch64
input_image = in-1-1
utility_image = build:7
template = t/live.tdl
template_scm = {SCM}

[indirection-build:aarch64]
memory = 8G
"""
    )
    done = run(hub, *WHAT, "--config", path, "--nowait", "--quiet")
    assert done.returncode == 0, done.stderr
    assert wire(hub, int(done.stdout)) == whole(
        arches=["x86_64", "aarch64"], arch_build={"aarch64": {"memory_bytes": 8 * 2**30}}
    )
    path.write_text(path.read_text().replace("template_scm", "template_smc"))
    done = run(hub, "--config", path)
    assert done.returncode == 2
    assert "has no key 'template_smc' (did you mean 'template_scm'?)" in done.stderr


def test_who_may_not_build_images_is_told(hub: RealKoji) -> None:
    hub.user_session("mallory", perms=[])
    before = tasks(hub)
    done = run(hub, *ENOUGH, "--nowait", user="mallory")
    assert done.returncode == 1
    assert "ActionNotAllowed: image permission required" in done.stderr
    assert tasks(hub) == before


def test_what_the_hub_refuses_is_told_as_the_hub_says_it(hub: RealKoji, template: Path) -> None:
    done = run(hub, *WHAT, *INPUTS, f"--template={template}", "--nowait")
    assert done.returncode == 1
    assert "ActionNotAllowed: a build that is not scratch needs its template from" in done.stderr
    assert "Created task" not in done.stdout


def test_a_hub_without_the_plugin_is_told_of(hub: RealKoji) -> None:
    hub.hub_restart(settings={"Plugins": ""})
    try:
        done = run(hub, *ENOUGH, "--nowait")
    finally:
        hub.hub_restart()
    assert done.returncode == 3
    assert f"builder fault: the hub {hub.server} knows no indirection builds (" in done.stderr


# Waiting


@contextmanager
def waiting(hub: RealKoji, *arguments: object) -> Iterator[tuple[Any, int]]:
    """The command, running, and its task."""
    before = set(tasks(hub))
    command = subprocess.Popen(
        hub.cli_argv("indirection-build", *ENOUGH, "--wait", *arguments, user="alice"),
        env=hub.cli_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        told = command.stderr if "--json" in arguments else command.stdout
        assert told is not None
        for line in told:
            if line.startswith("Watching tasks"):
                break
        (task_id,) = set(tasks(hub)) - before
        yield command, task_id
    finally:
        command.kill()
        command.communicate()


def test_the_exit_status_is_that_of_the_task(hub: RealKoji) -> None:
    with waiting(hub) as (command, task_id):
        hub.admin_session().cancelTask(task_id)
        out, _ = command.communicate(timeout=60)
        assert command.returncode == 1
        assert f"{task_id} indirectionBuild" in out
        assert "canceled" in out


def test_a_task_that_succeeds_is_told_with_its_build(hub: RealKoji, tmp_path: Path) -> None:
    with waiting(hub, "--json") as (command, task_id):
        build = play_the_builder(hub, task_id, tmp_path)
        out, err = command.communicate(timeout=60)
    assert command.returncode == 0, err
    assert json.loads(out) == {
        "task_id": task_id,
        "state": "CLOSED",
        "build": {
            "id": build["id"],
            "nvr": "live-1.cli-1",
            "name": "live",
            "version": "1.cli",
            "release": "1",
            "state": "COMPLETE",
        },
    }
    assert f"{task_id} indirectionBuild" in err


def play_the_builder(hub: RealKoji, task_id: int, directory: Path) -> Any:
    """Make the task's build of one small file, and close the task."""
    import koji
    from harness.base import HOST
    from koji.xmlrpcplus import dumps

    hub.admin_session().assignTask(task_id, HOST, force=True)
    host = hub._session(HOST)
    host.exclusiveSession(force=True)
    assert host.host.openTask(task_id) is not None
    nvr = {"name": "live", "version": "1.cli", "release": "1", "epoch": 0}
    build = host.host.initImageBuild(task_id, nvr)
    (directory / "boot.json").write_text("{}")
    (directory / "build.log").write_text("built\n")
    for name in ("boot.json", "build.log"):
        with warnings.catch_warnings():
            # The library leaves the file to the garbage collector.
            warnings.simplefilter("ignore", ResourceWarning)
            host.fastUpload(str(directory / name), koji.pathinfo.taskrelpath(task_id))
    results = {
        "task_id": task_id,
        "files": ["boot.json"],
        "logs": ["build.log"],
        "arch": "x86_64",
        "rpmlist": [],
    }
    host.host.completeImageBuild(task_id, build["id"], {str(task_id): results})
    host.host.closeTask(task_id, dumps(("done",), methodresponse=1))
    host.logout()
    return build


def test_a_task_without_a_build_has_none(hub: RealKoji) -> None:
    with waiting(hub, "--json") as (command, task_id):
        hub.admin_session().cancelTask(task_id)
        out, _ = command.communicate(timeout=60)
    assert command.returncode == 1
    assert json.loads(out) == {"task_id": task_id, "state": "CANCELED", "build": None}


def test_interrupting_the_watch_leaves_the_task_and_its_id(hub: RealKoji) -> None:
    with waiting(hub, "--json") as (command, task_id):
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=60)
        assert command.returncode == 1
        assert json.loads(out)["task_id"] == task_id
        assert "You can continue to watch with the" in err
        assert task_id in tasks(hub)


# Dry runs


@pytest.fixture(scope="module")
def nvr(hub: RealKoji, tmp_path_factory: pytest.TempPathFactory) -> str:
    from harness.base import DEST_TAG, ImageFile

    disk = tmp_path_factory.mktemp("disks") / "disk.qcow2"
    disk.write_bytes(b"x" * 70000)
    nvr = "dry-input-1-1"
    hub.import_image_build(
        nvr,
        [ImageFile(disk, name="d.x86_64.qcow2"), ImageFile(disk, "aarch64", "d.aarch64.qcow2")],
        tag=DEST_TAG,
    )
    return nvr


def dry_run(hub: RealKoji, *arguments: object, images: str) -> subprocess.CompletedProcess[str]:
    """As a user whom the hub does not know."""
    from harness.base import DEST_TAG

    before = tasks(hub)
    done = run(
        *(hub, *WHAT, "--dry-run", f"--input-image={images}", "--template=t/live.tdl"),
        *(f"--utility-image=latest:dry-input@{DEST_TAG}", f"--template-scm={SCM}", *arguments),
        user="nobody",
    )
    assert tasks(hub) == before
    return done


def test_a_dry_run_shows_which_images_it_would_use(hub: RealKoji, nvr: str) -> None:
    from hashlib import sha256

    done = dry_run(hub, "--arch=x86_64", "--arch=aarch64", images=nvr)
    assert done.returncode == 0, done.stderr
    assert "Images for x86_64:\n  input image: d.x86_64.qcow2 of dry-input-1-1 (build:" in (
        done.stdout
    )
    digest = sha256(b"x" * 70000).hexdigest()
    assert f"    68.4 KiB, sha256 {digest}\n" in done.stdout
    assert "  utility image: d.aarch64.qcow2 of dry-input-1-1" in done.stdout
    assert done.stdout.endswith("No task was made.\n")


def test_a_dry_run_prints_json(hub: RealKoji, nvr: str) -> None:
    done = dry_run(hub, "--arch=aarch64", "--json", images=nvr)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    build = hub.admin_session().getBuild(nvr)
    assert record["spec"]["build"]["results"] == ["/results/images/boot.iso"]
    image = record["inputs"]["aarch64"]["input_image"]
    assert (image["build_id"], image["filename"]) == (build["id"], "d.aarch64.qcow2")
    assert (image["size_bytes"], image["checksum_type"]) == (70000, "sha256")


def test_a_dry_run_uploads_nothing(hub: RealKoji, nvr: str, template: Path) -> None:
    uploads = hub.topdir / "work" / "cli-indirection"
    before = sorted(uploads.rglob("*"))
    done = dry_run(*(hub, "--arch=x86_64", "--template-scm=", f"--template={template}"), images=nvr)
    assert done.returncode == 0, done.stderr
    assert f"The template is {template}; it was not uploaded.\n" in done.stdout
    assert sorted(uploads.rglob("*")) == before


def test_a_dry_run_fails_where_the_build_would(hub: RealKoji, nvr: str) -> None:
    done = dry_run(hub, "--arch=s390x", images=nvr)
    assert done.returncode == 1
    assert "there is no image for s390x, only for aarch64, x86_64" in done.stderr
    done = dry_run(hub, "--arch=x86_64,s390x", "--can-fail=s390x", images=nvr)
    assert done.returncode == 0, done.stderr
    assert "this arch will fail, as it may: " in done.stdout
    done = dry_run(hub, "--arch=x86_64", images="no-such-1")
    assert done.returncode == 2
    assert "there is no such build" in done.stderr
    done = run(hub, "nowhere", *WHAT[1:], *INPUTS, "--template=t", "--dry-run",
               f"--template-scm={SCM}")  # fmt: skip
    assert done.returncode == 2
    assert "there is no build target 'nowhere'" in done.stderr
