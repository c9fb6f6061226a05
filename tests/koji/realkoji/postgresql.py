"""A private PostgreSQL: one cluster in one directory, reached over one Unix socket."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Mapping
from pathlib import Path

from harness.processes import Processes, StartFailed

from .install import postgresql_program

DATABASE = "koji"
# Nobody wants these data after the test; and all its shared memory is in its directory.
SETTINGS = ("fsync=off", "full_page_writes=off", "dynamic_shared_memory_type=mmap")


class PostgreSQL:
    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.directory = processes.work / "postgresql"
        self._as_user = self._make_directory()

    def _make_directory(self) -> list[str]:
        """The command's beginning that makes us somebody whom the server accepts: not root."""
        self.directory.mkdir(mode=0o700)
        if os.geteuid() != 0:
            return []
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            user = pwd.getpwnam("nobody")
        os.chown(self.directory, user.pw_uid, user.pw_gid)
        return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]

    def start(self) -> None:
        data = self.directory / "data"
        self._run(
            *self._as_user,
            postgresql_program("initdb"),
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            f"--username={DATABASE}",
            f"--pgdata={data}",
        )
        options = [word for setting in SETTINGS for word in ("-c", setting)]
        options += ["-c", "listen_addresses=", "-c", f"unix_socket_directories={self.directory}"]
        server = self._processes.start(
            "postgresql", [*self._as_user, postgresql_program("postgres"), "-D", data, *options]
        )
        pid_file = data / "postmaster.pid"

        def ready() -> bool:
            return pid_file.exists() and "ready" in pid_file.read_text()

        self._processes.wait_until("postgresql", server, ready, 30)
        self._psql("postgres", f"CREATE DATABASE {DATABASE};")

    def load(self, script: Path) -> None:
        self.execute(script.read_text())

    def execute(self, sql: str, **values: str) -> None:
        """:'name' in the SQL is the value of that name, quoted."""
        self._psql(DATABASE, sql, values)

    def _psql(self, database: str, sql: str, values: Mapping[str, str] | None = None) -> None:
        variables = [f"--set={name}={value}" for name, value in (values or {}).items()]
        self._run(
            postgresql_program("psql"),
            "--no-psqlrc",
            "--quiet",
            "--set=ON_ERROR_STOP=1",
            f"--host={self.directory}",
            f"--username={DATABASE}",
            *variables,
            database,
            text=sql,
        )

    def _run(self, *argv: object, text: str = "") -> None:
        done = subprocess.run(
            [str(word) for word in argv],
            input=text,
            capture_output=True,
            text=True,
            cwd=self.directory.parent,
            env=self._processes.environment("postgresql", {"LC_ALL": "C"}),
        )
        if done.returncode != 0:
            raise StartFailed(f"{argv} failed: {done.stderr.strip()}")
