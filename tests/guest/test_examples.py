"""The templates of examples/, each built by the very command line that stands in it.

What the live ISO's template makes is booted in test_debian.py. lorax is no Debian package, so its
two templates run here with a stand-in that is as particular as livemedia-creator about its options
and directories: what they are given is shown to be right, and what they then do is not.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest
from lxml import etree

from .conftest import REPOSITORY, Builder, RunningBuild, raw_copy, replace_in_root, run

EXAMPLES = REPOSITORY / "examples"
DEBIAN = ("--memory", "1G", "--cpus", "2", "--boot-timeout", "5m")

# Refuses what lorax 46 refuses; exits 0 without an ISO where lorax does: no root in the image.
LIVEMEDIA_CREATOR = r"""#!/bin/sh
mkdir -p /var/tmp # which the tiny guest has not
ks= tmp=/var/tmp logfile=livemedia.log macboot=yes disk= results=
while [ $# -gt 0 ]; do
    case $1 in
    --make-iso) ;;
    --nomacboot) macboot=no ;;
    --project | --releasever | --volid) shift ;;
    --ks) ks=$2; shift ;;
    --tmp) tmp=$2; shift ;;
    --logfile) logfile=$2; shift ;;
    --disk-image) disk=$2; shift ;;
    --resultdir) results=$2; shift ;;
    *) echo "unrecognized arguments: $1" >&2; exit 2 ;;
    esac
    shift
done
echo "program.log of livemedia-creator" >"$(dirname "$logfile")/program.log"
exec >"$logfile" 2>&1
echo "livemedia-creator: $disk $ks"
fail() { echo "$*"; exit 1; }
[ -e "$disk" ] || fail "The disk image $disk is missing."
[ ! -e "$results" ] || fail "The results_dir ($results) should not exist"
[ -d "$tmp" ] || fail "$tmp is no directory"
if [ OLD = "$RELEASE" ]; then
    command -v mkfs.hfsplus || fail "mkfs.hfsplus is missing"
else
    [ "$macboot" = no ] || command -v mkfs.hfsplus || fail "mkfs.hfsplus is missing"
    grep -qx dracut-live "$ks" || fail "dracut-live package is missing from the kickstart."
    grep -q '^part .*--size=[0-9]' "$ks" || fail "No partitions in the kickstart."
fi
mkdir -p "$tmp/work/images"
dd if="$disk" of="$tmp/work/images/boot.iso" bs=1M count=1
cp -r "$tmp/work" "$results"
"""


def command_line(example: str) -> list[str]:
    """The one command line in a template's description, as words."""
    description = etree.parse(EXAMPLES / example).findtext("description")
    joined = description.replace("\\\n", " ")
    (line,) = re.findall(r"^ *(koji-indirection build .*)$", joined, re.MULTILINE)
    return shlex.split(line)


def start(build: Builder, example: str, *more: str, utility: Path, given: Path) -> RunningBuild:
    """The example's command line, but for where its files are; `more` are the test machine's."""
    words = command_line(example)
    assert words[2:10] == [
        *("--utility-image", "utility.qcow2", "--input-image", "input.qcow2"),
        *("--template", example, "--output", "out/"),
    ]
    return build.start(
        EXAMPLES / example, *words[10:], *more, utility_image=utility, input_image=given
    )


def test_every_example_template_says_how_it_is_built_and_is_tested() -> None:
    templates = {path.name for path in EXAMPLES.glob("*.tdl")}
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert templates <= set(re.findall(r'"([a-z0-9-]+\.tdl)"', tests))
    readme = (EXAMPLES / "README.md").read_text()
    for name in templates:
        assert command_line(name)[7] == name
        assert f"[{name}]({name})" in readme


def test_an_image_comes_back_as_a_compressed_qcow2(
    build: Builder, utility_image: Path, tiny_image: Path
) -> None:
    running = start(build, "compressed-qcow2.tdl", *DEBIAN, utility=utility_image, given=tiny_image)
    disk = running.finish(600).succeeded().output / "disk.qcow2"
    as_qcow2 = ("-f", "qcow2", "-F", "qcow2")
    assert "Images are identical" in run("qemu-img", "compare", *as_qcow2, tiny_image, disk)
    found = json.loads(run("qemu-img", "check", "-f", "qcow2", "--output=json", disk))
    assert found["compressed-clusters"] > found["allocated-clusters"] // 2
    assert disk.stat().st_size < tiny_image.stat().st_size


def test_a_root_file_system_comes_back_as_a_tar(
    build: Builder, utility_image: Path, tiny_image: Path
) -> None:
    running = start(build, "root-tar.tdl", *DEBIAN, utility=utility_image, given=tiny_image)
    archive = running.finish(600).succeeded().output / "root.tar.gz"
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        hostname = tar.extractfile("./etc/hostname")
        assert hostname is not None
        assert hostname.read() == (EXAMPLES / "tiny-guest/root/etc/hostname").read_bytes()
        assert {member.uid for member in tar.getmembers()} == {0}
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert "./lost+found" not in names


def test_an_iso_comes_back_with_its_checksum_in_a_file_beside_it(
    build: Builder, utility_image: Path, tiny_image: Path
) -> None:
    running = start(
        build, "iso-with-checksum.tdl", *DEBIAN, utility=utility_image, given=tiny_image
    )
    output = running.finish(600).succeeded().output
    with (output / "boot.iso").open("rb") as iso:
        subprocess.run(["sha256sum", "--check", str(output / "boot.sha256")], stdin=iso, check=True)
    found = run("xorriso", "-indev", output / "boot.iso", "-find", "/etc", "-name", "hostname")
    assert "/etc/hostname" in found


@pytest.mark.parametrize(
    ("example", "release", "logs"),
    [
        ("livemedia-creator.tdl", "46", {"livemedia.log", "program.log"}),
        ("livemedia-creator-old.tdl", "OLD", {"livemedia.log", "program.log"}),
    ],
)
def test_livemedia_creator_is_given_what_it_asks_for_and_its_logs_come_back(
    build: Builder, tiny_image: Path, tmp_path: Path, example: str, release: str, logs: set[str]
) -> None:
    utility = raw_copy(tiny_image, tmp_path / "utility.raw")
    script = LIVEMEDIA_CREATOR.replace("$RELEASE", release)
    replace_in_root(utility, "/bin/livemedia-creator", script, tmp_path)
    if release == "OLD":  # an old utility image has hfsplus-tools; a new one need not
        replace_in_root(utility, "/bin/mkfs.hfsplus", "#!/bin/sh\n", tmp_path)
    running = start(build, example, "--memory", "256M", utility=utility, given=tiny_image)
    built = running.finish().succeeded()
    first = raw_copy(tiny_image, tmp_path / "input.raw").read_bytes()[: 1024 * 1024]
    assert (built.output / "boot.iso").read_bytes() == first
    assert logs <= set(built.manifest["logs"])
    assert "livemedia-creator: /mnt/input_image.raw" in built.log("livemedia.log")
