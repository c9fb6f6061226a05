"""imagefile.py: hostile and broken images, made with the real qemu-img."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from koji_indirection import imagefile, programs
from koji_indirection.errors import BuilderFault, BuildFailed, IndirectionError, UsageError
from koji_indirection.imagefile import INPUT_IMAGE, UTILITY_IMAGE, ImageFile

MIB = 1024**2
LIMIT = 64 * MIB


def run(*argv: object) -> None:
    subprocess.run([str(word) for word in argv], check=True, stdout=subprocess.DEVNULL)


def vet(path: Path, *, role: str = INPUT_IMAGE, limit: int = LIMIT) -> ImageFile:
    work_dir = path.parent / "work"
    work_dir.mkdir(exist_ok=True)
    return imagefile.vet(path, max_virtual_size_bytes=limit, work_dir=work_dir, role=role)


def refusal(path: Path, kind: type[IndirectionError] = BuildFailed, **options: object) -> str:
    """The message that vet() refuses a file with; nothing may be left in its work directory."""
    with pytest.raises(IndirectionError) as caught:
        vet(path, **options)  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert caught.value.hint
    assert list((path.parent / "work").iterdir()) == []
    role = options.get("role", INPUT_IMAGE)
    assert caught.value.message.startswith(f"{role} {path} ")
    return caught.value.message[len(f"{role} {path} ") :]


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """16 MiB, a boot sector, data at its start and end, a hole between."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\0" * 510 + b"\x55\xaa" + os.urandom(MIB))
    os.truncate(path, 16 * MIB - 4096)
    with path.open("ab") as file:
        file.write(os.urandom(4096))
    return path


@pytest.fixture
def qcow2(raw: Path) -> Path:
    path = raw.with_name("disk.qcow2")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


# -- what is accepted ----------------------------------------------------------


@pytest.mark.parametrize("role", [INPUT_IMAGE, UTILITY_IMAGE])
def test_a_raw_disk_is_accepted_as_raw(raw: Path, role: str) -> None:
    image = vet(raw, role=role)
    assert (image.path, image.source) == (raw, raw)
    assert (image.format, image.virtual_size_bytes) == ("raw", 16 * MIB)


