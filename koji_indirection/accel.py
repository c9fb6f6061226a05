"""Is KVM really usable here? One verdict, for libvirt and libguestfs alike.

Some hosts have a /dev/kvm on which firmware runs and kernels hang, because it
emulates every privileged instruction. So the question is put to KVM itself: a
vCPU in long mode, ring 0, must finish a loop in time. This module must never
wait for a guest without a deadline: the probe runs in a child process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import BuilderFault, UsageError
from .jobdir import python_environment

DEVICE = Path("/dev/kvm")
LOOPS = 5_000_000  # milliseconds on hardware, 7 s where every ring-0 instruction is emulated
CACHE_NAME = "accel.json"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CACHE_VERSION = 1
_START_SECONDS = 30.0  # for the child's interpreter on a busy host; not the guest's time
_PROBE_SECONDS = 2.0  # hardware takes milliseconds
_REAP_SECONDS = 1.0
_READY = b"ready\n"  # the child's first line: the clock starts
_USE_TCG = "use --accel tcg, which works everywhere but is about 10 times slower"


@dataclass(frozen=True)
class Accel:
    """What guests run on, and why.

    kind -- "kvm" or "tcg".
    reason -- one sentence without a full stop: why this one.
    forced -- it was asked for, not chosen.
    hint -- what to do to get KVM; empty when there is nothing to do.
    """

    kind: str
    reason: str
    forced: bool
    hint: str = ""


def choose(wanted: str, *, cache_dir: Path) -> Accel:
    """The accelerator to use when the user said auto, kvm or tcg.

    What the probe found is remembered in cache_dir until the host reboots;
    whether /dev/kvm exists and may be opened is looked at each time. Raises
    BuilderFault when KVM was asked for and cannot be used, UsageError for
    another word.
    """
    if wanted not in ("auto", "kvm", "tcg"):
        raise UsageError(f"unknown acceleration {wanted!r}", "use auto, kvm or tcg")
    if wanted == "tcg":
        return Accel("tcg", "it was asked for", forced=True)
    found = _find(cache_dir)
    if wanted == "auto":
        return found
    if found.kind != "kvm":
        hint = f"{found.hint}; or {_USE_TCG}" if found.hint else _USE_TCG
        raise BuilderFault(f"KVM was asked for but cannot be used: {found.reason}", hint)
    return Accel("kvm", found.reason, forced=True)


def _find(cache_dir: Path) -> Accel:
    unavailable = _unavailable()
    if unavailable:
        return unavailable
    key = _cache_key()
    cached = _read_cache(cache_dir / CACHE_NAME, key)
    if cached:
        return cached
    found, lasting = _probe(_PROBE_SECONDS)
    if lasting and key:
        _write_cache(cache_dir / CACHE_NAME, key, found)
    return found


def _no_kvm(reason: str, hint: str) -> Accel:
    return Accel("tcg", reason, forced=False, hint=hint)


def _unavailable() -> Accel | None:
    """Why /dev/kvm cannot even be opened; None when it can."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return _no_kvm(
            f"{DEVICE} does not exist",
            "load the module kvm_intel or kvm_amd; in a virtual machine, turn on nested "
            "virtualization; in a container, pass the device in",
        )
    except PermissionError:
        return _no_kvm(f"this user may not open {DEVICE}", "add the user to the group kvm")
    except OSError as error:
        if error.errno == errno.EBUSY:
            return _no_kvm(f"{DEVICE} is busy", "stop the other hypervisor that uses it")
        return _no_kvm(
            f"{DEVICE} cannot be opened: {error.strerror}",
            "is virtualization turned on in the firmware, and a kvm module loaded?",
        )
    return None


# -- the cache ---------------------------------------------------------------


def _cache_key() -> list[str | int] | None:
    """What must be the same for a verdict to hold: this boot of the host, this device."""
    try:
        device = DEVICE.stat()
        return [
            _CACHE_VERSION,
            _BOOT_ID.read_text(encoding="ascii").strip(),
            device.st_dev,
            device.st_ino,
            device.st_rdev,
        ]
    except (OSError, ValueError):
        return None


