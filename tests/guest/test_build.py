"""Builds that succeed: what the guest sees, and what the user gets."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from .conftest import REPOSITORY, RESULT, Builder, change_root, raw_copy, run

MIB = 1024 * 1024

# A tiny guest has no udev, which makes /dev/stderr; test_debian.py uses that name.
LOOK = """
pwd
readlink /proc/self/fd/0
echo again > /proc/self/fd/2
grep vdb /proc/mounts || echo nobody has mounted it
"""
WRITE = """
printf changed | dd of=/mnt/input_image.raw conv=notrunc
head -c 7 /mnt/input_image.raw
echo
"""
MAKE = """
set -e
mkdir -p /mnt/out
echo one > /mnt/out/a.raw
echo two > /mnt/out/b.qcow2
echo from the root > /root/tool.log
echo from the workspace > /mnt/program.log
"""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_against_schema(manifest: dict[str, Any]) -> None:
    schema = REPOSITORY / "docs" / "manifest.schema.json"
    if schema.exists():
        jsonschema.validate(manifest, json.loads(schema.read_text()))


@pytest.fixture
def data_disk(tmp_path: Path) -> Path:
    """A qcow2 with a boot sector, data and holes, and an odd number of sectors."""
    raw, image = tmp_path / "data.raw", tmp_path / "data.qcow2"
    with raw.open("wb") as file:
        file.truncate(24 * MIB + 512)
        for offset in (0, 5 * MIB + 4096, 24 * MIB):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(512 if offset > 20 * MIB else MIB))
        file.seek(510)
        file.write(b"\x55\xaa")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, image)
    raw.unlink()
    return image


def test_a_build_hands_the_input_over_as_a_raw_file_and_returns_results_and_logs(
    build: Builder, tiny_image: Path, data_disk: Path, tmp_path: Path
) -> None:
    originals = {path: sha256(path) for path in (tiny_image, data_disk)}
    built = build(
        [
            ("look", LOOK),
            ("mount", "set -e; mount /dev/vdb1 /mnt; sha256sum </mnt/input_image.raw"),
            ("write", WRITE),
            ("make", MAKE),
            ("leave a daemon", "sleep 3600 &\necho left it"),
        ],
        *("--results", "/out/*.raw", "--results", "/out/b.q*"),
        *("--collect-log", "/root/tool.log", "--collect-log", "/program.log"),
        input_image=data_disk,
        utility_image=tiny_image,
    ).succeeded()

    raw = raw_copy(data_disk, tmp_path / "converted.raw")
    job_log = built.log("job.log")
    assert f"=== command 2 of 5: mount\n{sha256(raw)}  -\n=== exit status 0 after " in job_log
    assert "look\n/\n/dev/null\nagain\nnobody has mounted it\n=== exit" in job_log
    assert "\nchanged\n" in job_log
    assert job_log.count("\n=== exit status 0 after ") == 5
    assert built.log("tool.log") == "from the root\n"
    assert built.log("program.log") == "from the workspace\n"
    assert built.log("console.log").strip()

    assert {path: sha256(path) for path in originals} == originals
    assert (built.output / "a.raw").read_text() == "one\n"
    manifest = built.manifest
    check_against_schema(manifest)
    assert [(one["name"], one["guest_path"]) for one in manifest["outputs"]] == [
        ("a.raw", "/out/a.raw"),
        ("b.qcow2", "/out/b.qcow2"),
    ]
    assert manifest["outputs"][1]["sha256"] == sha256(built.output / "b.qcow2")
    assert manifest["input_image"]["sha256"] == originals[data_disk]
    assert manifest["utility_image"]["sha256"] == originals[tiny_image]
    assert [command["status"] for command in manifest["commands"]] == [0] * 5
    shutdown = next(one for one in manifest["timeline"] if one["phase"] == "shutdown")
    assert shutdown["seconds"] < 60, "the daemon held up the end"
    assert str(built.output / "a.raw") in built.stdout


def test_an_input_device_is_read_only_and_disks_can_change_places(
    build: Builder, tiny_raw: Path, data_disk: Path
) -> None:
    run("xz", "-0", tiny_raw)
    built = build(
        [
            ("read", f"set -e; mount /dev/vdc1 /mnt; ls -A /mnt; sha256sum </dev/vdb; {RESULT}"),
            ("write", "if echo changed > /dev/vdb; then echo was written; else echo refused; fi"),
        ],
        *("--input-device", "vdb", "--workspace-device", "vdc", "--workspace-fs", "ext2"),
        input_image=data_disk,
        utility_image=tiny_raw.with_suffix(".raw.xz"),
    ).succeeded()
    raw = raw_copy(data_disk, build.directory / "converted.raw")
    assert f"{sha256(raw)}  -" in built.log("job.log")
    assert "refused" in built.log("job.log")
    assert "input_image.raw" not in built.log("job.log")
    assert "input_filename" not in built.manifest["spec"]
    assert built.manifest["utility_image"]["path"].endswith("tiny.raw.xz")


def test_a_writable_input_device_is_a_throw_away_copy(
    build: Builder, tiny_image: Path, data_disk: Path
) -> None:
    run("gzip", "-1", "--keep", data_disk)
    packed = data_disk.with_suffix(".qcow2.gz")
    before = sha256(packed)
    built = build(
        [
            ("write", "printf changed | dd of=/dev/vdc bs=1 seek=4096 && sync && sleep 1"),
            ("read", "dd if=/dev/vdc bs=1 skip=4096 count=7; echo"),
            ("result", f"set -e; mount /dev/vdb1 /mnt; ls -A /mnt; {RESULT}"),
        ],
        *("--input-device", "vdc", "--input-writable"),
        input_image=packed,
        utility_image=tiny_image,
    ).succeeded()
    assert "changed" in built.log("job.log")
    assert "input_image.raw" not in built.log("job.log")
    assert sha256(packed) == before


@pytest.mark.parametrize("filesystem", ["ext2", "xfs"])
def test_the_workspace_has_the_file_system_size_and_file_name_asked_for(
    build: Builder, tiny_raw: Path, filesystem: str
) -> None:
    image = tiny_raw
    if filesystem == "xfs":
        run("zstd", "-q", "-1", tiny_raw)
        image = tiny_raw.with_suffix(".raw.zst")
    built = build(
        [
            ("look", "set -e; modprobe xfs; mount /dev/vdb1 /mnt; grep /dev/vdb1 /proc/mounts\n"
             "cat /sys/block/vdb/size; ls -l /mnt/images/in.raw; sha256sum </mnt/images/in.raw"),
            ("write", f"set -e; echo changed > /mnt/images/in.raw; {RESULT}"),
        ],
        *("--workspace-fs", filesystem, "--workspace-size", "1536M"),
        *("--input-filename", "/images/in.raw"),
        input_image=image,
    ).succeeded()  # fmt: skip
    job_log = built.log("job.log")
    assert f"/dev/vdb1 /mnt {filesystem} rw" in job_log
    assert f"\n{1536 * MIB // 512}\n" in job_log
    assert f"{sha256(tiny_raw)}  -" in job_log


def test_a_guest_runs_its_own_rc_local_before_the_job(
    build: Builder, tiny_raw: Path, tmp_path: Path
) -> None:
    """Its own rc.local runs first, then the job."""
    source = tmp_path / "rc.local"
    source.write_text("#!/bin/sh\ntouch /run/own-rc-local\n")
    change_root(
        tiny_raw, f"write {source} /etc/rc.local", "set_inode_field /etc/rc.local mode 0100755"
    )
    built = build([("look", "ls /run/own-rc-local; exit 9")], input_image=tiny_raw)
    assert built.status == 1
    assert "\n/run/own-rc-local\n" in built.log("job.log")
