"""A directory in the place of a guest's root, in which job/setup.sh is run for real."""

from __future__ import annotations

import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import pytest

from koji_indirection.guestjob import DIRECTORY, GuestJob, job_files

SHELLS = {"dash": ["dash"], "bash": ["bash", "--posix"], "busybox": ["busybox", "sh"]}
SETUP_SH = resources.files("koji_indirection").joinpath("job", "setup.sh").read_text("utf-8")
TOOLS = ("sh", "cat", "chmod", "chown", "cp", "cut", "grep", "head", "ls", "mkdir", "mktemp")
TOOLS += ("rm", "sed", "sleep", "tee", "tr")

# Reports its arguments, then does what the test says. $@ is at hand.
FAKE = '#!/bin/sh\necho "$0 $*" | sed "s,.*/bin/,," >>{calls}\n{script}\n'
MANAGERS = {
    "dnf": "dnf",
    "dnf5": "dnf5",
    "yum": "yum",
    "apt": "apt-get",
    "zypper": "zypper",
}


class Ended(NamedTuple):
    status: int
    output: str
    reason: str


class Guest:
    """A root directory, and a PATH on which only what the test wants is found."""

    def __init__(self, directory: Path, shell: list[str]) -> None:
        self.directory, self._shell = directory, shell
        self.root, self.bin, self.job = (directory / name for name in ("root", "bin", "job"))
        self.media = directory / "media"
        for path in (self.root, self.bin, self.job, self.media):
            path.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None
            # No symbolic link: a fake of the same name would be written through it.
            (self.bin / tool).write_text(f'#!/bin/sh\nexec {found} "$@"\n')
            (self.bin / tool).chmod(0o755)
        self.fake("modprobe", "exit 0")

    def fake(self, program: str, script: str) -> None:
        path = self.bin / program
        assert not path.is_symlink()
        path.write_text(FAKE.format(calls=self.directory / "calls", script=script))
        path.chmod(0o755)

    def manager(self, kind: str, script: str = "exit 0") -> None:
        self.fake(MANAGERS[kind], script)
        if kind == "apt":
            self.write("/var/lib/dpkg/status", "")

    def write(self, path: str, text: str) -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def calls(self) -> list[str]:
        """What was called with which arguments, the test's own directory left out."""
        path = self.directory / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.replace(str(self.root), "").replace(str(self.directory), "") for line in lines]

    def run(self, step: str, job: GuestJob) -> Ended:
        if step in ("network", "media") and self._shell[0] == "busybox":
            # Its own ip, udhcpc and mount come before those on the PATH: they would be real,
            # and work on the machine of whoever runs the tests.
            pytest.skip("busybox would change the network and the mounts of this machine")
        for name, (content, mode) in job_files(job).items():
            path = self.job / name.removeprefix(f"{DIRECTORY}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(mode)
        script = SETUP_SH
        for old, new in (
            ("\nROOT=\n", f"\nROOT={self.root}\n"),
            ("\nJOB=/etc/koji-indirection\n", f"\nJOB={self.job}\n"),
        ):
            assert script.count(old) == 1
            script = script.replace(old, new)
        (self.job / "setup").write_text(script)
        reason = self.directory / "reason"
        reason.write_text("")
        shell = shutil.which(self._shell[0])
        assert shell is not None
        done = subprocess.run(
            [shell, *self._shell[1:], str(self.job / "setup"), step],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
            env={
                "PATH": str(self.bin),
                "REASON_FILE": str(reason),
                "INDIRECTION_MEDIA": str(self.media),
                "TMPDIR": str(self.directory),
            },
        )
        return Ended(done.returncode, done.stdout + done.stderr, reason.read_text().rstrip("\n"))

    def tree(self) -> dict[str, str]:
        return {
            f"/{path.relative_to(self.root)}": path.read_text()
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and path.name != "status"
        }
