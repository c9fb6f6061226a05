"""The stand-in builder: koji.daemon's TaskManager, as the daemon drives it, and its tagBuild.

It forks for tasks, wakes and cancels them as kojid does, because that is the library's doing.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import koji
import koji.daemon
import koji.plugin
import koji.tasks

from koji_indirection import sweep, taskrun

from .etc import covered

# What our plugin gives the name of its configuration file.
READERS = (
    (taskrun, "task_settings"),
    (taskrun, "runs_directory"),
    (taskrun, "patient"),
    (sweep, "start"),
)

log = logging.getLogger("standin.builder")

DEFAULTS = {
    "maxjobs": 10,
    "minspace": 0,
    "sleeptime": 1,
    "max_retries": 120,
    "retry_interval": 1,
    "use_fast_upload": True,
    "offline_retry": True,
    "offline_retry_interval": 1,
    "allowed_scms": "",
    "allowed_scms_use_config": True,
    "allowed_scms_use_policy": False,
    "failed_buildroot_lifetime": 0,
    "buildroot_basic_cleanup_delay": 0,
    "buildroot_final_cleanup_delay": 0,
}

# What of it the session wants.
SESSION = ("user", "password", "use_fast_upload", "max_retries", "retry_interval")
SESSION += ("offline_retry", "offline_retry_interval")


class TagBuildTask(koji.tasks.BaseTaskHandler):  # type: ignore[misc]
    """Put a build into a tag, in the name of the task's owner."""

    Methods = ("tagBuild",)

    def handler(
        self, tag_id: int, build_id: int, force: bool = False, fromtag: Any = None, *unused: Any
    ) -> None:
        self.session.getBuild(build_id, strict=True)
        self.session.getTag(tag_id, strict=True)
        self.session.host.tagBuild(self.id, tag_id, build_id, force=force, fromtag=fromtag)
        self.session.host.tagNotification(True, tag_id, fromtag, build_id, self.taskinfo["owner"])


class Options(dict[str, Any]):
    """As the daemon has them: o.name and o.get("name")."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def read_options(path: str) -> Options:
    parser = koji.read_config_files(path, raw=True)
    options = Options(DEFAULTS)
    for name, text in parser.items("kojid"):
        default = DEFAULTS.get(name)
        if isinstance(default, bool):
            options[name] = parser.getboolean("kojid", name)
        else:
            options[name] = int(text) if isinstance(default, int) else text
    return options


def work(options: Options, session: Any) -> None:
    """Until SIGTERM."""
    manager = koji.daemon.TaskManager(options, session)
    manager.findHandlers(globals())
    manager.findHandlers(vars(koji.tasks))
    tracker = koji.plugin.PluginTracker(path=options.pluginpath.split(":"))
    for name in options.plugin.split():
        manager.scanPlugin(tracker.load(name))
    try:
        while True:
            if not _turn(manager):
                time.sleep(options.sleeptime)
    except (SystemExit, KeyboardInterrupt, koji.tasks.ServerExit):
        log.warning("ending")
    manager.shutdown()
    session.logout()


def _turn(manager: Any) -> bool:
    """Whether a task was taken; what goes wrong once may go right the next time."""
    try:
        manager.updateBuildroots(nolocal=True)  # it has none, and no mock
        manager.updateTasks()
        return bool(manager.getNextTask())
    except koji.AuthError:
        raise
    except Exception:
        log.exception("this turn failed")
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="kojid.conf")
    parser.add_argument("--etc", type=Path, required=True, help="what it sees as /etc")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    options = read_options(arguments.config)
    koji.pathinfo.topdir = options.topdir
    # How busy the machine is besides is no business of a test.
    os.getloadavg = lambda: (0.0, 0.0, 0.0)
    signal.signal(signal.SIGTERM, _end)
    session = koji.ClientSession(options.server, {name: options[name] for name in SESSION})
    session.login()
    session.exclusiveSession(force=True)
    with covered(arguments.etc, *READERS):
        work(options, session)


def _end(*_: object) -> None:
    raise SystemExit


if __name__ == "__main__":
    main()
