"""How an image boots, told from its first sector and its partitions."""

from __future__ import annotations

from typing import Any

import pytest

from koji_indirection import bootpath
from koji_indirection.appliance import ApplianceError
from koji_indirection.arches import ARCHES
from koji_indirection.bootpath import BootPaths
from koji_indirection.errors import BuildFailed, UsageError

ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
GRUB = "\x10GRUB \0Geom\0Hard Disk"
SOME_CODE = "\x10Missing operating system"
EMPTY = "\0" * 440


class FakeDisk:
    """The guestfs calls that examine() makes, on one partition table."""

    def __init__(
        self,
        code: str,
        table: str | None = None,
        kinds: tuple[Any, ...] = (),
        *,
        loaders: tuple[str, ...] | None = ("BOOTX64.EFI",),
        marked: tuple[int, ...] = (),
    ) -> None:
        self.code, self.table, self.kinds = code, table, kinds
        self.loaders, self.marked = loaders, marked
        self.mounted: list[str] = []

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self, method)(*args)

    def pread_device(self, _device: str, _count: int, _offset: int) -> str:
        return self.code

    def part_get_parttype(self, _device: str) -> str:
        if self.table is None:
            raise ApplianceError("part_get_parttype", "unrecognised disk label")
        return self.table

    def part_list(self, _device: str) -> list[dict[str, int]]:
        return [{"part_num": number} for number, _ in enumerate(self.kinds, start=1)]

    def part_get_gpt_type(self, _device: str, number: int) -> Any:
        return self.kinds[number - 1]

    part_get_mbr_id = part_get_gpt_type

    def part_get_gpt_attributes(self, _device: str, number: int) -> int:
        return 4 if number in self.marked else 1

    def part_get_bootable(self, _device: str, number: int) -> bool:
        return number in self.marked

    def mount_ro(self, device: str, _directory: str) -> None:
        if self.loaders is None:
            raise ApplianceError("mount_ro", "wrong fs type")
        self.mounted.append(device)

    def ls(self, _directory: str) -> list[str]:
        assert self.loaders is not None
        if not self.loaders:
            raise ApplianceError("ls", "No such file or directory")
        return list(self.loaders)

    def umount_all(self) -> None:
        self.mounted.clear()


def examine(disk: FakeDisk) -> BootPaths:
    found = bootpath.examine(disk)  # type: ignore[arg-type]
    assert disk.mounted == []
    return found


X64 = frozenset({"BOOTX64.EFI"})


@pytest.mark.parametrize(
    ("disk", "bios", "loaders"),
    [
        # BIOS only: a table or none, of any maker.
        (FakeDisk(GRUB, "msdos", (0x83,)), True, None),
        (FakeDisk(SOME_CODE, "msdos", (0x83,)), True, None),
        (FakeDisk(GRUB, None), True, None),
        (FakeDisk(GRUB, "gpt", (BIOS_BOOT, LINUX)), True, None),
        # UEFI only, with a program of the partitioning tool's or without.
        (FakeDisk(EMPTY, "gpt", (ESP, LINUX), loaders=("bootx64.efi",)), False, X64),
        (FakeDisk(SOME_CODE, "gpt", (ESP, LINUX)), False, X64),
        (FakeDisk(SOME_CODE, "msdos", (0xEF, 0x83), marked=(1,)), False, X64),
        # Both.
        (FakeDisk(SOME_CODE, "gpt", (BIOS_BOOT, ESP, LINUX)), True, X64),
        (FakeDisk(GRUB, "gpt", (ESP, LINUX)), True, X64),
        (FakeDisk(SOME_CODE, "gpt", (ESP, LINUX), marked=(2,)), True, X64),
        (FakeDisk(SOME_CODE, "msdos", (0xEF, 0x83), marked=(2,)), True, X64),
        # An EFI system partition in which nothing can be started without boot entries.
        (FakeDisk(EMPTY, "gpt", (ESP, LINUX), loaders=()), False, frozenset()),
        (FakeDisk(EMPTY, "gpt", (ESP, LINUX), loaders=None), False, frozenset()),
    ],
)
def test_the_ways_in_which_an_image_boots(
    disk: FakeDisk, bios: bool, loaders: frozenset[str] | None
) -> None:
    assert examine(disk) == BootPaths(bios, loaders is not None, loaders or frozenset(), False)


