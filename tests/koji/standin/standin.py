"""The stand-in Koji for tests: hub, topurl, builder and command line, on loopback.

It needs what PyPI has, and no more rights than the tests themselves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from harness.base import PLUGIN, REPOSITORY, AnyKoji, listens, running

from .database import Database, run_script

HERE = Path(__file__).resolve().parents[1]


class StandInKoji(AnyKoji):
    name = "stand-in"

    def start(self) -> None:
        self._make_directories()
        Database(self._database)
        self._make_admin()
        self.hub_start()
        self._start_topurl()
        self._furnish()
        self._write_cli_configuration()
        self.builder_start()

    @property
    def _database(self) -> Path:
        return self.work / "hub.sqlite"

    def sql(self, script: str, **values: str) -> None:
        run_script(self._database, script, values)

    def hub_start(
        self,
        *,
        policy: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        plugin_conf: str = "",
    ) -> None:
        conf = self._hub_configuration(settings or {}, policy)
        self._write_etc("koji-hub/hub.conf", conf)
        self._write_etc(f"koji-hub/plugins/{PLUGIN}.conf", plugin_conf)
        options = ["--database", self._database, "--port", self._hub_port]
        self._hub = self._start_part("hub", "server", "koji-hub/hub.conf", *options)
        self._processes.wait_until("hub", self._hub, lambda: listens(self._hub_port), 60)
        self._check_hub()

    def builder_start(
        self, *, settings: Mapping[str, str] | None = None, plugin_conf: str = ""
    ) -> None:
        self._write_etc("kojid/kojid.conf", self._builder_configuration(settings))
        self._write_etc(f"kojid/plugins/{PLUGIN}.conf", plugin_conf)
        started = time.time()
        self._builder = self._start_part("builder", "builder", "kojid/kojid.conf")
        self._wait_for_builder(started)

    def _start_part(self, role: str, module: str, config: str, *options: object):  # type: ignore[no-untyped-def]
        argv = [sys.executable, "-m", f"standin.{module}", "--config", self._etc / config]
        argv += ["--etc", self._etc, *options]
        path = f"{self._python_path()}:{HERE}"
        return self._processes.start(role, argv, env={"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"})

    def _cli_program(self) -> Path:
        """That of PyPI, which is beside Python in a virtual environment."""
        return Path(sys.executable).parent / "koji"

    def _python_path(self) -> str:
        return str(REPOSITORY)


class HubAlone(StandInKoji):
    """With nothing in it but the admin; and no builder."""

    def __init__(self, plugin: str, work: Path, logs: Path) -> None:
        super().__init__(work, logs)
        self._plugin = plugin

    def start(self) -> None:
        self._make_directories()
        (self._extra_plugins("hub") / "of_the_test.py").write_text(self._plugin)
        Database(self._database)
        self._make_admin()
        self.hub_start()


def running_stand_in_hub(plugin: str) -> AbstractContextManager[HubAlone]:
    """plugin -- the source of one."""
    return running(lambda work, logs: HubAlone(plugin, work, logs))


def running_stand_in() -> AbstractContextManager[StandInKoji]:
    return running(StandInKoji)
