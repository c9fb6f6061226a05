"""The disk with packages: made of a directory, or an ISO as it is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from koji_indirection import media
from koji_indirection.errors import BuildFailed, UsageError
from koji_indirection.units import GIB, MIB


def prepare(path: Path, work: Path, max_size_bytes: int = GIB) -> media.Media:
    work.mkdir(exist_ok=True)
    return media.prepare(path, device="vdc", work_dir=work, max_size_bytes=max_size_bytes)


def debugfs(disk: Path, request: str) -> str:
    argv = ["debugfs", "-R", request, str(disk)]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    source = tmp_path / "repo"
    (source / "pool" / "deep").mkdir(parents=True)
    (source / "Packages").write_text("Package: a\n")
    (source / "pool" / "deep" / "a.deb").write_bytes(b"\1" * 3_000_000)
    (source / "link").symlink_to("pool")
    return source


def test_a_directory_becomes_a_disk_that_is_read_only_and_sound(
    directory: Path, tmp_path: Path
) -> None:
    made = prepare(directory, tmp_path / "work")
    assert (made.file_system, made.image) == ("ext4", None)
    disk = made.disk
    assert (disk.device, disk.serial, disk.format, disk.readonly) == ("vdc", "media", "raw", True)
    assert debugfs(disk.path, "cat /Packages") == "Package: a\n"
    dumped = tmp_path / "dumped"
    debugfs(disk.path, f"dump /pool/deep/a.deb {dumped}")
    assert dumped.read_bytes() == b"\1" * 3_000_000
    checked = subprocess.run(["e2fsck", "-fn", str(disk.path)], capture_output=True)
    assert checked.returncode == 0


def test_many_small_files_fit(tmp_path: Path) -> None:
    source = tmp_path / "many"
    source.mkdir()
    for number in range(3000):
        (source / f"a-rather-long-name-of-a-package-{number}.deb").write_text("x")
    made = prepare(source, tmp_path / "work")
    assert debugfs(made.disk.path, "ls -p /").count("a-rather-long-name") == 3000


def test_an_empty_directory_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "empty", tmp_path / "work").disk.path.exists()


def test_a_directory_that_is_too_large_is_said(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="too much for a disk of 4 MiB"):
        prepare(directory, tmp_path / "work", max_size_bytes=4 * MIB)


def test_an_iso_is_handed_over_as_it_is(directory: Path, tmp_path: Path) -> None:
    if shutil.which("xorriso") is None:
        pytest.skip("xorriso is not installed")
    iso = tmp_path / "repo.iso"
    argv = ["xorriso", "-as", "mkisofs", "-quiet", "-R", "-o", str(iso), str(directory)]
    subprocess.run(argv, check=True, capture_output=True)
    made = prepare(iso, tmp_path / "work")
    assert made.file_system == "iso9660"
    assert made.disk.path == iso
    assert (made.disk.format, made.disk.readonly) == ("raw", True)


def test_what_is_no_iso_is_refused(tmp_path: Path) -> None:
    qcow2 = tmp_path / "disk.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", str(qcow2), "8M"]
    subprocess.run(argv, check=True)
    with pytest.raises(BuildFailed, match=r"disk\.qcow2 is neither a directory nor an ISO"):
        prepare(qcow2, tmp_path / "work")
    with pytest.raises(UsageError, match=r"none does not exist"):
        prepare(tmp_path / "none", tmp_path / "work")
