"""What starts the job in a guest, for each init system; tests/guest boots those of Debian."""

from __future__ import annotations

import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest
from fakeguest import FakeGuest

from koji_indirection import initsystem
from koji_indirection.errors import BuildFailed
from koji_indirection.initsystem import Start

START_JOB = "/bin/sh /etc/koji-indirection/run </dev/null >/dev/null 2>&1"
SYSTEMD = {"/sbin/init": "-> ../lib/systemd/systemd", "/lib/systemd/systemd": ""}
SYSTEMD_UNIT = "/lib/systemd/system/multi-user.target"
BUSYBOX = {"/sbin/init": "-> /bin/busybox", "/bin/busybox": ""}
MASKED = [
    "NetworkManager-wait-online.service",
    "systemd-networkd-wait-online.service",
    "systemd-networkd-wait-online@.service",
    "ifupdown-wait-online.service",
    "systemd-time-wait-sync.service",
    "chrony-wait.service",
    "ntp-wait.service",
    "systemd-firstboot.service",
    "systemd-homed-firstboot.service",
    "initial-setup.service",
    "initial-setup-text.service",
    "initial-setup-graphical.service",
    "jeos-firstboot.service",
    "YaST2-Firstboot.service",
    "YaST2-Second-Stage.service",
    "cloud-init-local.service",
    "cloud-init-main.service",
    "cloud-init-network.service",
    "cloud-init.service",
    "cloud-config.service",
    "cloud-final.service",
    "kdump.service",
    "snapd.seeded.service",
    "serial-getty@hvc0.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
]
ORDER = """\
TARGETS = killprocs bootlogs rmnologin single rc.local
INTERACTIVE =
single: killprocs
rc.local: bootlogs rmnologin
"""
# A root with RHEL 6's layout: upstart, links of runlevels under /etc/rc.d.
RHEL6 = {
    "/sbin/init": "",
    "/sbin/initctl": "",
    "/etc/init/rc.conf": "",
    "/etc/inittab": "# upstart\nid:5:initdefault:\n",
    "/etc/init.d": "-> rc.d/init.d",
    "/etc/rc.d/init.d/sshd": "",
    "/etc/rc.local": "-> rc.d/rc.local",
    "/etc/rc.d/rc.local": "",
    **{f"/etc/rc{level}.d": f"-> rc.d/rc{level}.d" for level in "2345"},
    **{f"/etc/rc.d/rc{level}.d/S55sshd": "-> ../init.d/sshd" for level in "2345"},
    **{f"/etc/rc.d/rc{level}.d/S52cloud-init": "-> ../init.d/cloud-init" for level in "35"},
    "/etc/rc.d/rc5.d/S99firstboot": "-> ../init.d/firstboot",
    "/etc/rc.d/rc5.d/K10firstboot": "-> ../init.d/firstboot",
}
DEBIAN_SYSVINIT = {
    "/sbin/init": "",
    "/lib/systemd/systemd": "",  # installed, but not process 1
    "/etc/inittab": "id:2:initdefault:\nl2:2:wait:/etc/init.d/rc 2\n",
    "/etc/init.d/rc.local": "",
    "/etc/init.d/.depend.start": ORDER,
    "/etc/rc2.d/S01bootlogs": "-> ../init.d/bootlogs",
    "/etc/rc2.d/S01rmnologin": "-> ../init.d/rmnologin",
    "/etc/rc2.d/S02rc.local": "-> ../init.d/rc.local",
}
OPENRC = {
    "/sbin/openrc": "",
    "/sbin/openrc-run": "",
    "/etc/inittab": "::sysinit:/sbin/openrc sysinit\n::wait:/sbin/openrc default\n",
    "/etc/runlevels/boot/hostname": "-> /etc/init.d/hostname",
    "/etc/runlevels/default/local": "-> /etc/init.d/local",
    "/etc/runlevels/default/lightdm": "-> /etc/init.d/lightdm",
}


def plan(files: dict[str, str]) -> Start:
    guest = FakeGuest(dict(files))
    guest.is_mounted = True
    return initsystem.plan(guest)  # type: ignore[arg-type]


def test_everything_for_systemd() -> None:
    units = "etc/systemd/system"
    service = resources.files("koji_indirection").joinpath("job", "koji-indirection.service")
    assert plan({**SYSTEMD, SYSTEMD_UNIT: ""}) == Start(
        "systemd",
        files={
            f"{units}/koji-indirection.service": (service.read_text(encoding="utf-8"), 0o644),
            "etc/systemd/system-preset/00-koji-indirection.preset": (
                "enable koji-indirection.service\nenable multi-user.target\n",
                0o644,
            ),
            "etc/cloud/cloud-init.disabled": ("", 0o644),
        },
        links={
            f"{units}/multi-user.target.wants/koji-indirection.service": (
                "../koji-indirection.service"
            ),
            f"{units}/default.target": SYSTEMD_UNIT,
            **{f"{units}/{unit}": "/dev/null" for unit in MASKED},
        },
    )


