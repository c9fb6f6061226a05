"""libvirt: connect, start the utility VM, hear of its end, photograph it, destroy it.

Nothing here outlives its `with`: the domain is transient, autodestroyed by
libvirtd when this process dies, and under the embedded driver (which has no
autodestroy) killed by the watchdog of jobdir.py. No call of libvirt's is waited
for without a deadline: libvirtd may hang, or go away.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import queue
import socket
import stat
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .domain import Domain, domain_xml
from .errors import BuilderFault
from .jobdir import kill_processes_of
from .spec import USER_NETWORK
from .threadcall import Call, GivenUp

log = logging.getLogger(__name__)

_PICTURE_LIMIT_BYTES = 64 * 1024 * 1024

_SOON_SECONDS = 10  # for a call that libvirt answers at once, if it answers at all
# A libvirtd that says nothing for 20 s is given up: 5 s, and three questions without an answer.
_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT = 5, 3

_KVM_DEVICE = Path("/dev/kvm")
# The users that libvirt's packages make for qemu; then one who owns nothing anywhere.
_QEMU_USERS = ("libvirt-qemu", "qemu", "nobody")
_EMBED_CONFIG = """\
user = "{user}"
group = "{group}"
dynamic_ownership = {ownership}
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""


@dataclass(frozen=True)
class Hypervisor:
    """An open libvirt connection.

    uri -- as libvirt names it; driver -- "system", "session", "embed" or "other".
    shares_our_files -- False when qemu runs as another user, who may not read our files.
    """

    connection: Any
    uri: str
    driver: str
    shares_our_files: bool

    @property
    def has_autodestroy(self) -> bool:
        return self.driver != "embed"

    @property
    def versions(self) -> dict[str, str]:
        """The versions of libvirt and qemu, e.g. {"libvirt": "9.0.0", "qemu": "7.2.22"}."""
        libvirt = libvirt_module()
        try:
            # Without a cache, libvirt runs each qemu for some seconds to answer the second.
            return {
                "libvirt": _dotted(
                    _Call(self.connection.getLibVersion).result("tell its version", _SOON_SECONDS)
                ),
                "qemu": _dotted(_Call(self.connection.getVersion).result("find qemu")),
            }
        except libvirt.libvirtError as error:
            raise BuilderFault(
                f"libvirt ({self.uri}) finds no qemu: {error.get_error_message()}",
                "install qemu-system-x86 (Debian) or qemu-kvm (Fedora, RHEL)",
            ) from error


@contextlib.contextmanager
def connect(
    uri: str | None, *, run_dir: Path, cache_dir: Path, disk_dir: Path | None = None
) -> Iterator[Hypervisor]:
    """Open libvirt: the URI asked for, or the first that works of system, session, embed.

    run_dir -- a short private directory: root of the embedded driver.
    cache_dir -- where the embedded driver's knowledge of qemu is kept between builds.
    disk_dir -- where the guest's disks will be: when we are root, the embedded driver runs
        qemu as an unprivileged user, if that user can get there.
    Raises BuilderFault when there is no libvirt or it cannot be reached.
    """
    # What libvirt's library logs belongs with the build, not on the terminal.
    os.environ.setdefault("LIBVIRT_LOG_OUTPUTS", f"3:file:{run_dir}/libvirt.log")
    libvirt = libvirt_module()
    _start_event_loop(libvirt)
    candidates = [uri] if uri else _default_uris()
    reasons = []
    connection = None
    account = None
    for candidate in candidates:
        name = candidate
        if candidate == "qemu:///embed":
            account = _qemu_account([run_dir, *([disk_dir] if disk_dir else [])])
            name = f"{candidate}?root={_embed_root(run_dir, cache_dir, account)}"
        try:
            connection = _Call(libvirt.open, name).result(f"open {candidate}")
            # From here on: starting a VM may take minutes, in which libvirtd answers these.
            with contextlib.suppress(libvirt.libvirtError):  # the embedded driver has none
                _Call(connection.setKeepAlive, _KEEPALIVE_SECONDS, _KEEPALIVE_COUNT).result(
                    "promise to show that it lives", _SOON_SECONDS
                )
            break
        except libvirt.libvirtError as error:
            reasons.append(f"{candidate}: {error.get_error_message()}")
            log.debug("libvirt %s", reasons[-1])
    if connection is None:
        raise BuilderFault(
            f"libvirt cannot be reached; {'; '.join(reasons)}",
            "start libvirtd, or install the qemu driver of libvirt so that qemu:///embed works",
        )
    try:
        chosen = str(_Call(connection.getURI).result("tell its URI", _SOON_SECONDS))
        driver = _driver_of(chosen)
        shared = driver == "session" or (driver == "embed" and account is None)
        yield Hypervisor(connection, chosen, driver, shared)
    finally:
        _Call(connection.close).settle(_SOON_SECONDS)


