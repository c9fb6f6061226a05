"""The whole way, on any Koji of the tests: one command makes a tagged build whose ISO boots."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from harness.base import AnyKoji

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGES = REPOSITORY / ".cache" / "images"
EXAMPLES = REPOSITORY / "examples"


@pytest.mark.timeout(1200)
def test_one_command_makes_a_tagged_build_whose_iso_boots(
    any_koji: AnyKoji, tmp_path: Path
) -> None:
    from harness.base import DEST_TAG, TARGET, ImageFile

    for name in ("utility", "input"):
        image = IMAGES / f"{name}.qcow2"
        if not image.exists():
            pytest.skip(f"there is no {image}: run make images")
        any_koji.import_image_build(
            f"debian-{name}-12-7", [ImageFile(image, name=f"{name}.x86_64.qcow2")], tag=DEST_TAG
        )
    template = (EXAMPLES / "live-iso.tdl").read_bytes()
    said = any_koji.cli(
        *("indirection-build", TARGET, "live", "12", "--release", "7", "--arch", "x86_64"),
        *("--utility-image", f"latest:debian-utility@{DEST_TAG}"),
        *("--input-image", "debian-input-12-7", "--template", "live-iso.tdl"),
        *("--template-scm", any_koji.git_repository("live-iso", {"live-iso.tdl": template})),
        *("--wait", "--json"),
        timeout_seconds=900,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    task_id = json.loads(said.stdout)["task_id"]

    session = any_koji.admin_session()
    build = session.getBuild("live-12-7")
    assert build["task_id"] == task_id
    assert [tag["name"] for tag in session.listTags(build["build_id"])] == [DEST_TAG]
    archives = {one["filename"]: one for one in session.listArchives(build["build_id"])}
    iso = archives["live-12-7.x86_64.iso"]
    directory = any_koji.topdir / "packages" / "live" / "12" / "7"
    file = directory / "images" / iso["filename"]
    manifest = json.loads((directory / "images" / "live-12-7.x86_64.manifest.json").read_text())
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    assert [one["sha256"] for one in manifest["outputs"]] == [checksum] == [iso["checksum"]]
    logs = {path.name for path in (directory / "data" / "logs" / "image" / "x86_64").iterdir()}
    assert {"job.log", "console.log", "build.log", "template.log"} <= logs
    inputs = {one["filename"] for one in session.listArchives(imageID=iso["id"])}
    assert inputs == {"utility.x86_64.qcow2", "input.x86_64.qcow2"}

    boots = subprocess.run(
        [EXAMPLES / "boot-iso", "--timeout", "400", file], capture_output=True, text=True
    )
    assert boots.returncode == 0, boots.stdout + boots.stderr
    assert "live system is up" in boots.stdout
