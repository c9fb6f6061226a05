"""What may befall a build of the soak: how it is done, and how the build must end then."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from koji_indirection import sweep
from koji_indirection.jobdir import python_environment
from tests.guest.conftest import (
    RESULT,
    Builder,
    Libvirtd,
    RunningBuild,
    mounted_tmpfs,
    private_libvirtd,
    raw_copy,
    replace_in_root,
    why_no_libvirtd,
    why_no_mounts,
)

MOUNT = ("mount", "mount /dev/vdb1 /mnt && mkdir -p /mnt/results/images")
MAKE = ("make", RESULT)
HANG = ("hang", "sleep 3600")
BUILT, FAILED, FAULT, INTERRUPTED, KILLED = 0, 1, 3, 130, -9

PHASES = ("vet", "prepare", "inject", "boot", "job", "collect")


@dataclass(frozen=True)
class Scene:
    """A running build, what is around it, and the dice."""

    build: Builder
    running: RunningBuild
    chance: random.Random
    libvirtd: Libvirtd | None


@dataclass(frozen=True)
class Fault:
    """One kind of build.

    statuses -- how the command may exit.
    says -- what its last line must match, if it comes to say one.
    inject -- done to the running build.
    full_disk -- the size of the file system that the work directory is, for itself.
    own_libvirtd -- whether the VM runs under a libvirtd that this build has for itself.
    init -- text of the guest's own start script, instead of what it has.
    """

    name: str
    statuses: tuple[int, ...]
    says: str = ""
    commands: Sequence[tuple[str, str]] = (MOUNT, MAKE)
    options: Sequence[str] = ()
    inject: Callable[[Scene], None] | None = None
    full_disk: str = ""
    own_libvirtd: bool = False
    init: str = ""

    def why_not_here(self) -> str:
        """What this machine does not permit that the fault needs; empty when it can be had."""
        if self.full_disk:
            return why_no_mounts()
        return why_no_libvirtd() if self.own_libvirtd else ""


def _at_any_moment(scene: Scene, phases: Sequence[str] = PHASES) -> bool:
    """Wait for it; False if the build was faster."""
    with contextlib.suppress(AssertionError):
        scene.running.wait_for_phase(scene.chance.choice(phases))
        time.sleep(scene.chance.uniform(0, 4))
    return scene.running.process.poll() is None


def _send(*numbers: int) -> Callable[[Scene], None]:
    """As kojid does when there are several: three seconds, one, one."""

    def send(scene: Scene) -> None:
        if not _at_any_moment(scene):
            return
        for number in numbers:
            if scene.running.process.poll() is None:
                scene.running.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    scene.running.process.wait(3 if number == signal.SIGINT else 1)

    return send


def _kill_process(pattern: str, phase: str) -> Callable[[Scene], None]:
    def kill(scene: Scene) -> None:
        scene.running.wait_for_phase(phase)
        deadline = time.monotonic() + 60
        while scene.running.process.poll() is None and time.monotonic() < deadline:
            for pid, command in scene.build.processes().items():
                if re.search(pattern, command):
                    time.sleep(scene.chance.uniform(0, 1))
                    _kill(pid)
                    return
            time.sleep(0.05)

    return kill


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _reboot(scene: Scene) -> None:
    """No process of the build is left, its watchdog included; then the builder's plugin loads."""
    build, running = scene.build, scene.running
    if not _at_any_moment(scene):
        return
    for pid, command in build.processes().items():
        if "koji_indirection.jobdir" in command:
            _kill(pid)
    running.kill()
    while build.processes():
        for pid in build.processes():
            _kill(pid)
        time.sleep(0.05)
    cache = build.directory / "cache"
    config = build.directory / "indirection.conf"
    config.write_text(
        f"[indirection]\nconnect = test:///default\nwork_dir = {build.work}\ncache_dir = {cache}\n"
    )
    # What a task's handler notes of the directory that its output is in.
    sweep.note_run(cache / "runs", running.output)
    argv = [sys.executable, "-m", "koji_indirection.sweep", str(config)]
    subprocess.run(argv, check=True, env=python_environment(), capture_output=True, timeout=60)


def _signal_libvirtd(
    number: int, *, restarted: bool = False, task_too: bool = False
) -> Callable[[Scene], None]:
    def send(scene: Scene) -> None:
        assert scene.libvirtd is not None
        _at_any_moment(scene, ("boot", "job"))
        scene.libvirtd.send(number)
        if task_too:
            scene.running.process.kill()
        if restarted:
            scene.libvirtd.start()
            scene.running.process.wait(120)
            assert scene.libvirtd.domains() == []

    return send


def _fill_disk(scene: Scene) -> None:
    if _at_any_moment(scene):
        with (
            (scene.build.work / FILLER).open("wb", buffering=0) as filler,
            contextlib.suppress(OSError),
        ):
            while scene.running.process.poll() is None:
                filler.write(bytes(65536))


FILLER = "filler"
FLOOD_OF_REPORTS = """
kill -STOP $PPID
(
    printf '\\377\\376\\033[2J half a line'
    head -c 30000000 /dev/zero
    echo
    yes '{"event":"command-started","index":1}' | head -c 4000000
    echo '{"event":"job-ended","status":0}'
) > /proc/$PPID/fd/3
poweroff -f
"""

