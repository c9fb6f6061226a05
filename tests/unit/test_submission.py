"""Command line and config file -> request: typed, nothing overlooked, old files unchanged."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from koji_indirection import options, submission
from koji_indirection.errors import BuildFailed, UsageError
from koji_indirection.localrun import Here
from koji_indirection.sources import Source
from koji_indirection.spec import BuildSpec
from koji_indirection.submission import BACKGROUND_PRIORITY, ArchInputs, Request, request_from
from koji_indirection.taskspec import TaskSpec
from koji_indirection.units import GIB, HOUR_SECONDS

EXAMPLE = Path(__file__).parents[2] / "examples" / "indirection-build.conf"
UPLOAD = "cli-indirection/1700000000.5.AbCdEfGh"
TEMPLATE = "<template><commands><command name='make'>true</command></commands></template>"
SCM = "git+https://example.com/templates.git#main"
WHAT = ["images", "live", "1.0"]
INPUTS = ["--arch=x86_64", "--input-image=in-1-1", "--utility-image=build:7"]
ENOUGH = [*WHAT, *INPUTS, "--template=live.tdl", f"--template-scm={SCM}"]

# As documented for Koji's image-build-indirection.
OLD = """
[image-build-indirection]
name = fedora-server-docker
version = 26
release = 1
target = f26-candidate
arch = x86_64

