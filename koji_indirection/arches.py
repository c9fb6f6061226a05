"""The machines that a guest of each arch gets, and what is peculiar to them."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class Arch:
    """One arch, as Koji and rpm name it, and its machine in qemu's and libvirt's words.

    machine -- the machine type; old guests of x86_64 need another one: see domain.py.
    uefi -- "optional" beside a BIOS, "always", or "never".
    efi_loader -- what a UEFI without a memory of boot entries starts.
    tcg_cpu_model -- the CPU where there is no KVM, for guests of which no more is known.
    console -- "serial", or "sclp" where there is no serial port.
    panic_model -- how a panic of the kernel reaches the host; None: it does not.
    video_model -- a screen to be photographed; None: none.
    virtio_console -- the first terminal on a virtio port, where no guest has a getty.
    has_report_ports -- whether it can have serial ports beside that of the console.
    """

    name: str
    machine: str
    uefi: str
    tcg_cpu_model: str
    efi_loader: str = ""
    console: str = "serial"
    panic_model: str | None = None
    video_model: str | None = None
    virtio_console: str = "/dev/hvc0"
    has_report_ports: bool = False


ARCHES = {
    arch.name: arch
    for arch in (
        Arch(
            "x86_64",
            machine="q35",
            uefi="optional",
            tcg_cpu_model="qemu64",
            efi_loader="BOOTX64.EFI",
            panic_model="isa",
            video_model="vga",
            has_report_ports=True,
        ),
        Arch(
            "aarch64",
            machine="virt",
            uefi="always",
            tcg_cpu_model="cortex-a57",
            efi_loader="BOOTAA64.EFI",
            video_model="virtio",
        ),
        Arch(
            "ppc64le",
            machine="pseries",
            uefi="never",
            # What RHEL 9 for this arch is compiled for; in capitals to libvirt, unlike to qemu.
            tcg_cpu_model="POWER9",
            panic_model="pseries",
            video_model="vga",
            virtio_console="/dev/hvc1",  # hvc0 is its serial port
        ),
        Arch(
            "s390x",
            machine="s390-ccw-virtio",
            uefi="never",
            tcg_cpu_model="qemu",
            console="sclp",
            panic_model="s390",
        ),
    )
}
# Other names of the same; and 32-bit systems, which the same machines run.
_ALIASES = {
    "amd64": "x86_64",
    **dict.fromkeys(("i386", "i486", "i586", "i686"), "x86_64"),
    "arm64": "aarch64",
    "ppc64el": "ppc64le",
}


def canonical(name: str) -> str:
    """The arch whose machine runs guests of this arch, known or not."""
    return _ALIASES.get(name, name)


def koji_arch(name: str) -> str:
    """The arch that Koji takes this one for, i386 for i686; canonical() is about machines."""
    import koji  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return str(koji.canonArch(name))


def of_host() -> str:
    """This machine's arch."""
    return canonical(platform.machine())


def named(name: str) -> Arch:
    """The arch with this name; UsageError when there is no machine for it."""
    arch = ARCHES.get(canonical(name))
    if arch is None:
        raise UsageError(
            f"there is no virtual machine for a guest of the arch {name[:40]!r}",
            f"arches are {', '.join(ARCHES)}",
        )
    return arch
