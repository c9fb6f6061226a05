"""A real Koji for tests: hub with PostgreSQL, kojid, topurl and command line, on loopback.

/etc and /var/log of the machine are covered for the hub and kojid, never changed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from harness.base import PLUGIN, REPOSITORY, AnyKoji, listens, running
from harness.processes import StartFailed

from . import install
from .postgresql import PostgreSQL

# Koji's configuration and log directories, as this Koji has them, on a machine that keeps its own.
_ISOLATE = """
mount -t overlay -o "ro,lowerdir=$1:/etc" overlay /etc &&
mount --bind "$2" /var/log &&
shift 2 &&
exec "$@"
"""
# 0 means that a task may be slow; what a test waits for has its own limit.
_GUNICORN = """
bind = "127.0.0.1:{port}"
workers = 4
timeout = 0
graceful_timeout = 5
preload_app = True
worker_tmp_dir = "{work}"
control_socket_disable = True
"""
_KOJID = """\
#!{python}
import os, runpy, sys
# How busy the machine is besides is no business of a test; kojid takes no task above a load.
os.getloadavg = lambda: (0.0, 0.0, 0.0)
sys.argv[0] = __file__  # what kojid executes to restart itself
runpy.run_path({kojid!r}, run_name="__main__")
"""


class RealKoji(AnyKoji):
    name = "real"

    def __init__(self, koji_install: install.Install, work: Path, logs: Path) -> None:
        super().__init__(work, logs)
        self._install = koji_install
        self._postgresql = PostgreSQL(self._processes)

    # Start and end

    def start(self) -> None:
        self._make_directories()
        for directory in ("var-log", "etc/mock/koji"):
            (self.work / directory).mkdir(parents=True)
        self._postgresql.start()
        self._postgresql.load(self._install.schema)
        self._make_admin()
        self.hub_start()
        self._start_topurl()
        self._furnish()
        self._write_cli_configuration()
        self.builder_start()

    def sql(self, script: str, **values: str) -> None:
        self._postgresql.execute(script, **values)

    # The hub

    def hub_start(
        self,
        *,
        policy: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        plugin_conf: str = "",
    ) -> None:
        database = {"DBName": "koji", "DBUser": "koji", "DBHost": self._postgresql.directory}
        conf = self._hub_configuration({**database, **(settings or {})}, policy)
        self._write_etc("koji-hub/hub.conf", conf)
        self._write_etc(f"koji-hub/plugins/{PLUGIN}.conf", plugin_conf)
        gunicorn = self.work / "gunicorn.conf.py"
        gunicorn.write_text(_GUNICORN.format(port=self._hub_port, work=self.work))
        argv = [sys.executable, "-m", "gunicorn", "--config", gunicorn]
        argv += ["realkoji.hub_app:application"]
        path = f"{self._python_path()}:{Path(__file__).parents[1]}"
        self._hub = self._processes.start(
            "hub", self._isolated(argv), env={"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        )
        self._processes.wait_until("hub", self._hub, lambda: listens(self._hub_port), 60)
        self._check_hub()

    # The builder

    def builder_start(
        self, *, settings: Mapping[str, str] | None = None, plugin_conf: str = ""
    ) -> None:
        self._write_etc("kojid/kojid.conf", self._builder_configuration(settings))
        self._write_etc(f"kojid/plugins/{PLUGIN}.conf", plugin_conf)
        program = self._kojid_program()
        started = time.time()
        self._builder = self._processes.start(
            "builder",
            self._isolated([program, "--config=/etc/kojid/kojid.conf", "--fg", "--force-lock"]),
            env={"PYTHONPATH": self._python_path(), "PYTHONUNBUFFERED": "1"},
        )
        self._wait_for_builder(started)

    def _kojid_program(self) -> Path:
        program = self.work / "kojid"
        script = _KOJID.format(python=sys.executable, kojid=str(self._install.kojid))
        program.write_text(script)
        program.chmod(0o755)
        return program

    def _python_path(self) -> str:
        return install.python_path(self._install, REPOSITORY)

    def _cli_program(self) -> Path:
        return self._install.cli

    def _isolated(self, argv: Sequence[object]) -> list[object]:
        """In a mount name space of its own; the pid is the program's."""
        covers = (self._etc, self.work / "var-log")
        return [*install.unshare(), "sh", "-c", _ISOLATE, "sh", *covers, *argv]


def running_koji() -> AbstractContextManager[RealKoji]:
    """install.missing() says beforehand whether there can be one."""
    found = install.find()
    if found is None:
        raise StartFailed(install.missing())
    return running(lambda work, logs: RealKoji(found, work, logs))
