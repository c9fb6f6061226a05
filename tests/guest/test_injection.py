"""What is put into guests that cannot be booted here: compared whole with the files in golden/.

Each disk is laid out as an installer of that system does, with the files that
tell what is there; the job is put in for real, by libguestfs. After a change
that is meant, write the trees anew and read the difference:

    KOJI_INDIRECTION_WRITE_GOLDEN=1 .venv/bin/pytest tests/guest/test_injection.py
    git diff tests/guest/golden
"""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import pytest

from koji_indirection import guest
from koji_indirection.appliance import Appliance, ApplianceError, Drive, appliance
from koji_indirection.guestjob import GuestFile, GuestJob
from koji_indirection.template import Command, Package, Repository
from koji_indirection.units import GIB, MIB

GOLDEN = Path(__file__).parent / "golden"
# With something of everything that a template can say.
JOB = GuestJob(
    [Command("one", "true")],
    network="user",
    media=("vdc", "iso9660"),
    repositories=(Repository("tools", "https://example.com/tools/", persisted=False),),
    packages=(Package("lorax"),),
    files=(
        GuestFile("/root/here.ks", b"text\n", mode=0o640, owner="root:adm"),
        GuestFile("/root/large", Path(__file__)),
    ),
)
LABEL = "system_u:object_r:etc_t:s0"

# The content of a file; "-> target" is a link, None a directory.
Tree = dict[str, Union[str, bytes, None]]

# The header alone tells file(1) what a program is for: 64 bits, little-endian, x86-64.
PROGRAM = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 2, 62, 1) + bytes(40)

USR: Tree = {
    "bin/bash": PROGRAM,
    "bin/sh": "-> bash",
    "sbin/init": "-> ../lib/systemd/systemd",
    "lib/systemd/systemd": PROGRAM,
    "lib/systemd/system/multi-user.target": "",
    "lib/systemd/system/graphical.target": "",
    "lib/modules/5.14/modules.builtin": "kernel/drivers/char/virtio_console.ko\n",
    "lib/modules/5.14/kernel/drivers/block/virtio_blk.ko.xz": "",
}
MERGED: Tree = {name: f"-> usr/{name}" for name in ("bin", "sbin", "lib")}
ROOT: Tree = {
    **dict.fromkeys(("boot", "dev", "home", "proc", "root", "run", "sys", "tmp", "usr", "var")),
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\n",
    "etc/hostname": "guest\n",
    "etc/systemd/system/default.target": "-> /usr/lib/systemd/system/graphical.target",
    "etc/systemd/system/multi-user.target.wants": None,
}
ENFORCING: Tree = {"etc/selinux/config": "SELINUX=enforcing\nSELINUXTYPE=targeted\n"}
RUNLEVELS: Tree = {
    "etc/inittab": "# inittab is no longer used when using systemd.\n",
    "etc/init.d": "-> rc.d/init.d",
    "etc/rc.local": "-> rc.d/rc.local",
    "etc/rc.d/rc.local": "#!/bin/sh\n",
    "etc/rc.d/init.d/network": "#!/bin/sh\n",
    **{f"etc/rc.d/rc{level}.d/S10network": "-> ../init.d/network" for level in "2345"},
    **{f"etc/rc{level}.d": f"-> rc.d/rc{level}.d" for level in "2345"},
}


def below_usr(tree: Tree) -> Tree:
    return {f"usr/{name}": text for name, text in tree.items()}


def release(system: str, version: str, line: str) -> Tree:
    text = f'NAME="{line.partition(" release")[0]}"\nID="{system}"\nVERSION_ID="{version}"\n'
    tree: Tree = {"etc/os-release": text + f'PRETTY_NAME="{line}"\n'}
    if "release" in line:
        tree["etc/redhat-release"] = line + "\n"
    return tree


def rhel(version: str, fstab: str, *, usr: Tree | None = None) -> Tree:
    line = f"Red Hat Enterprise Linux release {version} (Test)"
    old = RUNLEVELS if int(version.partition(".")[0]) < 8 else {}
    programs = below_usr(USR) if usr is None else usr
    tree = {**ROOT, **MERGED, **programs, **ENFORCING, **old, **release("rhel", version, line)}
    return {**tree, "etc/fstab": fstab}


# How the disks are laid out: each mounts the root at /, and what is below it.


def partitions(disk: Appliance, *sizes_mib: int) -> None:
    """A GPT with partitions of these sizes and a last one of the rest."""
    disk.call("part_init", "/dev/sda", "gpt")
    first = 2048
    for size in sizes_mib:
        disk.call("part_add", "/dev/sda", "primary", first, first + size * 2048 - 1)
        first += size * 2048
    disk.call("part_add", "/dev/sda", "primary", first, -2048)