class Machine:
    """A started utility VM and its three streams.

    console, status, log -- connected sockets to read from.
    events -- what libvirt says of it: "stopped", "crashed", "rebooted", "failed" when
        qemu itself died, "io-error" when the host could not write one of the guest's disks,
        or "lost" when libvirtd itself is gone or hangs.
    """

    def __init__(self, domain: Any, spec: Domain, events: queue.SimpleQueue[str]) -> None:
        self.events = events
        self.console = _connect_socket(spec.console_socket)
        self.status = _connect_socket(spec.status_socket)
        self.log = _connect_socket(spec.log_socket)
        self._domain = domain

    def is_active(self) -> bool:
        """Whether the VM still exists; False once libvirt no longer knows it."""
        libvirt = libvirt_module()
        try:
            return bool(_Call(self._domain.isActive).result("look at the VM", _SOON_SECONDS))
        except BuilderFault:
            return True  # libvirtd hangs; the keepalive will say that it is lost
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return False
            log.debug("libvirt: %s", error)
            self.events.put("lost")
            return True

    def screenshot(self, path: Path) -> bool:
        """Write the guest's screen to a PNG file; False when there is none to be had."""
        libvirt = libvirt_module()
        picture = bytearray()

        def receive(_stream: Any, data: bytes, _opaque: Any) -> int:
            picture.extend(data)
            return len(data) if len(picture) < _PICTURE_LIMIT_BYTES else -1

        def take() -> str:
            stream = self._domain.connect().newStream()
            mime_type = str(self._domain.screenshot(stream, 0, 0))
            stream.recvAll(receive, None)
            stream.finish()
            return mime_type

        try:
            mime_type = _Call(take).result("take a screenshot", 30)
        except (libvirt.libvirtError, BuilderFault) as error:
            log.warning("no screenshot: %s", error)
            return False
        path.write_bytes(picture if mime_type == "image/png" else _ppm_to_png(bytes(picture)))
        return True


_START_HINTS = {
    None: "`koji-indirection doctor` checks libvirt, qemu and KVM",
    USER_NETWORK: "`koji-indirection doctor` checks libvirt, qemu and KVM;"
    " if this qemu has no user-mode network, name a libvirt network",
}
_NAMED_NETWORK_HINT = (
    "the network must be active (virsh net-list), and libvirt's network driver running"
)


