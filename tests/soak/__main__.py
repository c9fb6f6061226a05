"""Many real builds with faults injected at random; at the end nothing may be left of them.

    python -m tests.soak --builds 100 --jobs 1,4 --seed 7

Prints the seed, a line for each build, and a table of what was there before and after. The
exit status is 0 when every build ended as it should and nothing was left.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.guest.conftest import IMAGES, Builder, unused, unused_run_directories

from .faults import FAULTS, Fault, Scene, surroundings

LEFT_SECONDS = 10  # within which everything of a build must be gone
BUILD_SECONDS = 900
MEMORY_SLACK_BYTES = 32 * 1024**2  # what Python's allocator may keep


@dataclass
class Outcome:
    number: int
    fault: Fault
    seconds: float = 0.0
    status: int | None = None
    wrong: str = ""


def build_once(number: int, fault: Fault, seed: int, directory: Path) -> Outcome:
    """One build with its fault; `wrong` says what should not have been."""
    outcome = Outcome(number, fault)
    started = time.monotonic()
    place = directory / f"build-{number}"
    place.mkdir()
    build = Builder(place, IMAGES / "tiny.qcow2", directory)
    try:
        with surroundings(build, fault, directory) as (options, libvirtd):
            running = build.start(
                fault.commands,
                *options,
                *("--cache-dir", directory / "cache"),
                output=place / "run-1",
            )
            if fault.inject is not None:
                fault.inject(Scene(build, running, random.Random(seed), libvirtd))
            built = running.finish(BUILD_SECONDS)
            outcome.status = built.status
            outcome.wrong = _verdict(fault, built.status, built.last_line)
            deadline = time.monotonic() + LEFT_SECONDS
            while build.leftovers() and time.monotonic() < deadline:
                time.sleep(0.1)
            left = build.leftovers() if not fault.full_disk else list(build.processes().values())
            if left:
                outcome.wrong += f" left: {left}"
    except Exception as error:
        outcome.wrong = f"{type(error).__name__}: {error}"
    finally:
        build.stop_all()
        build.remove()
        shutil.rmtree(place, ignore_errors=True)
    outcome.seconds = time.monotonic() - started
    return outcome


def _verdict(fault: Fault, status: int, last_line: str) -> str:
    if status not in fault.statuses:
        return f"exit status {status}, not one of {fault.statuses}: {last_line}"
    if fault.says and not re.search(fault.says, last_line):
        return f"it said {last_line!r}"
    return ""


# What is there


def _processes(directory: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                )
                status = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            child = int(status[1]) == os.getpid()
            if child or str(directory) in words:
                found.append(words or f"zombie {entry.name}")
    return found


def _domains() -> int:
    """VMs that the machine's own libvirtd knows of; those of the embedded driver are processes."""
    import libvirt

    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    try:
        connection = libvirt.open("qemu:///system")
    except libvirt.libvirtError:
        return 0
    count = len(connection.listAllDomains())
    connection.close()
    return count


def _resident_bytes() -> int:
    match = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) * 1024


def measure(directory: Path) -> dict[str, int]:
    """Numbers that must be the same before and after."""
    places = [path for path in directory.iterdir() if path.name != "cache"]
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return {
        "open files": len(list(Path("/proc/self/fd").iterdir())),
        "processes": len(_processes(directory)),
        "domains": _domains(),
        "work directories": len(places),
        "socket directories": len(unused_run_directories()),
        "libguestfs's": len(unused(Path("/tmp").glob("libguestfs*"))),
        "mounts": len([line for line in mounts if str(directory) in line]),
        "disk (bytes)": sum(
            path.lstat().st_blocks * 512 for place in places for path in place.rglob("*")
        ),
        "memory (bytes)": _resident_bytes(),
    }


def _differences(before: dict[str, int], after: dict[str, int]) -> list[str]:
    wrong = []
    for name, value in before.items():
        slack = MEMORY_SLACK_BYTES if name.startswith("memory") else 0
        if after[name] > value + slack:
            wrong.append(name)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--builds", type=int, default=100, metavar="N", help="(default: 100)")
    parser.add_argument(
        "--jobs", default="1,4", metavar="N[,N]", help="how many at a time (default: 1,4)"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), metavar="N")
    options = parser.parse_args()
    jobs = [int(number) for number in options.jobs.split(",")]
    print(f"soak: {options.builds} builds, {options.jobs} at a time, seed {options.seed}")

    chance = random.Random(options.seed)
    possible = []
    for fault in FAULTS:
        reason = fault.why_not_here()
        if reason:
            print(f"soak: left out: {fault.name}: {reason}")
        else:
            possible.append(fault)
    # Every fault before any comes again.
    faults: list[Fault] = []
    while len(faults) < options.builds:
        faults += chance.sample(possible, len(possible))
    plan = [(number, fault, chance.random()) for number, fault in enumerate(faults, start=1)]
    plan = plan[: options.builds]
    share = -(-len(plan) // len(jobs))

    directory = Path(tempfile.mkdtemp(prefix="ki-soak-", dir="/var/tmp"))
    directory.chmod(0o711)
    outcomes: list[Outcome] = []
    try:
        with ThreadPoolExecutor(max(jobs)) as pool:  # its threads are no leak
            list(pool.map(lambda _: time.sleep(0.1), range(max(jobs))))
        before = measure(directory)
        for place, number in enumerate(jobs):
            with ThreadPoolExecutor(number) as pool:
                part = plan[place * share : (place + 1) * share]
                for outcome in pool.map(
                    lambda item: build_once(item[0], item[1], hash(item[2]), directory), part
                ):
                    outcomes.append(outcome)
                    verdict = f"WRONG: {outcome.wrong}" if outcome.wrong else "ok"
                    print(
                        f"{outcome.number:4} {number} at a time {outcome.seconds:6.1f} s"
                        f"  {outcome.fault.name:20} status {outcome.status}  {verdict}",
                        flush=True,
                    )
        after = measure(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)

    print(f"\n{'':20}{'before':>14}{'after':>14}")
    different = _differences(before, after)
    for name, value in before.items():
        mark = "  WRONG" if name in different else ""
        print(f"{name:20}{value:>14}{after[name]:>14}{mark}")
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    statuses = Counter(outcome.status for outcome in outcomes)
    shown = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items(), key=str))
    print(
        f"\n{len(outcomes)} builds, {len(wrong)} wrong; exit statuses: {shown}; seed {options.seed}"
    )
    return 1 if wrong or different else 0


if __name__ == "__main__":
    sys.exit(main())
