"""Real guests that do not have systemd: the job starts when they have reached multi-user."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import (
    RESULT,
    Builder,
    change_root,
    raw_copy,
    replace_in_root,
    run,
    special_image,
)

DEBIAN = ("--memory", "512M", "--boot-timeout", "5m")
LOOK = """
set -e
mount /dev/vdb1 /mnt
test -s /mnt/input_image.raw
echo "process 1 is $(cat /proc/1/comm)"
touch /writable
test "$(cut -d ' ' -f 7 /proc/self/stat)" = 0 && echo no terminal
"""
OWN_SERVICE = """#!/bin/sh
### BEGIN INIT INFO
# Provides: {name}
# Required-Start: $local_fs
# Default-Start: 2 3 4 5
# Short-Description: the guest's own
### END INIT INFO
sleep 3
touch /run/{name}-$1
"""


def own_service(disk: Path, name: str, scratch: Path, *links: str) -> None:
    """A service of the guest's own that takes its time; /run/NAME-start says that it has run."""
    script = f"/etc/init.d/{name}"
    change_root(disk, f"write /dev/null {script}")
    replace_in_root(disk, script, OWN_SERVICE.format(name=name), scratch)
    change_root(disk, *(f"symlink {link} {script}" for link in links))


def file_in_root(disk: Path, path: str) -> str:
    return run("debugfs", "-R", f"cat {path}", f"{disk}?offset={1024 * 1024}")


def test_sysvinit_runs_the_job_behind_all_other_services(
    build: Builder, tiny_image: Path, tmp_path: Path
) -> None:
    disk = raw_copy(special_image("sysvinit"), tmp_path / "sysvinit.raw")
    # Its insserv has worked out an order without the job, and its default is graphical.
    order = file_in_root(disk, "/etc/init.d/.depend.start")
    replace_in_root(
        disk,
        "/etc/init.d/.depend.start",
        order.replace("TARGETS =", "TARGETS = slow gdm3"),
        tmp_path,
    )
    for name in ("slow", "gdm3"):
        own_service(disk, name, tmp_path, f"/etc/rc3.d/S01{name}", f"/etc/rc5.d/S01{name}")
    inittab = file_in_root(disk, "/etc/inittab")
    replace_in_root(
        disk, "/etc/inittab", inittab.replace("id:2:initdefault", "id:5:initdefault"), tmp_path
    )
    built = build(
        [
            ("look", LOOK),
            ("runlevel", "runlevel; test -e /run/slow-start; test ! -e /run/gdm3-start"),
            ("result", RESULT),
        ],
        *DEBIAN,
        seconds=900,
        input_image=tiny_image,
        utility_image=disk,
    ).succeeded()
    assert built.manifest["guest"]["init"] == "sysvinit"
    job_log = built.log("job.log")
    assert "process 1 is init\nno terminal\n" in job_log
    assert "N 3\n" in job_log
    assert "makefile-style concurrent boot" in built.log("console.log")


def test_openrc_runs_the_job_behind_all_other_services(
    build: Builder, tiny_image: Path, tmp_path: Path
) -> None:
    disk = raw_copy(special_image("openrc"), tmp_path / "openrc.raw")
    for name in ("slow", "lightdm"):
        own_service(disk, name, tmp_path, f"/etc/runlevels/default/{name}")
    built = build(
        [
            ("look", LOOK),
            ("runlevel", "rc-status --runlevel; test -e /run/slow-start"),
            ("no person", "test ! -e /run/lightdm-start"),
            ("result", RESULT),
        ],
        *DEBIAN,
        seconds=900,
        input_image=tiny_image,
        utility_image=disk,
    ).succeeded()
    assert built.manifest["guest"]["init"] == "openrc"
    job_log = built.log("job.log")
    assert "process 1 is init\nno terminal\n" in job_log
    assert "default\n=== exit status 0" in job_log


@pytest.fixture
def without_rc_local(tiny_raw: Path, tmp_path: Path) -> Path:
    """A guest in which nothing starts an /etc/rc.local."""
    start = file_in_root(tiny_raw, "/etc/init.d/rcS")
    kept, _, _ = start.partition("if [ -x /etc/rc.local ]")
    replace_in_root(tiny_raw, "/etc/init.d/rcS", kept, tmp_path)
    return tiny_raw


def test_a_guest_with_an_inittab_only_runs_the_job(build: Builder, without_rc_local: Path) -> None:
    built = build(
        [("look", "mount /dev/vdb1 /mnt && ls -l /mnt"), ("result", RESULT)],
        input_image=without_rc_local,
    ).succeeded()
    assert built.manifest["guest"]["init"] == "inittab"
    assert "input_image.raw" in built.log("job.log")


def test_a_guest_that_nothing_could_start_the_job_in_is_refused(
    build: Builder, without_rc_local: Path
) -> None:
    change_root(without_rc_local, "rm /etc/inittab")
    build([("result", RESULT)], input_image=without_rc_local).failed(
        "the utility image has no init system that could start the job"
    )