def test_the_default_target_leads_to_a_file_that_is_there() -> None:
    files = {"/usr/lib/systemd/systemd": "", f"/usr{SYSTEMD_UNIT}": ""}
    assert plan(files).links["etc/systemd/system/default.target"] == f"/usr{SYSTEMD_UNIT}"


def test_presets_that_a_first_boot_applies_leave_the_job_in_place(tmp_path: Path) -> None:
    """As systemd does it at the first boot of a Fedora: everything is off unless a preset says."""
    if shutil.which("systemctl") is None:
        pytest.skip("systemd is not installed")
    usr = "usr/lib/systemd"
    target = "[Unit]\nAllowIsolate=yes\n"
    own = {
        f"{usr}/system/multi-user.target": (target, 0o644),
        f"{usr}/system/graphical.target": (target, 0o644),
        f"{usr}/system/sshd.service": ("[Install]\nWantedBy=multi-user.target\n", 0o644),
        f"{usr}/system-preset/90-default.preset": ("enable sshd.service\n", 0o644),
        f"{usr}/system-preset/99-default-disable.preset": ("disable *\n", 0o644),
    }
    start = plan({"/usr/lib/systemd/systemd": "", f"/{usr}/system/multi-user.target": ""})
    for name, (text, _) in {**own, **start.files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name, link in start.links.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(link)
    subprocess.run(["systemctl", f"--root={tmp_path}", "--quiet", "preset-all"], check=False)
    units = tmp_path / "etc/systemd/system"
    assert (units / "multi-user.target.wants/sshd.service").is_symlink(), "presets were applied"
    for name, link in start.links.items():
        assert (tmp_path / name).is_symlink(), name
        assert str((tmp_path / name).readlink()) == link


def test_the_unit_has_no_sandbox_and_no_deadline() -> None:
    files = plan(SYSTEMD).files
    lines = files["etc/systemd/system/koji-indirection.service"][0].splitlines()
    assert {"PrivateTmp=no", "TimeoutStartSec=0", "StandardInput=null"} <= set(lines)
    for word in (
        "PrivateDevices",
        "PrivateMounts",
        "ProtectSystem",
        "NoNewPrivileges",
        "DynamicUser",
    ):
        assert not any(line.startswith(word) for line in lines)


def test_systemd_is_found_behind_a_usr_of_its_own_and_beside_old_runlevels() -> None:
    assert plan({"/sbin/init": "-> ../usr/lib/systemd/systemd"}).init == "systemd"
    rhel7 = {**SYSTEMD, "/etc/inittab": "# not used\n", "/etc/rc.d/rc3.d/S10network": "-> x"}
    assert plan(rhel7).init == "systemd"
    assert plan({"/usr/lib/systemd/systemd": "", "/etc/rc3.d/README": ""}).init == "systemd"


def test_upstart_runs_a_link_of_every_multi_user_runlevel_and_none_that_waits() -> None:
    start = plan(RHEL6)
    assert start.init == "sysvinit"
    assert start.links == {
        f"etc/rc.d/rc{level}.d/S99koji-indirection": "../init.d/koji-indirection"
        for level in "2345"
    }
    assert start.removed == (
        "etc/rc.d/rc3.d/S52cloud-init",
        "etc/rc.d/rc5.d/S52cloud-init",
        "etc/rc.d/rc5.d/S99firstboot",
    )
    assert start.files["etc/inittab"] == ("# upstart\nid:3:initdefault:\n", 0o644)
    script, mode = start.files["etc/rc.d/init.d/koji-indirection"]
    assert mode == 0o755
    assert script.startswith("#!/bin/sh\n# chkconfig: 2345 99 01\n")
    assert f"start) $session {START_JOB} & ;;" in script.splitlines()
    assert set(start.files) == {"etc/inittab", "etc/rc.d/init.d/koji-indirection"}


def test_an_order_of_insservs_gets_the_job_behind_what_the_runlevels_start() -> None:
    start = plan(DEBIAN_SYSVINIT)
    assert start.init == "sysvinit"
    assert start.links == {"etc/rc2.d/S99koji-indirection": "../init.d/koji-indirection"}
    order = ORDER.replace("single rc.local\n", "single rc.local koji-indirection\n")
    assert start.files["etc/init.d/.depend.start"] == (
        order + "koji-indirection: bootlogs rmnologin rc.local\n",
        0o644,
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("id:2:initdefault:", "id:2:initdefault:"),
        ("id:3:initdefault:", "id:3:initdefault:"),
        ("id:5:initdefault:", "id:3:initdefault:"),
        ("is:4:initdefault:", "is:3:initdefault:"),
        ("id:S:initdefault:", "id:3:initdefault:"),
        ("# id:5:initdefault:\nl3:3:wait:x", "# id:5:initdefault:\nl3:3:wait:x\nid:3:initdefault:"),
    ],
)
def test_a_graphical_or_missing_default_runlevel_becomes_three(before: str, after: str) -> None:
    start = plan({**DEBIAN_SYSVINIT, "/etc/inittab": f"{before}\nl2:2:wait:/etc/init.d/rc 2\n"})
    wanted = after.replace("l3:3:wait:x\n", "l3:3:wait:x\nl2:2:wait:/etc/init.d/rc 2\n")
    if "l3" not in before:
        wanted += "\nl2:2:wait:/etc/init.d/rc 2"
    assert start.files["etc/inittab"][0] == wanted + "\n"


