"""Put the job into the overlay of the utility image, so that the guest runs it at boot.

Works on an appliance in which the overlay is a drive; never on the host. Only
files under /etc are written, because /etc is on the root file system everywhere.
"""

from __future__ import annotations

import io
import logging
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from . import initsystem
from .appliance import Appliance, ApplianceError
from .errors import BuildFailed
from .guestlog import printable
from .initsystem import JOB_DIRECTORY, Start, text_of
from .template import Command

log = logging.getLogger(__name__)

STATUS_PORT = "org.koji.indirection.status"
LOG_PORT = "org.koji.indirection.log"
SAMPLE_SECONDS = 5

_JOB = JOB_DIRECTORY[1:]


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


def inject(
    appliance: Appliance, commands: Sequence[Command], *, workspace_partition: str, tmp_dir: Path
) -> GuestSystem:
    """Find the guest's root, and write the runner, the commands and what starts them.

    Raises BuildFailed when the image holds no operating system, or one in
    which nothing could start the job.
    """
    root_device = _mount_root(appliance)
    start = initsystem.plan(appliance)
    selinux_config = _permissive_selinux_config(appliance)
    os_release = _os_release(appliance)
    archive = tmp_dir / "job.tar"
    archive.write_bytes(
        job_archive(
            commands,
            workspace_partition=workspace_partition,
            start=start,
            selinux_config=selinux_config,
        )
    )
    for path in start.removed:
        appliance.call("rm", f"/{path}")
    for old, new in start.moved.items():
        appliance.call("mv", f"/{old}", f"/{new}")
    appliance.call("tar_in", str(archive), "/")
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


def job_archive(
    commands: Sequence[Command],
    *,
    workspace_partition: str,
    start: Start,
    selinux_config: str | None,
) -> bytes:
    """The tar archive, relative to the guest's root, of everything that the job needs there."""
    files: dict[str, tuple[str, int]] = {
        f"{_JOB}/run": (_job_file("run.sh"), 0o755),
        f"{_JOB}/settings": (
            f"STATUS_PORT={STATUS_PORT}\nLOG_PORT={LOG_PORT}\n"
            f"WORKSPACE={workspace_partition}\nSAMPLE_SECONDS={SAMPLE_SECONDS}\n",
            0o644,
        ),
    }
    for number, command in enumerate(commands, start=1):
        head = f"=== command {number} of {len(commands)}: {command.name}\n"
        files[f"{_JOB}/commands/{number:04}.cmd"] = (command.text + "\n", 0o755)
        files[f"{_JOB}/commands/{number:04}.head"] = (head, 0o644)
    files.update(start.files)
    if selinux_config is not None:
        files["etc/selinux/config"] = (selinux_config, 0o644)
    return _tar(files, start.links)


def _tar(files: dict[str, tuple[str, int]], links: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, (text, mode) in files.items():
            content = text.encode()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            archive.addfile(member, io.BytesIO(content))
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = tarfile.SYMTYPE, target, 0o777
            archive.addfile(member)
    return buffer.getvalue()


def _job_file(name: str) -> str:
    return resources.files("koji_indirection").joinpath("job", name).read_text(encoding="utf-8")


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
