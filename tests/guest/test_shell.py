"""`koji-indirection shell` as a person at a terminal uses it: a pty, and keys typed into it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import (
    COMMAND,
    SMALL,
    Builder,
    raw_copy,
    replace_in_root,
    special_image,
    wait_until,
)

TEMPLATE = """
<template>
  <files><file name="/root/notes.txt">as in a build</file></files>
  <commands>
    <command name="mount">mount "$INDIRECTION_WORKSPACE" /mnt</command>
    <command name="make">echo made > /mnt/made</command>
  </commands>
</template>
"""
PROMPT = "indirection# "


class Shell:
    """The command at a terminal of 30 lines and 100 columns."""

    def __init__(self, build: Builder, image: Path, directory: Path, *options: str) -> None:
        template = directory / "tasks.tdl"
        template.write_text(TEMPLATE)
        argv = [COMMAND, "shell", "--template", template, "--input-image", image]
        argv += ["--work-dir", build.work, *SMALL, *options]
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
        self.settings = termios.tcgetattr(slave)
        self._messages = directory / "stderr"
        with self._messages.open("w") as stderr:
            self.process = subprocess.Popen(
                [str(word) for word in argv],
                stdin=slave,
                stdout=slave,
                stderr=stderr,
                env={**os.environ, "TERM": "xterm-color"},
                start_new_session=True,
            )
        self._slave = slave
        self.shown = ""

    @property
    def messages(self) -> str:
        return self._messages.read_text()

    def read(self) -> None:
        while select.select([self.master], [], [], 0.05)[0]:
            self.shown += os.read(self.master, 4096).decode(errors="replace")

    def wait_for(self, text: str, seconds: float = 240) -> str:
        """What was shown from the last key on, once the text is there."""

        def there() -> bool:
            self.read()
            if text in self.shown:
                return True
            assert self.process.poll() is None, f"{self.shown}\n{self.messages}"
            return False

        try:
            wait_until(there, seconds, repr(text))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.shown}\n{self.messages}") from None
        return self.shown

    def type(self, keys: str) -> None:
        self.shown = ""
        os.write(self.master, keys.encode())

    def ask(self, command: str) -> str:
        """The output of a command."""
        self.type(f"{command}; echo end=$?\n")
        shown = self.wait_for("end=0\r\n", 60)
        return shown.partition("\r\n")[2].partition("end=")[0]

    def finish(self, seconds: float = 60) -> int:
        def ended() -> bool:
            self.read()  # a full terminal would stop it
            return self.process.poll() is not None

        wait_until(ended, seconds, "the end of the command")
        assert termios.tcgetattr(self._slave) == self.settings, "the terminal is as it was"
        return self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self._slave)


@contextmanager
def shell(build: Builder, image: Path, directory: Path, *options: str) -> Iterator[Shell]:
    running = Shell(build, image, directory, *options)
    try:
        yield running
    finally:
        running.close()


def test_commands_are_tried_by_hand_and_exit_powers_the_guest_off(
    build: Builder, tiny_image: Path, tmp_path: Path
) -> None:
    with shell(build, tiny_image, tmp_path) as running:
        shown = running.wait_for(PROMPT)
        assert "Booting" in shown, "the console is seen while it boots"
        for line in ("0001.cmd    mount", "0002.cmd    make", "=== exit powers the guest off"):
            assert line in shown
        assert running.ask("test -b /dev/vdb1 && grep -c vdb1 /proc/mounts || echo none") == (
            "0\r\nnone\r\n"
        )
        assert running.ask("id -u; pwd; cat /root/notes.txt") == "0\r\n/\r\nas in a build"
        assert running.ask(
            'echo "$INDIRECTION_WORKSPACE $INDIRECTION_RESULTS_DIR $HOME $TERM"'
        ) == ("/dev/vdb1 /results/images /root xterm-color\r\n")
        assert running.ask("stty size") == "30 100\r\n"
        running.ask("for one in /etc/koji-indirection/commands/*.cmd; do $one || break; done")
        assert running.ask("cat /mnt/made; ls /mnt/input_image.raw") == (
            "made\r\n/mnt/input_image.raw\r\n"
        )
        running.type("exit\n")
        assert running.finish() == 0
        assert running.messages.endswith("the guest is gone, and nothing of it is left\n")


def test_a_shell_in_debian_has_job_control_and_its_terminal_for_itself(
    build: Builder, utility_image: Path, tiny_image: Path, tmp_path: Path
) -> None:
    options = ("--utility-image", str(utility_image), "--memory", "1G", "--boot-timeout", "5m")
    with shell(build, tiny_image, tmp_path, *options) as running:
        running.wait_for("Ctrl-] ends it at once")
        running.type("tty; systemctl is-active serial-getty@hvc0\n")
        running.wait_for("/dev/hvc0\r\ninactive\r\n", 60)
        running.type("sh -c 'echo ready; exec cat'\n")
        running.wait_for("ready\r\n", 60)
        running.type("anybody\n")
        running.wait_for("anybody\r\nanybody\r\n", 60)
        running.type("\x03")  # Ctrl-C is the guest's
        running.wait_for("^C", 60)
        running.type("sh -c 'echo ready; exec cat'\n")
        running.wait_for("ready\r\n", 60)
        running.type("\x1a")
        running.wait_for("Stopped", 60)
        assert "Stopped" in running.ask("jobs")
        running.type("poweroff -f\n")
        assert running.finish(120) == 0


@pytest.mark.parametrize(
    ("kind", "options", "arch", "prompt"),
    [
        ("sysvinit", ("--memory", "512M"), "x86_64", "root@sysvinit:/# "),
        ("openrc", ("--memory", "512M"), "x86_64", "root@openrc:/# "),
        ("aarch64", ("--arch", "aarch64", "--memory", "512M"), "aarch64", PROMPT),
    ],
)
def test_a_shell_in_guests_without_systemd_and_on_another_arch(
    build: Builder,
    tiny_image: Path,
    tmp_path: Path,
    kind: str,
    options: tuple[str, ...],
    arch: str,
    prompt: str,
) -> None:
    if shutil.which(f"qemu-system-{arch}") is None:
        pytest.skip(f"qemu-system-{arch} is not installed")
    image = ("--utility-image", str(special_image(kind)), "--boot-timeout", "5m")
    with shell(build, tiny_image, tmp_path, *image, *options) as running:
        running.wait_for(prompt, 400)
        assert f"{arch}\r\n" in running.ask("uname -m")
        assert "/dev/vdb1 /input_image.raw /results/images\r\n" in running.ask(
            'echo "$INDIRECTION_WORKSPACE $INDIRECTION_INPUT $INDIRECTION_RESULTS_DIR"'
        )
        assert "as in a build" in running.ask("cat /root/notes.txt")
        running.type("exit\n")
        assert running.finish(120) == 0


def test_ctrl_bracket_leaves_at_once_whatever_the_guest_does(
    build: Builder, tiny_image: Path, tmp_path: Path
) -> None:
    with shell(build, tiny_image, tmp_path) as running:
        running.wait_for(PROMPT)
        running.type("exec sleep 1000\n")
        running.type("x" * 3000 + "\x1d")
        assert running.finish(20) == 0
    assert build.qemu() is None


def test_a_terminal_that_is_closed_and_a_kill_leave_nothing(
    build: Builder, tiny_image: Path, tmp_path: Path
) -> None:
    with shell(build, tiny_image, tmp_path) as running:
        running.wait_for("Booting")
        running.process.send_signal(signal.SIGTERM)
        assert running.finish(30) == 130
    assert build.qemu() is None


def test_a_guest_that_goes_off_before_its_shell_starts_is_a_fault(
    build: Builder, tiny_image: Path, tmp_path: Path
) -> None:
    disk = raw_copy(tiny_image, tmp_path / "off.raw")
    replace_in_root(disk, "/etc/init.d/rcS", "#!/bin/sh\npoweroff -f\n", tmp_path)
    with shell(build, disk, tmp_path) as running:
        assert running.finish(240) == 3
        assert re.search(
            r"^builder fault: the guest powered off before it started the shell",
            running.messages,
            re.MULTILINE,
        )


def test_a_reboot_ends_it(build: Builder, tiny_image: Path, tmp_path: Path) -> None:
    with shell(build, tiny_image, tmp_path) as running:
        running.wait_for(PROMPT)
        running.type("reboot -f\n")
        assert running.finish(60) == 1
        assert "build failed: the guest rebooted" in running.messages
