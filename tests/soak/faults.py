"""What may befall a build of the soak: how it is done, and how the build must end then."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.guest.conftest import RESULT, Builder, RunningBuild, mounted_tmpfs

MOUNT = ("mount", "mount /dev/vdb1 /mnt && mkdir -p /mnt/results/images")
MAKE = ("make", RESULT)
BUILT, FAILED, FAULT, INTERRUPTED, KILLED = 0, 1, 3, 130, -9

PHASES = ("vet", "prepare", "inject", "boot", "job", "collect")


@dataclass(frozen=True)
class Fault:
    """One kind of build.

    statuses -- how the command may exit.
    says -- what its last line must match, if it comes to say one.
    inject -- done to the running build.
    """

    name: str
    statuses: tuple[int, ...]
    says: str = ""
    commands: Sequence[tuple[str, str]] = (MOUNT, MAKE)
    options: Sequence[str] = ()
    inject: Callable[[Builder, RunningBuild, random.Random], None] | None = None
    full_disk: str = ""


def _at_any_moment(running: RunningBuild, chance: random.Random) -> bool:
    """Wait for it; False if the build was faster."""
    with contextlib.suppress(AssertionError):
        running.wait_for_phase(chance.choice(PHASES))
        time.sleep(chance.uniform(0, 4))
    return running.process.poll() is None


def _send(*numbers: int) -> Callable[[Builder, RunningBuild, random.Random], None]:
    """As kojid does when there are several: three seconds, one, one."""

    def send(_build: Builder, running: RunningBuild, chance: random.Random) -> None:
        if not _at_any_moment(running, chance):
            return
        for number in numbers:
            if running.process.poll() is None:
                running.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.process.wait(3 if number == signal.SIGINT else 1)

    return send


def _kill_process(
    pattern: str, phase: str
) -> Callable[[Builder, RunningBuild, random.Random], None]:
    def kill(build: Builder, running: RunningBuild, chance: random.Random) -> None:
        running.wait_for_phase(phase)
        deadline = time.monotonic() + 60
        while running.process.poll() is None and time.monotonic() < deadline:
            for pid, command in build.processes().items():
                if re.search(pattern, command):
                    time.sleep(chance.uniform(0, 1))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    return
            time.sleep(0.05)

    return kill


FAULTS = (
    Fault("none", (BUILT,)),
    Fault("none", (BUILT,)),
    Fault("command fails", (FAILED,), "exited with status 7", [("bad", "exit 7")]),
    Fault("no result", (FAILED,), "boot.iso is missing", [MOUNT]),
    Fault("panic", (FAILED,), "panicked", [("panic", "echo c > /proc/sysrq-trigger; sleep 99")]),
    Fault("reboot", (FAILED,), "rebooted", [("reboot", "reboot -f; sleep 99")]),
    Fault("power-off", (FAILED,), "powered off", [("off", "poweroff -f; sleep 99")]),
    Fault(
        "hang",
        (FAILED,),
        "did not end within 5 s",
        [("hang", "sleep 3600")],
        ["--command-timeout", "5"],
    ),
    Fault(
        "fork bomb",
        (FAILED,),
        "did not end within its 10 s",
        [("bomb", "bomb() { bomb | bomb & }; bomb; sleep 3600")],
        ["--job-timeout", "10"],
    ),
    Fault(
        "flood", (BUILT,), "", [MOUNT, ("flood", "yes | head -c 50000000"), MAKE],
        ["--max-log-size", "100K"],
    ),
    Fault(
        "sparse terabytes",
        (FAILED,),
        "larger than the limit",
        [MOUNT, ("sparse", "dd if=/dev/null bs=1M seek=4194304 of=/mnt/results/images/boot.iso")],
    ),
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
    Fault("kill qemu", (FAILED, FAULT, BUILT), "", [("hang", "sleep 3600")],
          inject=_kill_process("guest=koji-indirection", "job")),
    Fault("kill appliance", (FAULT, BUILT), "", inject=_kill_process("qemu.*guestfs", "inject")),
    Fault("kill appliance late", (FAULT, BUILT), "",
          inject=_kill_process("qemu.*guestfs", "collect")),
    Fault("kill helper", (FAULT, BUILT), "",
          inject=_kill_process("koji_indirection.appliance", "inject")),
    Fault("SIGINT", (INTERRUPTED, BUILT), "", inject=_send(signal.SIGINT)),
    Fault("SIGTERM", (INTERRUPTED, BUILT), "", inject=_send(signal.SIGTERM)),
    Fault("SIGKILL", (KILLED, BUILT), "", inject=_send(signal.SIGKILL)),
    Fault(
        "as kojid",
        (INTERRUPTED, KILLED, BUILT),
        "",
        inject=_send(signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGKILL),
    ),
)  # fmt: skip


@contextlib.contextmanager
def work_directory(build: Builder, fault: Fault):  # type: ignore[no-untyped-def]
    """With the small disk that the fault wants; nothing where there may be no mounts."""
    if not fault.full_disk:
        yield
        return
    with mounted_tmpfs(build.work, fault.full_disk):
        yield
        left = [str(path) for path in build.work.iterdir()]
        assert not left, left