def lvm(*volumes: tuple[str, str, int]) -> Callable[[Appliance], str]:
    """/boot on a partition, and logical volumes of (name, directory, MiB), as RHEL's installer."""

    def make(disk: Appliance) -> str:
        partitions(disk, 400)
        disk.call("mkfs", "xfs", "/dev/sda1")
        disk.call("pvcreate", "/dev/sda2")
        disk.call("vgcreate", "rhel", ["/dev/sda2"])
        for name, directory, size in volumes:
            disk.call("lvcreate", name, "rhel", size)
            disk.call("mkfs", "xfs", f"/dev/rhel/{name}")
            if directory != "/":
                disk.call("mkdir_p", directory)
            disk.call("mount", f"/dev/rhel/{name}", directory)
        return f"/dev/rhel/{volumes[0][0]}"

    return make


def plain(kind: str) -> Callable[[Appliance], str]:
    def make(disk: Appliance) -> str:
        partitions(disk, 400)
        for device in ("/dev/sda1", "/dev/sda2"):
            disk.call("mkfs", kind, device)
        disk.call("mount", "/dev/sda2", "/")
        return "/dev/sda2"

    return make


def btrfs_fedora(disk: Appliance) -> str:
    partitions(disk, 100)
    disk.call("mkfs", "ext4", "/dev/sda1")
    disk.call("mkfs", "btrfs", "/dev/sda2")
    disk.call("mount", "/dev/sda2", "/")
    for name in ("home", "root"):
        disk.call("btrfs_subvolume_create", f"/{name}")
    disk.call("umount_all")
    disk.call("mount", "btrfsvol:/dev/sda2/root", "/")
    return "btrfsvol:/dev/sda2/root"


def btrfs_opensuse(disk: Appliance) -> str:
    """The root is a snapshot, which is what mounts by default; an older one looks the same."""
    partitions(disk, 100)
    disk.call("mkfs", "vfat", "/dev/sda1")
    disk.call("mkfs", "btrfs", "/dev/sda2")
    disk.call("mount", "/dev/sda2", "/")
    disk.call("btrfs_subvolume_create", "/@")
    for number in (1, 2):
        disk.call("mkdir_p", f"/@/.snapshots/{number}")
        disk.call("btrfs_subvolume_create", f"/@/.snapshots/{number}/snapshot")
    for file in ("/etc/passwd", "/sbin/init"):
        path = f"/@/.snapshots/1/snapshot{file}"
        disk.call("mkdir_p", str(Path(path).parent))
        disk.call("touch", path)
    for one in disk.call("btrfs_subvolume_list", "/"):
        if one["btrfssubvolume_path"].endswith("2/snapshot"):
            disk.call("btrfs_subvolume_set_default", one["btrfssubvolume_id"], "/")
    disk.call("umount_all")
    disk.call("mount", "/dev/sda2", "/")
    return "/dev/sda2"


@dataclass(frozen=True)
class System:
    """A system that is made up; what mounts at its root, and what must be found in it."""

    layout: Callable[[Appliance], str]
    tree: Tree
    found: tuple[str, str, str]
    labelled: bool = True


RHEL_FSTAB = "/dev/mapper/rhel-root / xfs defaults 0 0\nUUID=0 /boot xfs defaults 0 0\n"
LEAP: Tree = {
    # /lib is no link there, and has no unit files.
    **{name: text for name, text in ROOT.items() if name != "etc/systemd/system/default.target"},
    **below_usr(USR),
    "sbin/init": "-> ../usr/lib/systemd/systemd",
    "bin/sh": "-> ../usr/bin/bash",
    "lib/modules": "-> ../usr/lib/modules",
    "etc/fstab": "UUID=0 / btrfs defaults 0 0\nUUID=0 /var btrfs subvol=/@/var 0 0\n",
    **release("opensuse-leap", "15.6", "openSUSE Leap 15.6"),
}
RHEL6: Tree = {
    **{name: text for name, text in ROOT.items() if "systemd" not in name},
    **RUNLEVELS,
    **ENFORCING,
    "bin/bash": PROGRAM,
    "bin/sh": "-> bash",
    "sbin/init": PROGRAM,
    "etc/init/rc.conf": "",
    "etc/inittab": "id:5:initdefault:\n",
    "etc/rc.d/rc3.d/S52cloud-init": "-> ../init.d/cloud-init",
    "etc/rc.d/rc5.d/S99firstboot": "-> ../init.d/firstboot",
    "etc/fstab": "UUID=0 / ext4 defaults 1 1\n",
    "etc/redhat-release": "Red Hat Enterprise Linux Server release 6.10 (Santiago)\n",
}
SYSTEMS = {
    "rhel6-ext4": System(plain("ext4"), RHEL6, ("", "", "sysvinit")),
    "rhel7-lvm-xfs": System(
        lvm(("root", "/", 700)), rhel("7.9", RHEL_FSTAB), ("rhel", "7.9", "systemd")
    ),
    "rhel8-lvm-usr": System(
        lvm(("root", "/", 700), ("usr", "/usr", 700)),
        rhel("8.10", RHEL_FSTAB + "/dev/mapper/rhel-usr /usr xfs defaults 0 0\n"),
        ("rhel", "8.10", "systemd"),
    ),
    "rhel9-xfs": System(
        plain("xfs"),
        # As virt-customize and its like leave it.
        {**rhel("9.4", "UUID=0 / xfs defaults 0 0\n"), ".autorelabel": ""},
        ("rhel", "9.4", "systemd"),
    ),
    "rhel10-lvm-xfs": System(
        lvm(("root", "/", 700), ("home", "/home", 400)),
        rhel("10.0", RHEL_FSTAB),
        ("rhel", "10.0", "systemd"),
    ),
    "fedora-btrfs": System(
        btrfs_fedora,
        {
            **ROOT,
            **MERGED,
            **below_usr(USR),
            **ENFORCING,
            **release("fedora", "41", "Fedora release 41 (Forty One)"),
            "etc/fstab": "UUID=0 / btrfs subvol=root 0 0\nUUID=0 /home btrfs subvol=home 0 0\n",
        },
        ("fedora", "41", "systemd"),
    ),
    "opensuse-btrfs": System(
        btrfs_opensuse, LEAP, ("opensuse-leap", "15.6", "systemd"), labelled=False
    ),
}