def _read_cache(path: Path, key: list[str | int] | None) -> Accel | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if key is None or record["key"] != key:
            return None
        accel = Accel(**record["accel"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    good = accel.kind in ("kvm", "tcg") and isinstance(accel.reason, str) and accel.reason
    return accel if good and isinstance(accel.hint, str) else None


def _write_cache(path: Path, key: list[str | int], accel: Accel) -> None:
    """Whole or not at all; a directory that cannot be written to only costs the next probe."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=CACHE_NAME, dir=path.parent)
    except OSError:
        return
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"key": key, "accel": asdict(accel)}, file)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# -- the probe, seen from outside ---------------------------------------------


def _probe(timeout_seconds: float, loops: int = LOOPS) -> tuple[Accel, bool]:
    """Run the probe in a child; also says whether the verdict lasts until the host reboots."""
    child = subprocess.Popen(
        [sys.executable, "-m", __name__, str(loops)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=python_environment(),
        start_new_session=True,
    )
    try:
        said: bytes | None = _read(child, _START_SECONDS) or b""
        if said == _READY:  # a fast answer comes together with it
            said = _read(child, timeout_seconds)
    finally:
        _end(child)
    if said is None:
        return _no_kvm(
            f"guests hang on this host's {DEVICE}: {loops:,} loops did not end "
            f"within {timeout_seconds:g} s",
            "KVM must run on hardware; this host emulates it, or its nested virtualization is "
            "broken",
        ), True
    try:
        record = json.loads(said.replace(_READY, b""))
        if "error" in record:
            return _no_kvm(str(record["error"]), str(record["hint"])), False
        reason = f"KVM works: {record['did']} in {record['milliseconds']} ms"
        return Accel("kvm", reason, forced=False), True
    except (ValueError, KeyError, TypeError):
        return _no_kvm(
            f"the probe of {DEVICE} ended without an answer", "try again on an idle host"
        ), False


def _read(child: subprocess.Popen[bytes], timeout_seconds: float) -> bytes | None:
    """What the child says next, b"" when it ended, None when the deadline passed."""
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], timeout_seconds)[0]:
        return None
    return os.read(child.stdout.fileno(), 4096)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill, and do not wait for long: a vCPU may sit where no signal reaches it."""
    child.kill()
    try:
        child.wait(_REAP_SECONDS)
    except subprocess.TimeoutExpired:
        pass  # reaped by subprocess when it does end
    if child.stdout is not None:
        child.stdout.close()


# -- the probe itself: the child ----------------------------------------------
# Numbers and layouts: linux/include/uapi/linux/kvm.h, Documentation/virt/kvm/api.rst.

_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_GET_VCPU_MMAP_SIZE = 0xAE04
_KVM_CREATE_VCPU = 0xAE41
_KVM_SET_USER_MEMORY_REGION = 0x4020AE46
_KVM_SET_TSS_ADDR = 0xAE47
_KVM_RUN = 0xAE80
_KVM_SET_REGS = 0x4090AE82
_KVM_GET_SREGS = 0x8138AE83
_KVM_SET_SREGS = 0x4138AE84
_KVM_EXIT_IO = 2

_MEMORY_BYTES = 2 * 1024**2  # one large page
_CODE, _PML4, _PDPT, _PD, _STACK = 0x1000, 0x2000, 0x3000, 0x4000, 0x8000
_PORT = 0xE9


class _Unusable(Exception):
    """KVM does not do what it should; message and hint."""


def main(loops: int) -> None:
    """Say _READY, then the answer as JSON, on standard output."""
    # A probe that hangs must not outlive whoever asked: PR_SET_PDEATHSIG.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.write(1, _READY)
    try:
        started = time.monotonic()
        did = _try_kvm(loops)
        milliseconds = round((time.monotonic() - started) * 1000)
        answer: dict[str, str | int] = {"did": did, "milliseconds": milliseconds}
    except _Unusable as error:
        answer = {"error": error.args[0], "hint": error.args[1]}
    except OSError as error:
        if error.errno == errno.EBUSY:
            answer = {
                "error": f"{DEVICE} is busy: another hypervisor holds the processor",
                "hint": "stop the other hypervisor (VirtualBox, VMware)",
            }
        else:
            answer = {
                "error": f"{DEVICE} makes no virtual machine: {error.strerror}",
                "hint": "see the kernel's log (dmesg) for kvm",
            }
    os.write(1, json.dumps(answer).encode())


def _try_kvm(loops: int) -> str:
    """Make a virtual machine and, on x86_64, have it work; returns what it did."""
    kvm = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(kvm, _KVM_GET_API_VERSION, 0)
    if version != 12:
        raise _Unusable(f"{DEVICE} speaks version {version}, not 12", "is this a Linux kernel?")
    machine = fcntl.ioctl(kvm, _KVM_CREATE_VM, 0)
    if platform.machine() != "x86_64":
        fcntl.ioctl(machine, _KVM_CREATE_VCPU, 0)
        return "a virtual machine was made"
    memory = _memory(loops)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    region = struct.pack("=IIQQQ", 0, 0, 0, _MEMORY_BYTES, address)
    fcntl.ioctl(machine, _KVM_SET_USER_MEMORY_REGION, region)
    fcntl.ioctl(machine, _KVM_SET_TSS_ADDR, 0x7FFBD000)  # Intel wants three pages, anywhere
    cpu = fcntl.ioctl(machine, _KVM_CREATE_VCPU, 0)
    state = mmap.mmap(cpu, fcntl.ioctl(kvm, _KVM_GET_VCPU_MMAP_SIZE, 0))
    _enter_long_mode(cpu)
    fcntl.ioctl(cpu, _KVM_RUN, 0)
    (reason,) = struct.unpack_from("=I", state, 8)  # struct kvm_run: exit_reason
    _, _, port, _ = struct.unpack_from("=BBHI", state, 32)  # io: direction, size, port, count
    if reason != _KVM_EXIT_IO or port != _PORT:
        raise _Unusable(
            f"a guest on this host's {DEVICE} stopped where it should not (exit reason {reason})",
            "see the kernel's log (dmesg) for kvm",
        )
    return f"{loops:,} guest loops"


def _memory(loops: int) -> mmap.mmap:
    """The guest's memory: the first 2 MiB mapped onto themselves, and the code."""
    memory = mmap.mmap(-1, _MEMORY_BYTES)
    struct.pack_into("=Q", memory, _PML4, _PDPT | 0x3)  # present, writable
    struct.pack_into("=Q", memory, _PDPT, _PD | 0x3)
    struct.pack_into("=Q", memory, _PD, 0 | 0x83)  # and a large page
    code = (
        b"\xb9" + struct.pack("<I", loops),  # mov ecx, loops
        b"\xff\xc9",  # 1: dec ecx
        b"\x75\xfc",  # jnz 1b
        b"\x0f\x20\xe0",  # mov rax, cr4: only ring 0 may
        b"\xe6" + bytes([_PORT]),  # out 0xe9, al
        b"\xf4",  # hlt
    )
    memory[_CODE : _CODE + len(b"".join(code))] = b"".join(code)
    return memory


def _enter_long_mode(cpu: int) -> None:
    """Set the registers as a kernel would have them just after it entered 64-bit mode."""
    special = bytearray(312)  # struct kvm_sregs
    fcntl.ioctl(cpu, _KVM_GET_SREGS, special)  # for apic_base and what is not set here
    # struct kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable
    code = struct.pack("=QIH10B", 0, 0xFFFFFFFF, 0x08, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
    data = struct.pack("=QIH10B", 0, 0xFFFFFFFF, 0x10, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    task = struct.pack("=QIH10B", 0, 0x67, 0x18, 11, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    special[:168] = code + data * 5 + task  # cs, ds, es, fs, gs, ss, tr
    cr0 = 0x80050033  # PG AM WP NE ET MP PE
    cr4, efer = 0x20, 0x500  # PAE; LMA LME
    struct.pack_into("=QQQQ", special, 224, cr0, 0, _PML4, cr4)  # cr0, cr2, cr3, cr4
    struct.pack_into("=Q", special, 264, efer)
    fcntl.ioctl(cpu, _KVM_SET_SREGS, bytes(special))
    registers = [0] * 18  # struct kvm_regs: rax rbx rcx rdx rsi rdi rsp rbp r8-r15 rip rflags
    registers[6], registers[16], registers[17] = _STACK, _CODE, 0x2
    fcntl.ioctl(cpu, _KVM_SET_REGS, struct.pack("=18Q", *registers))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else LOOPS)
