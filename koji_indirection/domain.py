"""The libvirt domain XML of the utility VM, built in this one place.

Every disk's format and whole backing chain are stated, so that libvirt and
qemu probe nothing. Disks come in a fixed order: guests name them by it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from lxml import etree
from lxml.builder import E

from .arches import ARCHES, Arch
from .errors import BuildFailed, UsageError
from .firmware import Firmware
from .guestjob import LOG_PORT, STATUS_PORT
from .spec import USER_NETWORK

# os-release IDs of systems compiled for more than the first x86-64: since which major version
# they need x86-64-v2, and v3.
_RHEL_LIKE = ("rhel", "centos", "almalinux", "rocky", "ol", "eurolinux", "circle")
_NEEDS_V2 = {
    **dict.fromkeys(_RHEL_LIKE, 9),
    **dict.fromkeys(("sles", "sled", "opensuse-leap"), 16),
    "amzn": 2023,
}
_NEEDS_V3 = dict.fromkeys(_RHEL_LIKE, 10)

# How libvirt, and the guest, begin the names of disks on a bus.
_BUS_PREFIX = {"virtio": "vd", "sata": "sd", "ide": "hd"}
# Of every VM's name: what an administrator, and sweep.py, know ours by.
NAME_PREFIX = "koji-indirection"


@dataclass(frozen=True)
class Disk:
    """One disk.

    device -- the guest's name of it (vda, vdb, ...), which is its place in the order; on
        another bus than virtio the guest has other names for the same places.
    serial -- what the runner in the guest finds it by, whatever its name there.
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
    firmware -- a UEFI as Firmware.for_one_vm() makes it; None for a BIOS, or for what
        an arch without either has.
    disk_bus -- "virtio", "sata" or "ide".
    serial_reports -- whether status and log come over serial ports, because the guest has no
        driver for virtio ones.
    virtio_1 -- whether the guest's virtio drivers know version 1.0.
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
    arch: Arch = ARCHES["x86_64"]
    firmware: Firmware | None = None
    disk_bus: str = "virtio"
    serial_reports: bool = False
    virtio_1: bool = True

    @property
    def machine(self) -> str:
        """The machine type: q35 has no IDE, and no virtio but 1.0 behind its PCI Express ports."""
        is_old = self.disk_bus == "ide" or not self.virtio_1
        return "pc" if is_old and self.arch.name == "x86_64" else self.arch.machine

    @property
    def console_socket(self) -> Path:
        return self.socket_dir / "console"

    @property
    def status_socket(self) -> Path:
        return self.socket_dir / "status"

    @property
    def log_socket(self) -> Path:
        return self.socket_dir / "log"


def disk_bus(asked: str, missing_drivers: Collection[str], arch: Arch) -> str:
    """The bus of the disks; asked -- "auto", "virtio", "sata" or "ide".

    Raises UsageError when the arch's machine has no such bus, BuildFailed when it
    has none that the guest has a driver for.
    """
    if asked in ("sata", "ide") and arch.name != "x86_64":
        raise UsageError(
            f"--disk-bus {asked} makes no sense for a guest of the arch {arch.name}",
            "leave it out: its machine has virtio disks only",
        )
    if asked != "auto":
        return asked
    if "virtio_blk" not in missing_drivers:
        return "virtio"
    if arch.name != "x86_64":
        raise BuildFailed(
            "no kernel of the utility image has virtio_blk, the driver for its disks",
            "use a utility image with virtio drivers",
        )
    return "sata" if "ahci" not in missing_drivers else "ide"


def serial_reports(missing_drivers: Collection[str], arch: Arch) -> bool:
    """Whether status and log have to come over serial ports; BuildFailed when they cannot."""
    if "virtio_console" not in missing_drivers:
        return False
    if not arch.has_report_ports:
        raise BuildFailed(
            "no kernel of the utility image has virtio_console, the driver for what the job"
            " reports over",
            "use a utility image with virtio drivers",
        )
    return True


def tcg_cpu_model(os_id: str, version_id: str, arch: Arch = ARCHES["x86_64"]) -> str:
    """The fastest CPU model under TCG that this guest's binaries run on.

    qemu64 boots in 25 s where `max` takes 32 to 37 s, but some systems need more.
    """
    major = version_id.partition(".")[0]
    if arch.name != "x86_64" or not major.isdecimal():
        return arch.tcg_cpu_model
    for needs, model in ((_NEEDS_V3, "Haswell-noTSX"), (_NEEDS_V2, "Nehalem")):
        if os_id in needs and int(major) >= needs[os_id]:
            return model
    return arch.tcg_cpu_model


