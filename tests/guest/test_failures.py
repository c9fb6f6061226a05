"""Builds that fail: each cause is told apart, in one sentence, and nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
from pathlib import Path

import pytest

from .conftest import Builder, mounted_tmpfs, replace_in_root, wait_until

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOUNT = ("mount", "mount /dev/vdb1 /mnt && mkdir -p /mnt/results/images")
HANG = ("hang", "echo now hanging; sleep 3600")
ISO = "/mnt/results/images/boot.iso"


def is_picture(path: Path) -> bool:
    """A PNG of a size that a screen has."""
    head = path.read_bytes()[:24]
    width, height = struct.unpack(">II", head[16:24])
    return head.startswith(SIGNATURE) and width >= 640 and height >= 350


# Commands


def test_a_failing_command_is_named_and_logs_are_collected_all_the_same(build: Builder) -> None:
    built = build(
        [
            MOUNT,
            ("half", "echo why it failed > /mnt/program.log; echo root > /anaconda.log; exit 7"),
            ("never", "echo must not run"),
        ],
        *("--collect-log", "/program.log", "--collect-log", "/anaconda.log"),
        *("--collect-log", "/not-there.log"),
    ).failed(r"command 'half' exited with status 7 \(see logs/job.log\)$")
    assert built.log("program.log") == "why it failed\n"
    assert built.log("anaconda.log") == "root\n"
    assert "must not run" not in built.log("job.log") + built.stderr
    assert "/not-there.log: there is no such file" in built.stderr
    assert [one["status"] for one in built.manifest["commands"]] == [0, 7]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--command-timeout", r"command 'hang' did not end within 5 s \(--command-timeout"),
        ("--job-timeout", r"the job did not end within its 5 s, during command 'hang' \(--job-tim"),
    ],
)
def test_a_command_that_never_ends_is_stopped(build: Builder, option: str, message: str) -> None:
    built = build([HANG], option, "5").failed(message)
    assert is_picture(built.output / "logs" / "screenshot.png")
    assert "the guest's last console lines:" in built.stderr
    assert "now hanging" in built.log("job.log")
    assert built.manifest["commands"] == [{"name": "hang", "status": None, "seconds": None}]


# The guest's end


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo c > /proc/sysrq-trigger", "the guest's kernel panicked: sysrq triggered crash"),
        ("reboot -f", "the guest rebooted"),
        ("poweroff -f", "the guest powered off"),
    ],
)
def test_an_early_end_of_the_guest_is_told_for_what_it_is(
    build: Builder, command: str, message: str
) -> None:
    """Each command also says a word on the console, which is shown."""
    built = build([("end", f"echo the last word > /dev/console; sleep 1\n{command}\nsleep 60")])
    built.failed(f"{message} before the job ended, during command 'end'")
    last = "end Kernel panic" if "panicked" in message else "the last word"
    assert re.search(f"^  .*{last}", built.stderr, re.MULTILINE)
    assert "the last word" in built.log("console.log")
    picture = built.output / "logs" / "screenshot.png"
    if "powered off" not in message:  # the guest is still there
        assert is_picture(picture)
    assert picture.exists() == ("screenshot.png" in built.manifest["logs"])


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo c > /proc/sysrq-trigger", "the guest's kernel panicked: sysrq.* before the job st"),
        ("poweroff -f", "the guest powered off before the job started, [0-9]+ s after power-on"),
        ("reboot -f", "the guest rebooted before the job started"),
        ("sleep 3600", "the guest did not start the job within the boot deadline of 25 s"),
    ],
)
def test_a_guest_that_never_starts_the_job_is_a_fault(
    build: Builder, tiny_raw: Path, tmp_path: Path, script: str, message: str
) -> None:
    start = f"#!/bin/sh\n: not /etc/rc.local\nmount -t proc proc /proc\nsleep 1\n{script}\n"
    replace_in_root(tiny_raw, "/etc/init.d/rcS", start, tmp_path)
    deadline = "25" if script.startswith("sleep") else "5m"
    built = build([("never", "true")], "--boot-timeout", deadline, input_image=tiny_raw)
    built.failed(message, status=3)
    assert built.manifest["commands"] == []
    if "poweroff" not in script:
        assert is_picture(built.output / "logs" / "screenshot.png")


def test_a_disk_without_a_boot_loader_is_refused_long_before_the_deadline(
    build: Builder, tiny_raw: Path
) -> None:
    """What an installer's root file system looks like that never got its GRUB."""
    with tiny_raw.open("r+b") as disk:
        disk.write(bytes(440))
        disk.seek(512)
        disk.write(bytes(512 * 2047))
    built = build([("never", "true")], input_image=tiny_raw).failed("is not bootable: ")
    assert "boot" not in [one["phase"] for one in built.manifest["timeline"]]


def test_a_disk_without_an_operating_system_is_refused(build: Builder, tiny_raw: Path) -> None:
    offset = f"offset={1024 * 1024}"
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-E", offset, str(tiny_raw), "126976k"], check=True
    )
    build([("never", "true")], input_image=tiny_raw).failed(
        r"holds no operating system; file systems found: /dev/sda1 \(ext4\)"
    )


def test_one_image_cannot_be_the_system_and_the_input_device(build: Builder) -> None:
    built = build([("never", "true")], "--input-device", "vdc")
    assert built.status == 2
    assert "cannot be the input device too" in built.stderr.splitlines()[-1]


# Results

