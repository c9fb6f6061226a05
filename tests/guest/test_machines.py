"""Firmware, disk buses and arches: guests that boot on another machine than the usual one."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from .conftest import RESULT, Builder, raw_copy, run, special_image

DEBIAN = ("--memory", "768M", "--boot-timeout", "8m")
FIRMWARE = """
set -e
test -d /sys/firmware/efi
echo "secure boot: $(od -An -t u1 -j 4 -N 1 /sys/firmware/efi/efivars/SecureBoot-*)"
"""


def test_an_image_that_boots_by_uefi_only_does(build: Builder, tiny_image: Path) -> None:
    built = build(
        [("firmware", FIRMWARE), ("mount", "mount /dev/vdb1 /mnt"), ("result", RESULT)],
        *DEBIAN,
        seconds=900,
        input_image=tiny_image,
        utility_image=special_image("uefi"),
    ).succeeded()
    assert built.manifest["guest"]["firmware"] == "uefi"
    assert "secure boot:    0\n" in built.log("job.log")


def test_secure_boot_starts_what_is_signed(build: Builder, tiny_image: Path) -> None:
    built = build(
        [("firmware", FIRMWARE), ("mount", "mount /dev/vdb1 /mnt"), ("result", RESULT)],
        *DEBIAN,
        "--secure-boot",
        seconds=900,
        input_image=tiny_image,
        utility_image=special_image("uefi"),
    ).succeeded()
    assert "secure boot:    1\n" in built.log("job.log")


def test_secure_boot_refuses_what_is_not_signed_for_it(
    build: Builder, tiny_image: Path, tmp_path: Path
) -> None:
    disk = raw_copy(special_image("uefi"), tmp_path / "uefi.raw")
    table = json.loads(run("sfdisk", "--json", disk))["partitiontable"]
    esp = f"{disk}@@{table['partitions'][1]['start'] * 512}"
    # GRUB is signed with a key that only the loader before it knows.
    grub = tmp_path / "grub.efi"
    run("mcopy", "-i", esp, "::/EFI/BOOT/grubx64.efi", grub)
    run("mcopy", "-o", "-i", esp, grub, "::/EFI/BOOT/BOOTX64.EFI")
    build(
        [("result", RESULT)],
        *DEBIAN,
        "--secure-boot",
        seconds=900,
        input_image=tiny_image,
        utility_image=disk,
    ).failed("Secure Boot refused the boot loader of the utility image")


def test_an_image_without_a_way_to_boot_as_asked_is_refused(
    build: Builder, tiny_image: Path
) -> None:
    build([("result", RESULT)], "--firmware", "uefi", input_image=tiny_image).failed(
        "the utility image does not boot by UEFI: it has no EFI system partition"
    )
    build(
        [("result", RESULT)],
        *("--firmware", "bios"),
        input_image=tiny_image,
        utility_image=special_image("uefi"),
    ).failed("the utility image does not boot by a BIOS")


# Other disks


VARIABLES = """
set -e
echo "$INDIRECTION_WORKSPACE $INDIRECTION_INPUT $INDIRECTION_RESULTS_DIR"
test -b "$INDIRECTION_WORKSPACE" && test -b /dev/vdb1
mount "$INDIRECTION_WORKSPACE" /mnt
head -c 1048576 "$INDIRECTION_INPUT" | sha256sum
cmp "$INDIRECTION_INPUT" /dev/vdc
echo changed > "$INDIRECTION_INPUT"
yes "a line of the log" | head -n 20000
touch /mnt/here
umount /mnt
mount /dev/vdb1 /mnt
test -e /mnt/here
"""


def check_without_virtio(build: Builder, kind: str, input_image: Path, *options: str) -> None:
    """Neither disks nor reports can come over virtio, and all is as on any other guest.

    The kernel may name the disks in any order: which is which is told by what is on them.
    """
    start = input_image.read_bytes()[:1048576]
    built = build(
        [
            ("no virtio", "! ls /dev/vda && ! ls /sys/class/virtio-ports/*"),
            ("variables", VARIABLES),
            ("result", RESULT),
        ],
        *options,
        *("--input-device", "vdc"),
        seconds=900,
        input_image=input_image,
        utility_image=special_image(kind),
    ).succeeded()
    assert input_image.read_bytes()[:1048576] == start
    assert built.manifest["guest"]["disk_bus"] == kind
    assert built.manifest["guest"]["peaks"]["workspace_bytes"] > 0
    job_log = built.log("job.log")
    by_id = "/dev/disk/by-id/indirection"
    assert f"{by_id}-workspace-part1 {by_id}-input /results/images\n" in job_log
    assert hashlib.sha256(start).hexdigest() in job_log
    assert job_log.count("a line of the log\n") == 20000
    assert job_log.count("=== exit status 0 after") == 3


def test_a_guest_without_virtio_gets_sata_disks_and_reports_over_serial_ports(
    build: Builder, tiny_raw: Path
) -> None:
    check_without_virtio(build, "sata", tiny_raw, *DEBIAN)


def test_a_guest_without_virtio_and_sata_gets_ide_disks(build: Builder, tiny_raw: Path) -> None:
    check_without_virtio(build, "ide", tiny_raw)


# Other arches


@pytest.fixture
def aarch64_image() -> Path:
    if shutil.which("qemu-system-aarch64") is None:
        pytest.skip("qemu-system-arm is not installed")
    return special_image("aarch64")


def test_a_guest_of_another_arch_is_emulated_when_it_is_asked_for(
    build: Builder, tiny_image: Path, aarch64_image: Path
) -> None:
    built = build(
        [("arch", "uname -m"), ("mount", "mount /dev/vdb1 /mnt"), ("result", RESULT)],
        *("--arch", "aarch64", "--memory", "512M", "--boot-timeout", "5m"),
        seconds=900,
        input_image=tiny_image,
        utility_image=aarch64_image,
    ).succeeded()
    found = built.manifest["guest"]
    assert (found["arch"], found["firmware"], found["cpu_model"]) == (
        "aarch64",
        "uefi",
        "cortex-a57",
    )
    assert "aarch64\n=== exit status 0" in built.log("job.log")


def test_a_utility_image_of_another_arch_is_refused_at_once(
    build: Builder, tiny_image: Path, aarch64_image: Path
) -> None:
    build([("result", RESULT)], input_image=tiny_image, utility_image=aarch64_image).failed(
        "the utility image is a system for aarch64, but the guest is to be one for x86_64"
    )
