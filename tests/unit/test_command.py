"""The local command, run as a user runs it: options, messages, exit statuses."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from koji_indirection import command, pipeline
from koji_indirection.config import Settings
from koji_indirection.errors import BuilderFault
from koji_indirection.jobdir import python_environment
from koji_indirection.pipeline import Order
from koji_indirection.spec import BuildSpec
from koji_indirection.units import GIB

TEMPLATE = '<template><commands><command name="one">true</command></commands></template>'


class Said(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.splitlines()[-1] if self.err else ""


def run(*argv: object, **env: str) -> Said:
    done = subprocess.run(
        [sys.executable, "-m", "koji_indirection.command", *map(str, argv)],
        capture_output=True,
        text=True,
        env={**python_environment(), "COLUMNS": "100", **env},
        cwd="/",
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Said]]:
    """As run(), in this process: for the many cases that end before anything starts."""
    handlers = {number: signal.getsignal(number) for number in command._SIGNALS}

    def run_in_process(*argv: object) -> Said:
        try:
            status = command.main([str(word) for word in argv])
        except SystemExit as end:  # argparse
            status = int(str(end.code))
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    yield run_in_process
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.tdl"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "input.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M"], check=True, timeout=20
    )
    return path


@pytest.fixture
def bare_machine(tmp_path: Path) -> dict[str, str]:
    """An environment in which libvirt, guestfs, rich and what needs a build are not there."""
    directory = tmp_path / "blocked"
    directory.mkdir()
    for name in ("libvirt", "libvirtmod", "guestfs", "libguestfsmod", "rich", "oslo_utils"):
        (directory / f"{name}.py").write_text(f"raise ImportError('no {name} on this machine')\n")
    return {"PYTHONPATH": f"{directory}{os.pathsep}{python_environment()['PYTHONPATH']}"}


def options_of(name: str) -> list[argparse.Action]:
    parser = command._parser()
    (commands,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    return list(commands.choices[name]._actions)


# --help


@pytest.mark.parametrize("name", ["build", "shell", "doctor", "check"])
def test_help_lists_every_option_even_on_a_bare_machine(
    name: str, bare_machine: dict[str, str]
) -> None:
    said = run(name, "--help", **bare_machine)
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith(f"usage: koji-indirection {name}")
    for action in options_of(name):
        for option in action.option_strings:
            assert action.help, f"{option} has no help"
            assert f" {option}" in said.out.partition("]\n\n")[2], option


def test_the_main_help_names_the_commands() -> None:
    said = run("--help")
    assert said.status == 0
    for name in ("build", "shell", "doctor", "check"):
        assert f"\n    {name} " in said.out


# Options in the documentation that are other programs'.
FOREIGN = {
    *("--make-iso", "--disk-image", "--ks", "--tmp", "--resultdir"),  # livemedia-creator
    *("--template-scm", "--local", "--system-site-packages", "--prefix"),  # koji, venv, pip
}


@pytest.mark.parametrize("page", ["README.md", "docs/user.md", "docs/template.md"])
def test_every_option_that_the_documentation_names_is_there(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - FOREIGN - {"--help"}
    commands = ("build", "shell", "doctor", "check")
    known = {o for name in commands for action in options_of(name) for o in action.option_strings}
    assert named <= known
    assert len(named) > 3


def test_the_version_is_printed() -> None:
    said = run("--version")
    assert said.status == 0
    assert said.out.startswith("koji-indirection ")


# Usage


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "COMMAND"),
        (["brew"], "brew"),
        (["build"], "--input-image"),
        (["check"], "FILE"),
        (["doctor", "--accel", "xen"], "--accel: invalid choice: 'xen'"),
        (["doctor", "--no-such"], "unrecognized arguments: --no-such"),
        (["check", "x", "--max-image-size", "30GB"], "--max-image-size: "),
    ],
)
def test_a_wrong_command_line_exits_2_with_one_sentence(
    run_here: Callable[..., Said], argv: list[str], sentence: str
) -> None:
    said = run_here(*argv)
    assert (said.status, said.out) == (2, "")
    assert said.last_line.startswith("koji-indirection")
    assert ": error: " in said.last_line
    assert sentence in said.last_line


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--cpus", "0"], "'0' is not a whole number above 0"),
        (["--cpus", "-1"], "--cpus"),
        (["--memory", "lots"], "--memory: "),
        (["--boot-timeout", "soon"], "--boot-timeout: "),
        (["--max-results", "x"], "'x' is not a whole number above 0"),
        (["--input-device", "vdc", "--input-filename", "/i.raw"], "input_device"),
        (["--input-writable"], "input_device"),
        (["--input-device", "vdb"], "vdb"),
        (["--workspace-fs", "ntfs"], "workspace_fs"),
        (["--firmware", "efi"], "firmware"),
        (["--firmware", "bios", "--secure-boot"], "secure_boot is given and firmware is 'bios'"),
        (["--disk-bus", "ide", "--secure-boot"], "secure_boot is given and disk_bus is 'ide'"),
        (["--disk-bus", "scsi"], "disk_bus"),
        (["--arch", "sparc"], "no virtual machine for a guest of the arch 'sparc'"),
        (["--results", "relative"], "results"),
        (["--cpus", "1000"], "cpus"),
    ],
)
def test_a_wrong_value_exits_2_and_makes_no_output_directory(
    run_here: Callable[..., Said],
    tmp_path: Path,
    template: Path,
    image: Path,
    argv: list[str],
    sentence: str,
) -> None:
    output = tmp_path / "out"
    said = run_here(
        *("build", "--input-image", image, "--template", template, "--output", output), *argv
    )
    assert (said.status, said.out) == (2, "")
    assert sentence in said.last_line
    assert "error: " in said.last_line
    assert not output.exists()


def test_a_shell_takes_what_a_build_takes_of_guest_and_machine_and_needs_a_terminal(
    tmp_path: Path, template: Path, image: Path
) -> None:
    build, shell = (
        {option for action in options_of(name) for option in action.option_strings}
        for name in ("build", "shell")
    )
    assert shell <= build
    assert build - shell == {
        *("--output", "--force", "--collect-log", "--json", "-v", "--verbose", "-q", "--quiet"),
        *("--job-timeout", "--command-timeout", "--shutdown-timeout"),
        *("--max-results", "--max-result-size", "--max-log-size", "--max-collect-time"),
        "--max-silence",
    }
    said = run("shell", "--input-image", image, "--template", template)
    assert (said.status, said.out) == (2, "")
    assert said.err.startswith("usage error: a shell needs a terminal")


def test_a_build_without_a_template_is_refused(
    run_here: Callable[..., Said], tmp_path: Path, image: Path
) -> None:
    empty = tmp_path / "p.json"
    empty.write_text("{}")
    argv = ["build", "--input-image", image, "--output", tmp_path / "out"]
    for more in ([], ["--parameters", empty]):
        said = run_here(*argv, *more)
        assert said.status == 2
        assert said.err.startswith("usage error: there is no template (name one with --template")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["--input-image", "--utility-image", "--template"])
def test_a_missing_file_is_said_and_makes_no_output_directory(
    run_here: Callable[..., Said], tmp_path: Path, template: Path, image: Path, missing: str
) -> None:
    files = {"--input-image": image, "--utility-image": image, "--template": template}
    files[missing] = tmp_path / "not-there"
    argv = [word for pair in files.items() for word in pair]
    said = run_here("build", *argv, "--output", tmp_path / "out")
    assert said.status == 2
    assert said.err.splitlines() == [said.last_line], "one sentence"
    assert said.last_line.startswith("usage error: ")
    assert f"{tmp_path}/not-there" in said.last_line
    assert not (tmp_path / "out").exists()


def test_an_output_directory_with_files_is_refused(
    run_here: Callable[..., Said], tmp_path: Path, template: Path, image: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    said = run_here("build", "--input-image", image, "--template", template, "--output", output)
    assert said.status == 2
    assert said.err == (
        f"usage error: the output directory {output} is not empty"
        " (name a new directory, or use --force to replace an earlier build in it)\n"
    )
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_a_template_without_commands_fails_the_build_before_anything_is_made(
    tmp_path: Path, image: Path
) -> None:
    template = tmp_path / "empty.tdl"
    template.write_text("<template/>")
    said = run("build", "--input-image", image, "--template", template, "--output", tmp_path / "o")
    assert said.status == 1
    assert said.last_line.startswith("build failed: ")
    assert not (tmp_path / "o").exists()


def test_a_build_that_fails_leaves_its_manifest_and_log(tmp_path: Path, template: Path) -> None:
    text = tmp_path / "text.qcow2"
    text.write_text("no disk image at all\n" * 100)
    output, work = tmp_path / "out", tmp_path / "work"
    said = run(
        *("build", "--input-image", text, "--template", template, "--output", output),
        *("--work-dir", work, "--cache-dir", tmp_path / "cache", "--accel", "tcg", "--json"),
    )
    assert said.status == 1
    assert said.last_line.startswith("build failed: ")
    record = json.loads(said.out)
    assert record == json.loads((output / "manifest.json").read_text())
    assert record["outcome"] == "build failed"
    assert f"build failed: {record['reason']}" == said.last_line
    assert record["logs"] == ["build.log"]
    assert said.last_line in (output / "logs" / "build.log").read_text()
    assert list(work.iterdir()) == []


# check


def checked(*argv: object, **env: str) -> tuple[int, list[dict[str, Any]]]:
    said = run("check", "--json", *argv, **env)
    findings = json.loads(said.out)
    assert all(
        set(one) == {"ok", "path", "kind", "message", "hint", "exit_status"} for one in findings
    )
    return said.status, findings


def test_check_passes_good_files(tmp_path: Path, template: Path, image: Path) -> None:
    said = run("check", "--work-dir", tmp_path / "work", template, image)
    assert (said.status, said.err) == (0, "")
    assert said.out.splitlines() == [
        f"ok    {template}: template with 1 command: one",
        f"ok    {image}: qcow2 image, 8 MiB virtual",
    ]
    assert list((tmp_path / "work").iterdir()) == []


def test_check_says_what_is_wrong_with_each_file(
    tmp_path: Path, template: Path, image: Path
) -> None:
    bomb = tmp_path / "bomb.tdl"
    bomb.write_text('<!DOCTYPE t [<!ENTITY a "b">]><template>&a;</template>')
    empty, text = tmp_path / "empty.raw", tmp_path / "text.qcow2"
    empty.touch()
    text.write_text("hello " * 1000)
    backed = tmp_path / "backed.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", backed],
        check=True,
    )
    status, findings = checked(template, bomb, empty, text, backed, image)
    assert status == 1
    assert [one["ok"] for one in findings] == [True, False, False, False, False, True]
    assert [one["kind"] for one in findings] == ["template", "template", *["image"] * 4]
    assert "backing file" in findings[4]["message"]
    assert all(one["message"] for one in findings)


def test_check_waits_for_no_pipe_and_no_name_steers_the_terminal(
    tmp_path: Path, image: Path
) -> None:
    odd = image.with_name("odd\n\x1b[31mname")
    pipes = [tmp_path / name for name in ("pipe", "pipe.tdl", "pipe.json")]
    image.rename(odd)
    for pipe in pipes:
        os.mkfifo(pipe)
    said = run("check", "--work-dir", tmp_path / "work", odd, *pipes)
    assert [line.split()[0] for line in said.out.splitlines()] == ["ok", "WRONG", "WRONG", "WRONG"]
    assert "odd ?[31mname: qcow2 image" in said.out
    assert "pipe is not a regular file" in said.out
    assert "pipe.tdl is not a regular file" in said.out
    assert "pipe.json is not a regular file" in said.out


def test_check_says_what_a_template_brings_and_what_of_it_has_no_effect(tmp_path: Path) -> None:
    path = tmp_path / "all.tdl"
    path.write_text(
        "<template><name>x</name><repositories><repository name='r'><url>http://h/</url>"
        "</repository></repositories><packages><package name='a'/><package name='b'/></packages>"
        "<files><file name='/f' type='url' colour='red'>http://files.example.com/f</file></files>"
        "<commands><command name='one'>true</command>"
        "<command name='two' arch='ppc64le'>true</command></commands></template>"
    )
    said = run("check", path)
    assert said.out == (
        f"ok    {path}: template with 2 commands: one, two (on ppc64le only); brings 1 repository,"
        " 2 packages, 1 file; needs a network; ignored: name;"
        " WARNING: unknown, and without effect: file@colour\n"
    )
    settings = tmp_path / "machine.conf"
    settings.write_text("[guest]\nfile_hosts = git.example.com\n")
    said = run("check", "--config", settings, path)
    assert said.status == 1
    assert (
        "file '/f' is at files.example.com, from where the settings of this machine allow no files"
        " (its setting file_hosts in [guest] is: git.example.com)" in said.out
    )


def test_check_takes_the_parameters_of_image_factory(tmp_path: Path) -> None:
    path = tmp_path / "parameters.json"
    path.write_text(json.dumps({"utility_cpus": 2, "utility_customizations": TEMPLATE}))
    said = run("check", path)
    assert said.status == 0
    assert f"{path}: parameters: utility_cpus, utility_customizations; template with" in said.out
    path.write_text('{"utility_customizations": "<template>\\n<commands/></template>"}')
    said = run("check", path)
    assert (said.status, "utility_customizations, line 1: there is no <command>" in said.out) == (
        1,
        True,
    )


def test_check_knows_a_template_in_utf_16_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "tasks"
    path.write_text(f"<?xml version='1.0' encoding='UTF-16'?>{TEMPLATE.lstrip()}", "utf-16")
    assert "template with" in run("check", path).out


def test_check_exits_2_for_a_file_that_is_not_there(tmp_path: Path) -> None:
    said = run("check", tmp_path / "none.qcow2", tmp_path / "none.tdl")
    assert said.status == 2
    assert said.out.count("WRONG") == 2
    assert "none.qcow2 does not exist" in said.out
    assert "none.tdl does not exist" in said.out
    assert said.last_line == "2 of 2 files cannot be used (see the lines above)"


def test_check_honours_the_limit_of_the_virtual_size(image: Path) -> None:
    assert checked("--max-image-size", "8M", image)[0] == 0
    status, (finding,) = checked("--max-image-size", "7M", image)
    assert status == 1
    assert "limit" in finding["message"]


def test_check_of_templates_needs_no_virtualization(
    template: Path, bare_machine: dict[str, str]
) -> None:
    assert checked(template, **bare_machine)[0] == 0


def test_a_file_name_that_is_no_utf8_is_no_traceback(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.tdl")
    Path(path).write_text(TEMPLATE)
    assert run("check", path, PYTHONIOENCODING="utf-8:strict").status == 0


# doctor


def test_doctor_says_what_a_bare_machine_lacks(
    tmp_path: Path, bare_machine: dict[str, str]
) -> None:
    argv = ["--accel", "tcg", "--work-dir", tmp_path / "w", "--cache-dir", tmp_path / "c"]
    said = run("doctor", "--json", *argv, **bare_machine)
    assert said.status == 3
    assert said.last_line.startswith("builder fault: this machine cannot build: ")
    findings = {one["name"]: one for one in json.loads(said.out)}
    assert findings["libvirt"]["verdict"] == "FAILED"
    assert findings["libvirt"]["hint"] == "install python3-libvirt"
    assert findings["libguestfs"]["verdict"] == "FAILED"
    assert "python3-guestfs" in findings["libguestfs"]["message"] + findings["libguestfs"]["hint"]
    assert findings["qemu-img"]["verdict"] == "ok"
    assert {"acceleration", "work directory", "memory", "UEFI"} <= set(findings)
    assert list((tmp_path / "w").iterdir()) == []


OPTIONS = [
    (["--results", "/a", "--results", "/b/*"], BuildSpec, {"results": ("/a", "/b/*")}),
    (["--collect-log", "/a.log"], BuildSpec, {"collect_logs": ("/a.log",)}),
    (["--input-filename", "/in.raw"], BuildSpec, {"input_filename": "/in.raw"}),
    (
        ["--input-device", "vdb", "--workspace-device", "vdc", "--input-writable"],
        BuildSpec,
        {"input_device": "vdb", "workspace_device": "vdc", "input_writable": True},
    ),
    (["--workspace-size", "40G"], BuildSpec, {"workspace_size_bytes": 40 * GIB}),
    (["--workspace-fs", "xfs"], BuildSpec, {"workspace_fs": "xfs"}),
    (["--firmware", "uefi", "--secure-boot"], BuildSpec, {"firmware": "uefi", "secure_boot": True}),
    (["--disk-bus", "sata"], BuildSpec, {"disk_bus": "sata"}),
    (["--arch", "aarch64"], Order, {"arch": "aarch64"}),
    (["--cpus", "3"], BuildSpec, {"cpus": 3}),
    (["--memory", "3G"], BuildSpec, {"memory_bytes": 3 * GIB}),
    (["--boot-timeout", "7m"], BuildSpec, {"boot_timeout_seconds": 420}),
    (["--job-timeout", "2h"], BuildSpec, {"job_timeout_seconds": 7200}),
    (["--command-timeout", "90"], BuildSpec, {"command_timeout_seconds": 90}),
    (["--shutdown-timeout", "9s"], BuildSpec, {"shutdown_timeout_seconds": 9}),
    (["--connect", "test:///default"], Settings, {"connect": "test:///default"}),
    (["--accel", "tcg"], Settings, {"accel": "tcg"}),
    (["--work-dir", "/w"], Settings, {"work_dir": Path("/w")}),
    (["--cache-dir", "/c"], Settings, {"cache_dir": Path("/c")}),
    (["--max-image-size", "5G"], Settings, {"max_image_bytes": 5 * GIB}),
    (["--max-results", "4"], Settings, {"max_results": 4}),
    (["--max-result-size", "6G"], Settings, {"max_result_bytes": 6 * GIB}),
    (["--max-log-size", "1M"], Settings, {"max_log_bytes": 1024**2}),
    (
        ["--network", "user", "--repo", "http://h/a", "--repo", "http://h/debian sid main"],
        BuildSpec,
        {"network": "user", "repos": ("http://h/a", "http://h/debian sid main")},
    ),
    (["--media", "/srv/repo"], Settings, {"media": Path("/srv/repo")}),
    ([], Settings, {"networks": ("user",), "file_hosts": ("*",)}),
    (["--max-disk-size", "9G"], Settings, {"max_disk_bytes": 9 * GIB}),
    (["--max-collect-time", "9m"], Settings, {"max_collect_seconds": 540}),
    (["--max-silence", "8m"], Settings, {"max_silence_seconds": 480}),
]


def ordered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: object) -> tuple[Any, Any]:
    """The order and the settings that a command line comes to."""
    asked: list[Any] = []

    def build(order: Any, settings: Settings, _progress: Any) -> None:
        asked.extend([order, settings])
        raise BuilderFault("enough")

    monkeypatch.setattr(pipeline, "build", build)
    monkeypatch.setattr(command, "_catch_signals", lambda: None)  # they are pytest's here
    image = tmp_path / "i.raw"
    image.write_bytes(b"x")
    required = ["--input-image", image, "--output", tmp_path / "out"]
    assert command.main(["build", *map(str, [*required, *words])]) == 3
    order, settings = asked
    return order, settings


@pytest.mark.parametrize(("words", "kind", "fields"), OPTIONS, ids=lambda value: str(value)[:40])
def test_every_option_reaches_the_build(
    words: list[str],
    kind: type,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    template = tmp_path / "t.tdl"
    template.write_text(TEMPLATE)
    order, settings = ordered(monkeypatch, tmp_path, "--template", template, *words)
    got = {BuildSpec: order.spec, Settings: settings, Order: order}[kind]
    assert {name: getattr(got, name) for name in fields} == fields


def test_the_settings_file_is_read_and_options_come_before_it(
    run_here: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from koji_indirection import doctor

    seen: list[Settings] = []
    monkeypatch.setattr(doctor, "examine", lambda settings: seen.append(settings) or [])
    path = tmp_path / "machine.conf"
    path.write_text(f"[indirection]\naccel = tcg\ncache_dir = {tmp_path}\n[guest]\nnetworks = b\n")
    assert run_here("doctor", "--config", path, "--accel", "kvm").status == 0
    assert (seen[0].accel, seen[0].cache_dir, seen[0].networks) == ("kvm", tmp_path, ("b",))
    assert seen[0].file_hosts == ("*",)


def test_a_settings_file_that_is_named_and_missing_is_a_usage_error(
    run_here: Callable[..., Said], tmp_path: Path
) -> None:
    said = run_here("doctor", "--config", tmp_path / "none.conf")
    assert said.status == 2
    assert said.last_line.endswith("none.conf do not exist (check the path)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--network", "default"],
            "asks for network 'default', which the settings of this machine",
        ),
        (["--network", "br 0"], "network is 'br 0'"),
        (["--repo", "http://h/"], "repos are given, but the guest has no network"),
        (["--network", "user", "--repo", "file:///srv"], "repos has 'file:///srv' in it"),
    ],
)
def test_a_network_or_repository_that_is_not_to_be_had_is_said_before_anything_starts(
    words: list[str],
    message: str,
    run_here: Callable[..., Said],
    template: Path,
    image: Path,
    tmp_path: Path,
) -> None:
    required = ["--template", template, "--input-image", image, "--output", tmp_path / "out"]
    said = run_here("build", *required, *words)
    assert said.status == 2
    assert message in said.last_line
    assert not (tmp_path / "out").exists()


def test_parameters_of_image_factory_reach_the_build_and_options_override_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    utility = tmp_path / "u.raw"
    utility.write_bytes(b"x")
    values = {
        "utility_image": str(utility),
        "utility_customizations": TEMPLATE,
        "utility_cpus": 7,
        "results_location": "/a.iso",
    }
    path = tmp_path / "p.json"
    path.write_text(json.dumps(values))
    order, _ = ordered(monkeypatch, tmp_path, "--parameters", path, "--results", "/b.iso")
    assert order.utility_image == utility
    assert order.template_name == "p.json"
    assert [one.name for one in order.template.commands] == ["one"]
    assert (order.spec.cpus, order.spec.results) == (7, ("/b.iso",))

    path.write_text(json.dumps({**values, "utility_image": "f216b47f-0444-4392-b1a4-a17f36746f7b"}))
    template = tmp_path / "t.tdl"
    template.write_text(TEMPLATE.replace("one", "other"))
    words = ["--parameters", path, "--utility-image", utility, "--template", template]
    order, _ = ordered(monkeypatch, tmp_path, *words, "--force")
    assert order.utility_image == utility
    assert order.template_name == "t.tdl"
    assert [one.name for one in order.template.commands] == ["other"]


def test_every_option_of_build_is_tried_above() -> None:
    shown = run("build", "--help").out
    tried = {word for words, _, _ in OPTIONS for word in words if word.startswith("--")}
    elsewhere = {"--help", "--input-image", "--utility-image", "--template", "--output", "--force"}
    elsewhere |= {"--config", "--parameters"}
    assert set(re.findall(r"--[a-z][a-z-]+", shown)) <= tried | elsewhere | {
        "--verbose",
        "--quiet",
        "--json",
    }
