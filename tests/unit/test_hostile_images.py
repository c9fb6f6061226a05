"""Images made to make qemu open something else, or to use it up: all watched with strace.

Each is made with the real qemu-img, or from such an image by changing its header. All are
vetted in one process that strace follows with all its children; what an image names must not
be opened by any of them, no connection made, and what the header gives away must be refused
before any other program sees the file.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

MIB = 1024**2
LIMIT = 64 * MIB
DATA_FILE_EXTENSION, BITMAPS_EXTENSION = 0x44415441, 0x23852875

VET = """
import json, os, sys
from pathlib import Path
from koji_indirection import imagefile
from koji_indirection.errors import BuildFailed

work = Path(sys.argv[1])
for name, path in json.loads(Path(sys.argv[2]).read_text()).items():
    try:
        os.open("/case/" + name, os.O_RDONLY)  # a mark in strace's log
    except OSError:
        pass
    try:
        image = imagefile.vet(Path(path), max_virtual_size_bytes=64 * 1024**2, work_dir=work,
                              role="input image")
        verdict = ["accepted as " + image.format, image.virtual_size_bytes]
    except BuildFailed as error:
        verdict = ["refused", error.one_line()]
    except Exception as error:
        verdict = [type(error).__name__, str(error)]
    print(json.dumps([name, *verdict]), flush=True)