def test_openrc_has_the_job_in_its_default_runlevel() -> None:
    for first_process in (BUSYBOX, {"/sbin/init": ""}):
        start = plan({**OPENRC, **first_process})
        assert start.init == "openrc"
        assert start.links == {
            "etc/runlevels/default/koji-indirection": "/etc/init.d/koji-indirection"
        }
        assert start.removed == ("etc/runlevels/default/lightdm",)
        script, mode = start.files["etc/init.d/koji-indirection"]
        assert (set(start.files), mode) == ({"etc/init.d/koji-indirection"}, 0o755)
        assert script.startswith("#!/sbin/openrc-run\n")
        assert f"    $session {START_JOB} &" in script.splitlines()


def test_openrc_that_was_removed_or_is_not_process_1_is_not_used() -> None:
    left = {name: text for name, text in OPENRC.items() if name != "/sbin/openrc"}
    assert plan({**DEBIAN_SYSVINIT, **left, "/etc/inittab": "l2:2:wait:x\n"}).init == "sysvinit"
    assert plan({**OPENRC, **SYSTEMD}).init == "systemd"


def test_rc_local_is_used_where_something_starts_it_and_the_guests_own_is_kept() -> None:
    files = {**BUSYBOX, "/etc/inittab": "::sysinit:/etc/init.d/rcS\n"}
    starter = {"/etc/init.d/rcS": "#!/bin/sh\n[ -x /etc/rc.local ] && /etc/rc.local\n"}
    start = plan({**files, **starter, "/etc/rc.local": "own"})
    assert start == Start(
        "rc.local",
        files={
            "etc/rc.local": (
                "#!/bin/sh\n[ -x /etc/rc.local.own ] && /etc/rc.local.own\n" + START_JOB + " &\n",
                0o755,
            )
        },
        moved={"etc/rc.local": "etc/rc.local.own"},
    )
    assert plan({**files, **starter}).moved == {}
    assert plan({"/sbin/init": "-> /sbin/runit", "/etc/rc.local": ""}).init == "rc.local"


def test_a_busybox_that_starts_no_rc_local_gets_a_line_in_its_inittab() -> None:
    inittab = "::sysinit:/etc/init.d/rcS\nttyS0::respawn:/sbin/getty"
    files = {**BUSYBOX, "/etc/inittab": inittab, "/etc/rc.local": "", "/etc/rc3.d/S01x": ""}
    mentioned = {"/etc/init.d/rcS": "# once this ran /etc/rc.local\n/bin/true\n"}
    start = plan({**files, **mentioned})
    assert start == Start("inittab", {"etc/inittab": (f"{inittab}\n::once:{START_JOB}\n", 0o644)})


def test_a_sysvinit_without_links_gets_a_line_for_its_runlevels() -> None:
    inittab = "id:5:initdefault:\nrc:2345:wait:/etc/rc.d/rc.M\n"
    assert plan({"/sbin/init": "", "/etc/inittab": inittab}) == Start(
        "inittab",
        {
            "etc/inittab": (
                f"id:3:initdefault:\nrc:2345:wait:/etc/rc.d/rc.M\nkjob:2345:once:{START_JOB}\n",
                0o644,
            )
        },
    )


def test_a_guest_that_nothing_can_start_the_job_in_is_said() -> None:
    with pytest.raises(BuildFailed, match="no init system that could start the job"):
        plan({"/sbin/init": "", "/etc/passwd": ""})


@pytest.mark.parametrize(
    "files", [SYSTEMD, RHEL6, DEBIAN_SYSVINIT, {**OPENRC, **BUSYBOX}, {"/etc/rc.local": ""}]
)
def test_everything_is_written_below_etc(files: dict[str, str]) -> None:
    start = plan(files)
    for name in (*start.files, *start.links, *start.moved, *start.removed):
        assert name.startswith("etc/")
        assert ".." not in name.split("/")
