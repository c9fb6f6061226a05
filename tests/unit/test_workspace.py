"""The workspace disk: made of real files by the real programs, read back by other means."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from koji_indirection import workspace
from koji_indirection.errors import BuilderFault, BuildFailed, UsageError
from koji_indirection.units import GIB, MIB
from koji_indirection.workspace import Workspace

INPUT_SIZE = 48 * MIB


def run(*argv: object) -> str:
    return subprocess.run(
        [str(word) for word in argv], check=True, capture_output=True, text=True
    ).stdout


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(MIB):
            digest.update(chunk)
    return digest.hexdigest()


def write_pieces(path: Path, size: int) -> None:
    """Random data with holes between, data at both ends, and a block of written zeros."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset in (0, 5 * MIB + 512, size // 2 - 4096, max(0, size - 300_000)):
            file.seek(offset)
            file.write(os.urandom(min(300_000, size - offset)))
        file.seek(min(10 * MIB, size // 3))
        file.write(bytes(min(MIB, size // 4)))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "in,put.img"  # a comma separates options in qemu-img's language
    write_pieces(path, INPUT_SIZE)
    return path


@pytest.fixture
def qcow2(tmp_path: Path, raw: Path) -> Path:
    path = tmp_path / "input.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, path)
    return path


def create(path: Path, input_path: Path | None = None, **changes: Any) -> Workspace:
    arguments: dict[str, Any] = {
        "size_bytes": GIB,
        "filesystem": "ext4",
        "input_path": input_path,
        "input_format": "raw" if input_path else None,
        "input_size_bytes": input_path.stat().st_size if input_path else 0,
        "input_filename": "/input_image.raw",
    }
    return workspace.create(path, **{**arguments, **changes})


def partition(made: Workspace) -> str:
    return f"{made.path}?offset={made.partition_offset_bytes}"


def debugfs(made: Workspace, command: str) -> str:
    return run("debugfs", "-R", command, partition(made))


def assert_holds(made: Workspace, original: Path, original_format: str, tmp_path: Path) -> None:
    """The file in the workspace has exactly the bytes of `qemu-img convert -O raw`."""
    wanted, found = tmp_path / "wanted", tmp_path / "found"
    run("qemu-img", "convert", "-f", original_format, "-O", "raw", original, wanted)
    debugfs(made, f"dump {made.input_filename} {found}")
    assert found.stat().st_size == wanted.stat().st_size
    assert sha256(found) == sha256(wanted)


def assert_clean_ext(made: Workspace) -> None:
    run("e2fsck", "-fn", partition(made))


def cut_out_partition(made: Workspace, path: Path) -> Path:
    table = json.loads(run("sfdisk", "--json", made.path))["partitiontable"]["partitions"][0]
    part = f"driver=raw,offset={table['start'] * 512},size={table['size'] * 512}"
    disk = f"file.driver=file,file.filename={made.path}"
    run("qemu-img", "convert", "--image-opts", f"{part},{disk}", "-O", "raw", path)
    return path


# Contents


@pytest.mark.parametrize("filesystem", ["ext4", "ext2"])
@pytest.mark.parametrize("source_format", ["raw", "qcow2"])
def test_the_file_in_the_workspace_is_what_qemu_img_makes_of_the_input(
    tmp_path: Path, raw: Path, qcow2: Path, filesystem: str, source_format: str
) -> None:
    source = {"raw": raw, "qcow2": qcow2}[source_format]
    made = create(
        tmp_path / "workspace.img",
        source,
        filesystem=filesystem,
        input_format=source_format,
        input_size_bytes=INPUT_SIZE,
    )
    assert_holds(made, source, source_format, tmp_path)
    assert_clean_ext(made)


@pytest.mark.parametrize("filesystem", ["ext4", "ext2"])
@pytest.mark.parametrize("size", [1, 511, 512, 4096, 4097, 1_000_001, 12 * MIB + 1537])
def test_odd_sizes_are_filled_up_to_a_sector_and_no_further(
    tmp_path: Path, filesystem: str, size: int
) -> None:
    odd = tmp_path / "odd.raw"
    odd.write_bytes(os.urandom(size))
    made = create(tmp_path / "workspace.img", odd, filesystem=filesystem)
    assert_holds(made, odd, "raw", tmp_path)
    assert_clean_ext(made)


def test_an_input_that_is_one_hole_takes_no_space(tmp_path: Path) -> None:
    hole = tmp_path / "hole.raw"
    with hole.open("wb") as file:
        file.truncate(INPUT_SIZE)
    made = create(tmp_path / "workspace.img", hole)
    assert_holds(made, hole, "raw", tmp_path)
    assert made.path.stat().st_blocks * 512 < 2 * MIB


def test_an_input_in_several_pieces_is_put_together(tmp_path: Path) -> None:
    """Beyond 128 MiB the backups of the superblock lie between the pieces of the file."""
    large = tmp_path / "large.raw"
    write_pieces(large, 450 * MIB)
    with large.open("r+b") as file:
        for offset in range(0, 450 * MIB, 4 * MIB):
            file.seek(offset)
            file.write(offset.to_bytes(8, "big"))
    made = create(tmp_path / "workspace.img", large, size_bytes=2 * GIB)
    assert_holds(made, large, "raw", tmp_path)
    assert_clean_ext(made)


def test_the_originals_stay_as_they_are(tmp_path: Path, raw: Path, qcow2: Path) -> None:
    for number, (source, source_format) in enumerate(((raw, "raw"), (qcow2, "qcow2"))):
        source.chmod(0o444)
        before = sha256(source), source.stat().st_mtime_ns, source.stat().st_ctime_ns
        for filesystem in workspace.FILESYSTEMS:
            create(
                tmp_path / f"workspace-{number}-{filesystem}.img",
                source,
                filesystem=filesystem,
                input_format=source_format,
                input_size_bytes=INPUT_SIZE,
            )
        assert (sha256(source), source.stat().st_mtime_ns, source.stat().st_ctime_ns) == before


def test_a_backing_file_is_not_followed_even_if_nobody_vetted_the_image(
    tmp_path: Path, raw: Path
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", raw, overlay)
    made = create(
        tmp_path / "workspace.img", overlay, input_format="qcow2", input_size_bytes=INPUT_SIZE
    )
    debugfs(made, f"dump {made.input_filename} {tmp_path / 'found'}")
    assert (tmp_path / "found").read_bytes() == bytes(INPUT_SIZE)


# What the guest sees


def test_the_partition_table_has_one_linux_partition_at_1_mib(tmp_path: Path) -> None:
    made = create(tmp_path / "workspace.img")
    table = json.loads(run("sfdisk", "--json", made.path))["partitiontable"]
    assert table["label"] == "dos"
    (only,) = table["partitions"]
    assert (only["start"], only["size"], only["type"]) == (2048, (GIB - MIB) // 512, "83")
    assert not only.get("bootable")
    assert made.partition_offset_bytes == 2048 * 512
    run("sfdisk", "--verify", made.path)


@pytest.mark.parametrize("filesystem", workspace.FILESYSTEMS)
def test_sizes_that_are_no_multiple_of_anything_are_fine(tmp_path: Path, filesystem: str) -> None:
    made = create(tmp_path / "workspace.img", filesystem=filesystem, size_bytes=GIB + 777)
    assert made.path.stat().st_size == made.size_bytes == GIB + 777


@pytest.mark.parametrize("filesystem", ["ext4", "ext2"])
def test_the_file_belongs_to_root_and_can_be_read_by_all(
    tmp_path: Path, raw: Path, filesystem: str
) -> None:
    raw.chmod(0o600)
    made = create(
        tmp_path / "workspace.img", raw, filesystem=filesystem, input_filename="images/a/in.raw"
    )
    assert made.input_filename == "/images/a/in.raw"
    for name, mode in (("/", "0755"), ("/images", "0755"), ("/images/a/in.raw", "0644")):
        seen = " ".join(debugfs(made, f"stat {name}").split())
        assert f"Mode: {mode}" in seen
        assert "User: 0 Group: 0 " in seen
    assert_holds(made, raw, "raw", tmp_path)
    assert_clean_ext(made)


@pytest.mark.parametrize("filesystem", ["ext4", "ext2"])
def test_linux_3_10_and_e2fsprogs_1_42_know_every_feature(
    tmp_path: Path, raw: Path, filesystem: str
) -> None:
    made = create(tmp_path / "workspace.img", raw, filesystem=filesystem)
    header = dict(
        line.split(":", 1)
        for line in run("dumpe2fs", "-h", partition(made)).splitlines()
        if ":" in line
    )
    known = {
        "ext2": "ext_attr dir_index filetype sparse_super large_file",
        "ext4": "has_journal ext_attr dir_index filetype extent flex_bg sparse_super large_file"
        " huge_file dir_nlink extra_isize",
    }[filesystem]
    assert set(header["Filesystem features"].split()) == set(known.split())
    assert header["Filesystem volume name"].strip() == "workspace"
    assert header["Reserved block count"].strip() == "0"


@pytest.mark.parametrize("filesystem", workspace.FILESYSTEMS)
def test_without_an_input_the_file_system_is_empty(tmp_path: Path, filesystem: str) -> None:
    made = create(tmp_path / "workspace.img", filesystem=filesystem)
    assert made.input_filename is None
    if filesystem == "xfs":
        listed = run("xfs_db", "-r", "-c", "ls /", cut_out_partition(made, tmp_path / "xfs"))
        assert {line.split()[5] for line in listed.splitlines() if "(good)" in line} <= {".", ".."}
    else:
        listed = debugfs(made, "ls -p /")
        names = {line.split("/")[5] for line in listed.splitlines() if line}
        assert names == {".", "..", "lost+found"}
        assert_clean_ext(made)


@pytest.mark.parametrize("source_format", ["raw", "qcow2"])
def test_xfs_holds_the_input_and_is_clean(
    tmp_path: Path, raw: Path, qcow2: Path, source_format: str
) -> None:
    source = {"raw": raw, "qcow2": qcow2}[source_format]
    made = create(
        tmp_path / "workspace.img",
        source,
        filesystem="xfs",
        input_format=source_format,
        input_size_bytes=INPUT_SIZE,
        input_filename="/images/in.raw",
    )
    image = cut_out_partition(made, tmp_path / "xfs")
    run("xfs_repair", "-n", image)
    assert read_from_xfs(image, "/images/in.raw") == raw.read_bytes()


def test_xfs_puts_an_odd_input_together_from_several_allocation_groups(tmp_path: Path) -> None:
    source = tmp_path / "odd.raw"
    write_pieces(source, 300 * MIB + 100)
    made = create(tmp_path / "workspace.img", source, filesystem="xfs", size_bytes=512 * MIB)
    image = cut_out_partition(made, tmp_path / "xfs")
    run("xfs_repair", "-n", image)
    assert read_from_xfs(image, "/input_image.raw") == source.read_bytes() + bytes(412)


def test_linux_3_10_knows_every_feature_of_the_xfs(tmp_path: Path, raw: Path) -> None:
    made = create(tmp_path / "workspace.img", raw, filesystem="xfs")
    with made.path.open("rb") as file:
        file.seek(made.partition_offset_bytes)
        superblock = file.read(512)
    assert superblock[:4] == b"XFSB"
    assert superblock[108:120] == b"workspace".ljust(12, b"\0")
    read_only_compatible = int.from_bytes(superblock[212:216], "big")
    incompatible = int.from_bytes(superblock[216:220], "big")
    assert read_only_compatible == 0  # finobt 1, rmapbt 2, reflink 4, inobtcount 8
    assert incompatible == 1  # ftype; sparse inodes 2, bigtime 8, nrext64 32


def read_from_xfs(image: Path, name: str) -> bytes:
    """By the extents that xfs_db prints, none of them unwritten."""
    said = run(
        *("xfs_db", "-r", "-c", f"path {name}", "-c", "print core.size core.mode", "-c", "bmap"),
        *("-c", "sb 0", "-c", "print agblocks", image),
    ).splitlines()
    values = dict(line.split(" = ") for line in said if " = " in line)
    assert values["core.mode"] == "0100644"
    content = bytearray()
    with image.open("rb") as file:
        for line in said:
            if line.startswith("data offset"):
                words = line.split()
                group, block = map(int, words[5].strip("()").split("/"))
                assert words[-2:] == ["flag", "0"]
                file.seek((group * int(values["agblocks"]) + block) * 4096)
                content += file.read(int(words[7]) * 4096)
    assert len(content) - int(values["core.size"]) < 4096
    return bytes(content[: int(values["core.size"])])


# Space


@pytest.mark.parametrize("filesystem", workspace.FILESYSTEMS)
def test_the_default_size_costs_little_more_than_the_data(tmp_path: Path, filesystem: str) -> None:
    source = tmp_path / "input.raw"
    write_pieces(source, GIB)
    made = create(tmp_path / "workspace.img", source, filesystem=filesystem, size_bytes=30 * GIB)
    beyond = made.path.stat().st_blocks * 512 - source.stat().st_blocks * 512
    assert beyond < 8 * MIB


def test_nothing_else_is_left_behind(tmp_path: Path, raw: Path) -> None:
    directory = tmp_path / "work"
    directory.mkdir()
    for filesystem in workspace.FILESYSTEMS:
        create(directory / f"{filesystem}.img", raw, filesystem=filesystem)
    assert {path.name for path in directory.iterdir()} == {"ext4.img", "ext2.img", "xfs.img"}


def test_an_input_that_is_too_large_is_refused_with_a_size_that_works(tmp_path: Path) -> None:
    source = tmp_path / "input.raw"
    with source.open("wb") as file:
        file.truncate(40 * GIB)
    for filesystem in workspace.FILESYSTEMS:
        path = tmp_path / f"{filesystem}.img"
        with pytest.raises(BuildFailed) as caught:
            create(path, source, filesystem=filesystem, size_bytes=30 * GIB)
        assert caught.value.message == (
            "the input image (40 GiB) does not fit into a workspace of 30 GiB"
        )
        assert caught.value.hint == "use --workspace-size 43G or more"
        assert not path.exists()
        create(path, source, filesystem=filesystem, size_bytes=43 * GIB)


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
@pytest.mark.parametrize("size", [600 * MIB, GIB + 4321, 9 * GIB, 30 * GIB, 129 * GIB - 5000])
def test_what_is_said_to_fit_does_fit(tmp_path: Path, filesystem: str, size: int) -> None:
    source = tmp_path / "input.raw"
    largest = (size - workspace.needed_bytes(filesystem, 0, size)) // 4096 * 4096
    with source.open("wb") as file:
        file.truncate(largest)
    made = create(tmp_path / "workspace.img", source, filesystem=filesystem, size_bytes=size)
    if filesystem == "ext4":
        assert_clean_ext(made)
    with source.open("wb") as file:
        file.truncate(largest + 4096)
    with pytest.raises(BuildFailed, match="does not fit"):
        create(tmp_path / "other.img", source, filesystem=filesystem, size_bytes=size)


def test_ext2_holds_an_input_without_holes_that_is_said_to_fit(tmp_path: Path) -> None:
    source = tmp_path / "input.raw"
    size = 100 * MIB
    largest = size - workspace.needed_bytes("ext2", size, size) + size
    source.write_bytes(os.urandom(largest // 4096 * 4096))
    made = create(tmp_path / "workspace.img", source, filesystem="ext2", size_bytes=size)
    assert_holds(made, source, "raw", tmp_path)
    assert_clean_ext(made)


@pytest.mark.parametrize("gib", [1, 3, 7, 20, 39, 100, 500, 1500])
@pytest.mark.parametrize("filesystem", workspace.FILESYSTEMS)
def test_the_suggested_size_leaves_room_for_results(filesystem: str, gib: int) -> None:
    size = gib * GIB - 512
    suggested = workspace.suggested_bytes(filesystem, size)
    assert suggested % GIB == 0
    assert suggested - workspace.needed_bytes(filesystem, size, suggested) > GIB // 2
    assert suggested <= size * 1.05 + 2 * GIB


def test_a_workspace_beyond_2_tib_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="2 TiB"):
        create(tmp_path / "workspace.img", size_bytes=2**41 + 512)


@pytest.mark.parametrize(
    ("filesystem", "hint"), [("ext4", "64M"), ("ext2", "64M"), ("xfs", "512M")]
)
def test_a_tiny_workspace_is_refused_with_the_least_size(
    tmp_path: Path, filesystem: str, hint: str
) -> None:
    with pytest.raises(BuildFailed, match="too small") as caught:
        create(tmp_path / "workspace.img", filesystem=filesystem, size_bytes=5 * MIB)
    assert hint in caught.value.hint
    size = int(hint[:-1]) * MIB
    create(tmp_path / "workspace.img", filesystem=filesystem, size_bytes=size)


# Faults


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "workspace-test", directory],
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        yield directory
    finally:
        run("umount", directory)


@pytest.mark.parametrize("filesystem", workspace.FILESYSTEMS)
@pytest.mark.parametrize("full", ["while copying", "from the start"])
def test_a_full_disk_is_a_fault_that_names_the_directory(
    tmp_path: Path, small_disk: Path, filesystem: str, full: str
) -> None:
    source = tmp_path / "input.raw"
    source.write_bytes(os.urandom(INPUT_SIZE))
    filler = small_disk / "filler"
    if full == "from the start":
        filler.write_bytes(bytes(24 * MIB - 8192))
    before = set(small_disk.iterdir())
    with pytest.raises(BuilderFault) as caught:
        create(small_disk / "workspace.img", source, filesystem=filesystem)
    assert caught.value.message.startswith(f"no space left for the workspace in {small_disk} (")
    assert caught.value.message.endswith(" free)")
    assert set(small_disk.iterdir()) == before


def test_an_input_of_another_size_than_promised_is_a_fault(tmp_path: Path, raw: Path) -> None:
    with pytest.raises(BuilderFault, match="did it change"):
        create(tmp_path / "workspace.img", raw, input_size_bytes=INPUT_SIZE - 512)
    assert not (tmp_path / "workspace.img").exists()


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "workspace.img"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        create(path)
    assert path.read_text() == "precious"


def test_an_unknown_file_system_or_format_is_a_usage_error(tmp_path: Path, raw: Path) -> None:
    with pytest.raises(UsageError, match="btrfs"):
        create(tmp_path / "workspace.img", filesystem="btrfs")
    with pytest.raises(UsageError, match="vmdk"):
        create(tmp_path / "workspace.img", raw, input_format="vmdk")


def test_a_work_directory_with_odd_characters_in_its_name_works(tmp_path: Path, raw: Path) -> None:
    directory = tmp_path / 'a, b="c" %d\'e:f'
    directory.mkdir()
    for filesystem in workspace.FILESYSTEMS:
        made = create(directory / f"{filesystem}.img", raw, filesystem=filesystem)
        if filesystem != "xfs":
            assert_holds(made, raw, "raw", tmp_path)


def test_a_work_directory_that_e2fsprogs_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuilderFault, match=r"\?"):
        create(tmp_path / "what?" / "workspace.img")
