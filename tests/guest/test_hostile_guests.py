"""Guests that mean harm: a clear failure, bounded memory and disk, and nothing opened for them."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import os
import re
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import (
    RESULT,
    Builder,
    RunningBuild,
    mounted_tmpfs,
    wait_until,
    why_no_namespace,
)

MIB = 1024**2
MOUNT = ("mount", "mount /dev/vdb1 /mnt && mkdir -p /mnt/results/images")
ALLOWED_BYTES = 200 * MIB
HOLE = "dd if=/dev/null bs=1M seek=4194304 of="  # of 4 TiB; busybox has no unit for that


@contextlib.contextmanager
def memory_of(running: RunningBuild) -> Iterator[list[int]]:
    """The peak of the build process's resident memory so far, in bytes, as its only item."""
    peak = [0]
    status = Path(f"/proc/{running.process.pid}/status")
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            with contextlib.suppress(OSError, AttributeError):
                found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
                peak[0] = max(peak[0], int(found.group(1)) * 1024)  # type: ignore[union-attr]

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def watched_file(path: Path) -> Iterator[list[bool]]:
    """Whether any process has opened the file meanwhile, by inotify, as its only item."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(descriptor, os.fsencode(path), 0x20) > 0  # IN_OPEN
    opened = [False]
    try:
        yield opened
    finally:
        with contextlib.suppress(BlockingIOError):
            opened[0] = bool(os.read(descriptor, 4096))
        os.close(descriptor)


# Guests that never end


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("spin", "while :; do :; done"),
        ("fork bomb", "bomb() { bomb | bomb & }; bomb; sleep 3600"),
        ("deaf", "trap '' TERM INT HUP; kill -STOP 1; while :; do sleep 100; done"),
    ],
)
def test_a_guest_that_never_ends_is_ended(build: Builder, name: str, command: str) -> None:
    running = build.start([(name, command)], "--job-timeout", "20")
    with memory_of(running) as peak:
        running.finish().failed(f"the job did not end within its 20 s, during command '{name}'")
    assert 0 < peak[0] < ALLOWED_BYTES


@pytest.mark.parametrize(
    ("disk", "message"),
    [
        ("vda", "(?:boot.iso is missing|the job did not end within its 40 s|powered off|panicked)"),
        ("vdb", "boot.iso is missing"),
    ],
)
def test_a_guest_that_shuts_its_disk_controller_down_fails(
    build: Builder, disk: str, message: str
) -> None:
    """Pulled from under the running system, or with the result not yet written."""
    build(
        [MOUNT, ("pull", f"echo 1 > /sys/block/{disk}/device/../remove; sleep 1; ls /mnt; true")],
        *("--job-timeout", "40", "--shutdown-timeout", "10"),
    ).failed(message)


# Floods


def test_a_guest_that_takes_over_its_own_reports_gets_no_further_than_a_failure(
    build: Builder,
) -> None:
    """The runner is stopped, and what it wrote to is flooded: garbage, half lines, forgeries."""
    flood = """
    kill -STOP $PPID
    for port in 3 4; do [ -e /proc/$PPID/fd/$port ] || exit 9; done
    forged='{"event":"job-ended","status":0}'
    (
        printf '\\377\\376\\033[2J half a line'
        printf '{"event":"command-ended","index":99,"status":0,"seconds":1}\\n'
        printf '{"event":"sample","memory_bytes":"much"}\\n'
        head -c 64000000 /dev/zero
        echo
        yes '{"event":"command-started","index":1}' | head -c 8000000
        printf "$forged\\n"
    ) > /proc/$PPID/fd/3
    poweroff -f
    """
    running = build.start([MOUNT, ("flood", flood)], "--job-timeout", "3m")
    with memory_of(running) as peak:
        built = running.finish()
    built.failed("(?:boot.iso is missing|powered off before the job ended)")
    assert 0 < peak[0] < ALLOWED_BYTES
    assert "\x1b" not in built.stderr
    assert "\x1b" not in built.log("build.log")
    assert len(built.log("build.log")) < MIB


def test_a_flood_of_the_log_is_bounded_in_memory_and_on_disk(build: Builder) -> None:
    running = build.start(
        [("flood", "yes 'no end to this' | head -c 200000000; exit 3")],
        *("--max-log-size", "1M", "--job-timeout", "10m"),
    )
    with memory_of(running) as peak:
        built = running.finish(700).failed("command 'flood' exited with status 3")
    assert 0 < peak[0] < ALLOWED_BYTES
    assert (built.output / "logs" / "job.log").stat().st_size < 1.1 * MIB
    assert re.search(r"\n\[\.\.\. 19\d{7} bytes left out here", built.log("job.log"))


# Disks


def test_what_a_guest_writes_is_limited_on_the_hosts_disk(build: Builder) -> None:
    running = build.start(
        [MOUNT, ("fill", "dd if=/dev/urandom of=/mnt/fill bs=1M; sleep 3600")],
        *("--max-disk-size", "300M", "--workspace-size", "2G"),
    )
    built = running.finish()
    built.failed(
        "the guest's disks take 3[0-9.]+ MiB of the host's, more than the limit of 300 MiB,"
        r" during command 'fill' \(write less, or --max-disk-size"
    )


def test_sparse_terabytes_and_many_files_do_not_choke_the_host(
    build: Builder,
) -> None:
    """A directory listing of 4 MB, a result and a log of 4 TiB: all of it holes."""
    name = "n" * 190
    many = (
        "mkdir -p /mnt/many/x && cd /mnt/many && "
        f"""awk 'BEGIN {{ for (i = 0; i < 20000; i++) printf "x/{name}%06d\\n", i }}'"""
        " | xargs touch"
    )
    running = build.start(
        [
            MOUNT,
            ("sparse", f"{HOLE}/mnt/huge.iso && {HOLE}/mnt/huge.log"),
            ("many", many),
        ],
        *("--results", "/many/x/missing.iso", "--collect-log", "/huge.log"),
        *("--workspace-size", "4G", "--max-log-size", "100K", "--job-timeout", "10m"),
    )
    with memory_of(running) as peak:
        built = running.finish(800)
    built.failed("the result /many/x/missing.iso is missing; /many/x holds n.*and thousands more")
    assert 0 < peak[0] < ALLOWED_BYTES
    assert (built.output / "logs" / "huge.log").stat().st_size < 101 * 1024
    assert (built.output / "logs" / "huge.log").stat().st_blocks * 512 < MIB


def test_a_tree_that_takes_hours_to_walk_is_given_up_at_the_deadline(build: Builder) -> None:
    """Results that are links to links, forty times, each by way of eight hundred directories."""
    links = """
    cd /mnt && mkdir x && echo made > l40
    way=$(yes x/../ | head -n 800 | tr -d '\\n')
    for link in $(seq 39); do ln -s "${way}l$((link + 1))" "l$link"; done
    """
    running = build.start(
        [MOUNT, ("links", links)],
        *("--results", "/l1", "--results", "/l[2-9]", "--max-collect-time", "40s"),
    )
    running.wait_for_phase("collect")
    built = running.finish(120).failed(
        r"collecting results and logs from the guest's disks took longer than 40 s \(leave fewer,"
        r" smaller or simpler files, or --max-collect-time"
    )
    assert re.search("no time left, in (is_symlink|readlink)", built.log("build.log"))


def test_a_result_of_sparse_terabytes_is_refused_by_its_size(build: Builder) -> None:
    build([MOUNT, ("sparse", f"{HOLE}/mnt/results/images/boot.iso")]).failed(
        r"the results are larger than the limit of 21474836480 bytes.*\(--max-result-size"
    )


@pytest.mark.parametrize("phase", ["inject", "boot", "collect"])
def test_a_work_directory_that_is_full_from_some_moment_on_is_a_fault(
    build: Builder, phase: str
) -> None:
    """Or none at all, when there was nothing left to write."""
    with mounted_tmpfs(build.work, "200M") as work:
        running = build.start(
            [MOUNT, ("write", "dd if=/dev/urandom of=/mnt/x bs=1M count=9; sync")]
        )
        running.wait_for_phase(phase)
        with (work / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(65536))
        built = running.finish()
        (work / "filler").unlink()
        if phase == "collect":
            assert built.status in (1, 3)  # the result was never written, if that can be read
        else:
            built.failed("no space left in ", status=3)
        assert not list(work.iterdir())


def qcow2_header(backing_file: Path) -> bytes:
    """A qcow2 header that names a file; short enough to leave a partition table alone."""
    name = os.fsencode(backing_file)
    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        *(b"QFI\xfb", 2, 104, len(name), 16, 16 * MIB),
        *(0, 1, 65536, 131072, 1, 0, 0),
    )
    data = header.ljust(104, b"\0") + name
    assert len(data) <= 440
    return data.ljust(440, b"\0")


def test_an_image_that_a_guest_has_written_into_its_disks_is_never_taken_for_one(
    build: Builder, tmp_path: Path
) -> None:
    """qcow2 headers over a secret, at the start of the raw workspace and of its root disk."""
    secret = build.work.parent / "secret"
    secret.write_bytes(b"root:secret\n" * 100)
    header = qcow2_header(secret)

    trap = tmp_path / "trap.raw"
    trap.write_bytes(header.ljust(MIB, b"\0"))
    with watched_file(secret) as opened:  # what is looked for is seen when somebody guesses
        subprocess.run(["qemu-img", "convert", "-O", "raw", trap, tmp_path / "out"], check=False)
    assert opened == [True]

    encoded = base64.b64encode(header).decode()
    write = f"echo {encoded} | base64 -d > /h; for disk in vda vdb; do dd if=/h of=/dev/$disk; done"
    with watched_file(secret) as opened:
        built = build(
            [("headers", write), MOUNT, ("make", RESULT)], *("--collect-log", "/var/log/*")
        )
    assert opened == [False]
    built.succeeded()
    assert (built.output / "boot.iso").read_text() == "made\n"


# Isolation


def test_qemu_is_confined_unprivileged_and_shares_nothing(build: Builder) -> None:
    """What stands on the real command line, and the kernel's own word on the process."""
    running = build.start([("look", "ls /sys/class/net; sleep 3600")])
    running.wait_for("command 1 of 1: look")
    qemu = build.qemu()
    assert qemu is not None
    words = Path(f"/proc/{qemu}/cmdline").read_bytes().decode().split("\0")
    options = dict(zip(words, words[1:]))
    assert options["-sandbox"].startswith("on,")
    assert "elevateprivileges=deny" in options["-sandbox"]
    assert "spawn=deny" in options["-sandbox"]
    for forbidden in ("-vnc", "-spice", "-netdev", "-nic", "-net", "-virtfs", "-fsdev", "-usb"):
        assert forbidden not in words
    assert not re.search("virtio-9p|vhost-user|netdev|usb-|vfio|pci-assign", " ".join(words))
    status = Path(f"/proc/{qemu}/status").read_text()
    assert "\nSeccomp:\t2\n" in status
    if os.geteuid() == 0:
        uids = re.search(r"\nUid:\t(\d+)\t(\d+)", status)
        assert uids is not None
        assert "0" not in uids.groups()
        assert re.search(r"\nCapEff:\t0+\n", status)
    running.interrupt()
    assert "eth" not in running.finish(30).log("job.log")


