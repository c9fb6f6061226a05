"""How the utility image boots: by a BIOS, by UEFI, or by what other arches have.

Looks at the first drive of an appliance before anything is mounted. An image
that nothing could boot is refused here: a firmware that finds nothing to start
says so on a screen, and waits until the boot deadline.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from .appliance import Appliance, ApplianceError
from .arches import Arch
from .errors import BuildFailed, UsageError
from .guestlog import printable

log = logging.getLogger(__name__)

_DISK = "/dev/sda"
_BOOT_CODE_BYTES = 440
_GPT_ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
_GPT_BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
_GPT_PREP = "9E1A2D38-C612-4316-AA26-8B49521E5A8B"
_GPT_LEGACY_BOOTABLE = 1 << 2
_MBR_ESP, _MBR_PREP = 0xEF, 0x41
_ZIPL = "zIPL"


@dataclass(frozen=True)
class BootPaths:
    """The ways in which an image can boot.

    bios -- the boot sector holds a program that leads somewhere.
    has_esp -- there is an EFI system partition.
    efi_loaders -- the names in its EFI/BOOT, in capitals: what is started without boot entries.
    other -- a PReP partition or the loader of s390x is there.
    """

    bios: bool
    has_esp: bool
    efi_loaders: frozenset[str]
    other: bool


def examine(appliance: Appliance) -> BootPaths:
    """How the first drive can boot; BuildFailed when there is no way at all."""
    code: str = appliance.call("pread_device", _DISK, _BOOT_CODE_BYTES, 0)
    partitions = _partitions(appliance)
    esps = [one.number for one in partitions if one.kind in (_GPT_ESP, _MBR_ESP)]
    other = code.startswith(_ZIPL) or any(one.kind in (_GPT_PREP, _MBR_PREP) for one in partitions)
    # Partitioning tools leave a program that only complains: beside an EFI system partition
    # there must be a sign that it finds a boot loader.
    leads_somewhere = (
        not esps
        or "GRUB" in code
        or any(one.bios_bootable or one.kind == _GPT_BIOS_BOOT for one in partitions)
    )
    paths = BootPaths(
        bios=bool(code.strip("\0")) and leads_somewhere,
        has_esp=bool(esps),
        efi_loaders=frozenset(name for number in esps for name in _loaders(appliance, number)),
        other=other,
    )
    if not (paths.bios or paths.has_esp or paths.other):
        raise BuildFailed(
            "the utility image is not bootable: there is no boot loader in its first sector and no"
            " EFI system partition",
            "use an image that boots by itself in a virtual machine",
        )
    return paths


def choose(paths: BootPaths, arch: Arch, *, asked: str, secure_boot: bool) -> str:
    """The firmware to boot with: "bios", "uefi", or "own" for an arch that has only one.

    asked -- "auto", "bios" or "uefi". Raises BuildFailed when the image does not
    boot that way, UsageError when a machine of this arch never does.
    """
    if arch.uefi == "never":
        if asked != "auto" or secure_boot:
            what = "--secure-boot" if secure_boot else f"--firmware {asked}"
            raise UsageError(
                f"{what} makes no sense for a guest of the arch {arch.name},"
                " whose machines have neither BIOS nor UEFI",
                "leave it out",
            )
        return "own"
    if asked == "bios" and arch.uefi == "always":
        raise UsageError(
            f"--firmware bios makes no sense for a guest of the arch {arch.name},"
            " whose machines have UEFI only",
            "leave it out",
        )
    wants_uefi = secure_boot or arch.uefi == "always" or asked == "uefi"
    if not wants_uefi and (asked == "bios" or paths.bios):
        _require_bios(paths)
        return "bios"
    _require_uefi(paths, arch)
    return "uefi"


def _require_bios(paths: BootPaths) -> None:
    if not paths.bios:
        raise BuildFailed(
            "the utility image does not boot by a BIOS: there is no boot loader for one",
            "leave --firmware out, or make it uefi",
        )


def _require_uefi(paths: BootPaths, arch: Arch) -> None:
    if not paths.has_esp:
        raise BuildFailed(
            "the utility image does not boot by UEFI: it has no EFI system partition",
            "leave --firmware and --secure-boot out, or use another image",
        )
    if arch.efi_loader not in paths.efi_loaders:
        there = printable(", ".join(sorted(paths.efi_loaders)), 200) or "nothing"
        raise BuildFailed(
            f"the EFI system partition of the utility image has no EFI/BOOT/{arch.efi_loader}, the"
            f" only loader that a new virtual machine looks for; in that directory: {there}",
            "install its boot loader as for removable media: grub-install --removable, or bootctl",
        )


@dataclass(frozen=True)
class _Partition:
    """kind -- GPT's type or MBR's id; bios_bootable -- marked as what a BIOS is to boot."""

    number: int
    kind: str | int
    bios_bootable: bool


def _partitions(appliance: Appliance) -> list[_Partition]:
    try:
        table = appliance.call("part_get_parttype", _DISK)
        numbers = [one["part_num"] for one in appliance.call("part_list", _DISK)]
    except ApplianceError as error:
        log.debug("no partition table: %s", error.reason)
        return []
    found = []
    for number in numbers:
        try:
            found.append(_partition(appliance, table, number))
        except ApplianceError as error:
            log.debug("partition %d: %s", number, error.reason)
    return found


def _partition(appliance: Appliance, table: str, number: int) -> _Partition:
    if table == "gpt":
        kind = appliance.call("part_get_gpt_type", _DISK, number)
        attributes = appliance.call("part_get_gpt_attributes", _DISK, number)
        return _Partition(number, kind.upper(), bool(attributes & _GPT_LEGACY_BOOTABLE))
    kind = appliance.call("part_get_mbr_id", _DISK, number)
    active = appliance.call("part_get_bootable", _DISK, number)
    return _Partition(number, kind, active and kind != _MBR_ESP)


def _loaders(appliance: Appliance, number: int) -> list[str]:
    """What is in EFI/BOOT on this partition; names have no case there."""
    try:
        appliance.call("mount_ro", f"{_DISK}{number}", "/")
    except ApplianceError as error:
        log.warning("the EFI system partition does not mount: %s", printable(error.reason, 200))
        return []
    try:
        names: list[str] = appliance.call("ls", "/EFI/BOOT")
        return [name.upper() for name in names]
    except ApplianceError as error:
        log.debug("no EFI/BOOT: %s", error.reason)
        return []
    finally:
        appliance.call("umount_all")
