"""How a guest is made to start the job: which init system it has, and what that needs.

Looks at the mounted root of an appliance and changes nothing: a Start says what
is to be written, moved and removed. Whatever the init system, the job starts at
multi-user, after local file systems, and waits neither for a person nor for a
network that is not there.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import PurePosixPath

from .appliance import Appliance
from .errors import BuildFailed
from .guestjob import DIRECTORY

_NAME = "koji-indirection"
_START_JOB = f"/bin/sh /{DIRECTORY}/run </dev/null >/dev/null 2>&1"
_SYSTEMD = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
_UNIT_DIRECTORIES = ("/usr/lib/systemd/system", "/lib/systemd/system")
_OPENRC = ("/sbin/openrc", "/usr/sbin/openrc", "/usr/bin/openrc")
_OPENRC_RUN = ("/sbin/openrc-run", "/usr/sbin/openrc-run", "/usr/bin/openrc-run", "/sbin/runscript")
# Where RHEL 6, Debian and SUSE 11 keep the links of runlevel N; and a machine of ours is in 2 or 3,
# unless its kernel is told another one.
_RUNLEVEL_LINKS = ("/etc/rc.d/rc{}.d", "/etc/rc{}.d", "/etc/init.d/rc{}.d")
_MULTI_USER_RUNLEVELS = "2345"
# Where a small init says that it runs /etc/rc.local if there is one.
_MAY_START_RC_LOCAL = ("/etc/inittab", "/etc/init.d/rcS", "/etc/rc")
_OWN_RC_LOCAL = "/etc/rc.local.own"  # the guest's own rc.local, which still runs first

# Units that wait for a person, a network or a time server before multi-user is reached.
_MASKED_UNITS = (
    "NetworkManager-wait-online.service",
    "systemd-networkd-wait-online.service",
    "systemd-networkd-wait-online@.service",  # and its instances, one for an interface
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
    "kdump.service",  # builds an initramfs at the first boot
    "snapd.seeded.service",
    # hvc0 is the terminal of `shell`; on ppc64le it is the serial port, and nobody logs in there.
    "serial-getty@hvc0.service",
    # apt-get does not wait for whoever else fetches indexes.
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
)
# At a first boot (no machine-id yet) Fedora from 37 and RHEL from 10 apply their presets, which
# end with `disable *`: links of ours would go, that of the default target too.
_PRESET = f"enable {_NAME}.service\nenable multi-user.target\n"
# The same for init scripts; and display managers, where no runlevel leaves them out.
_REMOVED_SERVICES = (
    *("cloud-init-local", "cloud-init", "cloud-config", "cloud-final"),
    *("firstboot", "initial-setup", "kdump", "NetworkManager-wait-online"),
    *("display-manager", "prefdm", "gdm", "gdm3", "kdm", "lightdm", "lxdm", "sddm", "wdm", "xdm"),
)

_INIT_SCRIPT = f"""\
#!/bin/sh
# chkconfig: 2345 99 01
# description: the job of a koji-indirection build
### BEGIN INIT INFO
# Provides:          {_NAME}
# Required-Start:    $local_fs
# Should-Start:      $all
# Required-Stop:
# Default-Start:     2 3 4 5
# Default-Stop:
# Short-Description: the job of a koji-indirection build
### END INIT INFO

# In a session of its own: the terminal of whoever starts the services goes away after them.
session=$(command -v setsid)
case $1 in
start) $session {_START_JOB} & ;;
esac
exit 0
"""

_OPENRC_SERVICE = f"""\
description="the job of a koji-indirection build"

depend() {{
    after *
}}

start() {{
    # In a session of its own: the terminal of whoever starts the services goes away after them.
    session=$(command -v setsid)
    $session {_START_JOB} &
    return 0
}}