# Killed


def appliance_qemu(build: Builder) -> int | None:
    return next(
        (
            pid
            for pid, command in build.processes().items()
            if "qemu" in command.split()[0] and "guestfs" in command
        ),
        None,
    )


@pytest.mark.parametrize("phase", ["inject", "collect"])
def test_a_killed_appliance_is_a_fault(build: Builder, phase: str) -> None:
    running = build.start([MOUNT, ("make", RESULT)])
    running.wait_for_phase(phase)
    pid = wait_until(lambda: appliance_qemu(build), 60, "libguestfs's qemu runs")
    os.kill(pid, 9)
    running.finish(60).failed("libguestfs could not", status=3)


@pytest.mark.parametrize("end", ["none", "interrupt", "task", "helper", "appliance"])
def test_nothing_is_left_in_tmp(tiny_image: Path, end: str) -> None:
    """libguestfs has its sockets there, whatever it is told, and removes them when it may."""
    if why_no_namespace():
        pytest.skip(why_no_namespace())
    with tempfile.TemporaryDirectory(prefix="ki-test-", dir="/var/tmp") as name:
        directory, tmp = Path(name), Path(name) / "tmp"
        directory.chmod(0o711)
        tmp.mkdir()
        tmp.chmod(0o1777)
        build = Builder(directory, tiny_image, directory)
        running = build.start([MOUNT, ("make", RESULT)], tmp=tmp)
        if end == "none":
            running.finish().succeeded()
        else:
            running.wait_for_phase("inject")
            qemu = wait_until(lambda: appliance_qemu(build), 60, "libguestfs's qemu runs")
            assert list(tmp.glob("libguestfs*"))
            helper = next(
                pid
                for pid, command in build.processes().items()
                if "koji_indirection.appliance" in command
            )
            victim = {"task": running.process.pid, "helper": helper, "appliance": qemu}
            if end == "interrupt":
                running.interrupt()
            else:
                os.kill(victim[end], 9)
            running.process.wait(60)
        try:
            wait_until(lambda: not build.leftovers() and not list(tmp.iterdir()), 10, "all gone")
        finally:
            print(*tmp.rglob("*"))


# The whole of what kojid does to a task that is cancelled

KOJID_LIKE = """
import signal, sys
from koji_indirection import command

def terminate(*_):
    sys.exit(1)

def catch():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)

command._catch_signals = catch
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("phase", ["vet", "prepare", "inject", "boot", "job", "collect"])
@pytest.mark.parametrize("patience", [3.0, 0.05], ids=["as-kojid", "at-once"])
def test_what_kojid_sends_to_a_cancelled_task_leaves_nothing(
    build: Builder, phase: str, patience: float
) -> None:
    """SIGINT, SIGTERM twice a second apart, SIGKILL: each may interrupt the cleaning up."""
    running = build.start([MOUNT, ("make", RESULT)], runner=KOJID_LIKE)
    running.wait_for_phase(phase)
    waits = [(2, patience), (15, patience / 3), (15, patience / 3), (9, 0.0)]
    for number, seconds in waits:
        if running.process.poll() is None:
            os.kill(running.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(seconds)
    running.process.wait(10)
    wait_until(lambda: not build.leftovers(), 10, "nothing is left")
