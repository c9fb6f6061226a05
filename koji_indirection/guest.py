"""Put the job into the overlay of the utility image, so that the guest runs it at boot.

Works on an appliance in which the overlay is a drive; never on the host. Files are
written under /etc only, because /etc is on the root file system everywhere.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import initsystem
from .appliance import Appliance, ApplianceError
from .guestjob import Files, GuestJob, host_files, job_files
from .guestlog import printable
from .initsystem import Start, text_of
from .rootfs import mount_root

log = logging.getLogger(__name__)

# Every system has one of them, and in its own arch.
_PROGRAMS = ("/bin/sh", "/sbin/init", "/usr/lib/systemd/systemd", "/bin/busybox", "/bin/bash")
_ETC = PurePosixPath("/etc")
_SELINUX_XATTR = "security.selinux"
# The types in the policies of RHEL, Fedora and openSUSE, first match first.
_LABELS = (
    (r"/etc/systemd/system/", "systemd_unit_file_t"),
    (r"/etc(/rc\.d)?/init\.d/koji-indirection$|/etc/rc\.local$", "initrc_exec_t"),
    (r"/etc/selinux/config$", "selinux_config_t"),
    (r"", "etc_t"),
)
# With it a guest that has SELinux gives all its files their labels at boot, and then reboots.
_RELABEL_MARK = "/.autorelabel"
_DRIVERS = ("virtio_blk", "virtio_console", "ahci", "ata_piix")


@dataclass(frozen=True)
class GuestSystem:
    """What was found in the utility image.

    root_device -- the appliance's name of the file system that holds the root.
    os_id, version_id -- as in os-release(5); empty when the guest has none.
    init -- how the job is started, as initsystem.Start names it.
    selinux -- True when the guest enforced SELinux and now boots permissive.
    arch -- what its programs are compiled for, e.g. "x86_64" or "i386"; empty when unknown.
    missing_drivers -- those of virtio_blk, virtio_console, ahci and ata_piix that none of its
        kernels has.
    knows_virtio_1 -- False when all its kernels are from before virtio 1.0.
    """

    root_device: str
    os_id: str
    version_id: str
    init: str
    selinux: bool
    arch: str = ""
    missing_drivers: frozenset[str] = frozenset()
    knows_virtio_1: bool = True


def inject(appliance: Appliance, job: GuestJob, *, tmp_dir: Path) -> GuestSystem:
    """Find the guest's root, and write the job and what starts it.

    Raises BuildFailed when the image holds no operating system, or one in
    which nothing could start the job.
    """
    root_device = mount_root(appliance)
    start = initsystem.plan(appliance)
    selinux_config = _permissive_selinux_config(appliance)
    os_release = _os_release(appliance)
    arch = _arch(appliance)
    missing_drivers = _missing_drivers(appliance)
    knows_virtio_1 = _knows_virtio_1(appliance)
    if "virtio_console" in missing_drivers:
        job = dataclasses.replace(job, serial_reports=True)
    archive = tmp_dir / "job.tar"
    archive.write_bytes(job_archive(job, start=start, selinux_config=selinux_config))
    for path in start.removed:
        appliance.call("rm", f"/{path}")
    if appliance.call("is_file", _RELABEL_MARK):
        log.info(
            "utility image: %s removed: with it the guest would relabel its files and reboot"
            " before the job",
            _RELABEL_MARK,
        )
        appliance.call("rm", _RELABEL_MARK)
    for old, new in start.moved.items():
        appliance.call("mv", f"/{old}", f"/{new}")
    appliance.call("tar_in", str(archive), "/")
    for path, source in host_files(job).items():
        appliance.call("upload", str(source), f"/{path}")
        appliance.call("chmod", 0o600, f"/{path}")
    _label(appliance, [*_archive_names(archive), *host_files(job)])
    appliance.call("umount_all")
    system = GuestSystem(
        root_device,
        os_release.get("ID", ""),
        os_release.get("VERSION_ID", ""),
        start.init,
        selinux=selinux_config is not None,
        arch=arch,
        missing_drivers=missing_drivers,
        knows_virtio_1=knows_virtio_1,
    )
    log.info(
        "utility image: %s %s for %s on %s, started by %s%s",
        system.os_id or "unknown system",
        system.version_id,
        system.arch or "an unknown arch",
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


def _archive_names(archive: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        return tar.getnames()


def _label(appliance: Appliance, names: Iterable[str]) -> None:
    """Give what was written the labels that the policy has for it, if the guest has labels.

    Without them a guest that turns enforcing again could not read its own units.
    """
    if not _has_label(appliance, "/etc"):
        return
    paths = {PurePosixPath("/", name) for name in names}
    for directory in {parent for path in paths for parent in path.parents}:
        if _ETC in directory.parents and not _has_label(appliance, str(directory)):
            paths.add(directory)  # it was not there before
    for path in sorted(paths):
        kind = next(kind for pattern, kind in _LABELS if re.match(pattern, str(path)))
        label = f"system_u:object_r:{kind}:s0"
        appliance.call("lsetxattr", _SELINUX_XATTR, label, len(label), str(path))


def _has_label(appliance: Appliance, path: str) -> bool:
    try:
        appliance.call("lgetxattr", path, _SELINUX_XATTR)
    except ApplianceError:
        return False
    return True


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


def _arch(appliance: Appliance) -> str:
    for path in _PROGRAMS:
        if appliance.call("is_file", path, followsymlinks=True):
            try:
                arch: str = appliance.call("file_architecture", appliance.call("realpath", path))
            except ApplianceError as error:  # no program at all, or one of an arch of its own
                log.debug("%s: %s", path, error.reason)
            else:
                return printable(arch, 20)
    return ""


def _missing_drivers(appliance: Appliance) -> frozenset[str]:
    """The drivers that no kernel has; none when it cannot be told what the kernels have."""
    if not appliance.call("is_dir", "/lib/modules", followsymlinks=True):
        return frozenset()
    missing = set(_DRIVERS)
    lists = appliance.call("glob_expand", "/lib/modules/*/modules.builtin")
    for driver in _DRIVERS:
        if appliance.call("glob_expand", f"/lib/modules/*/kernel/drivers/*/{driver}.ko*") or any(
            appliance.call("grep", f"/{driver}.ko", path) for path in lists
        ):
            missing.discard(driver)
    return frozenset(missing) if lists else frozenset()


def _knows_virtio_1(appliance: Appliance) -> bool:
    """Whether one of its kernels does; True when there is none to be seen."""
    kernels = appliance.call("glob_expand", "/lib/modules/*/modules.dep")
    return not kernels or any(_has_virtio_1(PurePosixPath(path).parent.name) for path in kernels)


def _has_virtio_1(release: str) -> bool:
    """Linux has it since 4.0, RHEL since the kernel of 7.2."""
    numbers = [int(number) for number in re.findall("[0-9]+", release)[:4]]
    return numbers >= [4] or (".el7" in release and numbers >= [3, 10, 0, 327])
