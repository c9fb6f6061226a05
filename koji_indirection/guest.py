"""Put the job into the overlay of the utility image, so that the guest runs it at boot.

Works on an appliance in which the overlay is a drive; never on the host. Only
files under /etc are written, because /etc is on the root file system everywhere.
"""

from __future__ import annotations

import io
import logging
import re
import tarfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from .appliance import Appliance, ApplianceError
from .errors import BuildFailed
from .guestjob import DIRECTORY, Files, GuestJob, host_files, job_files
from .guestlog import printable

log = logging.getLogger(__name__)

_SYSTEMD = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
# Where a small init says that it runs /etc/rc.local if there is one.
_MAY_START_RC_LOCAL = ("/etc/inittab", "/etc/init.d/rcS", "/etc/rc")
_OWN_RC_LOCAL = "/etc/rc.local.own"  # the guest's own rc.local, which still runs first

# Units that wait for a person, or for a network that is not there, before multi-user is reached.
_MASKED_UNITS = (
    "NetworkManager-wait-online.service",
    "systemd-networkd-wait-online.service",
    "ifupdown-wait-online.service",
    "systemd-time-wait-sync.service",
    "systemd-firstboot.service",
    "initial-setup.service",
    "initial-setup-text.service",
    "initial-setup-graphical.service",
    "cloud-init-local.service",
    "cloud-init.service",
    "cloud-config.service",
    "cloud-final.service",
    "kdump.service",  # builds an initramfs at the first boot
    "snapd.seeded.service",
)


@dataclass(frozen=True)
class GuestSystem:
    """What was found in the utility image.

    root_device -- the appliance's name of the file system that holds the root.
    os_id, version_id -- as in os-release(5); empty when the guest has none.
    init -- "systemd" or "rc.local": how the job is started.
    selinux -- True when the guest enforced SELinux and now boots permissive.
    """

    root_device: str
    os_id: str
    version_id: str
    init: str
    selinux: bool


def require_boot_code(appliance: Appliance) -> None:
    """Raise BuildFailed when the first drive's boot sector holds no program.

    The firmware runs the zeros of such a sector, if it is signed, and says
    nothing more: that would last until the boot deadline.
    """
    code: str = appliance.call("pread_device", "/dev/sda", 440, 0)
    if not code.strip("\0"):
        raise BuildFailed(
            "the utility image is not bootable: there is no boot loader in its first sector",
            "use an image with a BIOS boot loader",
        )


def inject(appliance: Appliance, job: GuestJob, *, tmp_dir: Path) -> GuestSystem:
    """Find the guest's root, and write the job and what starts it.

    Raises BuildFailed when the image holds no operating system, or one that
    has neither systemd nor an rc.local.
    """
    root_device = _mount_root(appliance)
    init = _init_system(appliance)
    selinux_config = _permissive_selinux_config(appliance)
    os_release = _os_release(appliance)
    archive = tmp_dir / "job.tar"
    archive.write_bytes(job_archive(job, init=init, selinux_config=selinux_config))
    if init == "rc.local" and appliance.call("exists", "/etc/rc.local"):
        appliance.call("mv", "/etc/rc.local", _OWN_RC_LOCAL)
    appliance.call("tar_in", str(archive), "/")
    for path, source in host_files(job).items():
        appliance.call("upload", str(source), f"/{path}")
        appliance.call("chmod", 0o600, f"/{path}")
    appliance.call("umount_all")
    system = GuestSystem(
        root_device,
        os_release.get("ID", ""),
        os_release.get("VERSION_ID", ""),
        init,
        selinux=selinux_config is not None,
    )
    log.info(
        "utility image: %s %s on %s, started by %s%s",
        system.os_id or "unknown system",
        system.version_id,
        root_device,
        init,
        ", SELinux set to permissive" if system.selinux else "",
    )
    return system


