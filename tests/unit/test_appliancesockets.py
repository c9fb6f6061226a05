"""What libguestfs leaves in /tmp is found by its processes, and nothing else is removed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from koji_indirection import appliancesockets, jobdir

LISTEN = """
import os, socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
print("bound", flush=True)
time.sleep(300)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """As libguestfs makes one."""
    path = tmp_path / "libguestfsAb3dE9"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture
def helper(directory: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has a socket there, and is the helper of a build as far as one can see."""
    argv = [sys.executable, "-c", LISTEN, "guestfsd.sock", "koji_indirection.appliance"]
    argv[3] = str(directory / "guestfsd.sock")
    argv.append(str(tmp_path / "job"))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"bound\n"
        yield process
        process.kill()


def dead_socket(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(directory / "guestfsd.sock"))


def long_ago(path: Path) -> None:
    os.utime(path, (1, 1))


def test_a_directory_is_found_by_the_process_that_has_a_socket_in_it(
    directory: Path, helper: subprocess.Popen[bytes]
) -> None:
    assert appliancesockets.of_process(helper.pid) == {directory}
    assert appliancesockets.of_group(helper.pid) == {directory}
    assert appliancesockets.of_process(os.getpid()) == set()


def test_a_directory_is_found_by_the_command_line_of_qemu() -> None:
    name = "/tmp/libguestfsXyZ123"
    argv = ["qemu-x", "-c", "import time; time.sleep(60)"]
    argv += ["-chardev", f"socket,path={name}/guestfsd.sock,id=channel0"]
    with subprocess.Popen(argv, executable=sys.executable) as process:
        while name not in Path(f"/proc/{process.pid}/cmdline").read_text():
            pass
        assert appliancesockets.of_process(process.pid) == {Path(name)}
        process.kill()


def test_it_goes_with_the_processes_of_a_dead_build(
    directory: Path, helper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    jobdir.kill_processes_of([tmp_path / "another"])
    assert directory.exists()
    jobdir.kill_processes_of([tmp_path / "job"])
    assert helper.wait(5) == -signal.SIGKILL
    assert not directory.exists()


def test_what_only_looks_like_one_is_not_removed(tmp_path: Path, directory: Path) -> None:
    (directory / "precious.txt").write_text("x")
    other = tmp_path / "libguestfs-notes"
    other.mkdir()
    link = tmp_path / "libguestfsLiNk12"
    link.symlink_to(other)
    appliancesockets.remove([directory, other, link, tmp_path / "libguestfsGoNe12"])
    assert (directory / "precious.txt").exists()
    assert other.exists()
    assert link.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make another user's directory")
def test_another_users_is_not_removed(directory: Path) -> None:
    os.chown(directory, 12345, 12345)
    appliancesockets.remove([directory])
    assert directory.exists()


def test_a_sweep_removes_what_is_dead_and_leaves_what_lives_or_is_being_made(
    directory: Path, helper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    dead, young, old = (tmp_path / f"libguestfs{name}" for name in ("dEaD12", "yOuNg1", "oLd123"))
    for path in (dead, young, old):
        path.mkdir()
    dead_socket(dead)
    long_ago(old)
    assert appliancesockets.sweep([tmp_path]) == [dead, old]
    assert sorted(tmp_path.glob("libguestfs*")) == [directory, young]


def test_a_sweep_leaves_what_a_process_is_told_of_whose_sockets_cannot_be_seen(
    directory: Path,
) -> None:
    dead_socket(directory)
    argv = ["qemu-x", "-c", "import time; time.sleep(60)", f"path={directory}/guestfsd.sock,id=x"]
    with subprocess.Popen(argv, executable=sys.executable) as process:
        while str(directory) not in Path(f"/proc/{process.pid}/cmdline").read_text():
            pass
        assert appliancesockets.sweep([directory.parent]) == []
        process.kill()
    assert appliancesockets.sweep([directory.parent]) == [directory]
