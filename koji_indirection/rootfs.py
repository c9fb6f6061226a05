"""Find the root file system of the guest among those of an image, and mount it.

Partitions, logical volumes and btrfs subvolumes are all looked at, in the
appliance; LVM is up there already. Nothing is written.
"""

from __future__ import annotations

import logging
import re

from .appliance import Appliance, ApplianceError
from .errors import BuildFailed
from .guestlog import printable

log = logging.getLogger(__name__)

# What a root may be on; others hold firmware, swap or data.
_KINDS = ("ext", "xfs", "btrfs", "f2fs")
_SUBVOLUME = "btrfsvol:"
_MARKS = ("/sbin/init", "/usr/lib/systemd/systemd", "/bin/busybox")


def mount_root(appliance: Appliance) -> str:
    """Mount the guest's root at the appliance's /, read-write, and its /usr if that is another.

    Returns what the root is on, as guestfs calls it. Looking for the marks of a
    root on each file system takes well under a second; libguestfs's own
    inspection takes 11 to 16 s under TCG and is asked only when they are not found.
    """
    listed: dict[str, str] = appliance.call("list_filesystems")
    file_systems = {_usable_name(device): kind for device, kind in listed.items()}
    unreadable = []
    for device in _candidates(file_systems):
        try:
            appliance.call("mount", device, "/")
        except ApplianceError as error:
            unreadable.append(f"{device} does not mount: {printable(error.reason, 200)}")
            log.debug("%s", unreadable[-1])
            continue
        if _looks_like_root(appliance):
            _mount_usr(appliance)
            return device
        if appliance.call("is_dir", "/ostree/deploy"):
            raise BuildFailed(
                "the utility image is an ostree system, whose root is no file system but a"
                " directory in one, where no job can be put",
                "use an image of the same release that is made of packages",
            )
        appliance.call("umount_all")
    roots: list[str] = appliance.call("inspect_os")
    if not roots:
        found = ", ".join(f"{device} ({kind})" for device, kind in file_systems.items())
        hint = "use an image of a full, bootable system as utility image"
        if unreadable:
            hint += "; libguestfs's kernel may be too old for a file system that does not mount"
        raise BuildFailed(
            "; ".join(
                [
                    "the utility image holds no operating system",
                    f"file systems found: {found or 'none'}",
                    *unreadable,
                ]
            ),
            hint,
        )
    mountpoints: dict[str, str] = appliance.call("inspect_get_mountpoints", roots[0])
    for directory in sorted(mountpoints, key=len):
        try:
            appliance.call("mount", _usable_name(mountpoints[directory]), directory)
        except ApplianceError as error:
            if directory in ("/", "/usr"):
                raise
            log.debug("%s does not mount: %s", directory, error.reason)
    return _usable_name(roots[0])


def _usable_name(device: str) -> str:
    """The name by which a subvolume mounts.

    libguestfs gives the image's disk the name /dev/sda whatever its kernel calls
    it, and forgets to in the names of subvolumes; it is the only disk here.
    """
    return re.sub(rf"^{_SUBVOLUME}/dev/sd[a-z]+", f"{_SUBVOLUME}/dev/sda", device)


def _candidates(file_systems: dict[str, str]) -> list[str]:
    """Where a root may be. A btrfs as it mounts by default comes before its subvolumes, and
    snapshots, which look like the system that they are of, last.
    """

    def rank(device: str) -> int:
        return device.startswith(_SUBVOLUME) + ("snapshot" in device)

    usable = [device for device, kind in file_systems.items() if kind.startswith(_KINDS)]
    return sorted(usable, key=rank)


def _looks_like_root(appliance: Appliance) -> bool:
    if not appliance.call("is_dir", "/etc", followsymlinks=True):
        return False
    if any(appliance.call("exists", path) or appliance.call("is_symlink", path) for path in _MARKS):
        return True
    # Where /usr is a file system of its own, and all programs are there.
    return bool(appliance.call("is_symlink", "/sbin") and appliance.call("is_file", "/etc/fstab"))


def _mount_usr(appliance: Appliance) -> None:
    """Mount what the guest's fstab(5) has for /usr: the guest's programs are looked at."""
    if not appliance.call("is_file", "/etc/fstab"):
        return
    text: str = appliance.call("pread", "/etc/fstab", 65536, 0)
    for line in text.splitlines():
        fields = line.split("#", 1)[0].split()
        if len(fields) < 4 or fields[1].rstrip("/") != "/usr":
            continue
        try:
            device = _device(appliance, fields[0])
            subvolume = re.search(r"(?:^|,)subvol=/?([^,]+)", fields[3])
            if subvolume is not None:
                device = f"{_SUBVOLUME}{device}/{subvolume[1]}"
            appliance.call("mount_ro", device, "/usr")
        except ApplianceError as error:
            log.warning("the guest's /usr does not mount: %s", printable(error.reason, 200))


def _device(appliance: Appliance, spec: str) -> str:
    """The appliance's name of what fstab(5) names; the guest has its only disk as another."""
    kind, _, value = spec.partition("=")
    value = value.strip("\"'")
    if kind == "UUID":
        identified: str = appliance.call("findfs_uuid", value)
        return identified
    if kind == "LABEL":
        labelled: str = appliance.call("findfs_label", value)
        return labelled
    return re.sub(r"^/dev/(?:[hsv]d|xvd)[a-z](\d+)$", r"/dev/sda\1", spec)