stop() {{
    return 0
}}
"""


@dataclass(frozen=True)
class Start:
    """What makes a guest start the job; paths are relative to its root, without a first slash.

    init -- "systemd", "openrc", "sysvinit" (upstart too, which runs the same links),
        "rc.local" or "inittab".
    files -- text and mode; links -- their targets.
    moved -- old to new name; removed -- what goes away: both before files are written.
    """

    init: str
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()


def plan(appliance: Appliance) -> Start:
    """How the guest whose root is mounted can be made to start the job.

    Raises BuildFailed when nothing in it could.
    """
    first_process = _first_process(appliance)
    if first_process == "systemd":
        return _systemd(appliance)
    if _is_openrc(appliance):
        return _openrc(appliance)
    inittab = _inittab(appliance)
    link_directories = _link_directories(appliance)
    has_systemd = _first_existing(appliance, _SYSTEMD) is not None
    runs_links = first_process not in ("", "busybox") and (inittab.entries or not has_systemd)
    if link_directories and runs_links:
        return _sysvinit(appliance, link_directories, inittab)
    if has_systemd:
        return _systemd(appliance)
    if any(
        appliance.call("is_file", path)
        and re.search(r"(?m)^[^#\n]*/etc/rc\.local\b", text_of(appliance, path))
        for path in _MAY_START_RC_LOCAL
    ):
        return _rc_local(appliance)
    if inittab.entries:
        return Start("inittab", {"etc/inittab": (inittab.with_job(first_process), 0o644)})
    if appliance.call("is_file", "/etc/rc.local", followsymlinks=True):
        return _rc_local(appliance)
    raise BuildFailed(
        "the utility image has no init system that could start the job: neither systemd, OpenRC"
        " nor runlevels, no /etc/inittab and no /etc/rc.local",
        "use a utility image that boots with one of these",
    )


def text_of(appliance: Appliance, path: str) -> str:
    """The first 64 KiB of a small configuration file of the guest."""
    content: str = appliance.call("pread", path, 65536, 0)
    return content


def _first_process(appliance: Appliance) -> str:
    """The name of the program that /sbin/init is; empty when there is none."""
    if appliance.call("exists", "/sbin/init"):
        return PurePosixPath(appliance.call("realpath", "/sbin/init")).name
    if appliance.call("is_symlink", "/sbin/init"):  # to a /usr that is not mounted
        return PurePosixPath(appliance.call("readlink", "/sbin/init")).name
    return ""


def _first_existing(appliance: Appliance, paths: tuple[str, ...]) -> str | None:
    return next((path for path in paths if appliance.call("exists", path)), None)


# systemd


def _systemd(appliance: Appliance) -> Start:
    units = "etc/systemd/system"
    service = resources.files("koji_indirection").joinpath("job", "koji-indirection.service")
    # Where /lib is not a link to /usr/lib (openSUSE Leap), only one of the two is there.
    targets = tuple(f"{directory}/multi-user.target" for directory in _UNIT_DIRECTORIES)
    multi_user = _first_existing(appliance, targets) or targets[0]
    return Start(
        "systemd",
        files={
            f"{units}/{_NAME}.service": (service.read_text(encoding="utf-8"), 0o644),
            f"etc/systemd/system-preset/00-{_NAME}.preset": (_PRESET, 0o644),
            "etc/cloud/cloud-init.disabled": ("", 0o644),
        },
        links={
            f"{units}/multi-user.target.wants/{_NAME}.service": f"../{_NAME}.service",
            f"{units}/default.target": multi_user,
            **{f"{units}/{unit}": "/dev/null" for unit in _MASKED_UNITS},
        },
    )


# OpenRC


def _is_openrc(appliance: Appliance) -> bool:
    # A package that was removed leaves its runlevels in /etc.
    return bool(
        appliance.call("is_dir", "/etc/runlevels/default", followsymlinks=True)
        and _first_existing(appliance, _OPENRC)
    )


def _openrc(appliance: Appliance) -> Start:
    interpreter = _first_existing(appliance, _OPENRC_RUN) or _OPENRC_RUN[0]
    removed = [
        f"{runlevel}/{name}"
        for runlevel in ("/etc/runlevels/boot", "/etc/runlevels/default")
        if appliance.call("is_dir", runlevel)
        for name in appliance.call("ls", runlevel)
        if name in _REMOVED_SERVICES
    ]
    script = f"/etc/init.d/{_NAME}"
    return Start(
        "openrc",
        files={script[1:]: (f"#!{interpreter}\n{_OPENRC_SERVICE}", 0o755)},
        links={f"etc/runlevels/default/{_NAME}": script},
        removed=tuple(path[1:] for path in removed),
    )


# Runlevels: sysvinit, and upstart with the links of sysvinit


def _link_directories(appliance: Appliance) -> list[str]:
    """The directories, one for each multi-user runlevel, whose links are run."""
    found: list[str] = []
    for runlevel in _MULTI_USER_RUNLEVELS:
        for pattern in _RUNLEVEL_LINKS:
            path = pattern.format(runlevel)
            if appliance.call("is_dir", path, followsymlinks=True):
                found.append(appliance.call("realpath", path))
                break
    return found


def _sysvinit(appliance: Appliance, link_directories: list[str], inittab: _Inittab) -> Start:
    # The archive is not unpacked in the guest's root as seen from within: no links on the way.
    scripts = "/etc/init.d"
    if appliance.call("exists", scripts):
        scripts = appliance.call("realpath", scripts)
    script = f"{scripts}/{_NAME}"
    files = {script[1:]: (_INIT_SCRIPT, 0o755)}
    if inittab.entries:
        files["etc/inittab"] = (inittab.multi_user(), 0o644)
    removed, started = [], set()
    for directory in link_directories:
        for name in appliance.call("ls", directory):
            link = re.fullmatch(r"S\d\d(.+)", name)
            if link and link[1] in _REMOVED_SERVICES:
                removed.append(f"{directory[1:]}/{name}")
            elif link:
                started.add(link[1])
    # Where insserv has worked out an order, startpar runs only what is in it.
    order = f"{scripts}/.depend.start"
    if appliance.call("is_file", order):
        files[order[1:]] = (_order_with_job(text_of(appliance, order), started), 0o644)
    return Start(
        "sysvinit",
        files=files,
        links={
            f"{directory[1:]}/S99{_NAME}": posixpath.relpath(script, directory)
            for directory in link_directories
        },
        removed=tuple(removed),
    )


def _order_with_job(order: str, started: set[str]) -> str:
    """insserv's makefile of services, with the job behind all that the runlevels start."""
    lines = order.rstrip("\n").split("\n")
    for number, line in enumerate(lines):
        variable, _, targets = line.partition("=")
        if variable.strip() == "TARGETS":
            lines[number] = f"{line.rstrip()} {_NAME}"
            before = [target for target in targets.split() if target in started]
            lines.append(f"{_NAME}: {' '.join(before)}".rstrip())
    return "\n".join(lines) + "\n"