@pytest.mark.parametrize("role", [INPUT_IMAGE, UTILITY_IMAGE])
def test_a_qcow2_disk_is_accepted_as_qcow2(qcow2: Path, role: str) -> None:
    image = vet(qcow2, role=role)
    assert image.path == qcow2
    assert (image.format, image.virtual_size_bytes) == ("qcow2", 16 * MIB)


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "extended_l2=on",
        "compression_type=zstd",
        "lazy_refcounts=on",
        "cluster_size=4096",
        "cluster_size=2M",
        "refcount_bits=1",
        "preallocation=metadata",
    ],
)
def test_every_harmless_feature_of_qcow2_is_accepted(options: str, raw: Path) -> None:
    path = raw.with_name("feature.qcow2")
    compress = [] if "preallocation" in options else ["-c"]
    run("qemu-img", "convert", *compress, "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    assert vet(path).format == "qcow2"


def test_snapshots_and_bitmaps_are_accepted(qcow2: Path) -> None:
    run("qemu-img", "snapshot", "-c", "one", qcow2)
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", qcow2, "changed")
    assert vet(qcow2).format == "qcow2"


def test_leaked_clusters_are_accepted(qcow2: Path) -> None:
    size = qcow2.stat().st_size
    run("qemu-io", "-f", "qcow2", "-c", "write 8M 64k", qcow2)
    table = int.from_bytes(qcow2.read_bytes()[40:48], "big")  # L1, whose first entry names the L2
    l2 = int.from_bytes(qcow2.read_bytes()[table : table + 8], "big") & 0xFFFFFFFFFFFE00
    patch(qcow2, l2 + 8 * 128, b"\0" * 8)  # forget the cluster at 8 MiB
    assert qcow2.stat().st_size > size
    assert subprocess.run(["qemu-img", "check", "-q", qcow2], capture_output=True).returncode == 3
    assert vet(qcow2).format == "qcow2"


def test_an_empty_qcow2_disk_is_accepted(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "new.qcow2", "10M")
    assert vet(tmp_path / "new.qcow2").virtual_size_bytes == 10 * MIB


def test_a_name_says_nothing(qcow2: Path) -> None:
    path = qcow2.rename(qcow2.with_name("name,with:odd=json:{} parts.raw"))
    assert vet(path).format == "qcow2"


def test_a_symlink_is_followed_by_us_and_not_by_qemu(raw: Path) -> None:
    link = raw.with_name("link")
    link.symlink_to(raw.name)
    assert vet(link).path == raw


def test_a_raw_disk_of_an_odd_size_has_the_size_that_a_guest_sees(raw: Path) -> None:
    os.truncate(raw, 16 * MIB + 1)
    assert vet(raw).virtual_size_bytes == 16 * MIB + 512


@pytest.mark.parametrize(
    ("offset", "magic"),
    [
        (1080, b"\x53\xef"),
        (0, b"XFSB"),
        (0x10040, b"_BHRfS_M"),
        (32769, b"CD001"),
        (0, b"hsqs"),
        (4096, b"EFI PART"),
    ],
)
def test_a_bare_file_system_is_an_input_image_but_no_utility_image(
    offset: int, magic: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "fs.img"
    path.write_bytes(bytes(MIB))
    patch(path, offset, magic)
    assert vet(path).format == "raw"
    assert refusal(path, role=UTILITY_IMAGE) == (
        "has no boot sector and no partition table, so nothing can boot from it"
    )


def test_an_iso_with_a_partition_table_is_accepted(raw: Path) -> None:
    patch(raw, 32768, b"\x01CD001")
    assert vet(raw, role=UTILITY_IMAGE).format == "raw"


# -- compressed ----------------------------------------------------------------


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return bytes(zstandard.ZstdCompressor().compress(data))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "xz": lzma.compress,
    "gz": gzip.compress,
    "zst": zstd,
}


@pytest.fixture(params=PACKERS)
def packer(request: pytest.FixtureRequest) -> Callable[[bytes], bytes]:
    return PACKERS[request.param]


def test_a_compressed_raw_disk_is_unpacked_once_and_sparse(
    raw: Path, packer: Callable[[bytes], bytes]
) -> None:
    packed = raw.with_name("packed")
    packed.write_bytes(packer(raw.read_bytes()))
    image = vet(packed)
    assert image.source == packed
    assert image.path.parent == raw.parent / "work"
    assert (image.format, image.virtual_size_bytes) == ("raw", 16 * MIB)
    assert image.path.read_bytes() == raw.read_bytes()
    assert image.path.stat().st_blocks * 512 < 2 * MIB
    assert imagefile.unchanged(image)


def test_a_compressed_qcow2_disk_is_unpacked(qcow2: Path, packer: Callable[[bytes], bytes]) -> None:
    packed = qcow2.with_name("disk.qcow2.packed")
    packed.write_bytes(packer(qcow2.read_bytes()))
    image = vet(packed)
    assert image.format == "qcow2"
    assert image.path.read_bytes() == qcow2.read_bytes()


def test_several_streams_in_a_row_are_one_image(
    raw: Path, packer: Callable[[bytes], bytes]
) -> None:
    data = raw.read_bytes()
    packed = raw.with_name("packed")
    parts = [data[: 5 * MIB + 3], data[5 * MIB + 3 : 9 * MIB], data[9 * MIB :]]
    packed.write_bytes(b"".join(map(packer, parts)))
    assert vet(packed).path.read_bytes() == data


def test_what_xz_with_padding_and_zstd_with_skippable_frames_write_is_unpacked(raw: Path) -> None:
    data = raw.read_bytes()
    packed = raw.with_name("packed")
    packed.write_bytes(lzma.compress(data) + b"\0" * 8)
    assert vet(packed).path.read_bytes() == data
    packed.write_bytes(zstd(data) + b"\x50\x2a\x4d\x18" + b"\4\0\0\0" + b"skip" + zstd(b"\1" * 512))
    assert vet(packed).path.read_bytes() == data + b"\1" * 512


def test_truncated_compressed_data_is_told_apart(
    raw: Path, packer: Callable[[bytes], bytes]
) -> None:
    packed = raw.with_name("packed")
    data = packer(raw.read_bytes())
    for length in (len(data) - 4, len(data) // 2, 12):
        packed.write_bytes(data[:length])
        assert refusal(packed).endswith("data ends too early")


def test_damaged_compressed_data_is_told_apart(raw: Path, packer: Callable[[bytes], bytes]) -> None:
    packed = raw.with_name("packed")
    data = bytearray(packer(raw.read_bytes()))
    data[len(data) // 2 :] = bytes(byte ^ 0xA5 for byte in data[len(data) // 2 :])
    packed.write_bytes(data)
    assert refusal(packed).startswith("is damaged: its ")


def test_a_decompression_bomb_stops_at_the_limit(
    tmp_path: Path, packer: Callable[[bytes], bytes]
) -> None:
    bomb = tmp_path / "bomb.raw"
    bomb.write_bytes(packer(b"\0" * 510 + b"\x55\xaa" + bytes(100 * MIB)))
    assert bomb.stat().st_size < MIB
    assert refusal(bomb) == "unpacks to more than the limit of 64 MiB"


def test_unpacking_has_a_deadline(
    raw: Path, packer: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = raw.with_name("packed")
    packed.write_bytes(packer(raw.read_bytes()))
    monkeypatch.setattr(imagefile, "_UNPACK_SECONDS", -10.0)
    assert refusal(packed).startswith("could not be unpacked within ")


def test_a_bomb_with_a_qcow2_magic_stops_too(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.qcow2.gz"
    bomb.write_bytes(gzip.compress(b"QFI\xfb" + bytes(140 * MIB)))
    assert refusal(bomb).startswith("unpacks to more than the limit")


def test_what_is_refused_after_unpacking_leaves_no_file(tmp_path: Path) -> None:
    packed = tmp_path / "disk.qcow2.xz"
    packed.write_bytes(lzma.compress(b"<html>404</html>"))
    assert refusal(packed) == "is named .qcow2 but its content is not qcow2"
    packed.write_bytes(lzma.compress(b""))
    assert refusal(packed) == "is empty once unpacked"


def test_an_interrupted_unpacking_leaves_no_file(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = raw.with_name("packed")
    packed.write_bytes(gzip.compress(raw.read_bytes()))

    def interrupted(file: object) -> Iterator[bytes]:
        yield b"\1" * 4096
        raise KeyboardInterrupt

    monkeypatch.setattr(imagefile, "_ungzip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vet(packed)
    assert list((raw.parent / "work").iterdir()) == []


def test_a_missing_work_directory_is_a_fault(raw: Path) -> None:
    packed = raw.with_name("packed")
    packed.write_bytes(gzip.compress(b"x"))
    with pytest.raises(BuilderFault, match=r"cannot unpack .* into .*/none: No such file"):
        imagefile.vet(
            packed, max_virtual_size_bytes=LIMIT, work_dir=raw.parent / "none", role=INPUT_IMAGE
        )


FILL = """
import sys
from pathlib import Path
from koji_indirection import imagefile
from koji_indirection.errors import BuilderFault
try:
    imagefile.vet(Path(sys.argv[1]), max_virtual_size_bytes=1 << 30, work_dir=Path(sys.argv[2]),
                  role="input image")
except BuilderFault as fault:
    print(fault.message)
    print(len(list(Path(sys.argv[2]).iterdir())))
"""


def test_a_full_work_directory_is_a_fault_that_names_it(raw: Path) -> None:
    packed = raw.with_name("packed")
    packed.write_bytes(gzip.compress(raw.read_bytes()))
    small = raw.parent / "small"
    small.mkdir()
    shell = 'mount -t tmpfs -o size=512k none "$2" || exit 77; exec "$0" -c "$3" "$1" "$2"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell, sys.executable, packed, small, FILL],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    if "unshare" in done.stderr or done.returncode == 77:
        pytest.skip("no private mounts here")
    assert done.stdout == f"no space left in {small} to unpack input image {packed}\n0\n"


# -- the file itself -------------------------------------------------------------


def test_what_is_not_a_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    assert refusal(tmp_path / "none", UsageError) == "does not exist"
    (tmp_path / "folder").mkdir()
    assert refusal(tmp_path / "folder", UsageError) == "is a directory"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe", UsageError) == "is not a regular file"
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(tmp_path / "loop", UsageError).startswith("cannot be read: ")


def test_a_file_that_may_not_be_read_is_a_usage_error(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (raw.parent / "work").mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(raw, UsageError) == "cannot be read: Permission denied"


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.qcow2").write_bytes(b"")
    assert refusal(tmp_path / "empty.qcow2") == "is empty"


@pytest.mark.parametrize(
    "text", ["hello\n", "hello, world\n" * 1000, "Grüße\n" * 2000, "\0" * 5000]
)
@pytest.mark.parametrize("name", ["text.qcow2", "TEXT.QCOW2", "text.qcow2.xz"])
def test_a_file_named_qcow2_that_is_not_is_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert refusal(tmp_path / name) == "is named .qcow2 but its content is not qcow2"


@pytest.mark.parametrize("text", ["hello\n", "hello, world\n" * 1000, "Grüße\n" * 2000])
def test_a_text_file_is_no_raw_disk(text: str, tmp_path: Path) -> None:
    (tmp_path / "text.raw").write_text(text)
    assert refusal(tmp_path / "text.raw") == (
        "is not a disk image: it has no partition table and no known file system"
    )


# -- formats that are refused ------------------------------------------------------


@pytest.mark.parametrize(
    ("qemu_name", "name"),
    [
        ("vmdk", "vmdk"),
        ("vdi", "vdi"),
        ("vhdx", "vhdx"),
        ("qed", "qed"),
        ("vpc", "vhd"),
        ("vpc -o subformat=fixed", "vhd"),
        ("vmdk -o subformat=monolithicFlat", "vmdk"),
    ],
)
def test_another_format_is_refused_with_the_way_to_convert_it(
    qemu_name: str, name: str, raw: Path
) -> None:
    path = raw.with_name("disk.img")
    run("qemu-img", "convert", "-f", "raw", "-O", *qemu_name.split(), raw, path)
    (raw.parent / "work").mkdir()
    with pytest.raises(BuildFailed) as caught:
        vet(path, role=UTILITY_IMAGE)
    assert caught.value.message == (
        f"utility image {path} is in {name} format, only raw and qcow2 are supported"
    )
    convert = f"qemu-img convert -f {qemu_name.split()[0]} -O qcow2 {path} NEW.qcow2"
    assert convert in caught.value.hint


def test_a_luks_disk_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"LUKS\xba\xbe\0\2" + bytes(MIB))
    assert refusal(path) == "is encrypted (LUKS)"


def test_a_qcow2_that_is_an_iso_too_is_refused(qcow2: Path) -> None:
    patch(qcow2, 32768, b"\x01CD001")
    assert refusal(qcow2) == "looks like several formats at once (iso, qcow2)"


# -- qcow2 that is refused ---------------------------------------------------------


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """Whoever opens this to read hangs, and the test with it."""
    path = tmp_path / "secret"
    os.mkfifo(path)
    return path


def test_a_backing_file_is_refused_and_never_opened(pipe: Path) -> None:
    path = pipe.with_name("disk.qcow2")
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", pipe, path, "10M")
    assert refusal(path) == f"has a backing file ('{pipe}'), which is never followed"


def test_a_data_file_is_refused_and_never_opened(pipe: Path) -> None:
    path = pipe.with_name("disk.qcow2")
    data = pipe.with_name("data")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", path, "10M")
    data.unlink()
    pipe.rename(data)
    assert refusal(path) == "keeps its content in an external data file, which is never followed"


def test_qemu_img_alone_would_refuse_them_too(pipe: Path) -> None:
    """Two fences: were the header check fooled, `qemu-img info` still tells and opens nothing."""
    path = pipe.with_name("disk.qcow2")
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", pipe, path, "10M")
    with pytest.raises(BuildFailed, match="has a backing file, says qemu-img"):
        imagefile._vet_info(path, "qcow2", "it", LIMIT)


def test_an_encrypted_disk_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    secret = "secret,id=s,data=abc"
    create = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        secret,
        "-o",
        options,
        path,
        "9M",
    ]
    for _ in range(10):  # "Unable to get accurate CPU usage", it says at times
        if subprocess.run(create, capture_output=True).returncode == 0:
            break
    assert refusal(path) == "is encrypted"


def test_unknown_features_are_refused(qcow2: Path) -> None:
    patch(qcow2, 72, (1 << 40).to_bytes(8, "big"))
    assert refusal(qcow2) == "uses unknown qcow2 features (0x10000000000)"


def test_a_disk_marked_corrupt_is_refused(qcow2: Path) -> None:
    patch(qcow2, 79, b"\2")
    assert refusal(qcow2) == "is marked as corrupt"


@pytest.mark.parametrize("version", [1, 4])
def test_other_versions_are_refused(version: int, qcow2: Path) -> None:
    patch(qcow2, 4, version.to_bytes(4, "big"))
    assert refusal(qcow2) == f"is qcow2 version {version}, only 2 and 3 are supported"


def test_too_many_snapshots_are_refused(qcow2: Path) -> None:
    patch(qcow2, 60, (65).to_bytes(4, "big"))
    assert refusal(qcow2) == "holds 65 internal snapshots, more than 64"


@pytest.mark.parametrize("left", [8, 100, 300, 4096, 200_000, -65536])
def test_a_truncated_qcow2_is_refused(left: int, qcow2: Path) -> None:
    os.truncate(qcow2, left if left > 0 else qcow2.stat().st_size + left)
    message = refusal(qcow2)
    assert message.startswith(("is incomplete", "is not a usable qcow2 image: "))


def test_a_truncated_compressed_qcow2_is_refused(raw: Path) -> None:
    path = raw.with_name("disk.qcow2")
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    os.truncate(path, path.stat().st_size - 100_000)
    assert refusal(path).startswith("is incomplete or damaged: ")


def test_a_disk_that_was_not_closed_is_refused_with_the_way_to_repair_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "10M")
    crash = ["qemu-io", "-f", "qcow2", "-c", "write 0 1M", "-c", "abort", path]
    subprocess.run(crash, capture_output=True)
    assert refusal(path).startswith("was not closed properly: it is marked dirty")
    run("qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", path)
    assert vet(path).format == "qcow2"


def test_a_disk_that_a_machine_writes_to_is_refused(qcow2: Path) -> None:
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", qcow2], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(b"length\n")
        writer.stdin.flush()
        writer.stdout.read(1)
        assert refusal(qcow2) == "is in use by another program, which may write to it"
        writer.stdin.close()


# -- sizes -------------------------------------------------------------------------


def test_a_virtual_size_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "2T")
    assert refusal(path) == "is a disk of 2 TiB, more than the limit of 64 MiB"


def test_a_raw_disk_over_the_limit_is_refused_by_its_size_alone(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(raw, 8 * 1024 * 1024 * MIB)
    monkeypatch.setattr(programs, "run", lambda *_, **__: pytest.fail("a program was run"))
    assert refusal(raw) == "is a disk of 8 TiB, more than the limit of 64 MiB"


def test_a_huge_raw_disk_is_not_read_to_its_end(raw: Path) -> None:
    os.truncate(raw, 8 * 1024 * 1024 * MIB)
    assert vet(raw, limit=16 * 1024 * 1024 * MIB).virtual_size_bytes == 8 * 1024 * 1024 * MIB


def test_a_disk_of_no_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "0")
    assert refusal(path) == "is a disk of no size at all"


# -- while it is looked at, and after ------------------------------------------------


def test_a_file_that_changes_while_it_is_vetted_is_refused(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_info = imagefile._vet_info

    def grow(path: Path, *arguments: object) -> int:
        with path.open("ab") as file:
            file.write(b"more")
        return real_info(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(imagefile, "_vet_info", grow)
    assert refusal(raw) == "changed while it was read"


def test_a_change_after_vetting_is_noticed(raw: Path) -> None:
    image = vet(raw)
    assert imagefile.unchanged(image)
    other = raw.with_name("other")
    other.write_bytes(raw.read_bytes())
    other.rename(raw)
    assert not imagefile.unchanged(image)
    raw.unlink()
    assert not imagefile.unchanged(image)


def test_a_slow_qemu_img_is_our_fault_and_a_greedy_one_the_images(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(returncode: int | None) -> Callable[..., str]:
        def failing(argv: list[str], **_: object) -> str:
            raise programs.ProgramFailed(argv, returncode, "", 60)

        return failing

    monkeypatch.setattr(programs, "run", fail(None))
    with pytest.raises(BuilderFault, match="did not end within 60 s"):
        vet(raw)
    monkeypatch.setattr(programs, "run", fail(-24))
    assert "cannot be examined with 60 s of CPU time" in refusal(raw)


def test_a_disk_with_hundreds_of_millions_of_bad_clusters_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 MB of which `qemu-img check` would write gigabytes of complaints."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "20G")
    head, end = path.read_bytes()[:48], (path.stat().st_size + 511) // 512 * 512
    entries, l1 = int.from_bytes(head[36:40], "big"), int.from_bytes(head[40:48], "big")
    bad = [((1 << 63) + (1 << 44) + 512 * n).to_bytes(8, "big") for n in range(64)]
    patch(path, end, b"".join(bad))
    patch(path, l1, ((1 << 63) + end).to_bytes(8, "big") * entries)
    monkeypatch.setattr(imagefile, "_LIMITS", programs.Limits(cpu_seconds=1))
    assert refusal(path, limit=1 << 40).startswith("cannot be examined with 1 s of CPU time")


def test_without_oslo_utils_nothing_is_vetted(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "oslo_utils.imageutils", None)
    with pytest.raises(
        BuilderFault,
        match=r"the Python module oslo_utils.*, which inspects images, is not installed",
    ):
        vet(raw)


# -- overlays, checksums ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_an_overlay_takes_all_writes(kind: str, raw: Path, qcow2: Path) -> None:
    base = vet(raw if kind == "raw" else qcow2)
    before = imagefile.sha256(base.path)
    path = raw.with_name("over,lay=1.qcow2")
    overlay = imagefile.create_overlay(base, path)
    assert (overlay.path, overlay.format) == (path, "qcow2")
    assert overlay.virtual_size_bytes == base.virtual_size_bytes
    answer = subprocess.run(
        ["qemu-img", "info", "--output=json", "-f", "qcow2", path], capture_output=True, check=True
    )
    info = json.loads(answer.stdout)
    assert info["full-backing-filename"] == str(base.path)
    assert info["backing-filename-format"] == kind
    run("qemu-img", "compare", "-f", "qcow2", "-F", kind, path, base.path)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", path)
    assert imagefile.sha256(base.path) == before
    assert imagefile.unchanged(base)


def test_a_checksum_is_that_of_the_bytes(raw: Path) -> None:
    assert imagefile.sha256(raw) == hashlib.sha256(raw.read_bytes()).hexdigest()


def test_a_checksum_can_be_stopped(raw: Path) -> None:
    answers = iter([False, False, True])
    with pytest.raises(CancelledError):
        imagefile.sha256(raw, cancelled=lambda: next(answers))
