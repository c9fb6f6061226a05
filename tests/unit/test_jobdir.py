"""A build's private directory: gone however the build ends, and nobody else's is touched."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from koji_indirection import jobdir
from koji_indirection.errors import BuilderFault
from koji_indirection.jobdir import job_directory, python_environment


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 8) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def run_parent() -> Iterator[Path]:
    path = Path("/tmp") / f"ki-test-{os.getpid()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def watchdogs_of(directory: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"koji_indirection.jobdir" in words and os.fsencode(directory) in words:
                found.append(int(entry.name))
    return found


def test_both_directories_are_there_and_then_gone(tmp_path: Path, run_parent: Path) -> None:
    with job_directory(tmp_path / "work", run_parent) as job:
        (job.path / "disk.raw").write_bytes(b"x")
        (job.run / "deep" / "er").mkdir(parents=True)
        assert job.path.parent == tmp_path / "work"
        assert job.run.parent == run_parent
        wait_until(lambda: len(watchdogs_of(job.path)) == 1, "one watchdog runs")
    assert list((tmp_path / "work").iterdir()) == []
    assert list(run_parent.iterdir()) == []
    assert watchdogs_of(job.path) == []


def test_another_user_can_reach_files_by_name_and_list_nothing(
    tmp_path: Path, run_parent: Path
) -> None:
    with job_directory(tmp_path, run_parent) as job:
        assert stat.S_IMODE(job.path.stat().st_mode) == 0o711
        assert stat.S_IMODE(job.run.stat().st_mode) == 0o711


def test_a_socket_path_in_the_run_directory_fits_a_unix_socket(tmp_path: Path) -> None:
    with job_directory(tmp_path / ("long-" * 20)) as job:
        assert len(os.fsencode(job.run / "console")) < 50


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_they_are_gone_after_an_exception(
    tmp_path: Path, run_parent: Path, kind: type[BaseException]
) -> None:
    with pytest.raises(kind), job_directory(tmp_path / "work", run_parent) as job:
        (job.path / "disk.raw").write_bytes(b"x")
        raise kind
    assert list((tmp_path / "work").iterdir()) == []
    assert list(run_parent.iterdir()) == []


def test_two_builds_do_not_share_or_remove_each_others_directories(
    tmp_path: Path, run_parent: Path
) -> None:
    with job_directory(tmp_path, run_parent) as one:
        with job_directory(tmp_path, run_parent) as two:
            assert one.path != two.path
            assert one.run != two.run
        assert one.path.is_dir()
        assert one.run.is_dir()


def test_a_directory_that_the_build_removed_itself_is_no_error(
    tmp_path: Path, run_parent: Path
) -> None:
    with job_directory(tmp_path, run_parent) as job:
        shutil.rmtree(job.path)


def test_a_watchdog_that_was_killed_does_not_stop_the_clean_up(
    tmp_path: Path, run_parent: Path
) -> None:
    with job_directory(tmp_path, run_parent) as job:
        wait_until(lambda: len(watchdogs_of(job.path)) == 1, "one watchdog runs")
        (pid,) = watchdogs_of(job.path)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not watchdogs_of(job.path), "the watchdog is dead")
    assert not job.path.exists()
    assert not job.run.exists()


def test_the_watchdog_is_no_descendant_of_the_build(tmp_path: Path, run_parent: Path) -> None:
    """kojid signals a task's descendants one by one, SIGKILL included, before the task."""
    with job_directory(tmp_path, run_parent) as job:
        (pid,) = watchdogs_of(job.path)
        status = Path(f"/proc/{pid}/status").read_text()
        assert f"\nPPid:\t{os.getpid()}\n" not in status
        assert os.getsid(pid) != os.getsid(0)


def test_after_a_sigkill_directories_and_qemu_go_and_nobody_else(
    tmp_path: Path, run_parent: Path
) -> None:
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from koji_indirection.jobdir import job_directory\n"
        "with job_directory(Path(sys.argv[1]), Path(sys.argv[2])) as job:\n"
        "    (job.path / 'disk.raw').write_bytes(b'x')\n"
        "    print(job.path, job.run, flush=True)\n"
        "    time.sleep(300)\n"
    )
    qemu = tmp_path / "qemu-system-fake"
    bystander = tmp_path / "tail-like"

    with ExitStack() as stack:

        def start(*argv: object, **kwargs: object) -> subprocess.Popen[bytes]:
            child = subprocess.Popen([str(word) for word in argv], **kwargs)  # type: ignore[call-overload]
            stack.callback(child.wait)
            stack.callback(child.kill)
            return child  # type: ignore[no-any-return]

        holder = start(
            *(sys.executable, "-c", code, tmp_path / "work", run_parent),
            stdout=subprocess.PIPE,
            env=python_environment(),
            cwd="/",
            start_new_session=True,
        )
        assert holder.stdout is not None
        stack.callback(holder.stdout.close)
        path, run = map(Path, holder.stdout.readline().decode().split())
        program = "import time; time.sleep(300)"
        qemu.symlink_to(sys.executable)
        bystander.symlink_to(sys.executable)
        with_disk = start(qemu, "-c", program, f"file={path}/disk.raw")
        with_socket = start(qemu, "-c", program, f"path={run}/console")
        other_qemu = start(qemu, "-c", program, f"file={tmp_path}/another/disk.raw")
        reader = start(bystander, "-c", program, f"{path}/disk.raw")

        os.killpg(holder.pid, signal.SIGKILL)  # as a builder does: the whole process group
        assert with_disk.wait(8) == -signal.SIGKILL
        assert with_socket.wait(8) == -signal.SIGKILL
        wait_until(lambda: not path.exists() and not run.exists(), "both directories are gone")
        assert other_qemu.poll() is None, "a qemu of somebody else was killed"
        assert reader.poll() is None, "a process that is no qemu was killed"
        wait_until(lambda: not watchdogs_of(path), "the watchdog has ended")


def test_the_libguestfs_helper_of_a_dead_build_is_killed_too(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(300)", "koji_indirection.appliance"]
    ours = subprocess.Popen([*argv, str(tmp_path)])
    other = subprocess.Popen([*argv, str(tmp_path.parent / "other")])
    try:
        jobdir.kill_processes_of([tmp_path])
        assert ours.wait(5) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for child in (ours, other):
            child.kill()
            child.wait()


def test_a_work_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(BuilderFault) as caught,
        job_directory(tmp_path / "file" / "work"),
    ):
        pass
    assert caught.value.message == (
        f"the work directory {tmp_path}/file/work cannot be written: Not a directory"
    )
    assert caught.value.hint == "name another one with --work-dir"


def test_a_work_directory_that_cannot_be_written_is_said() -> None:
    # /proc takes no new directories, not even root's.
    with pytest.raises(BuilderFault, match="the work directory /proc cannot be written: "):
        job_directory(Path("/proc")).__enter__()
