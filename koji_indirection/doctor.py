"""Can this machine build? One finding a line, each failure with what to do."""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from . import accel, appliance, arches, firmware, machine, programs
from .appliance import Drive
from .config import Settings
from .errors import IndirectionError
from .jobdir import job_directory
from .spec import BuildSpec
from .units import GIB, MIB, format_size

OK, WARNING, FAILED = "ok", "warning", "FAILED"

_PROGRAMS = {
    "qemu-img": "install qemu-utils (Debian) or qemu-img (Fedora, RHEL)",
    "mke2fs": "install e2fsprogs",
    "debugfs": "install e2fsprogs",
    "mkfs.xfs": "install xfsprogs; only --workspace-fs xfs needs it",
}
# Python modules that are imported where they are used: what for, and whether every build needs it.
_MODULES = {
    "oslo_utils.imageutils.format_inspector": ("install oslo.utils and cryptography", True),
    "zstandard": ("install zstandard; only .zst images need it", False),
}
_LEAST_FREE_BYTES = 5 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; hint says what to do when it is not in order."""

    name: str
    verdict: str
    message: str
    hint: str = ""

    def line(self) -> str:
        hint = f"\n{'':24}-> {self.hint}" if self.hint and self.verdict != OK else ""
        return f"{self.verdict:9}{self.name:15}{self.message}{hint}"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def examine(settings: Settings) -> list[Finding]:
    """Look at everything that a build needs; takes some seconds, an appliance is started."""
    acceleration, kind = _acceleration(settings)
    return [
        acceleration,
        _guarded("libvirt", lambda: _libvirt(settings)),
        _guarded("libguestfs", lambda: _libguestfs(settings, kind)),
        _uefi(),
        *(_guarded(name, partial(_program, name)) for name in _PROGRAMS),
        *(_module(name) for name in _MODULES),
        _guarded("work directory", lambda: _space(settings.work_dir)),
        _memory(),
    ]


def _guarded(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except IndirectionError as error:
        return Finding(name, FAILED, error.message, error.hint)
    except OSError as error:
        return Finding(name, FAILED, str(error), "see whether the file system is full or read-only")


def _acceleration(settings: Settings) -> tuple[Finding, str]:
    name = "acceleration"
    try:
        found = accel.choose(settings.accel, cache_dir=settings.cache_dir)
    except IndirectionError as error:
        return Finding(name, FAILED, error.message, error.hint), "tcg"
    verdict = OK if found.kind == "kvm" or found.forced else WARNING
    message = f"{found.kind}, {found.reason}"
    return Finding(name, verdict, message, found.hint), found.kind


def _libvirt(settings: Settings) -> Finding:
    with ExitStack() as stack:
        job = stack.enter_context(job_directory(settings.work_dir))
        hypervisor = stack.enter_context(
            machine.connect(settings.connect, run_dir=job.run, cache_dir=settings.cache_dir)
        )
        versions = " ".join(f"{name} {version}" for name, version in hypervisor.versions.items())
        return Finding("libvirt", OK, f"{hypervisor.uri.partition('?')[0]} ({versions})")


def _libguestfs(settings: Settings, accel_kind: str) -> Finding:
    started = time.monotonic()
    with job_directory(settings.work_dir) as job:
        disk = job.path / "empty.raw"
        with disk.open("wb") as file:
            file.truncate(MIB)
        drive = Drive(str(disk), "raw", readonly=True)
        with appliance.appliance([drive], accel_kind=accel_kind, job_dir=job.path) as running:
            version = running.version()
    seconds = time.monotonic() - started
    return Finding("libguestfs", OK, f"{version}, its appliance starts ({seconds:.1f} s)")


def _uefi() -> Finding:
    try:
        arch = arches.named(arches.of_host())
        if arch.uefi == "never":
            return Finding("UEFI", OK, f"machines of the arch {arch.name} have none")
        found = firmware.find(arch.name, arch.machine, secure_boot=False)
    except IndirectionError as error:
        hint = f"{error.hint}; only utility images that boot by UEFI need it"
        return Finding("UEFI", WARNING, error.message, hint)
    return Finding("UEFI", OK, str(found.code))


def _program(name: str) -> Finding:
    version_flag = "--version" if name == "qemu-img" else "-V"
    # e2fsprogs prints its version to standard error and qemu-img to standard output.
    path = shutil.which(name)
    if path is None:
        verdict = WARNING if name == "mkfs.xfs" else FAILED
        return Finding(name, verdict, f"{name} is not installed", _PROGRAMS[name])
    said = programs.run([name, version_flag], timeout_seconds=10).strip()
    return Finding(name, OK, said.splitlines()[0] if said else path)


def _module(name: str) -> Finding:
    hint, needed = _MODULES[name]
    shown = name.partition(".")[0]
    try:
        importlib.import_module(name)
    except ImportError as error:
        return Finding(shown, FAILED if needed else WARNING, str(error), hint)
    return Finding(shown, OK, "can be imported")


def _space(work_dir: Path) -> Finding:
    with job_directory(work_dir) as job:
        free_bytes = shutil.disk_usage(job.path).free
    message = f"{work_dir}: {format_size(free_bytes)} free"
    if free_bytes < _LEAST_FREE_BYTES:
        return Finding(
            "work directory",
            WARNING,
            message,
            "a build needs about the size of the input image plus that of the results;"
            " --work-dir names another place",
        )
    return Finding("work directory", OK, message)


def _memory() -> Finding:
    available_bytes = _available_memory_bytes()
    wanted_bytes = BuildSpec().memory_bytes
    message = f"{format_size(available_bytes)} available"
    if available_bytes < wanted_bytes:
        return Finding(
            "memory",
            WARNING,
            f"{message}, less than the default guest's {format_size(wanted_bytes)}",
            "free some memory, or give the guest less with --memory",
        )
    return Finding("memory", OK, message)


def _available_memory_bytes() -> int:
    """MemAvailable of proc(5)."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
