"""What dead builds have left is removed; what lives, or is not ours, is not touched."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from koji_indirection import jobdir, sweep
from koji_indirection.config import Settings

DEAD_JOB = f"{jobdir.PREFIX}{'0' * 12}"
DEAD_SOCKETS = f"ki-{'1' * 12}"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(jobdir, "RUN_PARENT", tmp_path / "tmp")
    path = tmp_path / "indirection.conf"
    path.write_text(
        f"[indirection]\nconnect = test:///default\nwork_dir = {tmp_path / 'work'}\n"
        f"cache_dir = {tmp_path / 'cache'}\n"
    )
    for name in ("tmp", "work", "cache"):
        (tmp_path / name).mkdir()
    return path


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A qemu whose build is dead, as far as its command line tells."""
    argv = ["qemu-system-x86_64", "-c", "import time; time.sleep(60)"]
    disk = tmp_path / "work" / DEAD_JOB / "utility-overlay.qcow2"
    with subprocess.Popen([*argv, str(disk)], executable=sys.executable) as process:
        # Popen returns a moment before the kernel shows the new command line.
        while disk.name not in Path(f"/proc/{process.pid}/cmdline").read_text():
            time.sleep(0.01)
        yield process
        process.kill()


def test_directories_and_processes_of_dead_builds_are_removed(
    config: Path, tmp_path: Path, orphan: subprocess.Popen[bytes]
) -> None:
    job, sockets = tmp_path / "work" / DEAD_JOB, tmp_path / "tmp" / DEAD_SOCKETS
    for directory in (job, sockets):
        directory.mkdir()
        (directory / "file").write_text("x")
    assert sweep.main(config) == 0
    assert not job.exists()
    assert not sockets.exists()
    assert orphan.wait(5) == -9


def test_a_build_that_lives_keeps_all_it_has(config: Path, tmp_path: Path) -> None:
    with jobdir.job_directory(tmp_path / "work", tmp_path / "tmp") as job:
        (job.path / "disk").write_text("x")
        assert sweep.main(config) == 0
        assert (job.path / "disk").exists()
        assert job.run.exists()
    assert jobdir.is_dead(job.run), "it is gone"


@pytest.mark.parametrize("survivor", ["build", "watchdog"])
def test_one_of_build_and_watchdog_is_enough_to_live(
    config: Path, tmp_path: Path, survivor: str
) -> None:
    job = tmp_path / "work" / DEAD_JOB
    job.mkdir()
    if survivor == "build":
        lock = jobdir.lock(job)
    else:
        watchdog = jobdir._Watchdog(job)
    try:
        sweep.main(config)
        assert job.exists()
    finally:
        if survivor == "build":
            os.close(lock)
        else:
            watchdog.dismiss()
    sweep.main(config)
    assert not job.exists()


def test_what_only_looks_like_ours_stays(config: Path, tmp_path: Path) -> None:
    kept = [tmp_path / "work" / name for name in ("koji-indirection-notes", "ki-abc", "other")]
    for directory in kept:
        directory.mkdir()
    link = tmp_path / "work" / DEAD_JOB
    link.symlink_to(kept[0])
    sweep.main(config)
    assert all(directory.exists() for directory in kept)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make another user's directory")
def test_what_another_user_has_left_stays(config: Path, tmp_path: Path) -> None:
    job = tmp_path / "work" / DEAD_JOB
    job.mkdir()
    os.chown(job, 12345, 12345)
    sweep.main(config)
    assert job.exists()


def test_runs_of_tasks_are_found_wherever_kojid_has_its_workdir(
    config: Path, tmp_path: Path
) -> None:
    runs = sweep.runs_directory(Settings(cache_dir=tmp_path / "cache"))
    task = tmp_path / "kojid" / "tasks" / "7" / "7"
    dead, alive, gone = task / "run-dead", task / "run-alive", tmp_path / "8" / "run-gone"
    for run in (dead, alive):
        (run / "vm").mkdir(parents=True)
    for run in (dead, alive, gone):
        sweep.note_run(runs, run)
    lock = jobdir.lock(alive)
    sweep.main(config)
    assert list(task.iterdir()) == [alive]
    assert [link.readlink() for link in runs.iterdir()] == [alive]
    os.close(lock)
    sweep.main(config)
    assert not task.exists()


def test_a_note_that_names_something_else_removes_nothing(config: Path, tmp_path: Path) -> None:
    runs, precious = tmp_path / "cache" / "runs", tmp_path / "precious"
    runs.mkdir()
    precious.mkdir()
    (runs / "a").symlink_to(precious)
    (runs / "b").symlink_to("../../work")
    (runs / "c").write_text("no link")
    sweep.main(config)
    assert precious.exists()
    assert (tmp_path / "work").exists()


DOMAIN = """
<domain type='test'>
  <name>{name}</name><memory>8192</memory><os><type>hvm</type></os>
  <devices>
    <channel type='unix'><source mode='bind' path='{sockets}/status'/>
      <target type='virtio' name='x'/></channel>
  </devices>
</domain>
"""


def test_vms_of_dead_builds_are_destroyed_and_no_other(tmp_path: Path) -> None:
    libvirt = pytest.importorskip("libvirt")
    alive, dead = tmp_path / "alive", tmp_path / "dead"
    for directory in (alive, dead):
        directory.mkdir()
    lock = jobdir.lock(alive)
    connection = libvirt.open("test:///default")
    before = {domain.name() for domain in connection.listAllDomains()}
    machines = {
        "koji-indirection-task-7-0123456789ab": dead,
        "koji-indirection-task-8-0123456789ab": tmp_path / "gone",
        "koji-indirection-task-9-0123456789ab": alive,
        "koji-indirection-local-0123456789ab": tmp_path / "not seen here",
        "somebody-elses": dead,
    }
    for name, sockets in machines.items():
        connection.createXML(DOMAIN.format(name=name, sockets=sockets))
    destroyed = sweep.sweep_domains(connection.listAllDomains())
    left = {domain.name() for domain in connection.listAllDomains()} - before
    connection.close()
    os.close(lock)
    assert sorted(destroyed) == sorted(list(machines)[:2])
    assert left == set(list(machines)[2:])


def test_a_broken_configuration_is_told_in_the_log_and_breaks_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "indirection.conf"
    config.write_text("[indirection]\nwork_dri = /x\n")
    with caplog.at_level(logging.INFO):
        sweep.start(config, logging.getLogger("kojid")).join(30)
    assert "was not looked for" in caplog.text
    assert "did you mean 'work_dir'" in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_in_the_background_it_tells_what_it_has_removed(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = tmp_path / "work" / DEAD_JOB
    job.mkdir()
    with caplog.at_level(logging.INFO):
        sweep.start(config, logging.getLogger("kojid")).join(30)
    assert f"removed {job}, which a dead build has left" in caplog.text
    assert not job.exists()
