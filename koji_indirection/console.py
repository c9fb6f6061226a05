"""A person's terminal at a guest: what its console and its shell say, and what is typed.

Bytes go through as they are, both ways. It must never leave the terminal raw, and
never be stuck behind a guest that has stopped reading: Ctrl-] always ends it.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import BuilderFault, BuildFailed, UsageError
from .guestjob import Terminal
from .machine import Machine
from .watch import DiskLimit

ESCAPE = b"\x1d"  # Ctrl-], as telnet and `virsh console` have it

_MAX_UNSENT_BYTES = 65536
_LATE_EVENT_SECONDS = 2.0


@dataclass(frozen=True)
class Descriptors:
    """The terminal's two ends, as file descriptors."""

    keyboard: int
    screen: int


def require_terminal(ends: Descriptors) -> Terminal:
    """What the guest is told of the terminal; UsageError when there is none."""
    if not (os.isatty(ends.keyboard) and os.isatty(ends.screen)):
        raise UsageError(
            "a shell needs a terminal, and standard input or output is none",
            "start it from a terminal, without a pipe or redirection; over ssh, with ssh -t",
        )
    size = os.get_terminal_size(ends.screen)
    kind = os.environ.get("TERM", "")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,50}", kind):
        kind = "vt100"
    return Terminal(kind, rows=size.lines or 24, columns=size.columns or 80)


def relay(
    machine: Machine, ends: Descriptors, *, boot_seconds: float, disk_limit: DiskLimit
) -> None:
    """Connect the terminal with the guest until the guest is off or Ctrl-] is typed.

    Until the guest's shell says its first byte the terminal shows the serial console,
    and types into it; then it is the shell's. boot_seconds is how long that may take,
    unless somebody types at the console meanwhile.
    Raises BuilderFault or BuildFailed when the guest came to another end than power-off.
    """
    with _raw(ends.keyboard), selectors.DefaultSelector() as selector:
        _Relay(machine, ends, selector, boot_seconds, disk_limit).run()


@contextlib.contextmanager
def _raw(keyboard: int) -> Iterator[None]:
    """Every byte goes through as it is, for the time of the block."""
    before = termios.tcgetattr(keyboard)
    try:
        tty.setraw(keyboard)
        yield
    finally:
        with contextlib.suppress(termios.error):  # a terminal that was closed meanwhile
            termios.tcsetattr(keyboard, termios.TCSAFLUSH, before)


class _Relay:
    def __init__(
        self,
        machine: Machine,
        ends: Descriptors,
        selector: selectors.BaseSelector,
        boot_seconds: float,
        disk_limit: DiskLimit,
    ) -> None:
        self._machine = machine
        self._ends = ends
        self._selector = selector
        self._boot_seconds = boot_seconds
        self._boot_deadline: float | None = time.monotonic() + boot_seconds
        self._disk_limit = disk_limit
        self._has_shell = False
        self._unsent = bytearray()
        self._streams = {machine.console, machine.status, machine.log}

    def run(self) -> None:
        for stream in self._streams:
            stream.setblocking(False)
            self._selector.register(stream, selectors.EVENT_READ)
        self._selector.register(self._ends.keyboard, selectors.EVENT_READ)
        while self._streams:
            for key, _ in self._selector.select(timeout=0.02 if self._unsent else 0.25):
                if isinstance(key.fileobj, socket.socket):
                    self._take(key.fileobj)
                elif self._type():
                    return
            self._send()
            self._look_at_events()
            self._disk_limit.look()
            if self._boot_deadline is not None and time.monotonic() > self._boot_deadline:
                raise BuilderFault(
                    "the guest did not start the shell within the boot deadline of"
                    f" {self._boot_seconds:.0f} s",
                    "--boot-timeout allows more time",
                )
        self._require_power_off()

    def _take(self, stream: socket.socket) -> None:
        """Show what the guest has sent on one of its streams."""
        try:
            data = stream.recv(65536)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._selector.unregister(stream)
            self._streams.remove(stream)
        elif stream is self._machine.log:
            self._has_shell, self._boot_deadline = True, None
            self._show(data)
        elif stream is self._machine.console and not self._has_shell:
            self._show(data)

    def _show(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._ends.screen, data) :]

    def _type(self) -> bool:
        """Take what was typed; True when that ends it: Ctrl-], or a terminal that is gone."""
        try:
            typed = os.read(self._ends.keyboard, 4096)
        except OSError:  # EIO: hung up
            return True
        if not typed or ESCAPE in typed:
            return True
        self._boot_deadline = None  # somebody is at work on what the guest waits for
        if len(self._unsent) < _MAX_UNSENT_BYTES:
            self._unsent += typed
        return False

    def _send(self) -> None:
        stream = self._machine.log if self._has_shell else self._machine.console
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while self._unsent:
                del self._unsent[: stream.send(self._unsent)]

    def _look_at_events(self) -> None:
        event = None if self._machine.events.empty() else self._machine.events.get()
        if event == "crashed":
            raise BuildFailed("the guest's kernel panicked", "its last words are above")
        if event == "rebooted":
            raise BuildFailed("the guest rebooted, and no job outlasts that", "start another shell")
        if event == "failed":
            raise BuilderFault(
                "the VM's qemu process died", "see the kernel's log (dmesg) for a lack of memory"
            )
        if event == "io-error":
            raise BuilderFault(
                "the host could not write the guest's disks: no space left in the work directory",
                "free some space, or name another directory with --work-dir",
            )

    def _require_power_off(self) -> None:
        """After qemu has closed its streams: raise, unless the guest just went off."""
        deadline = time.monotonic() + _LATE_EVENT_SECONDS
        while self._machine.is_active() and time.monotonic() < deadline:
            time.sleep(0.05)
            self._look_at_events()
        self._look_at_events()
        if not self._has_shell:
            raise BuilderFault(
                "the guest powered off before it started the shell", "its last words are above"
            )