def domain_xml(domain: Domain) -> str:
    """The XML as libvirt's createXML takes it."""
    kvm = domain.accel_kind == "kvm"
    document = E.domain(
        E.name(domain.name),
        E.title("utility VM of a koji-indirection build"),
        E.memory(str(domain.memory_bytes), unit="b"),
        E.vcpu(str(domain.cpus)),
        _os(domain),
        *_features(domain),
        _cpu(domain),
        E.clock(offset="utc"),
        E.on_poweroff("destroy"),
        # A reboot must be seen as one, a crashed guest photographed: the watch destroys both.
        E.on_reboot("restart"),
        E.on_crash("preserve"),
        E.devices(
            *(_disk(disk, domain.disk_bus) for disk in domain.disks),
            *_interfaces(domain.network),
            E.controller(type="usb", model="none"),
            *_streams(domain),
            E.rng(E.backend("/dev/urandom", model="random"), model="virtio"),
            *_screen(domain),
            E.memballoon(model="none"),
            *([E.panic(model=domain.arch.panic_model)] if domain.arch.panic_model else []),
        ),
        type="kvm" if kvm else "qemu",
    )
    text: str = etree.tostring(document, pretty_print=True, encoding="unicode")
    return text


def _os(domain: Domain) -> etree._Element:
    element: etree._Element = E.os(E.type("hvm", arch=domain.arch.name, machine=domain.machine))
    firmware = domain.firmware
    if firmware is not None:
        # The variables stay where we put them: libvirt's own place for them outlives the VM.
        secure = "yes" if firmware.needs_smm else "no"
        loader = E.loader(str(firmware.code), readonly="yes", secure=secure, type="pflash")
        variables = E.nvram(str(firmware.variables))
        element.extend([loader, variables])
    element.append(E.boot(dev="hd"))
    if firmware is None and domain.arch.uefi == "optional":
        # The firmware's and the boot loader's words reach the console log too.
        element.append(E.bios(useserial="yes"))
    return element


def _features(domain: Domain) -> list[etree._Element]:
    if domain.arch.uefi == "never":
        return []  # without a firmware that could have them, libvirt refuses ACPI tables
    features: etree._Element = E.features(E.acpi())
    if domain.firmware is not None and domain.firmware.needs_smm:
        features.append(E.smm(state="on"))
    return [features]


def _cpu(domain: Domain) -> etree._Element:
    if domain.accel_kind != "kvm":
        model = E.model(domain.cpu_model, fallback="forbid")
        element: etree._Element = E.cpu(model, mode="custom", match="exact", check="none")
        return element
    element = E.cpu(mode="host-passthrough", check="none")
    if domain.arch.name == "x86_64":
        element.set("migratable", "off")
    return element


def _streams(domain: Domain) -> list[etree._Element]:
    """Console, status and log, each a socket that qemu serves."""
    sockets = (domain.status_socket, domain.log_socket)
    if domain.arch.console == "sclp":
        console = E.console(E.target(type="sclp", port="0"), type="unix")
    else:
        console = E.serial(E.target(port="0"), type="unix")
    if domain.serial_reports:
        # The third port of a PC shares the first one's interrupt, and would hang for it.
        reports = [
            E.serial(E.target(port="1"), type="unix"),
            E.serial(
                E.target(port="2"),
                E.address(type="isa", iobase="0x3e8", irq="0x5"),
                type="unix",
            ),
        ]
    else:
        reports = [
            E.channel(E.target(type="virtio", name=name), type="unix")
            for name in (STATUS_PORT, LOG_PORT)
        ]
        if domain.log_is_terminal:
            reports[1] = E.console(E.target(type="virtio", port="1"), type="unix")
    return [
        _unix_socket(console, domain.console_socket),
        *(_unix_socket(device, path) for device, path in zip(reports, sockets)),
    ]


def _screen(domain: Domain) -> list[etree._Element]:
    """A screen without a display server: only a screenshot can see it."""
    model = domain.arch.video_model
    if model is None:
        return []
    memory = {"vram": "16384"} if model == "vga" else {}
    return [E.video(E.model(type=model, **memory))]


def _disk(disk: Disk, bus: str) -> etree._Element:
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
        E.target(dev=_BUS_PREFIX[bus] + disk.device[-1], bus=bus),
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
