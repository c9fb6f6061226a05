"""The other two commands, on this machine and on real images."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from .conftest import COMMAND, REPOSITORY


def command(*argv: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in (COMMAND, *argv)]
    return subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_doctor_says_that_this_machine_can_build_and_how(tmp_path: Path) -> None:
    ended = command("doctor", "--json", "--work-dir", tmp_path / "work")
    assert ended.returncode == 0, ended.stdout
    findings = {one["name"]: one for one in json.loads(ended.stdout)}
    assert not [one for one in findings.values() if one["verdict"] == "FAILED"]
    kind, _, reason = findings["acceleration"]["message"].partition(", ")
    assert kind in ("kvm", "tcg")
    assert len(reason) > 10
    assert "qemu:///" in findings["libvirt"]["message"]
    assert "its appliance starts" in findings["libguestfs"]["message"]


def test_check_accepts_the_example_images_and_template_and_names_what_is_wrong(
    tiny_image: Path, utility_image: Path, input_image: Path, tmp_path: Path
) -> None:
    good = [REPOSITORY / "examples" / "live-iso.tdl", tiny_image, utility_image, input_image]
    ended = command("check", *good, "--work-dir", tmp_path / "work")
    assert ended.returncode == 0, ended.stdout
    assert [line.split()[0] for line in ended.stdout.splitlines()] == ["ok"] * 4

    cut = tmp_path / "cut.qcow2"
    cut.write_bytes(tiny_image.read_bytes()[:5_000_000])
    ended = command("check", tiny_image, cut, "--work-dir", tmp_path / "work")
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[1].startswith(f"WRONG {cut}: ")
    assert "1 of 2 files" in ended.stderr