base_image_build = fedora-base-26-1
utility_image_task = 4711
indirection_template = templates/fedora-indirection.tdl
indirection_template_url = git://git.example.org/git/templates.git?fedora26#68c40eb7
results_loc = results/fedora-indirection.tar
scratch = false
skip_tag = true
background = true
wait = no
noprogress = yes
"""


def request(*arguments: object) -> Request:
    return request_from([str(one) for one in arguments], upload_dir=UPLOAD)


def spec(*arguments: object) -> TaskSpec:
    return request(*arguments).spec


def refused(*arguments: object) -> str:
    with pytest.raises(UsageError) as caught:
        request(*arguments)
    return caught.value.one_line()


@pytest.fixture
def conf(tmp_path: Path) -> Any:
    path = tmp_path / "live.conf"

    def write(text: str) -> str:
        path.write_text(text, encoding="utf-8")
        return f"--config={path}"

    return write


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "live.tdl"
    path.write_text(TEMPLATE)
    return path


# The command line


def test_what_is_not_asked_for_has_its_default() -> None:
    assert request(*ENOUGH) == Request(
        TaskSpec(
            target="images",
            name="live",
            version="1.0",
            arches=("x86_64",),
            input_image="in-1-1",
            utility_image="build:7",
            template="live.tdl",
            template_scm=SCM,
        )
    )


def test_every_option_reaches_the_spec() -> None:
    asked = request(
        *WHAT,
        *["--release=3", "--arch=x86_64", "--arch=aarch64", "--can-fail=aarch64"],
        *["--input-image=latest:in@images", "--input-archive=*.qcow2"],
        *["--utility-image=task:12", "--utility-archive=tools*"],
        *["--template=t/live.tdl", "--template-scm", SCM],
        *["--results=/results/*.iso", "--results=/results/a, b.json", "--collect-log=/program.log"],
        *["--input-device=vdc", "--input-writable", "--workspace-device=vdb"],
        *["--firmware=uefi", "--secure-boot", "--disk-bus=sata"],
        *["--workspace-size=40G", "--workspace-fs=xfs", "--cpus=8", "--memory=6G"],
        *["--accel=kvm", "--timeout=2h", "--command-timeout=1h", "--boot-timeout=10m"],
        *["--network=user", "--repo=http://h/r", "--repo=http://h/debian bookworm main"],
        *["--tag-repo"],
        *["--shutdown-timeout=90", "--scratch", "--skip-tag", "--priority=3", "--nowait"],
        *["--dry-run", "--noprogress", "--quiet", "--json"],
    )
    assert asked == Request(
        TaskSpec(
            target="images",
            name="live",
            version="1.0",
            release="3",
            arches=("x86_64", "aarch64"),
            can_fail=("aarch64",),
            input_image="latest:in@images",
            input_archive="*.qcow2",
            utility_image="task:12",
            utility_archive="tools*",
            template="t/live.tdl",
            template_scm=SCM,
            scratch=True,
            skip_tag=True,
            tag_repo=True,
            accel="kvm",
            build=BuildSpec(
                results=("/results/*.iso", "/results/a, b.json"),
                collect_logs=("/program.log",),
                input_device="vdc",
                input_writable=True,
                workspace_device="vdb",
                workspace_size_bytes=40 * GIB,
                workspace_fs="xfs",
                firmware="uefi",
                secure_boot=True,
                disk_bus="sata",
                cpus=8,
                memory_bytes=6 * GIB,
                job_timeout_seconds=2 * HOUR_SECONDS,
                command_timeout_seconds=HOUR_SECONDS,
                boot_timeout_seconds=600,
                shutdown_timeout_seconds=90,
                network="user",
                repos=("http://h/r", "http://h/debian bookworm main"),
            ),
        ),
        priority=3,
        wait=False,
        dry_run=True,
        noprogress=True,
        quiet=True,
        json=True,
    )


def test_every_field_of_both_specs_can_be_asked_for() -> None:
    asked_for = {option.field for option in options.OPTIONS}
    own = {*TaskSpec.__dataclass_fields__} - {"build", "arch_build", "template_upload"}
    assert own | {*BuildSpec.__dataclass_fields__} <= asked_for


def test_the_input_image_is_its_own_utility_image_when_none_is_named() -> None:
    of = [*WHAT, "--arch=x86_64", "--input-image=in-1-1", "--template=t", f"--template-scm={SCM}"]
    assert spec(*of, "--input-archive=*.raw").utility_image == "in-1-1"
    assert spec(*of, "--input-archive=*.raw").utility_archive == "*.raw"
    assert spec(*of, "--utility-image=in-1-1", "--input-archive=*.raw").utility_archive is None


def test_background_is_a_lower_priority() -> None:
    assert request(*ENOUGH, "--background").priority == BACKGROUND_PRIORITY
    assert request(*ENOUGH, "--priority", "-5").priority == -5
    assert "--background and --priority are both given" in refused(
        *ENOUGH, "--background", "--priority=1"
    )


def test_old_names_are_options_too() -> None:
    asked = spec(
        *["--target=images", "--name=live", "--version=1.0", "--arch=x86_64"],
        *["--base-image-build=17", "--utility-image-task=4", "--results-loc=results/boot.iso"],
        *["--indirection-template=dir/live.tdl", "--indirection-template-url", SCM],
    )
    assert asked == spec(
        *[*WHAT, "--arch=x86_64", "--input-image=build:17", "--utility-image=task:4"],
        *["--results=/results/boot.iso", "--template=live.tdl", "--template-scm", SCM],
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--utilty-image=x"], "no such option: --utilty-image (did you mean --utility-image?)"),
        (["--netwrk"], "no such option: --netwrk"),
        (["--memory=3GB"], "--memory: '3GB' is not a size"),
        (["--timeout=soon"], "--timeout: 'soon' is not a duration"),
        (["--cpus=many"], "--cpus: 'many' is not a whole number"),
        (["--input-image=123"], "--input-image: '123' refers to no image in Koji"),
        (["--base-image-build=in-2-2"], "--input-image and --base-image-build are both given"),
        (["--indirection-template=x"], "--template and --indirection-template are both given"),
        (["--name=other"], "--name and the argument 'live' are both given"),
        (["fourth"], "there are 4 arguments"),
        (["--can-fail=s390x"], "can_fail has 's390x', which is not in arches"),
        (["--release=1-2"], "release is '1-2'"),
        (["--input-writable"], "input_writable is given without input_device"),
        (["--config=/no/such.conf"], "/no/such.conf cannot be read: No such file or directory"),
    ],
)
def test_what_makes_no_sense_is_named(more: list[str], message: str) -> None:
    assert message in refused(*ENOUGH, *more)


def test_an_old_name_means_a_task_or_a_build() -> None:
    assert "'task:in-1-1' refers to no image" in refused(*WHAT, "--base-image-task=in-1-1")
    assert "'task:5' refers to no image" not in refused(*WHAT, "--base-image-build=task:5")


def test_what_is_missing_is_named() -> None:
    assert "--arch, --input-image and --template are missing" in refused(*WHAT)
    assert "usage error: --template is missing (give it on" in refused(*WHAT, *INPUTS)
    assert "1 of three arguments" in refused("images")
    assert "TARGET, NAME and VERSION are missing" in refused(*ENOUGH[3:])


def test_help_exits_and_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        request("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for option in options.OPTIONS:
        assert option.flag in shown


# Templates


def test_a_local_template_is_to_be_uploaded(template: Path) -> None:
    asked = request(*WHAT, *INPUTS, f"--template={template}", "--scratch")
    assert asked.template_file == template
    assert (asked.spec.template, asked.spec.template_upload) == ("live.tdl", UPLOAD)
    assert asked.spec.template_scm is None


def test_whether_a_local_template_may_be_for_a_real_build_is_the_hubs_business(
    template: Path,
) -> None:
    assert not spec(*WHAT, *INPUTS, f"--template={template}").scratch


def test_an_old_local_template_keeps_its_directory(template: Path) -> None:
    asked = request(*WHAT, *INPUTS, f"--indirection-template={template}")
    assert asked.template_file == template


def test_a_local_template_that_no_builder_would_take_is_not_even_uploaded(template: Path) -> None:
    template.write_text("<template><commands>")
    with pytest.raises(BuildFailed, match=r"live\.tdl"):
        request(*WHAT, *INPUTS, f"--template={template}")
    template.write_text("<template><packages><package name='x'/></packages></template>")
    with pytest.raises(BuildFailed):
        request(*WHAT, *INPUTS, f"--template={template}")
    assert "does not exist" in refused(*WHAT, *INPUTS, "--template=/no/such.tdl")


# Config files


def test_the_example_is_right_and_names_every_key() -> None:
    asked = request(f"--config={EXAMPLE}")
    assert asked.spec.arches == ("x86_64", "aarch64")
    assert asked.spec.build_for("aarch64").memory_bytes == 8 * GIB
    text = EXAMPLE.read_text()
    old = {option.flag for option in options.GROUPS["Names from image-build-indirection"]}
    for option in options.OPTIONS:
        if option.flag not in {"--config", "--dry-run", "--json", *old}:
            assert f"\n{option.flag[2:].replace('-', '_')} =" in text, option.flag


@pytest.mark.parametrize("section", submission.SECTIONS)
def test_an_old_file_works_unchanged_under_either_section(conf: Any, section: str) -> None:
    asked = request(conf(OLD.replace("image-build-indirection", section)))
    assert asked == Request(
        TaskSpec(
            target="f26-candidate",
            name="fedora-server-docker",
            version="26",
            release="1",
            arches=("x86_64",),
            input_image="fedora-base-26-1",
            utility_image="task:4711",
            template="fedora-indirection.tdl",
            template_scm="git://git.example.org/git/templates.git?fedora26#68c40eb7",
            scratch=False,
            skip_tag=True,
            build=BuildSpec(results=("/results/fedora-indirection.tar",)),
        ),
        priority=BACKGROUND_PRIORITY,
        wait=False,
        noprogress=True,
    )


def test_an_old_file_may_leave_values_empty_and_refer_to_others(conf: Any) -> None:
    text = OLD.replace("release = 1\n", "release =\nbase_image_task =\n")
    text = text.replace("results/fedora", "%(name)s/100%%")
    asked = spec(conf(f"[DEFAULT]\nflavour = x\n{text}\n[image-build]\nname = another\n"))
    assert asked.release is None
    assert asked.input_image == "fedora-base-26-1"
    assert asked.build.results == ("/fedora-server-docker/100%-indirection.tar",)


NEW = f"""
[indirection-build]
target = images
name = live
version = 1.0
arch = x86_64, aarch64
can-fail = aarch64
input_image = in-1-1
input_device = vdc
template = live.tdl
template_scm = {SCM}
memory = 4G
scratch = true
results =
    /results/a b, c.iso
    /results/*.json

[indirection-build:aarch64]
memory = 8G
input_filename = /in.raw
"""


def test_an_arch_has_a_network_and_repositories_of_its_own(conf: Any) -> None:
    asked = spec(
        conf(
            f"""
[indirection-build]
target = images
name = live
version = 1
arch = x86_64 aarch64
input_image = in-1-1
template = live.tdl
template_scm = {SCM}
network = user
repo = http://h/repo
    http://h/debian bookworm main
tag_repo = yes
[indirection-build:aarch64]
network = br0
repo = http://h/other
"""
        )
    )
    assert asked.tag_repo
    assert asked.build_for("x86_64").repos == ("http://h/repo", "http://h/debian bookworm main")
    assert asked.build_for("aarch64").network == "br0"
    assert asked.build_for("aarch64").repos == ("http://h/other",)


def test_an_arch_has_its_own_values(conf: Any) -> None:
    asked = spec(conf(NEW))
    assert asked.build_for("x86_64").memory_bytes == 4 * GIB
    assert asked.build_for("x86_64").input_device == "vdc"
    assert asked.build_for("aarch64").memory_bytes == 8 * GIB
    assert asked.build_for("aarch64").input_filename == "/in.raw"
    assert asked.build_for("aarch64").results == ("/results/a b, c.iso", "/results/*.json")


def test_options_override_the_file(conf: Any) -> None:
    asked = request(
        *["other", "best", "2.0", conf(NEW), "--no-scratch", "--results=/x.iso"],
        *["--memory=1G", "--input-filename=/mine.raw", "--base-image-build=in-2-2"],
    ).spec
    assert (asked.target, asked.name, asked.version) == ("other", "best", "2.0")
    assert asked.scratch is False
    assert asked.input_image == asked.utility_image == "in-2-2"
    for arch in asked.arches:
        build = asked.build_for(arch)
        assert build.results == ("/x.iso",)
        assert build.memory_bytes == GIB
        assert (build.input_filename, build.input_device) == ("/mine.raw", None)


def test_an_empty_option_takes_back_what_the_file_says(conf: Any, template: Path) -> None:
    asked = request(conf(NEW), "--template-scm=", f"--template={template}", "--memory=")
    assert asked.template_file == template
    assert asked.spec.build_for("aarch64").memory_bytes == BuildSpec().memory_bytes
    assert spec(*ENOUGH, "--release=3", "--release=").release is None


def test_fewer_arches_than_the_file_has(conf: Any) -> None:
    asked = spec(conf(NEW), "--arch=x86_64")
    assert (asked.arches, asked.can_fail, dict(asked.arch_build)) == (("x86_64",), (), {})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory = 4G", "memry = 4G", "[indirection-build] has no key 'memry' (did you mean"),
        ("memory = 4G", "workspace = 4G", "or 'workspace_size' or"),
        ("memory = 4G", "memory = lots", "live.conf: [indirection-build] memory: 'lots' is not"),
        ("scratch = true", "scratch = maybe", "scratch: 'maybe' is neither true nor false"),
        ("memory = 4G", "networks = yes", "has no key 'networks'"),
        ("memory = 4G", "config = x", "has no key 'config'"),
        ("memory = 4G", "input_archive = 50%", "input_archive: '%' must be followed"),
        ("memory = 4G", "memory = 4G\nmemory = 5G", "is not an ini file"),
        ("memory = 8G", "target = other", "cannot differ between arches (move it to [indirection"),
        ("memory = 8G", "memry = 8G", "[indirection-build:aarch64] has no key 'memry'"),
        ("memory = 8G", "memory = 1K", "arch_build, aarch64: build spec: memory_bytes is 1024"),
        ("build:aarch64", "build:aarch46", "[indirection-build:aarch46] is for an arch that"),
        ("build:aarch64", "biuld:aarch64", "there is no section [indirection-biuld:aarch64] (did"),
        ("[indirection-build:", "[image-build-indirection:", "there are: indirection-build:ARCH"),
        ("[indirection-build]", "[image-build]", "has neither a section [indirection-build] nor"),
        ("build:aarch64]", "build:aarch64]\n[image-build-indirection]", "has both a section"),
    ],
)
def test_mistakes_in_a_file_are_named(conf: Any, old: str, new: str, message: str) -> None:
    assert message in refused(conf(NEW.replace(old, new)))


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "live.conf"
    path.write_bytes(b"[indirection-build]\nname = \xff\n")
    assert "is not UTF-8 text" in refused(f"--config={path}")
    assert "Is a directory" in refused(f"--config={tmp_path}")


# What is printed

SOURCE = Source(
    reference="in-1-1",
    role="input image",
    nvr="in-1-1",
    build_id=5,
    archive_id=6,
    task_id=None,
    filename="in.x86_64.qcow2",
    size_bytes=3 * GIB,
    checksum="ab" * 32,
    checksum_type=2,
    arch="x86_64",
    relpath="packages/in/1/1/images/in.x86_64.qcow2",
)


# Builds on this machine


LOCAL = (*ENOUGH, "--local", "--output=out")


def test_a_local_build_has_the_options_of_this_machine() -> None:
    asked = request(
        *(*LOCAL, "--force", "--settings=s.conf", "--work-dir=/w", "--cache-dir=/c"),
        *("--connect=qemu:///session", "--verbose"),
    )
    assert asked.spec == spec(*ENOUGH)
    assert asked.here == Here(
        Path("out"), True, Path("s.conf"), Path("/w"), Path("/c"), "qemu:///session", True
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ENOUGH, "--local"], "--local is given without --output"),
        ([*ENOUGH, "--output=out"], "--output is given without --local"),
        ([*ENOUGH, "--verbose"], "--verbose is given without --local"),
        ([*LOCAL, "--dry-run"], "--dry-run and --local are both given"),
        ([*LOCAL, "--arch=i686"], "for one arch, not for x86_64 and i686 (choose one with --arch"),
    ],
)
def test_what_makes_no_sense_for_this_machine_is_named(arguments: Any, message: str) -> None:
    assert message in refused(*arguments)


def test_a_file_may_say_where_local_builds_go_and_for_which_arch_they_are_is_asked_for(
    conf: Any,
) -> None:
    file = conf(
        f"""
[indirection-build]
target = images
name = live
version = 1
arch = x86_64 aarch64
can_fail = aarch64
input_image = in-1-1
template = live.tdl
template_scm = {SCM}
output = /var/tmp/live
[indirection-build:aarch64]
memory = 8G
"""
    )
    assert request(file).here is None
    assert "choose one with --arch" in refused(file, "--local")
    asked = request(file, "--local", "--arch=aarch64")
    assert asked.here == Here(Path("/var/tmp/live"))
    assert asked.spec.build_for("aarch64").memory_bytes == 8 * GIB


def test_a_dry_run_says_what_it_found(conf: Any) -> None:
    asked = request(conf(NEW))
    inputs = [
        ArchInputs("x86_64", SOURCE, SOURCE),
        ArchInputs("aarch64", problem="there is no image for aarch64"),
    ]
    text = submission.dry_run_text(asked, inputs)
    assert "  input image: in.x86_64.qcow2 of in-1-1 (build:5, archive 6)\n" in text
    assert f"    3 GiB, sha256 {'ab' * 32}\n" in text
    assert "  memory_bytes: 8589934592 (8 GiB)\n" in text
    assert "this arch will fail, as it may: there is no image for aarch64" in text
    record = json.loads(submission.dry_run_json(asked, inputs))
    assert TaskSpec.from_dict(record["spec"]) == asked.spec
    assert record["inputs"]["x86_64"]["input_image"]["checksum_type"] == "sha256"
    assert record["inputs"]["aarch64"] == {"problem": "there is no image for aarch64"}
    odd = dataclasses.replace(SOURCE, nvr="in\x1b]0;title\x07-1\x9b-1")
    text = submission.dry_run_text(asked, [ArchInputs("x86_64", odd, SOURCE)])
    assert all(line.isprintable() for line in text.splitlines())


class NoBuilds:
    """A hub that has nothing."""

    def getBuild(self, _key: object) -> None:
        return None


def test_a_dry_run_fails_when_no_arch_has_its_images(conf: Any) -> None:
    pytest.importorskip("koji")
    hub: Any = NoBuilds()
    with pytest.raises(UsageError, match="there is no such build"):
        submission.resolve_inputs(hub, spec(conf(NEW)))
    with pytest.raises(BuildFailed, match="no arch has its images"):
        submission.resolve_inputs(hub, spec(conf(NEW), "--can-fail=x86_64,aarch64"))


def test_it_imports_without_koji_and_needs_no_libvirt() -> None:
    code = (
        "import sys\n"
        "for name in ('koji', 'koji_cli', 'libvirt', 'guestfs', 'requests'):\n"
        "    sys.modules[name] = None\n"
        "import koji_indirection.submission"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