def test_an_image_that_nothing_boots_is_refused() -> None:
    for disk in (FakeDisk(EMPTY), FakeDisk(EMPTY, "gpt", (LINUX,)), FakeDisk("", "msdos", (0x83,))):
        with pytest.raises(BuildFailed, match="the utility image is not bootable: "):
            examine(disk)


def test_the_loaders_of_power_and_of_z_are_known() -> None:
    assert examine(FakeDisk(EMPTY, "msdos", (0x41, 0x83))).other
    prep = "9e1a2d38-c612-4316-aa26-8b49521e5a8b"
    assert examine(FakeDisk(EMPTY, "gpt", (prep, LINUX))).other
    assert examine(FakeDisk("zIPL" + EMPTY, "msdos", (0x83,))).other


BIOS = BootPaths(True, False, frozenset(), False)
UEFI = BootPaths(False, True, X64, False)
BOTH = BootPaths(True, True, X64, False)


@pytest.mark.parametrize(
    ("paths", "asked", "secure_boot", "chosen"),
    [
        (BIOS, "auto", False, "bios"),
        (UEFI, "auto", False, "uefi"),
        (BOTH, "auto", False, "bios"),
        (BOTH, "uefi", False, "uefi"),
        (BOTH, "bios", False, "bios"),
        (BOTH, "auto", True, "uefi"),
        (UEFI, "uefi", True, "uefi"),
    ],
)
def test_the_firmware_is_the_one_asked_for_or_that_of_the_image(
    paths: BootPaths, asked: str, secure_boot: bool, chosen: str
) -> None:
    x86_64 = ARCHES["x86_64"]
    assert bootpath.choose(paths, x86_64, asked=asked, secure_boot=secure_boot) == chosen


@pytest.mark.parametrize(
    ("paths", "arch", "asked", "secure_boot", "error", "message"),
    [
        (BIOS, "x86_64", "uefi", False, BuildFailed, "does not boot by UEFI: it has no EFI system"),
        (BIOS, "x86_64", "auto", True, BuildFailed, "does not boot by UEFI: it has no EFI system"),
        (UEFI, "x86_64", "bios", False, BuildFailed, "does not boot by a BIOS"),
        (UEFI, "aarch64", "auto", False, BuildFailed, "no EFI/BOOT/BOOTAA64.EFI.*: BOOTX64.EFI "),
        (BIOS, "aarch64", "auto", False, BuildFailed, "does not boot by UEFI"),
        (BIOS, "aarch64", "bios", False, UsageError, "--firmware bios makes no sense .* aarch64"),
        (BIOS, "s390x", "uefi", False, UsageError, "--firmware uefi makes no sense .* s390x"),
        (BIOS, "ppc64le", "auto", True, UsageError, "--secure-boot makes no sense .* ppc64le"),
    ],
)
def test_what_cannot_be_is_said(
    paths: BootPaths, arch: str, asked: str, secure_boot: bool, error: type, message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        bootpath.choose(paths, ARCHES[arch], asked=asked, secure_boot=secure_boot)
    assert caught.value.hint


def test_other_arches_boot_in_their_own_way() -> None:
    aarch64 = BootPaths(False, True, frozenset({"BOOTAA64.EFI"}), False)
    assert bootpath.choose(aarch64, ARCHES["aarch64"], asked="auto", secure_boot=False) == "uefi"
    for arch in ("ppc64le", "s390x"):
        own = bootpath.choose(BIOS, ARCHES[arch], asked="auto", secure_boot=False)
        assert own == "own"
