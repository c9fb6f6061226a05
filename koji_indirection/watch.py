"""Follow a running utility VM from power-on to power-off.

Reads the three streams of the guest, writes the logs, enforces the deadlines
and says how it ended. What a guest sends is text, so many bytes; a report
that makes no sense is counted and dropped, never obeyed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import BuilderFault, BuildFailed, IndirectionError
from .guestlog import BoundedLog, LineSplitter, printable
from .machine import Machine
from .units import format_size

log = logging.getLogger(__name__)

_LINE_LIMIT_BYTES = 4096
_CONSOLE_LINES_IN_ERRORS = 20
_LATE_EVENT_SECONDS = 1.0
# At the start of a console line, behind the kernel's time stamp.
_PANIC = re.compile(rb"(?:\[ *\d+\.\d+\] )?Kernel panic - not syncing: ?([^\r\n]*)")
_NOT_BOOTABLE = re.compile(
    rb"No bootable device|Boot failed: not a bootable disk"
    # UEFI, with a shell of its own and without.
    rb"|UEFI Interactive Shell|No bootable option or device was found"
)
_NOT_SIGNED = re.compile(rb"BdsDxe: failed to (load|start) .*: (Access Denied|Security Violation)")
# A guest that lives sends a sample every five seconds, whatever its console says.
_SILENCE_AFTER_PANIC_SECONDS = 12.0
_DISK_LOOK_SECONDS = 1.0
_FULL_SHARE = 0.98  # of a file system: a program that needs more fails before the last block


@dataclass(frozen=True)
class Deadlines:
    """In seconds: how long each stage may take.

    silence -- how long nothing at all may come from a guest during the job: one that lives sends
        a sample every five seconds.
    """

    boot: float
    job: float
    command: float | None
    shutdown: float
    silence: float = 600


@dataclass
class CommandRecord:
    """One command as the guest reported it; status and seconds None when it did not end."""

    name: str
    status: int | None = None
    seconds: float | None = None


@dataclass
class SetupRecord:
    """One set-up step as the guest reported it; status and seconds None when it did not end.

    reason -- what went wrong, in the guest's words.
    """

    name: str
    status: int | None = None
    seconds: float | None = None
    reason: str = ""


@dataclass
class JobReport:
    """What became of the job.

    setup, commands -- those that were started, in order.
    status -- exit status of the job; None until the guest reported its end.
    guest -- facts that the guest stated about itself (kernel, shell, selinux).
    peaks -- highest samples in bytes: memory_bytes, root_bytes, workspace_bytes.
    oom_kills -- processes that the guest's kernel has killed for want of memory.
    workspace_was_full -- whether its file system had hardly a block left at some time.
    boot_seconds, job_seconds, shutdown_seconds -- how long each stage took on the host's clock.
    """

    setup: list[SetupRecord] = field(default_factory=list)
    commands: list[CommandRecord] = field(default_factory=list)
    status: int | None = None
    guest: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    oom_kills: int = 0
    workspace_was_full: bool = False
    boot_seconds: float | None = None
    job_seconds: float | None = None
    shutdown_seconds: float | None = None

    @property
    def running_command(self) -> CommandRecord | None:
        """The command that was started and did not end."""
        last = self.commands[-1] if self.commands else None
        return last if last is not None and last.status is None else None

    @property
    def running_step(self) -> SetupRecord | None:
        """The set-up step that was started and did not end."""
        last = self.setup[-1] if self.setup else None
        return last if last is not None and last.status is None else None


class DiskLimit:
    """What a VM's disks may take of the host's.

    It is the host's word: nothing that a guest says of its disks counts.
    paths -- the files that the guest's writes go to, and directories with all in them.
    max_bytes -- of all together; None for no limit.
    """

    def __init__(self, paths: Sequence[Path], max_bytes: int | None) -> None:
        self._paths = paths
        self._max_bytes = max_bytes
        self._measured = 0.0

    def look(self, during: str = "") -> None:
        """Measure, at most once a second; BuildFailed when it is too much."""
        now = time.monotonic()
        if self._max_bytes is None or now - self._measured < _DISK_LOOK_SECONDS:
            return
        self._measured = now
        allocated_bytes = sum(map(_allocated_bytes, self._paths))
        if allocated_bytes > self._max_bytes:
            raise BuildFailed(
                f"the guest's disks take {format_size(allocated_bytes)} of the host's, more than"
                f" the limit of {format_size(self._max_bytes)}{during}",
                "write less, or --max-disk-size (max_disk_size on a builder) allows more",
            )


def _allocated_bytes(path: Path) -> int:
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # libvirt's own files come and go
                total += Path(directory, name).lstat().st_blocks * 512
    if path.is_file():
        total += path.stat().st_blocks * 512
    return total


class Watch:
    """One pass over one VM; follow() is the whole of it."""

    def __init__(
        self,
        machine: Machine,
        *,
        command_names: Sequence[str],
        setup_steps: Sequence[str] = (),
        deadlines: Deadlines,
        job_log: BoundedLog,
        console_log: BoundedLog,
        disk_limit: DiskLimit,
        on_output: Callable[[bytes], None],
        on_stage: Callable[[str], None],
    ) -> None:
        self.report = JobReport()
        self._machine = machine
        self._command_names = command_names
        self._setup_steps = setup_steps
        self._deadlines = deadlines
        self._job_log = job_log
        self._console_log = console_log
        self._disk_limit = disk_limit
        self._on_output = on_output
        self._on_stage = on_stage
        self._reports = LineSplitter(_LINE_LIMIT_BYTES)
        self._console_lines = LineSplitter(_LINE_LIMIT_BYTES)
        self._bad_reports = 0
        self._stopped = False
        self._panic: str | None = None
        self._not_bootable = self._not_signed = False
        self._last_heard = time.monotonic()
        self._stage = "boot"
        self._stage_started = time.monotonic()
        self._command_started = 0.0

    def follow(self, screenshot: Path) -> JobReport:
        """Watch until the VM is gone after its job has ended.

        Raises BuildFailed when the job came to no orderly end (panic, reboot,
        power-off, time-out), BuilderFault when it never started; a screenshot
        is taken first. A job that ended with a status is no exception: see
        report.status.
        """
        try:
            self._follow()
        except IndirectionError as error:
            error.details = self._console_tail()
            if self._machine.is_active() and self._machine.screenshot(screenshot):
                log.info("screenshot of the guest's console: %s", screenshot.name)
            raise
        return self.report

    def _follow(self) -> None:
        streams = {
            self._machine.status: self._read_reports,
            self._machine.log: self._read_output,
            self._machine.console: self._read_console,
        }
        with selectors.DefaultSelector() as selector:
            for stream, reader in streams.items():
                stream.setblocking(False)
                selector.register(stream, selectors.EVENT_READ, reader)
            while self._stage != "over":
                for key, _ in selector.select(timeout=0.25):
                    data = _receive(key.fileobj)  # type: ignore[arg-type]
                    if data:
                        self._last_heard = time.monotonic()
                        key.data(data)
                    else:
                        selector.unregister(key.fileobj)
                gone = not selector.get_map()
                if gone:
                    time.sleep(0.1)  # qemu has closed every stream; its event follows
                self._look_at_events(gone)
                self._look_at_the_clock()
                self._disk_limit.look(self._during())

    def _enter(self, stage: str) -> float:
        """Go on to the next stage; returns how many seconds the last one took."""
        now = time.monotonic()
        took = now - self._stage_started
        self._stage, self._stage_started = stage, now
        if stage != "over":
            self._on_stage(stage)
        return round(took, 2)

    # What the guest sends

    def _read_output(self, data: bytes) -> None:
        self._job_log.write(data)
        self._on_output(data)

    def _read_console(self, data: bytes) -> None:
        self._console_log.write(data)
        for line in self._console_lines.feed(data):
            if self._stage == "boot" and _NOT_BOOTABLE.search(line):
                self._not_bootable = True
            if self._stage == "boot" and _NOT_SIGNED.search(line):
                self._not_signed = True
            panic = _PANIC.match(line)
            if panic and self._panic is None:
                self._panic = printable(panic.group(1), 200).strip()

    def _read_reports(self, data: bytes) -> None:
        for line in self._reports.feed(data):
            try:
                self._take_report(json.loads(line))
            except (ValueError, OverflowError, TypeError, KeyError, AttributeError, RecursionError):
                self._bad_reports += 1
                if self._bad_reports == 1:
                    log.warning(
                        "the guest sent a report that makes no sense: %s", printable(line, 200)
                    )

    def _take_report(self, report: dict[str, Any]) -> None:
        event = report["event"]
        if event == "job-started" and self._stage == "boot":
            self.report.guest = {
                key: printable(str(report[key]), 100) for key in ("kernel", "shell", "selinux")
            }
            self.report.boot_seconds = self._enter("job")
            log.info(
                "job started after %.1f s: kernel %s, SELinux %s",
                self.report.boot_seconds,
                self.report.guest["kernel"],
                self.report.guest["selinux"],
            )
        elif self._stage != "job":
            return
        elif event == "setup-started":
            self._start_step(report["step"])
        elif event == "setup-ended":
            self._end_step(report)
        elif event == "command-started":
            index = int(report["index"])
            if index != len(self.report.commands) + 1:
                raise ValueError("out of order")
            name = self._command_names[index - 1] if index <= len(self._command_names) else ""
            if not name:
                raise ValueError("no such command")
            self.report.commands.append(CommandRecord(name))
            self._command_started = time.monotonic()
            log.info("command %d of %d: %s", index, len(self._command_names), name)
        elif event == "command-ended":
            command = self.report.running_command
            if command is None or int(report["index"]) != len(self.report.commands):
                raise ValueError("out of order")
            seconds = max(0.0, min(float(report["seconds"]), 1e9))
            command.status, command.seconds = int(report["status"]) & 0xFF, seconds
            log.info("command %s: exit status %d, %.1f s", command.name, command.status, seconds)
        elif event == "sample":
            for key in ("memory_bytes", "root_bytes", "workspace_bytes"):
                value = max(0, min(int(report[key]), 2**63 - 1))
                self.report.peaks[key] = max(value, self.report.peaks.get(key, 0))
            # The guest counts from its boot; one that has no memory may fail to tell.
            self.report.oom_kills = max(int(report["oom_kills"]), self.report.oom_kills)
            if int(report["workspace_bytes"]) > _FULL_SHARE * int(report["workspace_size_bytes"]):
                self.report.workspace_was_full = True
        elif event == "job-ended":
            self.report.status = int(report["status"]) & 0xFF
            self.report.job_seconds = self._enter("shutdown")

    def _start_step(self, step: object) -> None:
        done = [record.name for record in self.report.setup]
        if [*done, step] != list(self._setup_steps[: len(done) + 1]) or self.report.commands:
            raise ValueError("no such step, or out of order")
        self.report.setup.append(SetupRecord(str(step)))
        log.info("setup: %s", step)

    def _end_step(self, report: dict[str, Any]) -> None:
        step = self.report.running_step
        if step is None or report["step"] != step.name:
            raise ValueError("out of order")
        seconds = max(0.0, min(float(report["seconds"]), 1e9))
        step.status, step.seconds = int(report["status"]) & 0xFF, seconds
        step.reason = " ".join(printable(str(report["reason"]), 500).split())
        log.info("setup %s: exit status %d, %.1f s", step.name, step.status, seconds)

    # What ends it

    def _look_at_events(self, gone: bool) -> None:
        event = self._next_event(0)  # no wait: a guest may have gigabytes to say
        if event is None and gone and not self._stopped and not self._machine.is_active():
            # How it ended libvirt may say a moment later.
            event = self._next_event(_LATE_EVENT_SECONDS) or "stopped"
        if event == "stopped":
            self._stopped, event = True, None
        if event == "lost":
            raise BuilderFault(
                f"libvirtd ended, or does not answer any more{self._during()}",
                "see its log; the VM was ended with it",
            )
        # What the guest sent before it stopped is read first, to the end of every stream.
        if gone and self._stopped:
            event = event or "stopped"
        # After a job that went well, too: what it has written may be lost.
        if event == "io-error" and not self.report.status:
            raise BuilderFault(
                "the host could not write the guest's disks: no space left in the work directory",
                "free some, or name another with --work-dir (work_dir on a builder)",
            )
        if self._stage == "shutdown":
            if event is not None:
                self.report.shutdown_seconds = self._enter("over")
            return
        if event == "failed":
            raise BuilderFault(
                f"the VM's qemu process died{self._during()}",
                "see the kernel's log (dmesg) for a lack of memory",
            )
        silent = time.monotonic() - self._last_heard
        if event == "crashed" or (
            self._panic is not None and (event is not None or silent > _SILENCE_AFTER_PANIC_SECONDS)
        ):
            raise self._panicked()
        if event == "rebooted":
            raise self._early_end("the guest rebooted")
        if event == "stopped":
            raise self._early_end("the guest powered off")
        if self._not_signed:
            raise BuildFailed(
                "Secure Boot refused the boot loader of the utility image: it is not signed with a"
                " key that the firmware knows",
                "leave --secure-boot out, or use an image with a signed boot loader",
            )
        if self._not_bootable:
            raise BuildFailed(
                "the utility image is not bootable: the firmware found no boot loader on it",
                "use an image that boots by itself; --firmware bios or uefi boots it in one way",
            )

    def _next_event(self, timeout_seconds: float) -> str | None:
        with contextlib.suppress(queue.Empty):
            return self._machine.events.get(timeout_seconds > 0, timeout_seconds)
        return None

    def _panicked(self) -> IndirectionError:
        reason = f": {self._panic}" if self._panic else ""
        return self._early_end(f"the guest's kernel panicked{reason}")

    def _early_end(self, what: str) -> IndirectionError:
        if self._stage == "boot":
            return BuilderFault(
                f"{what} before the job started, {self._stage_age():.0f} s after power-on",
                "see logs/console.log; try the utility image in a VM of your own",
            )
        return BuildFailed(
            f"{what} before the job ended{self._during()}",
            "see logs/console.log and logs/job.log",
        )

    def _look_at_the_clock(self) -> None:
        age = self._stage_age()
        if self._stage == "boot" and age > self._deadlines.boot:
            if self._panic is not None:
                raise self._panicked()
            raise BuilderFault(
                f"the guest did not start the job within the boot deadline of"
                f" {self._deadlines.boot:.0f} s",
                "see logs/console.log and logs/screenshot.png; --boot-timeout allows more time",
            )
        if self._stage == "job":
            if time.monotonic() - self._last_heard > self._deadlines.silence:
                raise BuildFailed(
                    f"the guest has said nothing at all for {self._deadlines.silence:.0f} s"
                    f"{self._during()}",
                    "it hangs, or something in it killed the job, see logs/screenshot.png;"
                    " --max-silence (max_silence on a builder) allows more",
                )
            if age > self._deadlines.job:
                raise BuildFailed(
                    f"the job did not end within its {self._deadlines.job:.0f} s{self._during()}",
                    "--job-timeout (--timeout of koji indirection-build) allows more time",
                )
            command = self.report.running_command
            if (
                command is not None
                and self._deadlines.command is not None
                and time.monotonic() - self._command_started > self._deadlines.command
            ):
                raise BuildFailed(
                    f"command {command.name!r} did not end within {self._deadlines.command:.0f} s",
                    "--command-timeout allows more time",
                )
        if self._stage == "shutdown" and age > self._deadlines.shutdown:
            log.warning(
                "the guest did not power off within %.0f s and is destroyed (--shutdown-timeout"
                " allows more time)",
                self._deadlines.shutdown,
            )
            self.report.shutdown_seconds = self._enter("over")

    def _stage_age(self) -> float:
        return time.monotonic() - self._stage_started

    def _during(self) -> str:
        command = self.report.running_command
        if command is not None:
            return f", during command {command.name!r}"
        step = self.report.running_step
        return f", during set-up step {step.name!r}" if step is not None else ""

    def _console_tail(self) -> str:
        lines = self._console_log.last_lines(_CONSOLE_LINES_IN_ERRORS)
        if not lines:
            return "(the guest's console stayed silent)"
        return "\n".join(["the guest's last console lines:", *(f"  {line}" for line in lines)])


def _receive(stream: socket.socket) -> bytes:
    """What a stream has for us; empty at its end."""
    try:
        return stream.recv(65536)
    except BlockingIOError:
        raise AssertionError("selected, yet nothing to read") from None
    except ConnectionError:
        return b""
