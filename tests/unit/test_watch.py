"""The watch over a VM: real sockets, a scripted guest in a thread, real (small) deadlines."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from koji_indirection import watch
from koji_indirection.errors import BuilderFault, BuildFailed, IndirectionError
from koji_indirection.guestlog import BoundedLog
from koji_indirection.watch import Deadlines, DiskLimit, JobReport, Watch

MIB = 1024**2
NAMES = ["mount", "make the image"]
PATIENT = Deadlines(boot=20, job=20, command=None, shutdown=20)


class FakeMachine:
    """The host's side of a VM: its sockets, its events, and whether it runs."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.active = True
        self.screenshots: list[Path] = []
        self.status, status = socket.socketpair()
        self.log, log = socket.socketpair()
        self.console, console = socket.socketpair()
        self.guest = Guest(self, status, log, console)

    def is_active(self) -> bool:
        return self.active

    def screenshot(self, path: Path) -> bool:
        self.screenshots.append(path)
        return True

    def close(self) -> None:
        for stream in (self.status, self.log, self.console):
            stream.close()


class Guest:
    """The guest's side: what a script in a thread does with it."""

    def __init__(self, machine: FakeMachine, *streams: socket.socket) -> None:
        self.machine = machine
        self.status, self.log, self.console = self.streams = streams

    def report(self, event: str, **fields: Any) -> None:
        self.status.sendall(json.dumps({"event": event, **fields}).encode() + b"\n")

    def start_job(self) -> None:
        self.report("job-started", kernel="6.1.0", shell="/bin/bash", selinux="none")

    def start_command(self, index: int) -> None:
        self.report("command-started", index=index)

    def end_command(self, index: int, status: int = 0, seconds: float = 1.5) -> None:
        self.report("command-ended", index=index, status=status, seconds=seconds)

    def event(self, name: str) -> None:
        self.machine.events.put(name)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    def power_off(self) -> None:
        self.machine.active = False
        self.close()
        self.event("stopped")

    def run_whole_job(self) -> None:
        self.start_job()
        for index in (1, 2):
            self.start_command(index)
            self.end_command(index)
        self.report("job-ended", status=0)


