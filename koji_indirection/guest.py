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

from . import initsystem
from .appliance import Appliance, ApplianceError
from .errors import BuildFailed
from .guestjob import Files, GuestJob, host_files, job_files
from .guestlog import printable
from .initsystem import Start, text_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GuestSystem:
    """What was found in the utility image.

    root_device -- the appliance's name of the file system that holds the root.
    os_id, version_id -- as in os-release(5); empty when the guest has none.
    init -- how the job is started, as initsystem.Start names it.
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

    Raises BuildFailed when the image holds no operating system, or one in
    which nothing could start the job.
    """
    root_device = _mount_root(appliance)
    start = initsystem.plan(appliance)
    selinux_config = _permissive_selinux_config(appliance)
    os_release = _os_release(appliance)
    archive = tmp_dir / "job.tar"
    archive.write_bytes(job_archive(job, start=start, selinux_config=selinux_config))
    for path in start.removed:
        appliance.call("rm", f"/{path}")
    for old, new in start.moved.items():
        appliance.call("mv", f"/{old}", f"/{new}")
    appliance.call("tar_in", str(archive), "/")
    for path, source in host_files(job).items():
        appliance.call("upload", str(source), f"/{path}")
        appliance.call("chmod", 0o600, f"/{path}")
    appliance.call("umount_all")
    system = GuestSystem(
        root_device,
        os_release.get("ID", ""),
        os_release.get("VERSION_ID", ""),
        start.init,
        selinux=selinux_config is not None,
    )
    log.info(
        "utility image: %s %s on %s, started by %s%s",
        system.os_id or "unknown system",
        system.version_id,
        root_device,
        start.init,
        ", SELinux set to permissive" if system.selinux else "",
    )
    return system


def job_archive(job: GuestJob, *, start: Start, selinux_config: str | None) -> bytes:
    """The tar archive, relative to the guest's root, of what the job needs there.

    Files of the job that are on the host are not in it.
    """
    files = job_files(job)
    files.update({name: (text.encode(), mode) for name, (text, mode) in start.files.items()})
    if selinux_config is not None:
        files["etc/selinux/config"] = (selinux_config.encode(), 0o644)
    return _tar(files, start.links)


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


def _permissive_selinux_config(appliance: Appliance) -> str | None:
    """The guest's SELinux configuration made permissive; None when it does not enforce.

    Permissive rather than labelled: the files of the job have no place in any
    policy, and relabelling the whole overlay at boot takes minutes.
    """
    config = "/etc/selinux/config"
    if not appliance.call("is_file", config):
        return None
    text = text_of(appliance, config)
    permissive = re.sub(
        r"(?m)^[ \t]*SELINUX[ \t]*=[ \t]*(?i:enforcing).*$", "SELINUX=permissive", text
    )
    return permissive if permissive != text else None


def _os_release(appliance: Appliance) -> dict[str, str]:
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        if appliance.call("is_file", path, followsymlinks=True):
            pairs = (line.partition("=") for line in text_of(appliance, path).splitlines())
            return {key: value.strip("\"'")[:64] for key, _, value in pairs}
    return {}
