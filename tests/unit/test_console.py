"""The relay between a terminal and a guest: a pty, and sockets in place of qemu's."""

from __future__ import annotations

import fcntl
import os
import pty
import queue
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from koji_indirection import console
from koji_indirection.console import Descriptors
from koji_indirection.errors import BuilderFault, BuildFailed, IndirectionError, UsageError
from koji_indirection.watch import DiskLimit


class Guest:
    """A machine as relay() sees one, and its other side."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()
        pairs = {name: socket.socketpair() for name in ("console", "status", "log")}
        self.console, self.status, self.log = (pair[0] for pair in pairs.values())
        self.far = {name: pair[1] for name, pair in pairs.items()}
        self._pairs = pairs

    def is_active(self) -> bool:
        return bool(self.far)

    def go(self, event: str = "stopped") -> None:
        self.events.put(event)
        for stream in self.far.values():
            stream.close()
        self.far = {}

    def close(self) -> None:
        for pair in self._pairs.values():
            for stream in pair:
                stream.close()


class Person:
    """A terminal: what is shown on it, and what is typed."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        self.ends = Descriptors(slave, slave)
        self.settings = termios.tcgetattr(slave)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def sees(self, text: bytes) -> bool:
        shown = b""
        deadline = time.monotonic() + 10
        while text not in shown and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.1)[0]:
                shown += os.read(self.master, 65536)
        return text in shown


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def person() -> Iterator[Person]:
    person = Person()
    yield person
    os.close(person.master)
    os.close(person.ends.keyboard)


class Relay(threading.Thread):
    """relay(), running."""

    def __init__(
        self,
        guest: Any,
        person: Person,
        boot_seconds: float = 60,
        disk_limit: DiskLimit | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self.error: IndirectionError | None = None
        self._call: Callable[[], None] = lambda: console.relay(
            guest,
            person.ends,
            boot_seconds=boot_seconds,
            disk_limit=disk_limit or DiskLimit([], None),
        )
        self.start()
        while not boot_is_raw(person) and self.is_alive():
            time.sleep(0.01)

    def run(self) -> None:
        try:
            self._call()
        except IndirectionError as error:
            self.error = error

    def end(self) -> IndirectionError | None:
        self.join(10)
        assert not self.is_alive()
        return self.error


def boot_is_raw(person: Person) -> bool:
    return not termios.tcgetattr(person.ends.keyboard)[3] & termios.ICANON


def test_the_console_is_shown_and_typed_into_until_the_shell_speaks(
    guest: Guest, person: Person
) -> None:
    relay = Relay(guest, person)
    guest.far["console"].sendall(b"booting\r\n")
    assert person.sees(b"booting\r\n")
    person.type(b"e")
    assert guest.far["console"].recv(10) == b"e"
    guest.far["status"].sendall(b'{"event":"job-started"}\n')
    guest.far["log"].sendall(b"\x1b[1mshell# ")
    assert person.sees(b"\x1b[1mshell# ")
    guest.far["console"].sendall(b"a kernel message")
    person.type(b"ls\r\x03")
    received = b""
    while len(received) < 4:
        received += guest.far["log"].recv(10)
    assert received == b"ls\r\x03", "Ctrl-C is the guest's"
    guest.far["log"].sendall(b"bye")
    assert person.sees(b"bye")
    guest.go()
    assert relay.end() is None
    assert termios.tcgetattr(person.ends.keyboard) == person.settings


def test_ctrl_bracket_ends_it_even_when_the_guest_reads_nothing(
    guest: Guest, person: Person
) -> None:
    relay = Relay(guest, person)
    guest.far["log"].sendall(b"# ")
    assert person.sees(b"# ")
    for _ in range(200):
        person.type(b"x" * 2000)
    person.type(b"\x1d")
    assert relay.end() is None
    assert termios.tcgetattr(person.ends.keyboard) == person.settings


@pytest.mark.parametrize(
    ("event", "kind", "sentence"),
    [
        ("crashed", BuildFailed, "the guest's kernel panicked"),
        ("rebooted", BuildFailed, "the guest rebooted"),
        ("failed", BuilderFault, "qemu process died"),
        ("io-error", BuilderFault, "no space left in the work directory"),
    ],
)
def test_an_end_that_is_no_power_off_is_told(
    guest: Guest, person: Person, event: str, kind: type, sentence: str
) -> None:
    relay = Relay(guest, person)
    guest.far["log"].sendall(b"# ")
    assert person.sees(b"# ")
    guest.events.put(event)
    error = relay.end()
    assert isinstance(error, kind)
    assert sentence in str(error)
    assert termios.tcgetattr(person.ends.keyboard) == person.settings


def test_a_guest_that_takes_too_much_of_the_disk_is_ended(
    guest: Guest, person: Person, tmp_path: Path
) -> None:
    (tmp_path / "workspace.raw").write_bytes(b"x" * 100_000)
    error = Relay(guest, person, disk_limit=DiskLimit([tmp_path], 50_000)).end()
    assert isinstance(error, BuildFailed)
    assert "--max-disk-size" in error.hint


def test_a_guest_that_never_starts_a_shell_is_a_fault(guest: Guest, person: Person) -> None:
    error = Relay(guest, person, boot_seconds=0.3).end()
    assert isinstance(error, BuilderFault)
    assert "within the boot deadline of 0 s" in error.message
    assert "--boot-timeout" in error.hint


def test_somebody_who_types_at_the_console_is_given_time(guest: Guest, person: Person) -> None:
    relay = Relay(guest, person, boot_seconds=1)
    person.type(b"root\r")
    relay.join(2)
    assert relay.is_alive()
    guest.go()
    error = relay.end()
    assert isinstance(error, BuilderFault)
    assert "powered off before it started the shell" in str(error)


def test_a_terminal_is_needed_and_described(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl.ioctl(person.ends.screen, termios.TIOCSWINSZ, struct.pack("4H", 50, 132, 0, 0))
    monkeypatch.setenv("TERM", "screen.xterm-256color")
    found = console.require_terminal(person.ends)
    assert (found.type, found.rows, found.columns) == ("screen.xterm-256color", 50, 132)
    monkeypatch.setenv("TERM", "x; rm -rf /")
    assert console.require_terminal(person.ends).type == "vt100"
    reader, writer = os.pipe()
    try:
        for ends in (Descriptors(reader, person.ends.screen), Descriptors(0, writer)):
            with pytest.raises(UsageError, match="a shell needs a terminal"):
                console.require_terminal(ends)
    finally:
        os.close(reader)
        os.close(writer)
