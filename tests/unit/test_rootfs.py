"""Which file system of an image is taken for the guest's root; tests/guest has real disks."""

from __future__ import annotations

from typing import Any

import pytest
from fakeguest import FakeGuest

from koji_indirection.errors import BuildFailed
from koji_indirection.rootfs import mount_root

SYSTEM = {"/etc/passwd": "", "/sbin/init": ""}
# With a /usr of its own, a root has no program at all.
WITHOUT_USR = {"/etc/passwd": "", "/sbin": "-> usr/sbin", "/etc/fstab": ""}


class Disk(FakeGuest):
    """File systems by their device, each with the files on it."""

    def __init__(self, contents: dict[str, dict[str, str] | None], kind: str = "ext4") -> None:
        super().__init__({}, dict.fromkeys(contents, kind))
        self.contents = contents
        self.usr: str | None = None

    def mount(self, device: str, _directory: str) -> None:
        self.files = self.contents[device] or {}
        self.is_mounted = True

    def mount_ro(self, device: str, directory: str) -> None:
        assert directory == "/usr"
        self.usr = device

    def findfs_uuid(self, uuid: str) -> str:
        return f"/dev/found-by/{uuid}"

    findfs_label = findfs_uuid


def root_of(disk: Disk) -> Any:
    return mount_root(disk)  # type: ignore[arg-type]


def test_a_subvolume_is_the_root_where_the_default_one_is_not() -> None:
    disk = Disk(
        {
            "btrfsvol:/dev/sda2/@/.snapshots/7/snapshot": SYSTEM,
            "btrfsvol:/dev/sda2/home": {"/user/file": ""},
            "btrfsvol:/dev/sda2/root": SYSTEM,
            "/dev/sda2": {"/root/etc/passwd": ""},
        },
        "btrfs",
    )
    assert root_of(disk) == "btrfsvol:/dev/sda2/root"


def test_the_only_disk_is_sda_whatever_the_kernel_calls_it() -> None:
    disk = Disk({"btrfsvol:/dev/sdb2/root": SYSTEM, "/dev/sda2": {}}, "btrfs")
    disk.contents["btrfsvol:/dev/sda2/root"] = SYSTEM
    assert root_of(disk) == "btrfsvol:/dev/sda2/root"


def test_what_mounts_by_default_comes_before_subvolumes() -> None:
    disk = Disk({"btrfsvol:/dev/sda2/old": SYSTEM, "/dev/sda2": SYSTEM}, "btrfs")
    assert root_of(disk) == "/dev/sda2"


def test_a_logical_volume_is_the_root_beside_a_boot_partition() -> None:
    disk = Disk({"/dev/sda1": {"/grub2/grub.cfg": ""}, "/dev/rhel/root": SYSTEM}, "xfs")
    assert root_of(disk) == "/dev/rhel/root"


@pytest.mark.parametrize(
    ("spec", "options", "device"),
    [
        ("/dev/mapper/rhel-usr", "defaults", "/dev/mapper/rhel-usr"),
        ("/dev/vda3", "ro", "/dev/sda3"),
        ("UUID=1a2b", "defaults", "/dev/found-by/1a2b"),
        ('LABEL="usr"', "defaults", "/dev/found-by/usr"),
        ("UUID=1a2b", "noatime,subvol=/@usr", "btrfsvol:/dev/found-by/1a2b/@usr"),
    ],
)
def test_a_usr_of_its_own_is_mounted_as_the_guests_fstab_says(
    spec: str, options: str, device: str
) -> None:
    fstab = f"# /dev/x /usr\n{spec} /usr xfs {options} 0 0\n/dev/vda1 / xfs defaults 0 0\n"
    disk = Disk({"/dev/sda1": {**WITHOUT_USR, "/etc/fstab": fstab}})
    assert root_of(disk) == "/dev/sda1"
    assert disk.usr == device


def test_data_is_no_root() -> None:
    disk = Disk({"/dev/sda1": {"/etc/motd": ""}, "/dev/sda2": {"/sbin/init": ""}})
    with pytest.raises(BuildFailed, match="holds no operating system"):
        root_of(disk)


def test_a_root_that_is_an_ostree_deployment_is_said() -> None:
    disk = Disk(
        {
            "/dev/sda3": {"/loader/entries/ostree-1.conf": ""},
            "/dev/sda4": {"/ostree/deploy/fedora/deploy/4a5b.0/etc/passwd": ""},
        },
        "xfs",
    )
    with pytest.raises(BuildFailed, match="the utility image is an ostree system"):
        root_of(disk)


def test_a_file_system_that_does_not_mount_may_be_too_new() -> None:
    disk = FakeGuest({}, {"/dev/broken": "xfs"})
    with pytest.raises(BuildFailed) as caught:
        mount_root(disk)  # type: ignore[arg-type]
    assert caught.value.message.endswith("/dev/broken does not mount: wrong fs type")
    assert "too old" in caught.value.hint
