"""`koji indirection-build`, the command itself; the builder is played here, the hub is any."""

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
    from harness.base import AnyKoji

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
def hub(any_koji: AnyKoji) -> Iterator[AnyKoji]:
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


def run(hub: AnyKoji, *arguments: object, user: str = "alice") -> subprocess.CompletedProcess[str]:
    return hub.cli("indirection-build", *arguments, user=user, stdin=subprocess.DEVNULL)


def tasks(hub: AnyKoji) -> list[int]:
    free = hub.admin_session().listTasks({"method": "indirectionBuild", "state": [0, 1, 4]})
    return [task["id"] for task in free]


def wire(hub: AnyKoji, task_id: int) -> Any:
    """The spec of a task, as a builder gets it."""
    spec, *_ = hub.task(task_id)["request"]
    return spec


def whole(**fields: Any) -> Any:
    """With what the library adds."""
    from koji_indirection.taskspec import TaskSpec

    return TaskSpec.from_dict({**SPEC, **fields}).to_dict()


# Without a hub


def test_help_needs_no_server(hub: AnyKoji) -> None:
    done = hub.cli(NOBODY_LISTENS, "indirection-build", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "koji indirection-build [options] TARGET NAME VERSION" in done.stdout
    assert "--utility-image=REF" in done.stdout


def test_help_of_a_replay_needs_no_server(hub: AnyKoji) -> None:
    done = hub.cli(NOBODY_LISTENS, "indirection-replay", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "koji indirection-replay TASK_ID --output DIR [options]" in done.stdout
    assert "--template=FILE" in done.stdout


def test_koji_help_lists_the_commands(hub: AnyKoji) -> None:
    done = hub.cli(NOBODY_LISTENS, "help", "build")
    assert "indirection-build         Make an image with the tools that are" in done.stdout
    assert "indirection-replay        Build on this machine what a task of" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "TASK_ID is missing"),
        (["1", "2", "--output=x"], "there are 2 arguments"),
        (["live-1-1", "--output=x"], "'live-1-1' is no task's id"),
        (["5"], "--output is missing"),
        (["5", "--output=x", "--memory=3GB"], "--memory: '3GB' is not a size"),
        (["5", "--output=x", "--template=/no/such.tdl"], "/no/such.tdl does not exist"),
        (["5", "--output=x", "--scratch"], "no such option: --scratch"),
    ],
)
def test_usage_errors_of_a_replay_need_no_login(
    hub: AnyKoji, arguments: list[str], message: str
) -> None:
    done = hub.cli(NOBODY_LISTENS, "indirection-replay", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--utilty-image=x"], "no such option: --utilty-image (did you mean --utility-image?)"),
        (WHAT, "--arch, --input-image and --template are missing"),
        ([*ENOUGH, "--memory=3GB"], "--memory: '3GB' is not a size"),
        ([*WHAT, *INPUTS, "--template=/no/such.tdl"], "/no/such.tdl does not exist"),
    ],
)
def test_usage_errors_need_no_login(hub: AnyKoji, arguments: Any, message: str) -> None:
    done = hub.cli(NOBODY_LISTENS, "indirection-build", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage error: ")
    assert message in done.stderr
    assert done.stdout == ""


def without(
    hub: AnyKoji, module: str, tmp_path: Path, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """A command of koji's where this module is not installed."""
    (tmp_path / f"{module}.py").write_text("raise ImportError('it is not here')")
    environment = hub.cli_environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment['PYTHONPATH']}"
    argv = hub.cli_argv(*arguments)
    return subprocess.run(argv, env=environment, capture_output=True, text=True)


def test_without_the_library_other_commands_work_and_this_one_says_why(
    hub: AnyKoji, tmp_path: Path
) -> None:
    assert without(hub, "koji_indirection", tmp_path, "list-targets").returncode == 0
    done = without(hub, "koji_indirection", tmp_path, "indirection-build", "--help")
    assert done.returncode == 3
    assert "it is not here (install the Python module koji_indirection" in done.stderr


def test_without_jsonschema_there_is_help_and_a_build_says_what_to_install(
    hub: AnyKoji, tmp_path: Path
) -> None:
    done = without(hub, "jsonschema", tmp_path, "indirection-build", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    done = without(hub, "jsonschema", tmp_path, "indirection-build", *ENOUGH)
    assert done.returncode == 3
    assert done.stderr.startswith("builder fault: build specs cannot be checked: ")
    assert "install python3-jsonschema" in done.stderr


# Submitting


def test_a_task_has_exactly_the_spec_that_was_asked_for(hub: AnyKoji) -> None:
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


def test_nowait_prints_the_id_and_with_quiet_nothing_else(hub: AnyKoji) -> None:
    done = run(hub, *ENOUGH, "--nowait")
    created, info = done.stdout.splitlines()
    task_id = int(created.removeprefix("Created task: "))
    assert info.startswith("Task info: http://")
    assert info.endswith(f"/web/taskinfo?taskID={task_id}")
    quiet = run(hub, *ENOUGH, "--nowait", "--quiet")
    assert wire(hub, int(quiet.stdout)) == wire(hub, task_id) == whole()


def test_in_the_background_it_waits_only_when_told_to(hub: AnyKoji) -> None:
    done = run(hub, *ENOUGH)
    assert done.returncode == 0
    assert "Watching tasks" not in done.stdout


@pytest.mark.parametrize(("option", "more"), [("--background", 5), ("--priority=7", 7), ("", 0)])
def test_the_priority_is_relative_to_the_default(hub: AnyKoji, option: str, more: int) -> None:
    import koji

    done = run(hub, *ENOUGH, "--nowait", "--quiet", *([option] if option else []))
    assert hub.task(int(done.stdout))["priority"] == koji.PRIO_DEFAULT + more


def test_a_local_template_is_uploaded(hub: AnyKoji, template: Path) -> None:
    done = run(hub, *WHAT, *INPUTS, f"--template={template}", "--scratch", "--nowait", "--quiet")
    assert done.returncode == 0, done.stderr
    spec = wire(hub, int(done.stdout))
    assert spec["template"] == "live.tdl"
    assert (hub.topdir / "work" / spec["template_upload"] / "live.tdl").read_text() == TEMPLATE


def test_the_upload_shows_progress_on_a_terminal_unless_told_not_to(
    hub: AnyKoji, template: Path
) -> None:
    arguments = [*WHAT, *INPUTS, f"--template={template}", "--scratch", "--nowait"]
    assert "[=======" in on_a_terminal(hub, *arguments)
    assert "[=======" not in on_a_terminal(hub, *arguments, "--noprogress")
    assert "[=======" not in run(hub, *arguments).stdout


def on_a_terminal(hub: AnyKoji, *arguments: object) -> str:
    done = subprocess.run(
        terminal_argv(hub, *arguments),
        env=hub.cli_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Created task: " in done.stdout
    return done.stdout


def terminal_argv(hub: AnyKoji, *arguments: object) -> list[str]:
    """The command with a terminal of its own, whose output goes to standard output."""
    code = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    argv = hub.cli_argv("indirection-build", *arguments, user="alice")
    return [sys.executable, "-c", code, *argv]


@pytest.mark.parametrize("section", ["image-build-indirection", "indirection-build"])
def test_an_old_config_file_works_unchanged(hub: AnyKoji, tmp_path: Path, section: str) -> None:
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
    hub: AnyKoji, tmp_path: Path
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


def test_who_may_not_build_images_is_told(hub: AnyKoji) -> None:
    hub.user_session("mallory", perms=[])
    before = tasks(hub)
    done = run(hub, *ENOUGH, "--nowait", user="mallory")
    assert done.returncode == 1
    assert "ActionNotAllowed: image permission required" in done.stderr
    assert tasks(hub) == before


def test_what_the_hub_refuses_is_told_as_the_hub_says_it(hub: AnyKoji, template: Path) -> None:
    done = run(hub, *WHAT, *INPUTS, f"--template={template}", "--nowait")
    assert done.returncode == 1
    assert "ActionNotAllowed: a build that is not scratch needs its template from" in done.stderr
    assert "Created task" not in done.stdout


def test_a_hub_without_the_plugin_is_told_of(hub: AnyKoji) -> None:
    hub.hub_restart(settings={"Plugins": ""})
    try:
        done = run(hub, *ENOUGH, "--nowait")
    finally:
        hub.hub_restart()
    assert done.returncode == 3
    assert f"builder fault: the hub {hub.server} knows no indirection builds (" in done.stderr


# Waiting


@contextmanager
def waiting(
    hub: AnyKoji, *arguments: object, argv: list[str] | None = None
) -> Iterator[tuple[Any, int]]:
    """The command, running, and its task; argv is the whole of it, if it is a special one."""
    before = set(tasks(hub))
    command = subprocess.Popen(
        argv or hub.cli_argv("indirection-build", *ENOUGH, "--wait", *arguments, user="alice"),
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


def test_on_a_terminal_it_waits_without_being_told_to(hub: AnyKoji) -> None:
    with waiting(hub, argv=terminal_argv(hub, *ENOUGH)) as (command, task_id):
        hub.admin_session().cancelTask(task_id)
        command.communicate(timeout=60)
    assert command.returncode == 1


def test_the_exit_status_is_that_of_the_task(hub: AnyKoji) -> None:
    with waiting(hub) as (command, task_id):
        hub.admin_session().cancelTask(task_id)
        out, _ = command.communicate(timeout=60)
        assert command.returncode == 1
        assert f"{task_id} indirectionBuild" in out
        assert "canceled" in out


def test_a_task_that_succeeds_is_told_with_its_build(hub: AnyKoji, tmp_path: Path) -> None:
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


def play_the_builder(hub: AnyKoji, task_id: int, directory: Path) -> Any:
    """Make the task's build of one small file, and close the task."""
    from koji.xmlrpcplus import dumps

    host = taken(hub, task_id)
    nvr = {"name": "live", "version": "1.cli", "release": "1", "epoch": 0}
    build = host.host.initImageBuild(task_id, nvr)
    (directory / "boot.json").write_text("{}")
    (directory / "build.log").write_text("built\n")
    for name in ("boot.json", "build.log"):
        upload(host, task_id, directory / name)
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


def taken(hub: AnyKoji, task_id: int) -> Any:
    """The session of the host, which has opened the task."""
    from harness.base import HOST

    hub.admin_session().assignTask(task_id, HOST, force=True)
    host = hub._session(HOST)
    host.exclusiveSession(force=True)
    assert host.host.openTask(task_id) is not None
    return host


def upload(host: Any, task_id: int, path: Path) -> None:
    import koji

    with warnings.catch_warnings():
        # The library leaves the file to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        host.fastUpload(str(path), koji.pathinfo.taskrelpath(task_id))


def test_a_task_without_a_build_has_none(hub: AnyKoji) -> None:
    with waiting(hub, "--json") as (command, task_id):
        hub.admin_session().cancelTask(task_id)
        out, _ = command.communicate(timeout=60)
    assert command.returncode == 1
    assert json.loads(out) == {"task_id": task_id, "state": "CANCELED", "build": None}


def test_interrupting_the_watch_leaves_the_task_and_its_id(hub: AnyKoji) -> None:
    with waiting(hub, "--json") as (command, task_id):
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=60)
        assert command.returncode == 1
        assert json.loads(out)["task_id"] == task_id
        assert "You can continue to watch with the" in err
        assert task_id in tasks(hub)


# Dry runs


@pytest.fixture(scope="module")
def nvr(hub: AnyKoji, tmp_path_factory: pytest.TempPathFactory) -> str:
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


def dry_run(hub: AnyKoji, *arguments: object, images: str) -> subprocess.CompletedProcess[str]:
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


def test_a_dry_run_shows_which_images_it_would_use(hub: AnyKoji, nvr: str) -> None:
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


def test_a_dry_run_prints_json(hub: AnyKoji, nvr: str) -> None:
    done = dry_run(hub, "--arch=aarch64", "--json", images=nvr)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    build = hub.admin_session().getBuild(nvr)
    assert record["spec"]["build"]["results"] == ["/results/images/boot.iso"]
    image = record["inputs"]["aarch64"]["input_image"]
    assert (image["build_id"], image["filename"]) == (build["id"], "d.aarch64.qcow2")
    assert (image["size_bytes"], image["checksum_type"]) == (70000, "sha256")


def test_a_dry_run_uploads_nothing(hub: AnyKoji, nvr: str, template: Path) -> None:
    uploads = hub.topdir / "work" / "cli-indirection"
    before = sorted(uploads.rglob("*"))
    done = dry_run(*(hub, "--arch=x86_64", "--template-scm=", f"--template={template}"), images=nvr)
    assert done.returncode == 0, done.stderr
    assert f"The template is {template}; it was not uploaded.\n" in done.stdout
    assert sorted(uploads.rglob("*")) == before


def test_a_dry_run_fails_where_the_build_would(hub: AnyKoji, nvr: str) -> None:
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


# On this machine: real VMs, no task, and nobody is logged in

TINY = Path(__file__).resolve().parents[2] / ".cache/images/tiny.qcow2"
SMALL = ("--memory=256M", "--cpus=1", "--workspace-size=1G")
RESULTS = "mount /dev/vdb1 /mnt && cd /mnt && mkdir -p results/images"
MAKE_ISO = f"{RESULTS} && echo made >results/images/boot.iso"


@pytest.fixture(scope="module")
def tiny(hub: AnyKoji) -> str:
    if not TINY.exists():
        pytest.skip(f"there is no {TINY}: run make images")
    from harness.base import ImageFile

    nvr = "tiny-1-cli"
    images = [ImageFile(TINY, name="t.x86_64.qcow2"), ImageFile(TINY, "i686", "t.i686.qcow2")]
    hub.import_image_build(nvr, images)
    return nvr


def tdl(path: Path, command: str) -> Path:
    from lxml import etree
    from lxml.builder import E

    path.write_bytes(etree.tostring(E.template(E.commands(E.command(command, name="make")))))
    return path


def here(hub: AnyKoji, tmp_path: Path) -> list[str]:
    """The options of any build on this machine."""
    return [
        f"--output={tmp_path / 'out'}",
        f"--cache-dir={hub.work / 'cli-cache'}",
        f"--work-dir={tmp_path / 'work'}",
    ]


def build_locally(
    hub: AnyKoji, tmp_path: Path, image: str, *arguments: object, arch: str = "x86_64"
) -> subprocess.CompletedProcess[str]:
    return hub.cli(
        *("indirection-build", "images", "live", "1", f"--arch={arch}", f"--input-image={image}"),
        *("--local", *SMALL, *here(hub, tmp_path), *arguments),
        user="nobody",
        timeout_seconds=600,
    )


def replay(
    hub: AnyKoji, tmp_path: Path, task_id: int, *arguments: object
) -> subprocess.CompletedProcess[str]:
    return hub.cli(
        *("indirection-replay", task_id, *here(hub, tmp_path), *arguments),
        user="nobody",
        timeout_seconds=600,
    )


def nothing_is_left(tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert not work.exists() or list(work.iterdir()) == []


def test_a_local_build_makes_what_a_builder_would_and_no_task(
    hub: AnyKoji, tiny: str, tmp_path: Path
) -> None:
    before = tasks(hub)
    template = tdl(tmp_path / "live.tdl", MAKE_ISO)
    done = build_locally(hub, tmp_path, tiny, f"--template={template}", "--json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/boot.iso").read_text() == "made\n"
    manifest = json.loads(done.stdout)
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["outcome"] == "built"
    assert manifest["input_image"]["koji"]["nvr"] == tiny
    assert manifest["input_image"]["koji"]["filename"] == "t.x86_64.qcow2"
    assert (tmp_path / "out/logs/template.log").read_bytes() == template.read_bytes()
    assert "[  0:" in done.stderr, "the phases are shown"
    assert tasks(hub) == before
    nothing_is_left(tmp_path)


def test_a_local_build_takes_its_template_from_source_control_and_says_the_commit(
    hub: AnyKoji, tiny: str, tmp_path: Path
) -> None:
    template = tdl(tmp_path / "live.tdl", "echo the very last line; exit 7")
    url = hub.git_repository("local-template", {"live.tdl": template.read_bytes()})
    done = build_locally(
        hub, tmp_path, tiny, "--template=live.tdl", f"--template-scm={url}", "--verbose"
    )
    assert done.returncode == 1
    assert "the very last line" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("build failed: command 'make' exited with st")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    source, _, commit = manifest["template"]["source"].partition("#")
    assert source == url.partition("#")[0]
    assert len(commit) == 40
    nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--template-scm=file:///etc#main"], 2, "cannot be checked out here (write git+https:"),
        (["--template-scm=git+http://u:secret@h/r#main"], 2, "template_scm has a password"),
        (["--template-scm=git+http://127.0.0.1:1/r.git#main"], 1, "git cannot check out git+http:"),
        (["--input-image=no-such-1"], 2, "there is no such build"),
        (["--settings=/no/such.conf"], 2, "/no/such.conf do not exist"),
        (["--network=lab"], 2, "network 'lab', which the settings of this machine do not allow"),
    ],
)
def test_what_cannot_be_built_here_is_told_and_nothing_is_left(
    hub: AnyKoji, tiny: str, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    scm = any(one.startswith("--template-scm") for one in arguments)
    template = "live.tdl" if scm else tdl(tmp_path / "live.tdl", "true")
    done = build_locally(hub, tmp_path, tiny, f"--template={template}", *arguments)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr
    nothing_is_left(tmp_path)


def test_a_local_build_of_another_machines_arch_is_refused(
    hub: AnyKoji, tiny: str, tmp_path: Path
) -> None:
    template = tdl(tmp_path / "live.tdl", "true")
    done = build_locally(hub, tmp_path, tiny, f"--template={template}", arch="s390x")
    assert done.returncode == 2
    assert "this machine cannot run a guest of arch s390x" in done.stderr
    assert not (tmp_path / "out").exists()


def test_interrupting_a_local_build_stops_it_and_leaves_logs_only(
    hub: AnyKoji, tiny: str, tmp_path: Path
) -> None:
    template = tdl(tmp_path / "live.tdl", "echo it runs; sleep 300")
    argv = hub.cli_argv(
        *("indirection-build", "images", "live", "1", "--arch=x86_64", f"--input-image={tiny}"),
        *("--local", *SMALL, *here(hub, tmp_path), f"--template={template}", "--verbose"),
        user="nobody",
    )
    command = subprocess.Popen(
        argv, env=hub.cli_environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert command.stderr is not None
        for line in command.stderr:
            if "it runs" in line:
                break
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=30)
    finally:
        command.kill()
        command.communicate()
    assert command.returncode == 130, err
    assert err.splitlines()[-1].startswith("interrupted: everything was stopped")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"logs", "manifest.json"}
    nothing_is_left(tmp_path)


@pytest.fixture(scope="module")
def failed(hub: AnyKoji, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> int:
    """A scratch task that has failed, with what the engine leaves of that build.

    A later build of its image came after it.
    """
    import xmlrpc.client

    from harness.base import DEST_TAG, ImageFile
    from koji.xmlrpcplus import dumps

    directory = tmp_path_factory.mktemp("failed")
    hub.admin_session().tagBuildBypass(DEST_TAG, tiny)
    latest = f"latest:tiny@{DEST_TAG}"
    template = tdl(directory / "live.tdl", "echo oh dear; exit 3")
    done = run(
        *(hub, *WHAT, "--arch=x86_64", f"--input-image={latest}", *SMALL),
        *(f"--template={template}", "--scratch", "--nowait", "--quiet"),
    )
    assert done.returncode == 0, done.stderr
    task_id = int(done.stdout)
    done = build_locally(hub, directory, latest, f"--template={template}")
    assert done.returncode == 1, done.stderr
    (directory / "out/manifest.json").rename(directory / "live-1.cli-1.x86_64.manifest.json")
    host = taken(hub, task_id)
    upload(host, task_id, directory / "out/logs/template.log")
    upload(host, task_id, directory / "live-1.cli-1.x86_64.manifest.json")
    host.host.failTask(task_id, dumps(xmlrpc.client.Fault(1005, "build failed: see the logs")))
    host.logout()
    hub.import_image_build("tiny-2-cli", [ImageFile(TINY, name="new.qcow2")], tag=DEST_TAG)
    return task_id


def test_a_failed_task_fails_here_in_the_same_way(
    hub: AnyKoji, failed: int, tiny: str, tmp_path: Path
) -> None:
    done = replay(hub, tmp_path, failed, "--verbose", "--json")
    assert done.returncode == 1
    assert "oh dear" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("build failed: command 'make' exited with st")
    manifest = json.loads(done.stdout)
    assert manifest["outcome"] == "build failed"
    assert manifest["input_image"]["koji"]["nvr"] == tiny, "what was latest then"
    assert manifest["spec"]["memory_bytes"] == 256 * 2**20
    assert manifest["template"]["source"] == f"template.log of task {failed}"
    nothing_is_left(tmp_path)


def test_a_correction_is_tried_out_on_a_failed_task(
    hub: AnyKoji, failed: int, tmp_path: Path
) -> None:
    fixed = tdl(tmp_path / "fixed.tdl", MAKE_ISO.replace("boot.iso", "other.iso"))
    done = replay(
        *(hub, tmp_path, failed, f"--template={fixed}", "--memory=300M"),
        "--results=/results/images/*.iso",
    )
    assert done.returncode == 0, done.stderr
    assert f"result    {tmp_path / 'out/other.iso'}" in done.stdout
    assert (tmp_path / "out/other.iso").read_text() == "made\n"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["spec"]["memory_bytes"] == 300 * 2**20
    nothing_is_left(tmp_path)


def test_what_cannot_be_replayed_is_told(hub: AnyKoji, tiny: str, tmp_path: Path) -> None:
    def refused(task_id: int, *arguments: object) -> str:
        done = replay(hub, tmp_path, task_id, *arguments)
        assert done.returncode in (1, 2), done.stderr
        assert not (tmp_path / "out").exists()
        assert "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert "there is no task 2000000000" in refused(2000000000)
    admin = hub.admin_session()
    other = admin.makeTask("sleep", [0])
    assert f"task {other} is a sleep task, and no indirection build" in refused(other)
    admin.cancelTask(other)

    def canceled(*arguments: object) -> int:
        done = run(hub, *WHAT, *arguments, "--nowait", "--quiet")
        assert done.returncode == 0, done.stderr
        admin.cancelTask(int(done.stdout))
        return int(done.stdout)

    both = canceled("--arch=x86_64,i686", f"--input-image={tiny}", "--template=t/live.tdl",
                    f"--template-scm=git+{hub.topurl}/scm/nowhere.git#main")  # fmt: skip
    assert f"task {both} builds several arches: x86_64, i686 (choose one with" in refused(both)
    assert f"task {both} does not build s390x" in refused(both, "--arch=s390x")
    assert "or give a template with --template FILE)" in refused(both, "--arch=i686")

    template = tdl(tmp_path / "live.tdl", "true")
    uploaded = canceled(
        "--arch=x86_64", f"--input-image={tiny}", f"--template={template}", "--scratch"
    )
    spec, *_ = hub.task(uploaded)["request"]
    (hub.topdir / "work" / spec["template_upload"] / "live.tdl").unlink()
    assert "the template live.tdl is not in cli-indirection/" in refused(uploaded)