def archive_of(tree: Tree) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in tree.items():
            member = tarfile.TarInfo(name)
            member.mode = 0o755 if text is None or text == PROGRAM else 0o644
            content = text.encode() if isinstance(text, str) else text or b""
            if text is None:
                member.type = tarfile.DIRTYPE
            elif content.startswith(b"-> "):
                member.type, member.linkname = tarfile.SYMTYPE, content[3:].decode()
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def state(disk: Appliance) -> dict[str, str]:
    """Path -> kind, mode, SELinux type and content or target, of all that is in the root."""
    found = {}
    for name in disk.call("find", "/"):
        path = f"/{name}"
        mode = disk.call("lstatns", path)["st_mode"]
        try:
            label = disk.call("lgetxattr", path, "security.selinux").split(":")[2]
        except ApplianceError:
            label = "-"
        text = f"{stat.filemode(mode)} {label} {path}"
        if stat.S_ISLNK(mode):
            text += f" -> {disk.call('readlink', path)}"
        elif stat.S_ISREG(mode):
            text += f" {disk.call('checksum', 'md5', path)}"
        found[path] = text
    return found


def changes(before: dict[str, str], after: dict[str, str]) -> str:
    """What was done to the guest, a line for each path; without the checksums."""
    lines = [f"removed {path}" for path in before.keys() - after.keys()]
    for path, text in after.items():
        if before.get(path) != text:
            shown = text if " -> " in text else text.rsplit(f"{path} ", 1)[0].strip()
            shown = shown if path in shown else f"{shown} {path}"
            lines.append(f"{'changed' if path in before else 'added  '} {shown}")
    return "\n".join(sorted(lines, key=lambda line: line.rsplit(" -> ", 1)[0].split()[-1])) + "\n"


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_put_into_a_guest_is_the_golden_tree(name: str, tmp_path: Path) -> None:
    system = SYSTEMS[name]
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(3 * GIB + 16 * MIB)
    (tmp_path / "tree.tar").write_bytes(archive_of(system.tree))
    drive = Drive(str(disk), "raw", readonly=False)
    with appliance([drive], accel_kind="tcg", job_dir=tmp_path) as running:
        root = system.layout(running)
        running.call("tar_in", str(tmp_path / "tree.tar"), "/")
        if system.labelled:
            for path in running.call("find", "/etc"):
                running.call("lsetxattr", "security.selinux", LABEL, len(LABEL), f"/etc/{path}")
            for path in ("/etc", "/"):
                running.call("lsetxattr", "security.selinux", LABEL, len(LABEL), path)
        before = state(running)
        mounted = running.call("mountpoints")
        running.call("umount_all")

        # What the kernel calls the only disk may show through in the name of a subvolume.
        inspected = [one.replace("/dev/sdb", "/dev/sda") for one in running.call("inspect_os")]
        assert root in inspected, "libguestfs's own inspection finds another"
        running.call("umount_all")
        found = guest.inject(running, JOB, tmp_dir=tmp_path)

        for device, directory in mounted.items():
            # guestfs names the disk here, not the subvolume.
            running.call("mount", root if directory == "/" else device, directory)
        after = state(running)
    assert (found.os_id, found.version_id, found.init) == system.found
    assert (found.root_device, found.arch, found.selinux) == (root, "x86_64", system.labelled)
    golden, made = GOLDEN / f"{name}.txt", changes(before, after)
    if os.environ.get("KOJI_INDIRECTION_WRITE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(made, encoding="utf-8")
    assert made == golden.read_text(encoding="utf-8")


def test_no_golden_tree_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(SYSTEMS)