FAULTS = (
    Fault("none", (BUILT,)),
    Fault("none", (BUILT,)),
    # The guest.
    Fault("command fails", (FAILED,), "exited with status 7", [("bad", "exit 7")]),
    Fault("no result", (FAILED,), "boot.iso is missing", [MOUNT]),
    Fault("panic", (FAILED,), "panicked", [("panic", "echo c > /proc/sysrq-trigger; sleep 99")]),
    Fault("reboot", (FAILED,), "rebooted", [("reboot", "reboot -f; sleep 99")]),
    Fault("power-off", (FAILED,), "powered off", [("off", "poweroff -f; sleep 99")]),
    Fault("hang", (FAILED,), "did not end within 5 s", [HANG], ["--command-timeout", "5"]),
    Fault(
        "fork bomb",
        (FAILED,),
        "did not end within its 10 s",
        [("bomb", "bomb() { bomb | bomb & }; bomb; sleep 3600")],
        ["--job-timeout", "10"],
    ),
    Fault(
        "never starts the job",
        (FAULT,),
        "did not start the job within the boot deadline of 20 s",
        options=["--boot-timeout", "20"],
        init="#!/bin/sh\n: not /etc/rc.local\nsleep 3600\n",
    ),
    Fault(
        "flood",
        (BUILT,),
        "",
        [
            MOUNT,
            ("flood", "yes | head -c 50000000; yes | head -c 200000 > /dev/console"),
            MAKE,
        ],
        ["--max-log-size", "100K"],
    ),
    Fault(
        "forged reports",
        (FAILED,),
        "boot.iso is missing|powered off before the job ended",
        [MOUNT, ("forge", FLOOD_OF_REPORTS)],
    ),
    Fault(
        "disk controller off",
        (FAILED,),
        "boot.iso is missing",
        [MOUNT, ("pull", "echo 1 > /sys/block/vdb/device/../remove; sleep 1; ls /mnt; true")],
        ["--job-timeout", "60", "--shutdown-timeout", "10"],
    ),
    Fault(
        "sparse terabytes",
        (FAILED,),
        "larger than the limit",
        [MOUNT, ("sparse", "dd if=/dev/null bs=1M seek=4194304 of=/mnt/results/images/boot.iso")],
    ),
    Fault(
        "many files",
        (FAILED,),
        "boot.iso is missing",
        [MOUNT, ("many", "cd /mnt/results/images && seq 20000 | xargs touch")],
    ),
    # Disks.
    Fault(
        "disk limit",
        (FAILED,),
        "more than the limit of 250 MiB",
        [MOUNT, ("fill", "dd if=/dev/urandom of=/mnt/fill bs=1M; sleep 3600")],
        ["--max-disk-size", "250M"],
    ),
    Fault(
        "host disk full",
        (FAULT,),
        "no space left",
        [MOUNT, ("fill", "dd if=/dev/urandom of=/mnt/fill bs=1M; sync; sleep 3600")],
        full_disk="96M",
    ),
    Fault(
        "host disk fills up",
        (FAULT, FAILED, BUILT),
        "",
        [MOUNT, ("write", "dd if=/dev/urandom of=/mnt/x bs=1M count=9; sync"), MAKE],
        inject=_fill_disk,
        full_disk="200M",
    ),
    # Processes.
    Fault("kill qemu", (FAILED, FAULT), "", [HANG],
          inject=_kill_process("guest=koji-indirection", "job")),
    Fault("kill appliance", (FAULT, BUILT), "", inject=_kill_process("qemu.*guestfs", "inject")),
    Fault("kill appliance late", (FAULT, BUILT), "",
          inject=_kill_process("qemu.*guestfs", "collect")),
    Fault("kill helper", (FAULT, BUILT), "",
          inject=_kill_process("koji_indirection.appliance", "inject")),
    Fault("kill libvirtd", (FAULT,), "", [HANG],
          inject=_signal_libvirtd(signal.SIGKILL), own_libvirtd=True),
    Fault("restart libvirtd", (FAULT,), "", [HANG],
          inject=_signal_libvirtd(signal.SIGTERM, restarted=True), own_libvirtd=True),
    Fault("hang libvirtd", (FAULT,), "", [HANG],
          inject=_signal_libvirtd(signal.SIGSTOP), own_libvirtd=True),
    Fault("kill task and libvirtd", (KILLED,), "", [HANG],
          inject=_signal_libvirtd(signal.SIGKILL, task_too=True), own_libvirtd=True),
    # The task.
    Fault("SIGINT", (INTERRUPTED, BUILT), "", inject=_send(signal.SIGINT)),
    Fault("SIGTERM", (INTERRUPTED, BUILT), "", inject=_send(signal.SIGTERM)),
    Fault("SIGKILL", (KILLED, BUILT), "", inject=_send(signal.SIGKILL)),
    Fault(
        "as kojid",
        (INTERRUPTED, KILLED, BUILT),
        "",
        inject=_send(signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGKILL),
    ),
    Fault("host reboot", (KILLED, BUILT), "", inject=_reboot),
)  # fmt: skip


@contextlib.contextmanager
def surroundings(
    build: Builder, fault: Fault, directory: Path
) -> Iterator[tuple[list[object], Libvirtd | None]]:
    """What the fault needs around its build: options for the build, and its libvirtd."""
    options: list[object] = list(fault.options)
    with contextlib.ExitStack() as stack:
        daemon = None
        if fault.own_libvirtd:
            daemon = stack.enter_context(private_libvirtd(directory))
            options += ["--connect", daemon.uri, "--accel", "tcg"]
        if fault.full_disk:
            stack.enter_context(_small_disk(build.work, fault.full_disk))
        if fault.init:
            image = raw_copy(build.default_image, build.directory / "changed.raw")
            replace_in_root(image, "/etc/init.d/rcS", fault.init, build.directory)
            build.default_image = image
        yield options, daemon


@contextlib.contextmanager
def _small_disk(directory: Path, size: str) -> Iterator[None]:
    with mounted_tmpfs(directory, size):
        yield
        left = [str(path) for path in directory.iterdir() if path.name != FILLER]
        assert not left, left