class Watched:
    """One watch that was run to its end, and everything it left."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.machine = FakeMachine()
        self.stages: list[str] = []
        self.output_bytes = 0
        self.report = JobReport()
        self.disks: list[Path] = []
        self.max_disk_bytes: int | None = None

    def follow(self, script: Callable[[Guest], None], deadlines: Deadlines = PATIENT) -> JobReport:
        def count(data: bytes) -> None:
            self.output_bytes += len(data)

        def play() -> None:
            with contextlib.suppress(OSError):  # the watch has hung up on us
                script(self.machine.guest)

        thread = threading.Thread(target=play, daemon=True)
        with (
            BoundedLog(self.directory / "job.log", limit_bytes=MIB) as job_log,
            BoundedLog(self.directory / "console.log", limit_bytes=MIB) as console_log,
        ):
            one = Watch(
                self.machine,  # type: ignore[arg-type]
                command_names=NAMES,
                setup_steps=["network", "packages"],
                deadlines=deadlines,
                job_log=job_log,
                console_log=console_log,
                disk_limit=DiskLimit(self.disks, self.max_disk_bytes),
                on_output=count,
                on_stage=self.stages.append,
            )
            self.report = one.report
            thread.start()
            try:
                return one.follow(self.directory / "screenshot.png")
            finally:
                self.machine.close()
                thread.join(5)

    def failure(
        self, script: Callable[[Guest], None], deadlines: Deadlines = PATIENT
    ) -> IndirectionError:
        with pytest.raises(IndirectionError) as caught:
            self.follow(script, deadlines)
        return caught.value


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    one = Watched(tmp_path)
    yield one
    one.machine.close()
    one.machine.guest.close()


@pytest.fixture
def quick_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_SILENCE_AFTER_PANIC_SECONDS", 0.4)


# Orderly ends


def test_an_orderly_job_is_reported_whole(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.console.sendall(b"Linux version 6.1\r\n")
        guest.start_job()
        guest.start_command(1)
        guest.log.sendall(b"=== command 1 of 2: mount\n")
        for memory, root, workspace, oom_kills in (
            (300, 20, 10, 0),
            (200, 30, 5, 2),
            (100, 0, 1, 0),
        ):
            guest.report(
                "sample",
                memory_bytes=memory,
                root_bytes=root,
                workspace_bytes=workspace,
                workspace_size_bytes=11,
                oom_kills=oom_kills,
            )
        guest.end_command(1, seconds=2.25)
        guest.start_command(2)
        guest.end_command(2, seconds=0.5)
        guest.report("job-ended", status=0)
        guest.power_off()

    report = watched.follow(script)
    assert report.status == 0
    assert [(one.name, one.status, one.seconds) for one in report.commands] == [
        ("mount", 0, 2.25),
        ("make the image", 0, 0.5),
    ]
    assert report.guest == {"kernel": "6.1.0", "shell": "/bin/bash", "selinux": "none"}
    assert report.peaks == {"memory_bytes": 300, "root_bytes": 30, "workspace_bytes": 10}
    assert report.oom_kills == 2
    assert not report.workspace_was_full
    assert watched.stages == ["job", "shutdown"]
    assert None not in (report.boot_seconds, report.job_seconds, report.shutdown_seconds)
    assert (watched.directory / "job.log").read_bytes() == b"=== command 1 of 2: mount\n"
    assert (watched.directory / "console.log").read_bytes() == b"Linux version 6.1\r\n"
    assert watched.machine.screenshots == []


def test_a_command_that_fails_is_no_exception_but_a_status(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.start_command(1)
        guest.end_command(1, status=7)
        guest.report("job-ended", status=7)
        guest.power_off()

    report = watched.follow(script)
    assert report.status == 7
    assert [one.status for one in report.commands] == [7]


def test_set_up_steps_are_reported_before_the_commands(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.report("setup-started", step="network")
        guest.report("setup-ended", step="network", status=0, seconds=1.5, reason="")
        guest.report("setup-started", step="packages")
        guest.report("setup-ended", step="packages", status=1, seconds=2, reason="no\x07\n x")
        guest.report("job-ended", status=1)
        guest.power_off()

    report = watched.follow(script)
    assert [(one.name, one.status, one.seconds, one.reason) for one in report.setup] == [
        ("network", 0, 1.5, ""),
        ("packages", 1, 2.0, "no x"),
    ]
    assert (report.status, report.commands) == (1, [])


def test_steps_that_nobody_asked_for_or_out_of_order_are_dropped(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        for step in ("packages", "files", 7, ["network"]):
            guest.report("setup-started", step=step)
        guest.report("setup-ended", step="network", status=0, seconds=1, reason="")
        guest.report("setup-started", step="network")
        guest.report("setup-ended", step="packages", status=0, seconds=1, reason="")
        guest.start_command(1)
        guest.report("setup-started", step="packages")
        guest.report("job-ended", status=0)
        guest.power_off()

    report = watched.follow(script)
    assert [(one.name, one.status) for one in report.setup] == [("network", None)]


def test_the_job_deadline_names_the_step_that_ran(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.report("setup-started", step="network")
        time.sleep(5)

    error = watched.failure(script, Deadlines(boot=20, job=0.5, command=None, shutdown=20))
    assert ", during set-up step 'network'" in error.message


def test_output_behind_the_last_report_is_still_logged(watched: Watched) -> None:
    output = b"late line\n" * 60_000  # more than a socket holds: read after the job's end

    def script(guest: Guest) -> None:
        guest.run_whole_job()
        time.sleep(0.3)
        guest.log.sendall(output)
        guest.power_off()

    assert watched.follow(script).status == 0
    assert (watched.directory / "job.log").read_bytes() == output
    assert watched.output_bytes == len(output)


def test_reports_that_are_read_after_the_stop_event_count(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.machine.active = False
        guest.event("stopped")  # libvirt's word comes first
        time.sleep(0.6)
        guest.start_command(1)
        guest.end_command(1)
        guest.report("job-ended", status=0)
        guest.close()

    assert watched.follow(script).status == 0


def test_the_end_is_seen_even_when_no_event_comes(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.run_whole_job()
        guest.machine.active = False
        guest.close()

    assert watched.follow(script).status == 0


def test_a_reboot_after_the_job_has_ended_is_an_end(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.run_whole_job()
        time.sleep(0.5)  # an event overtakes reports that are sent at the same time
        guest.event("rebooted")

    assert watched.follow(script).status == 0


def test_a_guest_that_does_not_power_off_is_given_up_with_its_job_done(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    deadlines = Deadlines(boot=20, job=20, command=None, shutdown=0.3)
    report = watched.follow(Guest.run_whole_job, deadlines)
    assert report.status == 0
    assert "the guest did not power off within" in caplog.text


# Ends before the job's


def test_a_panic_is_told_with_its_reason(watched: Watched, quick_silence: None) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.start_command(1)
        guest.console.sendall(
            b"[   12.345678] Kernel panic - not syncing: sysrq triggered \x1b[31mcrash\r\n"
            b"[   12.4] Call Trace:\r\n"
        )

    error = watched.failure(script)
    assert isinstance(error, BuildFailed)
    assert error.message == (
        "the guest's kernel panicked: sysrq triggered crash before the job ended,"
        " during command 'mount'"
    )
    assert error.hint == "see logs/console.log and logs/job.log"
    assert error.details.splitlines() == [
        "the guest's last console lines:",
        "  [   12.345678] Kernel panic - not syncing: sysrq triggered crash",
        "  [   12.4] Call Trace:",
    ]
    assert watched.machine.screenshots == [watched.directory / "screenshot.png"]


def test_a_panic_during_boot_is_a_builder_fault(watched: Watched, quick_silence: None) -> None:
    def script(guest: Guest) -> None:
        guest.console.sendall(b"Kernel panic - not syncing: VFS: Unable to mount root fs\n")

    error = watched.failure(script)
    assert isinstance(error, BuilderFault)
    assert error.message.startswith(
        "the guest's kernel panicked: VFS: Unable to mount root fs before the job started, "
    )


def test_a_panic_that_the_boot_deadline_overtakes_is_still_told(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.console.sendall(b"Kernel panic - not syncing: VFS: Unable to mount root fs\n")

    deadlines = Deadlines(boot=0.4, job=20, command=None, shutdown=20)
    assert "panicked: VFS: Unable to mount root fs" in watched.failure(script, deadlines).message


def test_a_panic_that_reboots_is_still_a_panic(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.console.sendall(b"[    1.0] Kernel panic - not syncing: Fatal exception\n")
        time.sleep(0.3)
        guest.event("rebooted")

    assert "kernel panicked: Fatal exception" in watched.failure(script).message


def test_text_that_only_looks_like_a_panic_ends_nothing_while_the_job_goes_on(
    watched: Watched, quick_silence: None
) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.console.sendall(b"Kernel panic - not syncing: said a test of mine\n")
        guest.start_command(1)
        for _ in range(8):
            time.sleep(0.1)
            guest.log.sendall(b"still at work\n")
        guest.end_command(1)
        guest.report("job-ended", status=0)
        guest.power_off()

    assert watched.follow(script).status == 0


def test_the_word_panic_amid_a_line_means_nothing(watched: Watched, quick_silence: None) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.console.sendall(b"grep 'Kernel panic - not syncing: x' log\n")
        time.sleep(0.8)
        guest.report("job-ended", status=0)
        guest.power_off()

    assert watched.follow(script).status == 0


@pytest.mark.parametrize(
    ("event", "what"),
    [
        ("crashed", "the guest's kernel panicked"),
        ("rebooted", "the guest rebooted"),
    ],
)
def test_crash_and_reboot_during_the_job_fail_the_build(
    watched: Watched, event: str, what: str
) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.start_command(1)
        guest.end_command(1)
        guest.start_command(2)
        time.sleep(0.2)
        guest.event(event)

    error = watched.failure(script)
    assert isinstance(error, BuildFailed)
    assert error.message == f"{what} before the job ended, during command 'make the image'"
    assert error.details == "(the guest's console stayed silent)"
    assert len(watched.machine.screenshots) == 1


@pytest.mark.parametrize("event", ["crashed", "rebooted"])
def test_crash_and_reboot_during_boot_are_builder_faults(watched: Watched, event: str) -> None:
    error = watched.failure(lambda guest: guest.event(event))
    assert isinstance(error, BuilderFault)
    assert "before the job started, " in error.message
    assert error.hint == "see logs/console.log; try the utility image in a VM of your own"


def test_a_power_off_during_the_job_fails_the_build(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.start_command(1)
        guest.power_off()

    error = watched.failure(script)
    assert isinstance(error, BuildFailed)
    assert error.message == "the guest powered off before the job ended, during command 'mount'"
    assert watched.machine.screenshots == [], "a VM that is off has no screen"
    assert watched.report.commands[0].status is None


def test_a_power_off_during_boot_is_a_builder_fault(watched: Watched) -> None:
    error = watched.failure(Guest.power_off)
    assert isinstance(error, BuilderFault)
    assert error.message.startswith("the guest powered off before the job started, ")


@pytest.mark.parametrize(
    "words",
    [
        b"No bootable device.\r\n",
        b"Boot failed: not a bootable disk\r\n",
        b"BdsDxe: No bootable option or device was found.\r\n",
        b"\x1b[2J\x1b[01;01HUEFI Interactive Shell v2.2\r\n",
    ],
)
def test_an_image_that_does_not_boot_is_the_users_to_mend(watched: Watched, words: bytes) -> None:
    def script(guest: Guest) -> None:
        guest.console.sendall(b"SeaBIOS (version 1.16)\r\n" + words)

    error = watched.failure(script)
    assert isinstance(error, BuildFailed)
    assert error.message == (
        "the utility image is not bootable: the firmware found no boot loader on it"
    )


def test_a_boot_loader_that_secure_boot_refuses_is_said(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.console.sendall(
            b'BdsDxe: failed to load Boot0001 "UEFI Misc Device" from PciRoot(0x0)/Pci(0x1,0x0):'
            b" Access Denied\r\nBdsDxe: No bootable option or device was found.\r\n"
        )

    error = watched.failure(script)
    assert isinstance(error, BuildFailed)
    assert error.message.startswith("Secure Boot refused the boot loader of the utility image")


def test_a_command_that_prints_the_firmwares_words_is_not_taken_for_it(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        time.sleep(0.3)
        guest.console.sendall(b"No bootable device.\n")
        time.sleep(0.5)
        guest.report("job-ended", status=0)
        guest.power_off()

    assert watched.follow(script).status == 0


def test_a_full_disk_of_the_host_is_a_builder_fault(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        time.sleep(0.2)
        guest.event("io-error")

    error = watched.failure(script)
    assert isinstance(error, BuilderFault)
    assert "no space left in the work directory" in error.message
    assert "--work-dir" in error.hint


def test_a_disk_that_is_full_at_last_may_have_cost_the_results(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.run_whole_job()
        time.sleep(0.2)
        guest.event("io-error")

    error = watched.failure(script)
    assert isinstance(error, BuilderFault)
    assert "no space left in the work directory" in error.message


def test_a_job_that_failed_before_the_disk_was_full_is_told_as_that(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.report("job-ended", status=7)
        time.sleep(0.2)
        guest.event("io-error")

    assert watched.follow(script).status == 7


def test_a_libvirtd_that_goes_away_is_a_builder_fault(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.start_command(1)
        time.sleep(0.2)
        guest.event("lost")

    error = watched.failure(script)
    assert isinstance(error, BuilderFault)
    assert error.message == ("libvirtd ended, or does not answer any more, during command 'mount'")


# Limits


def test_what_the_guests_disks_take_on_the_host_is_limited(
    watched: Watched, tmp_path: Path
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    overlay, workspace = tmp_path / "overlay", tmp_path / "deep" / "er" / "workspace"
    watched.disks = [overlay, tmp_path / "deep", tmp_path / "gone"]
    with overlay.open("wb") as file:
        file.truncate(1024 * MIB)  # what it claims to have does not count
    watched.max_disk_bytes = 3 * MIB

    def script(guest: Guest) -> None:
        guest.start_job()
        guest.start_command(1)
        workspace.write_bytes(b"x" * 2 * MIB)
        time.sleep(1.5)
        assert watched.machine.screenshots == []
        with overlay.open("r+b") as file:
            file.write(b"x" * 2 * MIB)
            file.flush()
            os.fsync(file.fileno())

    error = watched.failure(script)
    assert isinstance(error, BuildFailed)
    assert error.message == (
        "the guest's disks take 4 MiB of the host's, more than the limit of 3 MiB,"
        " during command 'mount'"
    )
    assert error.hint == "write less, or --max-disk-size (max_disk_size on a builder) allows more"
    assert len(watched.machine.screenshots) == 1


# Deadlines


def test_the_boot_deadline_is_a_builder_fault(watched: Watched) -> None:
    deadlines = Deadlines(boot=0.4, job=20, command=None, shutdown=20)
    error = watched.failure(lambda guest: guest.console.sendall(b"stuck here\n"), deadlines)
    assert isinstance(error, BuilderFault)
    assert "did not start the job within the boot deadline of 0 s" in error.message
    assert "--boot-timeout" in error.hint
    assert "  stuck here" in error.details
    assert len(watched.machine.screenshots) == 1


def test_the_job_deadline_names_the_command_that_ran(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.start_command(1)

    error = watched.failure(script, Deadlines(boot=20, job=0.6, command=None, shutdown=20))
    assert isinstance(error, BuildFailed)
    assert error.message == "the job did not end within its 1 s, during command 'mount'"
    assert error.hint == "--job-timeout (--timeout of koji indirection-build) allows more time"


def test_a_command_deadline_counts_each_command_anew(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.start_command(1)
        time.sleep(0.4)
        guest.end_command(1)
        guest.start_command(2)
        while True:  # output is no sign of progress
            guest.log.sendall(b"working\n")
            time.sleep(0.05)

    error = watched.failure(script, Deadlines(boot=20, job=20, command=0.7, shutdown=20))
    assert isinstance(error, BuildFailed)
    assert error.message == "command 'make the image' did not end within 1 s"
    assert error.hint == "--command-timeout allows more time"
    assert watched.report.commands[0].status == 0


def test_a_job_that_says_nothing_at_all_is_given_up(watched: Watched) -> None:
    """Not even a sample, which a guest that lives sends every five seconds."""
    deadlines = Deadlines(boot=20, job=20, command=None, shutdown=20, silence=0.6)

    def script(guest: Guest) -> None:
        guest.start_job()
        guest.start_command(1)

    error = watched.failure(script, deadlines)
    assert isinstance(error, BuildFailed)
    assert error.message == ("the guest has said nothing at all for 1 s, during command 'mount'")
    assert error.hint.endswith("--max-silence (max_silence on a builder) allows more")


# Reports that make no sense


SENSELESS_REPORTS = [
    b"garbage",
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"42",
    b"{}",
    b'{"event": null}',
    b'{"event": "no-such-event"}',
    b'{"event": ["job-ended"]}',
    b'{"event": "job-started"',
    b"\xff\xfe\x00 no utf-8",
    b'{"event": "job-ended"}',
    b'{"event": "job-ended", "status": null}',
    b'{"event": "job-ended", "status": "x"}',
    b'{"event": "job-ended", "status": Infinity}',
    b'{"event": "job-ended", "status": NaN}',
    b'{"event": "job-ended", "status": 1e999}',
    b'{"event": "command-started", "index": 2}',
    b'{"event": "command-started", "index": 0}',
    b'{"event": "command-started", "index": -1}',
    b'{"event": "command-started", "index": 99999999999999999999}',
    b'{"event": "command-started", "index": 1e400}',
    b'{"event": "command-ended", "index": 1, "status": 0, "seconds": 1}',
    b'{"event": "sample", "memory_bytes": -Infinity, "root_bytes": 0, "workspace_bytes": 0}',
    b'{"event": "sample", "memory_bytes": "' + b"x" * 4000 + b'"}',
    b'{"event": "job-ended", "status": ' + b"[" * 4000,
    b'{"event": "job-ended", "status": 0, "x": "' + b"x" * 5000 + b'"}',
]


def test_reports_that_make_no_sense_are_dropped_one_by_one(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        for line in SENSELESS_REPORTS:
            guest.status.sendall(line + b"\n")
        guest.start_command(1)
        guest.end_command(1)
        guest.report("job-ended", status=3)
        guest.power_off()

    report = watched.follow(script)
    assert report.status == 3
    assert [(one.name, one.status) for one in report.commands] == [("mount", 0)]
    assert report.peaks == {}


def test_the_first_report_without_sense_is_logged_and_harmless_to_a_terminal(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    def script(guest: Guest) -> None:
        guest.status.sendall(b"\x1b[2Jevil\x9b one\n" + b"evil two\n" * 1000)
        guest.run_whole_job()
        guest.power_off()

    caplog.set_level(logging.DEBUG)
    watched.follow(script)
    assert caplog.text.count("a report that makes no sense") == 1
    assert "\x1b" not in caplog.text
    assert "evil two" not in caplog.text


def test_a_report_in_pieces_is_put_together(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        for byte in b'{"event": "job-ended", "status": 5}\r\n':
            guest.status.sendall(bytes([byte]))
            time.sleep(0.002)
        guest.power_off()

    assert watched.follow(script).status == 5


def test_half_a_report_at_the_end_is_none(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.status.sendall(b'{"event": "job-ended", "status": 0}')
        guest.power_off()

    assert "powered off before the job ended" in watched.failure(script).message


def test_numbers_out_of_range_are_brought_into_it(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.report(
            "sample",
            memory_bytes=-5,
            root_bytes=10**30,
            workspace_bytes=1,
            workspace_size_bytes=-1,
            oom_kills=-1,
        )
        guest.start_command(1)
        guest.status.sendall(
            b'{"event": "command-ended", "index": 1, "status": 0, "seconds": -1e999}\n'
        )
        guest.start_command(2)
        guest.end_command(2, seconds=1e300)
        guest.report("job-ended", status=1023)
        guest.power_off()

    report = watched.follow(script)
    assert report.peaks == {"memory_bytes": 0, "root_bytes": 2**63 - 1, "workspace_bytes": 1}
    assert report.oom_kills == 0
    assert [one.seconds for one in report.commands] == [0, 1e9]
    assert report.status == 255
    json.dumps([one.seconds for one in report.commands], allow_nan=False)


def test_seconds_that_are_no_number_are_none(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.start_command(1)
        guest.status.sendall(
            b'{"event": "command-ended", "index": 1, "status": 0, "seconds": NaN}\n'
            b'{"event": "command-ended", "index": 1, "status": 0, "seconds": 1'
            + b"0" * 400
            + b"}\n"
        )
        guest.report("job-ended", status=0)
        guest.power_off()

    (command,) = watched.follow(script).commands
    json.dumps(command.seconds, allow_nan=False)


def test_the_job_cannot_end_before_it_started(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.report("job-ended", status=0)
        guest.start_command(1)
        guest.power_off()

    assert "powered off before the job started" in watched.failure(script).message
    assert watched.report.status is None
    assert watched.report.commands == []


def test_a_second_end_of_the_job_changes_nothing(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.report("job-ended", status=9)
        guest.report("job-ended", status=0)
        guest.start_job()
        guest.power_off()

    assert watched.follow(script).status == 9
    assert watched.stages == ["job", "shutdown"]


def test_no_command_is_reported_beyond_those_of_the_template(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        for index in range(1, 2000):
            guest.start_command(index)
            guest.end_command(index)
        guest.report("job-ended", status=0)
        guest.power_off()

    assert [one.name for one in watched.follow(script).commands] == NAMES


def test_what_the_guest_says_of_itself_is_safe_and_short(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.report("job-started", kernel="\x1b[31m6.1" + "x" * 3000, shell=["a"], selinux=None)
        guest.report("job-ended", status=0)
        guest.power_off()

    facts = watched.follow(script).guest
    assert facts["kernel"].startswith("6.1xxx")
    assert all(len(value) <= 103 for value in facts.values())


# Floods


@pytest.mark.parametrize("stream", ["status", "log", "console"])
def test_a_flood_on_any_stream_costs_neither_memory_nor_disk(watched: Watched, stream: str) -> None:
    piece = b"\x1b[31m" + b"x" * (MIB - 6) + b"\n"

    def script(guest: Guest) -> None:
        guest.start_job()
        for _ in range(50):
            getattr(guest, stream).sendall(piece)
        guest.report("job-ended", status=0)
        guest.power_off()

    tracemalloc.start()
    try:
        assert watched.follow(script).status == 0
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * MIB
    for name in ("job.log", "console.log"):
        assert (watched.directory / name).stat().st_size < MIB + 300


def test_a_flood_of_empty_lines_is_worked_off(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        guest.console.sendall(b"\n" * (2 * MIB))
        guest.report("job-ended", status=0)
        guest.power_off()

    assert watched.follow(script).status == 0


def test_an_endless_flood_does_not_hold_up_a_deadline(watched: Watched) -> None:
    def script(guest: Guest) -> None:
        guest.start_job()
        while True:
            guest.console.sendall(b"y\n" * 32768)
            guest.log.sendall(b"y\n" * 32768)

    started = time.monotonic()
    error = watched.failure(script, Deadlines(boot=20, job=0.6, command=None, shutdown=20))
    assert error.message == "the job did not end within its 1 s"
    assert time.monotonic() - started < 4