@contextlib.contextmanager
def start(hypervisor: Hypervisor, spec: Domain) -> Iterator[Machine]:
    """Start the VM; destroy it, if it still runs, at the end.

    It is created paused and resumed when the three sockets are connected, so
    that not one byte of the guest's is lost. Raises BuilderFault when libvirt
    will not start it.
    """
    libvirt = libvirt_module()
    connection = hypervisor.connection
    events: queue.SimpleQueue[str] = queue.SimpleQueue()
    flags = libvirt.VIR_DOMAIN_START_PAUSED
    if hypervisor.has_autodestroy:
        flags |= libvirt.VIR_DOMAIN_START_AUTODESTROY
    callbacks: list[int] = []
    machine = None
    creation = _Call(connection.createXML, domain_xml(spec), flags)
    try:
        try:
            domain = creation.result("start the VM", 300)
            callbacks = _Call(_subscribe, libvirt, connection, domain, events).result(
                "promise to tell of the VM's end"
            )
            machine = Machine(domain, spec, events)
            _Call(domain.resume).result("let the VM run")
        except libvirt.libvirtError as error:
            if not _is_alive(connection):
                raise BuilderFault(
                    f"libvirtd ({hypervisor.uri}) ended, or does not answer any more, before the VM"
                    " ran",
                    "see its log",
                ) from error
            on = f" on network {spec.network!r}" if spec.network is not None else ""
            raise BuilderFault(
                f"libvirt ({hypervisor.uri}) could not start the VM{on}:"
                f" {error.get_error_message()}",
                _START_HINTS.get(spec.network, _NAMED_NETWORK_HINT),
            ) from error
        yield machine
    finally:
        # By name: an interrupt may have hit between the start and its answer.
        creation.settle(2)
        _Call(_end, libvirt, connection, spec.name, callbacks).settle(_SOON_SECONDS)
        # Where libvirtd is gone or hangs; nobody may write to the disks that are read next.
        kill_processes_of([spec.name])
        if machine is not None:
            for stream in (machine.console, machine.status, machine.log):
                stream.close()


def _is_alive(connection: Any) -> bool:
    try:
        return bool(_Call(connection.isAlive).result("tell whether it lives", _SOON_SECONDS))
    except (libvirt_module().libvirtError, BuilderFault):
        return False


def _end(libvirt: Any, connection: Any, name: str, callbacks: Sequence[int]) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        connection.lookupByName(name).destroy()
    for callback in callbacks:
        with contextlib.suppress(libvirt.libvirtError):
            connection.domainEventDeregisterAny(callback)
    with contextlib.suppress(libvirt.libvirtError):
        connection.unregisterCloseCallback()


class _Call(Call[Any]):
    """A libvirt call: libvirt blocks in C, where no signal handler runs."""

    def result(self, what: str, timeout_seconds: float = 60) -> Any:
        """The call's value or exception; BuilderFault when it does not come in time."""
        try:
            return self.value(timeout_seconds)
        except GivenUp:
            raise BuilderFault(
                f"libvirt did not {what} within {timeout_seconds:.0f} s", "restart libvirtd"
            ) from None


def _subscribe(
    libvirt: Any, connection: Any, domain: Any, events: queue.SimpleQueue[str]
) -> list[int]:
    def lifecycle(_connection: Any, _domain: Any, event: int, detail: int, _opaque: Any) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            # FAILED: qemu went away without saying that the guest had shut down.
            failed = detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED
            events.put("failed" if failed else "stopped")
        elif event == libvirt.VIR_DOMAIN_EVENT_CRASHED:
            events.put("crashed")
        elif (event, detail) == (
            libvirt.VIR_DOMAIN_EVENT_SUSPENDED,
            libvirt.VIR_DOMAIN_EVENT_SUSPENDED_IOERROR,
        ):
            events.put("io-error")

    def rebooted(_connection: Any, _domain: Any, _opaque: Any) -> None:
        events.put("rebooted")

    def closed(_connection: Any, reason: int, _opaque: Any) -> None:
        log.debug("libvirtd ended the connection, reason %d", reason)
        events.put("lost")

    # The embedded driver, which lives in this process, has none.
    with contextlib.suppress(libvirt.libvirtError):
        connection.registerCloseCallback(closed, None)
    register = connection.domainEventRegisterAny
    return [
        register(domain, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None),
        register(domain, libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, rebooted, None),
    ]