SHORT_ISO = f"""
dd if=/dev/zero of={ISO} bs=2048 count=30
printf '\\001CD001\\001' | dd of={ISO} bs=1 seek=32768 conv=notrunc
printf '\\350\\003' | dd of={ISO} bs=1 seek=32848 conv=notrunc
printf '\\000\\010' | dd of={ISO} bs=1 seek=32896 conv=notrunc
"""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("echo > /mnt/results/images/a.iso; echo > /mnt/results/images/b.txt",
         "boot.iso is missing; /results/images holds a.iso, b.txt"),
        (f": > {ISO}", "boot.iso is empty"),
        (f"mkdir {ISO}", "boot.iso is a directory, not a regular file"),
        (f"ln -s /etc/passwd {ISO}",
         r"boot.iso is a symbolic link out of the workspace \(to /etc/passwd\)"),
        (f"dd if=/dev/zero of={ISO} bs=1M count=2", "larger than the limit of 1048576 bytes"),
        (SHORT_ISO, "boot.iso is truncated: its ISO volume has 2048000 bytes, the file 61440"),
    ],
    ids=["missing", "empty", "directory", "symlink", "too-large", "truncated"],
)  # fmt: skip
def test_a_result_that_is_none_fails_the_build(build: Builder, make: str, message: str) -> None:
    built = build([MOUNT, ("make", make)], "--max-result-size", "1M").failed(message)
    assert [one["status"] for one in built.manifest["commands"]] == [0, 0]


# Floods


def test_a_guest_that_fills_its_workspace_fails_with_the_tools_own_words(build: Builder) -> None:
    built = build(
        [MOUNT, ("fill", "dd if=/dev/zero of=/mnt/fill bs=1M")],
        *("--workspace-size", "256M"),
    ).failed(
        "command 'fill' exited with status 1 .*; the workspace of 256 MiB was full,"
        " --workspace-size makes it larger"
    )
    assert "No space left on device" in built.stderr  # the end of job.log is shown


def test_a_guest_that_runs_out_of_memory_is_told_how_to_get_more(build: Builder) -> None:
    hoard = (
        "for one in 1 2 3; do dd if=/dev/zero of=/dev/null bs=100M count=20 & done; wait; exit 5"
    )
    build([("hoard", hoard)]).failed(
        "command 'hoard' exited with status 5 .*; the guest's 256 MiB of memory were used up,"
        " --memory gives it more"
    )


def test_floods_and_forgeries_leave_bounded_logs_and_an_honest_report(build: Builder) -> None:
    built = build(
        [
            MOUNT,
            ("forge", "for port in /dev/virtio-ports/*; do\n"
             """  echo '{"event":"job-ended","status":0}' > $port && echo $port was open\ndone\n"""
             """echo '{"event":"job-ended","status":0}'; true"""),
            ("console", "yes this is the console | head -c 300000 > /dev/console"),
            ("flood", "yes this is the log | head -c 80000000"),
            ("end", "echo the very end; exit 5"),
        ],
        *("--max-log-size", "100K"),
    ).failed("command 'end' exited with status 5")  # fmt: skip
    assert "was open" not in built.log("job.log")
    assert re.search(
        r"can't (create|open).* (Device or )?(Resource|resource)? ?busy",
        built.stderr + built.log("job.log"),
    )
    for name in ("job.log", "console.log"):
        assert (built.output / "logs" / name).stat().st_size < 101 * 1024 + 200
        assert re.search(r"\n\[\.\.\. \d+ bytes left out here", built.log(name))
    assert built.log("job.log").startswith("=== command 1 of 5: mount\n")
    assert "the very end\n=== exit status 5" in built.log("job.log")


def test_a_full_output_directory_is_a_fault_and_leaves_no_half_result(
    build: Builder, tmp_path: Path
) -> None:
    with mounted_tmpfs(tmp_path / "full", "4M") as full:
        built = build(
            [MOUNT, ("make", f"dd if=/dev/urandom of={ISO} bs=1M count=8")], output=full / "out"
        )
        built.failed("no space left in .* for the result boot.iso of 8388608 bytes", status=3)
        assert sorted(path.name for path in built.output.iterdir()) == ["logs", "manifest.json"]


def test_logs_that_fill_the_output_directory_are_a_fault(build: Builder, tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "full", "4M") as full:
        built = build([("flood", "yes | head -c 20000000; sleep 3600")], output=full / "out")
        assert built.status == 3
        assert re.match(
            r"builder fault: no space left on the file system of .*/out ", built.last_line
        )
        assert built.log("job.log").startswith("=== command 1 of 1: flood\ny\ny\n")


def test_a_full_work_directory_is_a_fault(build: Builder) -> None:
    with mounted_tmpfs(build.work, "16M") as work:
        build([("never", "true")]).failed("no space left .*", status=3)
        assert not list(work.iterdir())


def test_a_work_directory_that_fills_up_during_the_job_is_a_fault(build: Builder) -> None:
    with mounted_tmpfs(build.work, "96M") as work:
        built = build([MOUNT, ("fill", "dd if=/dev/urandom of=/mnt/fill bs=1M count=400; sync")])
        built.failed("no space left in the work directory", status=3)
        assert not list(work.iterdir())


# Killed


def test_killing_the_command_takes_the_guest_and_all_files_with_it(build: Builder) -> None:
    running = build.start([HANG])
    running.wait_for_phase("job")
    assert build.qemu() is not None
    running.kill()
    wait_until(lambda: not build.leftovers(), 10, "the guest and its files gone")


def test_a_killed_qemu_is_noticed_at_once(build: Builder) -> None:
    running = build.start([HANG])
    running.wait_for("command 1 of 1: hang")
    qemu = build.qemu()
    assert qemu is not None
    os.kill(qemu, signal.SIGKILL)
    built = running.finish(20)
    assert built.status in (1, 3), built.stderr
    assert re.match("(build failed|builder fault): .*during command 'hang'", built.last_line)
    # Nobody in the guest did this.
    assert "powered off" not in built.last_line
