"""The libvirt domain XML of the utility VM, built in this one place.

Every disk's format and whole backing chain are stated, so that libvirt and
qemu probe nothing. Disks come in a fixed order: guests name them by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lxml import etree
from lxml.builder import E

from .errors import UsageError
from .guestjob import LOG_PORT, STATUS_PORT
from .spec import USER_NETWORK

# os-release IDs of systems built for x86-64-v2 and -v3, by major version (facts: RHEL 9, RHEL 10).
_RHEL_LIKE = ("rhel", "centos", "almalinux", "rocky", "ol", "eurolinux", "circle")

# Of every VM's name: what an administrator, and sweep.py, know ours by.
NAME_PREFIX = "koji-indirection"


@dataclass(frozen=True)
class Disk:
    """One virtio disk.

    device -- the guest's name of it (vda, vdb, ...), which is its place in the order.
    serial -- appears in the guest as /dev/disk/by-id/virtio-SERIAL.
    backing -- (path, format) of the only file below an overlay; None for a lone file.
    readonly -- the file is the user's own; a disk that is not is one that we made.
    """

    device: str
    serial: str
    path: Path
    format: str
    backing: tuple[Path, str] | None = None
    readonly: bool = False


@dataclass(frozen=True)
class Domain:
    """Everything that the XML says about the utility VM; sizes in bytes.

    network -- "user", the name of a libvirt network, or None.
    log_is_terminal -- whether the log's stream is a terminal in the guest, for a shell.
    """

    name: str
    accel_kind: str
    memory_bytes: int
    cpus: int
    cpu_model: str
    disks: Sequence[Disk]
    socket_dir: Path
    network: str | None = None
    log_is_terminal: bool = False

    @property
    def console_socket(self) -> Path:
        return self.socket_dir / "console"

    @property
    def status_socket(self) -> Path:
        return self.socket_dir / "status"

    @property
    def log_socket(self) -> Path:
        return self.socket_dir / "log"


def tcg_cpu_model(os_id: str, version_id: str) -> str:
    """The fastest CPU model under TCG that this guest's binaries run on.

    qemu64 boots in 25 s where `max` takes 32 to 37 s; RHEL 9 and its rebuilds
    are compiled for x86-64-v2, RHEL 10 for v3, so they need more.
    """
    major = version_id.partition(".")[0]
    if os_id in _RHEL_LIKE and major.isdecimal() and int(major) >= 9:
        return "Nehalem" if int(major) == 9 else "Haswell-noTSX"
    return "qemu64"


def domain_xml(domain: Domain) -> str:
    """The XML as libvirt's createXML takes it."""
    kvm = domain.accel_kind == "kvm"
    cpu = (
        E.cpu(mode="host-passthrough", check="none", migratable="off")
        if kvm
        else E.cpu(
            E.model(domain.cpu_model, fallback="forbid"),
            mode="custom",
            match="exact",
            check="none",
        )
    )
    document = E.domain(
        E.name(domain.name),
        E.title("utility VM of a koji-indirection build"),
        E.memory(str(domain.memory_bytes), unit="b"),
        E.vcpu(str(domain.cpus)),
        E.os(
            E.type("hvm", arch="x86_64", machine="q35"),
            E.boot(dev="hd"),
            # The firmware's and the boot loader's words reach the console log too.
            E.bios(useserial="yes"),
        ),
        E.features(E.acpi()),
        cpu,
        E.clock(offset="utc"),
        E.on_poweroff("destroy"),
        # A reboot must be seen as one, a crashed guest photographed: the watch destroys both.
        E.on_reboot("restart"),
        E.on_crash("preserve"),
        E.devices(
            *(_disk(disk) for disk in domain.disks),
            *_interfaces(domain.network),
            E.controller(type="usb", model="none"),
            _unix_socket(E.serial(E.target(port="0"), type="unix"), domain.console_socket),
            _unix_socket(
                E.channel(E.target(type="virtio", name=STATUS_PORT), type="unix"),
                domain.status_socket,
            ),
            _unix_socket(
                E.console(E.target(type="virtio", port="1"), type="unix")
                if domain.log_is_terminal
                else E.channel(E.target(type="virtio", name=LOG_PORT), type="unix"),
                domain.log_socket,
            ),
            E.rng(E.backend("/dev/urandom", model="random"), model="virtio"),
            # A screen without a display server: only a screenshot can see it.
            E.video(E.model(type="vga", vram="16384")),
            E.memballoon(model="none"),
            E.panic(model="isa"),
        ),
        type="kvm" if kvm else "qemu",
    )
    text: str = etree.tostring(document, pretty_print=True, encoding="unicode")
    return text


def _disk(disk: Disk) -> etree._Element:
    own_file = not disk.readonly
    driver = E.driver(name="qemu", type=disk.format)
    if own_file:
        # Thrown away after the build: no flush of the guest's is worth waiting for.
        driver.set("cache", "unsafe")
        driver.set("discard", "unmap")
    element: etree._Element = E.disk(
        driver,
        _source(disk.path, own_file),
        _backing_store(disk.backing),
        E.target(dev=disk.device, bus="virtio"),
        E.serial(disk.serial),
        type="file",
        device="disk",
    )
    if disk.readonly:
        element.append(E.readonly())
    return element


def _interfaces(network: str | None) -> list[etree._Element]:
    if network is None:
        return []
    if network == USER_NETWORK:
        return [E.interface(E.model(type="virtio"), type="user")]
    return [E.interface(E.source(network=network), E.model(type="virtio"), type="network")]


def _backing_store(backing: tuple[Path, str] | None) -> etree._Element:
    """An empty <backingStore/> ends the chain: libvirt then probes nothing."""
    element: etree._Element = E.backingStore()
    if backing is not None:
        path, image_format = backing
        element.set("type", "file")
        element.extend([E.format(type=image_format), _source(path, False), E.backingStore()])
    return element


def _source(path: Path, own_file: bool) -> etree._Element:
    try:
        element: etree._Element = E.source(file=str(path))
    except ValueError as error:
        raise UsageError(
            f"libvirt cannot be told of the file {str(path)!r}: its name is not plain UTF-8",
            "rename it, or name another --work-dir",
        ) from error
    if not own_file:
        # The owner of the user's file stays as it is, even for the time of the build.
        element.append(E.seclabel(model="dac", relabel="no"))
    return element


def _unix_socket(device: etree._Element, path: Path) -> etree._Element:
    device.insert(0, E.source(mode="bind", path=str(path)))
    return device
