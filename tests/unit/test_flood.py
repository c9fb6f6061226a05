"""Ten gigabytes from a guest, by each way that it has: the process that reads them stays small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1024**2
ALLOWED_BYTES = 200 * MIB

FOLLOW = """
import json, os, queue, socket, sys, time
from pathlib import Path
import libvirt  # what a build has in memory besides
from koji_indirection import pipeline
from koji_indirection.display import Display
from koji_indirection.guestlog import BoundedLog
from koji_indirection.watch import Deadlines, DiskLimit, Watch

MIB = 1024**2
directory = Path(sys.argv[1])

class Machine:
    def __init__(self):
        self.events = queue.SimpleQueue()
        self.status, self.guest_status = socket.socketpair()
        self.log, self.guest_log = socket.socketpair()
        self.console, self.guest_console = socket.socketpair()
    def is_active(self): return False
    def screenshot(self, path): return False

def flood(machine):
    report = lambda **fields: machine.guest_status.sendall(json.dumps(fields).encode() + b"\\n")
    report(event="job-started", kernel="6", shell="/bin/sh", selinux="none")
    report(event="command-started", index=1)
    mebibytes = lambda stream: 10 * 1024 if stream == sys.argv[2] else 256
    for _ in range(mebibytes("log")):
        machine.guest_log.sendall((b"\\x1b[2J\\xff\\xfe" + b"x" * 65529 + b"\\n") * 16)
    for _ in range(mebibytes("console")):
        machine.guest_console.sendall(b"no end of this line " * 52429)
    for _ in range(mebibytes("status")):
        machine.guest_status.sendall(b'{"event":"job-ended","status":' + b"[" * MIB)
    machine.guest_status.sendall(b"\\n" + b'{"event":"sample"}\\n' * 100_000)
    report(event="command-ended", index=1, status=0, seconds=1)
    report(event="job-ended", status=0)

machine = Machine()
if os.fork() == 0:
    for stream in (machine.status, machine.log, machine.console):
        stream.close()  # or it would never learn that nobody reads any more
    flood(machine)
    os._exit(0)
for stream in (machine.guest_status, machine.guest_log, machine.guest_console):
    stream.close()
with (
    BoundedLog(directory / "job.log", limit_bytes=64 * MIB) as job_log,
    BoundedLog(directory / "console.log", limit_bytes=64 * MIB) as console_log,
    (directory / "shown").open("w") as shown,
    Display(shown, verbose=True, quiet=False) as display,
):
    report = Watch(
        machine,
        command_names=["flood"],
        deadlines=Deadlines(boot=300, job=900, command=None, shutdown=300),
        disk_limit=DiskLimit((), MIB),
        job_log=job_log,
        console_log=console_log,
        on_output=display.guest_output,
        on_stage=lambda stage: None,
    ).follow(directory / "screenshot.png")
status = Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
print(json.dumps([report.status, job_log.total_bytes, console_log.total_bytes, peak * 1024]))
"""


@pytest.mark.parametrize("stream", ["log", "console", "status"])
def test_ten_gigabytes_of_output_cost_less_than_200_mb_of_memory(
    tmp_path: Path, stream: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW, str(tmp_path), stream],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    status, job_bytes, console_bytes, peak_bytes = json.loads(done.stdout)
    assert status == 0
    assert job_bytes == (10 * 1024 if stream == "log" else 256) * MIB
    assert console_bytes == (10 * 1024 if stream == "console" else 256) * 52429 * 20
    assert peak_bytes < ALLOWED_BYTES
    for name in ("job.log", "console.log"):
        assert (tmp_path / name).stat().st_size < 65 * MIB