def _connect_socket(path: Path) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.connect(str(path))
    except OSError as error:
        stream.close()
        raise BuilderFault(
            f"the VM's socket {path} cannot be reached: {error.strerror}",
            "see whether AppArmor or SELinux denied it",
        ) from error
    return stream


def libvirt_module() -> Any:
    try:
        import libvirt
    except ImportError as error:
        raise BuilderFault(
            "the Python binding of libvirt is not installed", "install python3-libvirt"
        ) from error
    return libvirt


def _default_uris() -> list[str]:
    # libvirt refuses qemu:///session to root.
    session = [] if os.geteuid() == 0 else ["qemu:///session"]
    return ["qemu:///system", *session, "qemu:///embed"]


def _driver_of(uri: str) -> str:
    for driver in ("system", "session", "embed"):
        if uri.startswith(f"qemu:///{driver}"):
            return driver
    return "other"


def _qemu_account(directories: Sequence[Path]) -> tuple[str, str] | None:
    """User and group for qemu under the embedded driver; None: our own.

    As root we are somebody else's guest away from everything, so qemu gets a user without
    rights; unless that user could not reach the directories, or /dev/kvm, which would cost
    the build (and has libvirt ask qemu for its capabilities over and over).
    """
    if os.geteuid() != 0:
        return None
    users = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = next((users[name] for name in _QEMU_USERS if name in users), None)
    if entry is None:
        log.warning("qemu runs as root: there is no user %s", " or ".join(_QEMU_USERS))
        return None
    for directory in directories:
        for place in (directory, *directory.absolute().parents):
            if not place.stat().st_mode & stat.S_IXOTH:
                log.warning(
                    "qemu runs as root: user %s may not enter %s, see --work-dir",
                    entry.pw_name,
                    place,
                )
                return None
    group_id = entry.pw_gid
    with contextlib.suppress(OSError):
        status = _KVM_DEVICE.stat()
        if not status.st_mode & stat.S_IWOTH:
            if not (status.st_gid and status.st_mode & stat.S_IWGRP):
                log.warning("qemu runs as root: nobody else may open %s", _KVM_DEVICE)
                return None
            group_id = status.st_gid
    return entry.pw_name, f"+{group_id}"


def _embed_root(run_dir: Path, cache_dir: Path, account: tuple[str, str] | None) -> Path:
    """A configured root for the embedded driver, in which nothing needs a daemon."""
    root = run_dir / "v"
    (root / "etc").mkdir(parents=True)
    root.chmod(0o711)  # whatever the umask is; qemu's user passes through
    user, group = account or ("root", "root")
    config = _EMBED_CONFIG.format(user=user, group=group, ownership=int(account is not None))
    (root / "etc" / "qemu.conf").write_text(config)
    # Asking qemu for its capabilities takes 4 to 7 s; the answer is good for all builds.
    shared_cache = cache_dir / "libvirt"
    try:
        shared_cache.mkdir(parents=True, exist_ok=True)
        (root / "cache").symlink_to(shared_cache)
    except OSError as error:
        log.debug("no shared cache for libvirt's embedded driver: %s", error)
    return root


_event_loop_pid = 0


def _start_event_loop(libvirt: Any) -> None:
    """Run libvirt's event loop in a thread of this process; once, and anew after a fork."""
    global _event_loop_pid
    if _event_loop_pid == os.getpid():
        return
    # Errors arrive as exceptions; libvirt's own printing of them is noise.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt events", daemon=True).start()
    _event_loop_pid = os.getpid()


def _dotted(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def _ppm_to_png(ppm: bytes) -> bytes:
    """Convert the PPM (P6) that older libvirt gives into PNG (RFC 2083: one IDAT, no filter)."""
    fields = ppm.split(maxsplit=4)
    width, height = int(fields[1]), int(fields[2])
    pixels = ppm[len(ppm) - width * height * 3 :]
    rows = b"".join(
        b"\0" + pixels[start : start + width * 3] for start in range(0, len(pixels), width * 3)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