"""


@dataclass(frozen=True)
class Case:
    """A hostile image, and what must become of it.

    make -- makes the image in an empty directory; what it names is called secret there.
    verdict -- "raw" or "qcow2" when it is accepted as that, else how it is refused; with one of
        them among the alternatives both will do.
    by_header -- no program but ours may have seen the file.
    """

    make: Callable[[Path], Path]
    verdict: str
    by_header: bool = True


CASES: dict[str, Case] = {}


def case(
    verdict: str, *, by_header: bool = True
) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def add(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        CASES[make.__name__] = Case(make, verdict, by_header)
        return make

    return add


def add(name: str, verdict: str, make: Callable[[Path], Path], *, by_header: bool = True) -> None:
    CASES[name] = Case(make, verdict, by_header)


# How they are made


def run(*argv: object) -> None:
    subprocess.run([str(word) for word in argv], check=True, capture_output=True)


def raw(directory: Path) -> Path:
    """A partitioned disk of 8 MiB with data in it."""
    path = directory / "disk.raw"
    with path.open("wb") as file:
        file.write(bytes(510) + b"\x55\xaa" + b"data" * 100_000)
        file.truncate(8 * MIB)
    return path


def secret(directory: Path) -> Path:
    path = directory / "secret"
    if not path.exists():
        path.write_bytes(b"root:x:0:0\n" * 100_000)
    return path


def qcow2(directory: Path, *options: str) -> Path:
    """A good qcow2; the beginning of most bad ones."""
    path = directory / "disk.qcow2"
    run("qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2", raw(directory), path)
    return path


def patch(path: Path, offset: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


def be32(number: int) -> bytes:
    return struct.pack(">I", number)


def be64(number: int) -> bytes:
    return struct.pack(">Q", number)


def number_at(path: Path, offset: int, length: int) -> int:
    return int.from_bytes(path.read_bytes()[offset : offset + length], "big")


def patched(offset: int, data: bytes) -> Callable[[Path], Path]:
    return lambda directory: patch(qcow2(directory), offset, data)


def extended(kind: int, data: bytes) -> Callable[[Path], Path]:
    """With a header extension of this kind before all others."""

    def make(directory: Path) -> Path:
        path = qcow2(directory)
        start = number_at(path, 100, 4)
        extension = be32(kind) + be32(len(data)) + data + bytes(-len(data) % 8)
        return patch(path, start, extension + bytes(8))

    return make


def with_backing(name: Callable[[Path], str]) -> Callable[[Path], Path]:
    """The name is written into the header, as qemu-img itself would look for the file."""

    def make(directory: Path) -> Path:
        secret(directory)
        path = qcow2(directory)
        text = name(directory).encode()
        patch(path, 4096, text)
        return patch(path, 8, be64(4096) + be32(len(text)))

    return make


def with_data_file(name: Callable[[Path], str]) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        secret(directory)
        path = extended(DATA_FILE_EXTENSION, name(directory).encode())(directory)
        return patch(path, 79, b"\x04")

    return make


NAMES: dict[str, Callable[[Path], str]] = {
    "relative": lambda directory: "secret",
    "absolute": lambda directory: str(directory / "secret"),
    "json": lambda directory: json.dumps(
        {"driver": "file", "filename": str(directory / "secret")}
    ).join(["json:", ""]),
    "json_nested": lambda directory: (
        "json:"
        + json.dumps({"driver": "qcow2", "file": {"driver": "raw", "file.filename": "secret"}})
    ),
    "nbd": lambda directory: "nbd://127.0.0.1:10809/secret",
    "nbd_unix": lambda directory: f"nbd+unix:///export?socket={directory}/secret",
    "http": lambda directory: "http://127.0.0.1:8000/secret",
    "ssh": lambda directory: "ssh://root@127.0.0.1/secret",
    "device": lambda directory: "host_device:/dev/vda",
    "fat": lambda directory: f"fat:rw:{directory}",
}
for kind, name in NAMES.items():
    add(f"backing_{kind}", r"has a backing file \('", with_backing(name))
    add(f"data_file_{kind}", "in an external data file", with_data_file(name))


@case(r"has a backing file \('.*secret'\)")
def backing_by_qemu_img(directory: Path) -> Path:
    path = directory / "disk.qcow2"
    named = secret(directory)
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", named, path, "10M")
    return path


@case("in an external data file")
def data_file_by_qemu_img(directory: Path) -> Path:
    path = directory / "disk.qcow2"
    options = f"data_file={directory / 'secret'},data_file_raw=on"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "10M")
    return path


@case(r"has a backing file \(''\)")
def backing_file_whose_name_lies_behind_the_end(directory: Path) -> Path:
    return patch(qcow2(directory), 8, be64(1 << 40) + be32(10))


@case("has a backing file")
def backing_file_in_a_packed_image(directory: Path) -> Path:
    packed = directory / "disk.qcow2.gz"
    packed.write_bytes(gzip.compress(backing_by_qemu_img(directory).read_bytes()))
    return packed


@case("has a backing file")
def raw_disk_with_a_qcow2_header_in_its_boot_sector(directory: Path) -> Path:
    """Raw to whoever made it; to a qemu that guesses, qcow2 over the secret."""
    path = raw(directory)
    name = str(secret(directory)).encode()
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 104, len(name), 16, 8 * MIB, 0, 0, 0, 0,
                         0, 0, 0)  # fmt: skip
    return patch(path, 0, header.ljust(104, b"\0") + name)


# The header's bit does not announce it.
add(
    "data_file_without_its_bit",
    "has an external data file",
    lambda directory: extended(DATA_FILE_EXTENSION, b"secret")(directory),
    by_header=False,
)

# Versions, features, encryption

for version in (0, 1, 4, 0xFFFFFFFF):
    add(f"version_{version}", f"is qcow2 version {version}, only", patched(4, be32(version)))
for bit in (5, 6, 31, 63):
    add(f"unknown_incompatible_bit_{bit}", "unknown qcow2 features", patched(72, be64(1 << bit)))
add("unknown_compatible_bits", "qcow2", patched(80, be64(1 << 40)), by_header=False)
add("corrupt_bit", "is marked as corrupt", patched(79, b"\x02"))
add("encrypted_with_aes", "is encrypted", patched(32, be32(1)))
add("encrypted_with_luks", "is encrypted", patched(32, be32(2)))
add("encrypted_with_nobody_knows_what", "is encrypted", patched(32, be32(77)))


@case("is encrypted")
def encrypted_by_qemu_img(directory: Path) -> Path:
    path = directory / "disk.qcow2"
    options = "encrypt.format=aes,encrypt.key-secret=s"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc"]
    run(*argv, "-o", options, path, "9M")
    return path


# Tables that are absurdly large, or elsewhere

ABSURD = "states sizes of clusters or tables that no qcow2 image has"
for what, offset, data in (
    ("l1_table_of_4_giga_entries", 36, be32(0xFFFFFFFF)),
    ("l1_table_of_32_mega_entries", 36, be32(32 * MIB)),
    ("refcount_table_of_4_giga_clusters", 56, be32(0xFFFFFFFF)),
    ("clusters_too_small", 20, be32(8)),
    ("clusters_too_large", 20, be32(63)),
    ("clusters_of_no_number_at_all", 20, be32(0xFFFFFFFF)),
):
    add(what, ABSURD, patched(offset, data))
REFUSED = "is not a usable qcow2 image|is incomplete or damaged|cannot be examined|safety checks"
for what, offset, data in (
    ("l1_table_of_no_entries", 36, be32(0)),
    ("l1_table_behind_the_end", 40, be64(1 << 50)),
    ("l1_table_at_an_odd_place", 40, be64(12345)),
    ("l1_table_at_the_header", 40, be64(0)),
    ("refcount_table_behind_the_end", 48, be64(1 << 50)),
    ("refcounts_of_too_many_bits", 96, be32(60)),
    ("header_longer_than_its_cluster", 100, be32(0xFFFFFFF0)),
    ("header_shorter_than_it_is", 100, be32(73)),
    ("raw_external_data_without_a_data_file", 88, be64(2)),
    ("snapshot_table_behind_the_end", 60, be32(3) + be64(1 << 50)),
    ("snapshot_table_in_the_header", 60, be32(3) + be64(65536)),
):
    add(what, REFUSED, patched(offset, data), by_header=False)
for count in (65, 65536, 0xFFFFFFFF):
    add(f"snapshots_{count}", f"holds {count} internal snapshots", patched(60, be32(count)))
add("virtual_size_of_exabytes", "more than the limit of 64 MiB", patched(24, be64(1 << 62)))
add("virtual_size_beyond_all", "more than the limit of 64 MiB", patched(24, be64((1 << 64) - 1)))
add("virtual_size_of_nothing", "a disk of no size", patched(24, be64(0)), by_header=False)
add(
    "bitmaps_of_4_gigabytes",
    REFUSED + "|qcow2",
    extended(BITMAPS_EXTENSION, struct.pack(">IIQQ", 65535, 0, 1 << 32, 65536)),
    by_header=False,
)


def snapshot_patched(offset: int, data: bytes) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        path = qcow2(directory)
        run("qemu-img", "snapshot", "-c", "one", path)
        return patch(path, number_at(path, 64, 8) + offset, data)

    return make


for what, offset, data in (
    ("a_snapshots_l1_table_of_4_giga_entries", 8, be32(0xFFFFFFFF)),
    ("a_snapshots_l1_table_behind_the_end", 0, be64(1 << 50)),
    ("a_snapshots_extra_data_of_4_gigabytes", 36, be32(0xFFFFFFFF)),
    ("a_snapshots_name_of_64_kilobytes", 12, b"\xff\xff\xff\xff"),
):
    add(what, REFUSED, snapshot_patched(offset, data), by_header=False)


@case(REFUSED, by_header=False)
def l2_tables_that_are_the_l1_table(directory: Path) -> Path:
    path = qcow2(directory)
    l1 = number_at(path, 40, 8)
    return patch(path, l1, be64(1 << 63 | l1))


@case(REFUSED, by_header=False)
def clusters_that_lie_in_the_tables(directory: Path) -> Path:
    path = qcow2(directory)
    l2 = number_at(path, number_at(path, 40, 8), 8) & 0xFFFFFFFFFFFE00
    return patch(path, l2, be64(1 << 63 | 65536))


@case(REFUSED, by_header=False)
def refcounts_that_are_all_zero(directory: Path) -> Path:
    path = qcow2(directory)
    block = number_at(path, number_at(path, 48, 8), 8)
    return patch(path, block, bytes(64))


# Truncated


def truncated(size_bytes: int) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        path = qcow2(directory)
        path.write_bytes(path.read_bytes()[:size_bytes])
        return path

    return make


for size in (4, 71, 103, 512, 65536, 200_000):
    add(
        f"truncated_to_{size}",
        "is incomplete|not a usable qcow2|is qcow2 version 0",
        truncated(size),
        by_header=size < 512,
    )


# Several formats at once, and other formats under a false name


@case("several formats at once")
def qcow2_that_is_a_disk_with_partitions_too(directory: Path) -> Path:
    return patch(qcow2(directory), 510, b"\x55\xaaEFI PART")


@case("has a backing file")
def disk_with_partitions_and_a_qcow2_header_for_its_boot_code(directory: Path) -> Path:
    return patch(raw_disk_with_a_qcow2_header_in_its_boot_sector(directory), 512, b"EFI PART")


@case("several formats at once")
def qcow2_that_is_an_iso_too(directory: Path) -> Path:
    return patch(qcow2(directory), 32768, b"\x01CD001\x01")


@case("in vmdk format|several formats at once")
def raw_disk_with_a_vmdk_header_in_its_boot_sector(directory: Path) -> Path:
    vmdk = directory / "other.vmdk"
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", raw(directory), vmdk)
    return patch(directory / "disk.raw", 0, vmdk.read_bytes()[:440])


DESCRIPTOR = """# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="monolithicFlat"
RW 2048 FLAT "{name}" 0
"""


def vmdk_of_extents(text: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        path = directory / "disk.raw"
        path.write_bytes(text.format(name=secret(directory)).encode().ljust(MIB, b"\0"))
        return path

    return make


add("vmdk_with_an_extent", "in vmdk format", vmdk_of_extents(DESCRIPTOR))
add("vmdk_with_an_extent_behind_blanks", "in vmdk format", vmdk_of_extents(" \n\t" + DESCRIPTOR))


@case("in vmdk format")
def vmdk_with_an_extent_by_qemu_img(directory: Path) -> Path:
    path = directory / "disk.vmdk"
    options = ["-O", "vmdk", "-o", "subformat=monolithicFlat"]
    run("qemu-img", "convert", "-f", "raw", *options, raw(directory), path)
    (directory / "disk-flat.vmdk").rename(directory / "secret")
    text = path.read_text(errors="replace").replace("disk-flat.vmdk", "secret")
    path.write_text(text)
    return path.rename(directory / "disk.img")


def foreign(*options: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        path = directory / "other"
        run("qemu-img", "convert", "-f", "raw", "-O", *options, raw(directory), path)
        return path.rename(directory / "really-raw.raw")

    return make


for what, options in {
    "vdi": ["vdi"],
    "vhd": ["vpc", "-o", "subformat=dynamic"],
    "vhd_fixed": ["vpc", "-o", "subformat=fixed"],
    "vhdx": ["vhdx"],
    "qed": ["qed"],
    "vmdk_sparse": ["vmdk", "-o", "subformat=monolithicSparse"],
    "vmdk_stream": ["vmdk", "-o", "subformat=streamOptimized"],
}.items():
    family = what.partition("_")[0]
    add(f"{what}_under_a_false_name", f"is in {family} format", foreign(*options))


@case("is not a disk image")
def parallels_under_a_false_name(directory: Path) -> Path:
    return foreign("parallels")(directory)


@case("is named .qcow2 but its content is not|in vdi format")
def vdi_named_qcow2(directory: Path) -> Path:
    return foreign("vdi")(directory).rename(directory / "disk.qcow2")


@case(r"is encrypted \(LUKS\)")
def luks_under_a_false_name(directory: Path) -> Path:
    path = directory / "disk.raw"
    path.write_bytes(b"LUKS\xba\xbe\x00\x01" + b"aes".ljust(32, b"\0") + bytes(MIB))
    return path


# To a qemu that guesses these are formats of their own; to us they are disks or nothing.
for what, offset, data in (
    ("parallels", 0, b"WithoutFreeSpace" + be32(0x02000000)),
    ("parallels_of_large_disks", 0, b"WithouFreSpacExt" + be32(0x02000000)),
    ("bochs", 0, b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0")),
    (
        "cloop",
        0,
        b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n",
    ),
    ("dmg", 8 * MIB - 512, b"koly" + be32(4) + be32(512)),
    ("vmdk_3", 0, b"COWD" + struct.pack("<IIII", 1, 3, 16384, 4)),
):
    add(
        f"raw_disk_with_a_{what}_header",
        "raw|in vmdk format",
        lambda directory, offset=offset, data=data: patch(raw(directory), offset, data),
        by_header=False,
    )


# What only looks dangerous


@case("raw", by_header=False)
def raw_disk_with_a_qcow2_header_further_in(directory: Path) -> Path:
    return patch(raw(directory), 512, backing_by_qemu_img(directory).read_bytes()[:512])


@case("raw", by_header=False)
def raw_disk_with_a_name_that_is_an_option(directory: Path) -> Path:
    return raw(directory).rename(directory / "-o,file=json:{secret}")


for what, options in {
    "of_version_2": ["compat=0.10"],
    "with_extended_l2_tables": ["extended_l2=on"],
    "with_the_smallest_clusters": ["cluster_size=512"],
    "with_the_largest_clusters": ["cluster_size=2M"],
}.items():
    add(
        f"good_qcow2_{what}",
        "qcow2",
        lambda directory, options=options: qcow2(directory, "-o", *options),
        by_header=False,
    )


@case("qcow2", by_header=False)
def good_qcow2_with_a_snapshot_and_a_bitmap(directory: Path) -> Path:
    path = qcow2(directory, "-c")
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-img", "bitmap", "--add", path, "one")
    return path


# The test


@dataclass
class Seen:
    """What became of one image: the verdict, and what strace saw meanwhile."""

    verdict: str
    detail: object
    opened: list[str] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)
    connections: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    if shutil.which("strace") is None:
        pytest.fail("strace is not installed")
    directory = tmp_path_factory.mktemp("hostile")
    images = {}
    for name, one in CASES.items():
        (directory / name).mkdir()
        images[name] = str(one.make(directory / name))
    (directory / "images.json").write_text(json.dumps(images))
    (directory / "vet.py").write_text(VET)
    (directory / "work").mkdir()
    log = directory / "strace.log"
    argv = ["strace", "-f", "-qq", "-s", "4096", "-o", log]
    argv += ["-e", "trace=open,openat,openat2,execve,connect,socket"]
    argv += [sys.executable, directory / "vet.py", directory / "work", directory / "images.json"]
    done = subprocess.run(
        [str(word) for word in argv],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=600,
    )
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert not list((directory / "work").iterdir())
    verdicts = {line[0]: Seen(*line[1:]) for line in map(json.loads, done.stdout.splitlines())}
    _read_strace(log.read_text(errors="replace"), verdicts)
    shutil.rmtree(directory)
    return verdicts


def _read_strace(log: str, verdicts: dict[str, Seen]) -> None:
    current = Seen("", "")
    for line in log.splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if not call:
            continue
        function, rest = call.groups()
        mark = re.search(r'"/case/([^"]+)"', rest)
        if mark:
            current = verdicts[mark.group(1)]
        elif function == "execve":
            if "= -1" not in rest:
                current.programs.append(rest)
        elif function in ("connect", "socket"):
            if "AF_UNIX" not in rest:
                current.connections.append(rest)
        else:
            current.opened.append(rest)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_image_is_judged_without_opening_what_it_names(
    name: str, seen: dict[str, Seen]
) -> None:
    one, what = CASES[name], seen[name]
    assert f"/{name}/" in str(what.opened), "strace saw nothing"
    if what.verdict.startswith("accepted") or one.verdict in ("raw", "qcow2"):
        assert what.verdict.removeprefix("accepted as ") in one.verdict.split("|"), what.detail
    else:
        assert what.verdict == "refused", what.detail
        assert re.search(one.verdict, str(what.detail)), what.detail
        assert "Traceback" not in str(what.detail)
    assert not [path for path in what.opened if re.search(r"secret\"", path)]
    assert what.connections == []
    if one.by_header:
        assert what.programs == []


def test_strace_sees_a_secret_that_is_opened(tmp_path: Path) -> None:
    """What the test above looks for is there when somebody follows the name."""
    path = backing_by_qemu_img(tmp_path)
    log = tmp_path / "strace.log"
    argv = ["strace", "-f", "-qq", "-e", "trace=openat", "-o", log, "qemu-img", "check", path]
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True)
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr}")
    assert re.search(r'secret"', log.read_text())
