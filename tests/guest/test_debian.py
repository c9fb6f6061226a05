"""A real Debian as utility image: the live ISO of the demo, and what real tools need of a guest."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .conftest import REPOSITORY, Builder, change_root, raw_copy, run

DEBIAN = ("--memory", "1G", "--cpus", "2", "--workspace-size", "4G", "--boot-timeout", "5m")

LOOK = """
echo written twice > /dev/stderr
systemctl is-active multi-user.target
systemctl get-default
systemctl is-active graphical.target || true
"""

MAPPER = """
set -e
mount /dev/vdb1 /mnt
loop=$(losetup --find --show /mnt/input_image.raw)
echo "0 $(blockdev --getsz $loop) linear $loop 0" | dmsetup create whole
kpartx -a -s /dev/mapper/whole
mkdir -p /media/root
mount -o rw /dev/mapper/whole*1 /media/root
echo changed > /media/root/changed
touch /tmp/public
"""

ONE_NAMESPACE = """
set -e
cat /media/root/changed
test "$(readlink /proc/1/ns/mnt)" = "$(readlink /proc/self/ns/mnt)"
nsenter --target 1 --mount test -e /tmp/public
echo one namespace
"""

HANG_UP = """
for _ in 1 2 3; do
    systemctl restart serial-getty@ttyS0
    sleep 1
    echo a word on the console > /dev/console
done
echo still here
"""


def test_the_demo_template_makes_a_live_iso_that_boots(
    build: Builder, utility_image: Path, input_image: Path, tmp_path: Path
) -> None:
    copies = {path: path.stat().st_mtime_ns for path in (utility_image, input_image)}
    running = build.start(
        REPOSITORY / "examples" / "live-iso.tdl",
        *DEBIAN,
        utility_image=utility_image,
        input_image=input_image,
    )
    built = running.finish(900).succeeded()
    iso = built.output / "boot.iso"
    el_torito = run("xorriso", "-indev", iso, "-report_el_torito", "plain")
    assert "El Torito boot img :   1  BIOS  y" in el_torito
    assert "El Torito boot img :   2  UEFI  y" in el_torito
    assert {path: path.stat().st_mtime_ns for path in copies} == copies
    booted = subprocess.run(
        [str(REPOSITORY / "examples" / "boot-iso"), "--timeout", "400", str(iso)],
        capture_output=True,
        text=True,
    )
    assert booted.returncode == 0, booted.stdout + booted.stderr


def test_a_graphical_debian_boots_to_multi_user_and_tools_find_what_they_need(
    build: Builder, utility_image: Path, tiny_image: Path, tmp_path: Path
) -> None:
    disk = raw_copy(utility_image, tmp_path / "graphical.raw")
    target = "/etc/systemd/system/default.target"
    change_root(disk, f"rm {target}", f"symlink {target} /lib/systemd/system/graphical.target")
    running = build.start(
        [
            ("look", LOOK),
            ("mapper", MAPPER),
            ("namespace", ONE_NAMESPACE),
            ("hang up", HANG_UP),
            ("memory", "echo eating\ntail /dev/zero"),
        ],
        *DEBIAN,
        *("--memory", "512M"),
        input_image=tiny_image,
        utility_image=disk,
    )
    built = running.finish(600).failed("command 'memory' exited with status 137")
    job_log = built.log("job.log")
    assert (
        ": look\nwritten twice\nactive\nmulti-user.target\ninactive\n=== exit status 0" in job_log
    )
    assert "changed\none namespace\n=== exit status 0" in job_log
    assert "still here\n=== exit status 0" in job_log
    assert "eating\nKilled\n" in job_log or "eating\n" in job_log
    assert [one["status"] for one in built.manifest["commands"]] == [0, 0, 0, 0, 137]
    assert "a word on the console" in built.log("console.log")