# Without services


def _rc_local(appliance: Appliance) -> Start:
    moved = {}
    if appliance.call("exists", "/etc/rc.local"):
        moved["etc/rc.local"] = _OWN_RC_LOCAL[1:]
    text = f"#!/bin/sh\n[ -x {_OWN_RC_LOCAL} ] && {_OWN_RC_LOCAL}\n{_START_JOB} &\n"
    return Start("rc.local", {"etc/rc.local": (text, 0o755)}, moved=moved)


@dataclass(frozen=True)
class _Inittab:
    """An inittab(5), of sysvinit or of busybox, which has no runlevels."""

    lines: tuple[str, ...]

    @property
    def entries(self) -> list[list[str]]:
        """What stands between the colons: id, runlevels, action, process."""
        return [
            line.strip().split(":", 3)
            for line in self.lines
            if line.count(":") >= 3 and not line.lstrip().startswith("#")
        ]

    def multi_user(self) -> str:
        """The file with 3 as default runlevel, if it is another than 2 and 3."""
        lines, has_default = [], False
        for line in self.lines:
            default = re.fullmatch(r"\s*([^#:]*):([^:]*):initdefault:.*", line)
            if default:
                has_default = True
                if default[2].strip() not in ("2", "3"):
                    line = f"{default[1]}:3:initdefault:"
            lines.append(line)
        if not has_default:  # sysvinit would ask for it at the console
            lines.append("id:3:initdefault:")
        return "\n".join(lines) + "\n"

    def with_job(self, first_process: str) -> str:
        """The file with an entry that starts the job when multi-user has been reached."""
        has_runlevels = any(entry[1] for entry in self.entries)
        if first_process == "busybox" or not has_runlevels:
            return "\n".join([*self.lines, f"::once:{_START_JOB}"]) + "\n"
        return f"{self.multi_user()}kjob:2345:once:{_START_JOB}\n"


def _inittab(appliance: Appliance) -> _Inittab:
    if not appliance.call("is_file", "/etc/inittab", followsymlinks=True):
        return _Inittab(())
    return _Inittab(tuple(text_of(appliance, "/etc/inittab").rstrip("\n").split("\n")))