def job_archive(job: GuestJob, *, init: str, selinux_config: str | None) -> bytes:
    """The tar archive, relative to the guest's root, of what the job needs there.

    Files of the job that are on the host are not in it.
    """
    files = job_files(job)
    links: dict[str, str] = {}
    if init == "systemd":
        units = "etc/systemd/system"
        files[f"{units}/koji-indirection.service"] = (
            _job_file("koji-indirection.service"),
            0o644,
        )
        files["etc/cloud/cloud-init.disabled"] = (b"", 0o644)
        links[f"{units}/multi-user.target.wants/koji-indirection.service"] = (
            "../koji-indirection.service"
        )
        links[f"{units}/default.target"] = "/lib/systemd/system/multi-user.target"
        links.update({f"{units}/{unit}": "/dev/null" for unit in _MASKED_UNITS})
    else:
        files["etc/rc.local"] = (
            (
                f"#!/bin/sh\n[ -x {_OWN_RC_LOCAL} ] && {_OWN_RC_LOCAL}\n"
                f"/bin/sh /{DIRECTORY}/run </dev/null >/dev/null 2>&1 &\n"
            ).encode(),
            0o755,
        )
    if selinux_config is not None:
        files["etc/selinux/config"] = (selinux_config.encode(), 0o644)
    return _tar(files, links)


def _tar(files: Files, links: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, (content, mode) in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            archive.addfile(member, io.BytesIO(content))
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = tarfile.SYMTYPE, target, 0o777
            archive.addfile(member)
    return buffer.getvalue()


def _job_file(name: str) -> bytes:
    return resources.files("koji_indirection").joinpath("job", name).read_bytes()


def _mount_root(appliance: Appliance) -> str:
    """Mount the file system that looks like a root at the appliance's /, read-write.

    Looking for the marks of a root on each file system takes well under a
    second; libguestfs's own inspection takes 11 to 16 s under TCG and is asked
    only when the marks are not found (a /usr or /etc of its own).
    """
    file_systems: dict[str, str] = appliance.call("list_filesystems")
    unreadable = []
    for device, kind in file_systems.items():
        if not kind.startswith(("ext", "xfs", "btrfs", "f2fs")):
            continue
        try:
            appliance.call("mount", device, "/")
        except ApplianceError as error:
            unreadable.append(f"{device} does not mount: {printable(error.reason, 200)}")
            log.debug("%s", unreadable[-1])
            continue
        if appliance.call("is_dir", "/etc", followsymlinks=True) and any(
            appliance.call("exists", path) or appliance.call("is_symlink", path)
            for path in ("/sbin/init", "/usr/lib/systemd/systemd", "/bin/busybox")
        ):
            return device
        appliance.call("umount_all")
    roots: list[str] = appliance.call("inspect_os")
    if not roots:
        found = ", ".join(f"{device} ({kind})" for device, kind in file_systems.items())
        raise BuildFailed(
            "; ".join(
                [
                    "the utility image holds no operating system",
                    f"file systems found: {found or 'none'}",
                    *unreadable,
                ]
            ),
            "use an image of a full, bootable system as utility image",
        )
    mountpoints: dict[str, str] = appliance.call("inspect_get_mountpoints", roots[0])
    for directory in sorted(mountpoints, key=len):
        try:
            appliance.call("mount", mountpoints[directory], directory)
        except ApplianceError as error:
            if directory in ("/", "/usr"):
                raise
            log.debug("%s does not mount: %s", directory, error.reason)
    return roots[0]


def _init_system(appliance: Appliance) -> str:
    if any(appliance.call("exists", path) for path in _SYSTEMD):
        return "systemd"
    if appliance.call("is_file", "/etc/rc.local", followsymlinks=True) or any(
        appliance.call("is_file", path) and "/etc/rc.local" in _text(appliance, path)
        for path in _MAY_START_RC_LOCAL
    ):
        return "rc.local"
    raise BuildFailed(
        "the utility image has neither systemd nor an /etc/rc.local to start the job with",
        "use a utility image that boots with systemd",
    )


def _permissive_selinux_config(appliance: Appliance) -> str | None:
    """The guest's SELinux configuration made permissive; None when it does not enforce.

    Permissive rather than labelled: the files of the job have no place in any
    policy, and relabelling the whole overlay at boot takes minutes.
    """
    config = "/etc/selinux/config"
    if not appliance.call("is_file", config):
        return None
    text = _text(appliance, config)
    permissive = re.sub(
        r"(?m)^[ \t]*SELINUX[ \t]*=[ \t]*(?i:enforcing).*$", "SELINUX=permissive", text
    )
    return permissive if permissive != text else None


def _os_release(appliance: Appliance) -> dict[str, str]:
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        if appliance.call("is_file", path, followsymlinks=True):
            pairs = (line.partition("=") for line in _text(appliance, path).splitlines())
            return {key: value.strip("\"'")[:64] for key, _, value in pairs}
    return {}


def _text(appliance: Appliance, path: str) -> str:
    """The first 64 KiB of a small configuration file of the guest."""
    content: str = appliance.call("pread", path, 65536, 0)
    return content
