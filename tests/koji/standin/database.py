"""What the stand-in hub remembers: one SQLite file, with Koji's names for tables and columns.

Tests and hub plugins write SQL, so the names matter. Times are seconds since the epoch.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SCHEMA = """
CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL,
    password TEXT, status INTEGER NOT NULL DEFAULT 0, usertype INTEGER NOT NULL DEFAULT 0);
CREATE TABLE permissions (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL);
CREATE TABLE user_perms (user_id INTEGER NOT NULL, perm_id INTEGER NOT NULL, creator_id INTEGER);
CREATE TABLE sessions (id INTEGER PRIMARY KEY AUTOINCREMENT, user_id INTEGER NOT NULL,
    key TEXT NOT NULL, master INTEGER, callnum INTEGER, authtype INTEGER, start_time REAL,
    exclusive BOOLEAN NOT NULL DEFAULT FALSE, expired BOOLEAN NOT NULL DEFAULT FALSE,
    closed BOOLEAN NOT NULL DEFAULT FALSE);

CREATE TABLE channels (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL,
    enabled BOOLEAN NOT NULL DEFAULT TRUE, description TEXT, comment TEXT);
CREATE TABLE host (id INTEGER PRIMARY KEY AUTOINCREMENT, user_id INTEGER NOT NULL,
    name TEXT UNIQUE NOT NULL, arches TEXT, capacity REAL NOT NULL DEFAULT 2.0, description TEXT,
    comment TEXT, enabled BOOLEAN NOT NULL DEFAULT TRUE, task_load REAL NOT NULL DEFAULT 0.0,
    ready BOOLEAN NOT NULL DEFAULT FALSE, update_time REAL, data JSON);
CREATE TABLE host_channels (host_id INTEGER NOT NULL, channel_id INTEGER NOT NULL);
CREATE TABLE task (id INTEGER PRIMARY KEY AUTOINCREMENT, state INTEGER NOT NULL,
    create_time REAL NOT NULL, start_time REAL, completion_time REAL, channel_id INTEGER NOT NULL,
    host_id INTEGER, parent INTEGER, label TEXT, waiting BOOLEAN, awaited BOOLEAN,
    owner INTEGER NOT NULL, method TEXT NOT NULL, arch TEXT NOT NULL, priority INTEGER NOT NULL,
    weight REAL NOT NULL DEFAULT 1.0, request TEXT NOT NULL, result TEXT);
CREATE TABLE scheduler_task_refusals (id INTEGER PRIMARY KEY AUTOINCREMENT,
    task_id INTEGER NOT NULL, host_id INTEGER NOT NULL, by_host BOOLEAN NOT NULL,
    soft BOOLEAN NOT NULL, msg TEXT, time REAL NOT NULL);
CREATE TABLE scheduler_sys_data (name TEXT PRIMARY KEY, data JSON);
CREATE TABLE scheduler_log_messages (id INTEGER PRIMARY KEY AUTOINCREMENT, task_id INTEGER,
    host_id INTEGER, msg_time REAL NOT NULL, msg TEXT NOT NULL);

CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL);
CREATE TABLE tag (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL, arches TEXT,
    perm_id INTEGER, locked BOOLEAN NOT NULL DEFAULT FALSE,
    maven_support BOOLEAN NOT NULL DEFAULT FALSE,
    maven_include_all BOOLEAN NOT NULL DEFAULT FALSE, extra JSON NOT NULL DEFAULT '{}');
CREATE TABLE tag_inheritance (tag_id INTEGER NOT NULL, parent_id INTEGER NOT NULL,
    priority INTEGER NOT NULL DEFAULT 0);
CREATE TABLE build_target (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL,
    build_tag INTEGER NOT NULL, dest_tag INTEGER NOT NULL);
CREATE TABLE package (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL);
CREATE TABLE tag_packages (tag_id INTEGER NOT NULL, package_id INTEGER NOT NULL,
    owner INTEGER NOT NULL, blocked BOOLEAN NOT NULL DEFAULT FALSE, extra_arches TEXT,
    PRIMARY KEY (tag_id, package_id));
CREATE TABLE tag_listing (build_id INTEGER NOT NULL, tag_id INTEGER NOT NULL,
    create_event INTEGER NOT NULL, PRIMARY KEY (build_id, tag_id));

CREATE TABLE content_generator (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL);
CREATE TABLE cg_users (cg_id INTEGER NOT NULL, user_id INTEGER NOT NULL);
CREATE TABLE build_reservations (build_id INTEGER PRIMARY KEY, token TEXT NOT NULL);
CREATE TABLE buildroot (id INTEGER PRIMARY KEY AUTOINCREMENT, cg_id INTEGER NOT NULL);
CREATE TABLE volume (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL);
CREATE TABLE build (id INTEGER PRIMARY KEY AUTOINCREMENT, pkg_id INTEGER NOT NULL,
    version TEXT NOT NULL, release TEXT NOT NULL, epoch INTEGER,
    draft BOOLEAN NOT NULL DEFAULT FALSE, state INTEGER NOT NULL,
    volume_id INTEGER NOT NULL DEFAULT 0, task_id INTEGER, owner INTEGER NOT NULL,
    create_event INTEGER NOT NULL, start_time REAL, completion_time REAL, source TEXT, extra JSON,
    cg_id INTEGER, UNIQUE (pkg_id, version, release));
CREATE TABLE btype (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL);
CREATE TABLE build_types (build_id INTEGER NOT NULL, btype_id INTEGER NOT NULL);
CREATE TABLE archivetypes (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL,
    description TEXT NOT NULL, extensions TEXT NOT NULL, compression_type TEXT);
CREATE TABLE archiveinfo (id INTEGER PRIMARY KEY AUTOINCREMENT, type_id INTEGER NOT NULL,
    btype_id INTEGER NOT NULL, build_id INTEGER NOT NULL, buildroot_id INTEGER,
    filename TEXT NOT NULL, size INTEGER NOT NULL, checksum TEXT NOT NULL,
    checksum_type INTEGER NOT NULL, metadata_only BOOLEAN NOT NULL DEFAULT FALSE, extra JSON);
CREATE TABLE image_archives (archive_id INTEGER PRIMARY KEY, arch TEXT NOT NULL);
CREATE TABLE archive_components (archive_id INTEGER NOT NULL, component_id INTEGER NOT NULL,
    PRIMARY KEY (archive_id, component_id));
CREATE TABLE external_repo (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL,
    url TEXT);
CREATE TABLE rpminfo (id INTEGER PRIMARY KEY AUTOINCREMENT, build_id INTEGER, buildroot_id INTEGER,
    name TEXT NOT NULL, version TEXT NOT NULL, release TEXT NOT NULL, epoch INTEGER,
    arch TEXT NOT NULL, draft BOOLEAN, external_repo_id INTEGER NOT NULL DEFAULT 0,
    payloadhash TEXT NOT NULL, size INTEGER NOT NULL, buildtime INTEGER NOT NULL,
    metadata_only BOOLEAN NOT NULL DEFAULT FALSE, extra JSON);
CREATE TABLE archive_rpm_components (archive_id INTEGER NOT NULL, rpm_id INTEGER NOT NULL,
    PRIMARY KEY (archive_id, rpm_id));

INSERT INTO permissions (name) VALUES ('admin'), ('image'), ('tag'), ('target'), ('host'), ('cg');
INSERT INTO channels (name) VALUES ('default'), ('createrepo'), ('maven'), ('livecd'),
    ('appliance'), ('vm'), ('image');
INSERT INTO volume (id, name) VALUES (0, 'DEFAULT');
INSERT INTO btype (name) VALUES ('rpm'), ('maven'), ('win'), ('image');
INSERT INTO external_repo (id, name) VALUES (0, 'INTERNAL');
"""

# Which files a build may have, by their extensions; ../traces has the words for iso.
ARCHIVE_TYPES = (
    ("zip", "zip", "zip"),
    ("tar", "tar, packed or not", "tar tar.gz tar.bz2 tar.xz tgz"),
    ("xml", "xml", "xml"),
    ("img", "disk or file system", "img"),
    ("raw", "raw disk", "raw"),
    ("raw-gz", "raw disk, gzip", "raw.gz"),
    ("raw-xz", "raw disk, xz", "raw.xz"),
    ("qcow2", "qcow2 disk", "qcow2"),
    ("qcow2-compressed", "qcow2 disk, packed", "qcow2.gz qcow2.xz"),
    ("vhdx", "vhdx disk", "vhdx vhdx.gz vhdx.xz"),
    ("ova", "virtual appliance", "ova"),
    ("vmlinuz", "kernel", "vmlinuz vmlinuz.gz vmlinuz.xz"),
    ("squashfs", "squashfs", "squashfs"),
    ("erofs", "erofs", "erofs"),
    ("json", "json", "json"),
    ("yaml", "yaml", "yaml yml"),
    ("ks", "kickstart", "ks"),
    ("iso", "CD/DVD Image", "iso"),
    ("iso-compressed", "CD or DVD, packed", "iso.gz iso.xz"),
    ("cfg", "configuration", "cfg conf ini properties"),
    ("txt", "text", "txt"),
    ("packages", "list of packages", "packages"),
    ("manifest", "manifest", "manifest"),
    ("sha256", "checksum", "sha256"),
    ("sig", "signature", "sig"),
)

_PLACE = re.compile(r"%\((\w+)\)[a-z]")


def utc(seconds: float | None) -> str | None:
    """As a hub writes a time."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(" ")


def with_times(row: Row, *names: str) -> Row:
    """Each time twice, as a hub answers it: NAME_time for people, NAME_ts for programs."""
    for name in names:
        row[f"{name}_ts"] = row[f"{name}_time"]
        row[f"{name}_time"] = utc(row[f"{name}_time"])
    return row


class Database:
    """One connection; its user takes care that one thread at a time has it."""

    def __init__(self, path: Path) -> None:
        new = not path.exists()
        self._connection = sqlite3.connect(
            path,
            timeout=30,
            isolation_level=None,  # transaction() begins them
            detect_types=sqlite3.PARSE_DECLTYPES,
            check_same_thread=False,
        )
        self._connection.row_factory = _as_dict
        self._connection.execute("PRAGMA synchronous = OFF")  # nobody wants it after a power cut
        if new:
            self._connection.executescript(SCHEMA)
            for name, description, extensions in ARCHIVE_TYPES:
                self.insert(
                    "archivetypes", name=name, description=description, extensions=extensions
                )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Begun by the first write of others, too: a test's sql() waits for it to end."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        self._connection.execute("SAVEPOINT here")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK TO here")
            raise
        finally:
            self._connection.execute("RELEASE here")

    def changes(self) -> int:
        """Grows with every row that is written."""
        return self._connection.total_changes

    def rows(self, sql: str, values: Mapping[str, Any] | None = None, /, **more: Any) -> list[Row]:
        """sql has %(name)s where a value goes; one that is a collection becomes (a, b, ...)."""
        given = {**(values or {}), **more}
        arguments: Row = {}

        def place(match: re.Match[str]) -> str:
            name = match[1]
            value = given[name]
            if isinstance(value, Collection) and not isinstance(value, (str, bytes)):
                names = [f"{name}_{number}" for number in range(len(value))]
                arguments.update(zip(names, value))
                return "(" + ", ".join(f":{one}" for one in names) + ")"
            arguments[name] = value
            return f":{name}"

        statement = _PLACE.sub(place, sql)
        found: list[Row] = self._connection.execute(statement, arguments).fetchall()
        return found

    def row(self, sql: str, /, **values: Any) -> Row | None:
        return next(iter(self.rows(sql, **values)), None)

    def value(self, sql: str, /, **values: Any) -> Any:
        """Of the first column of the first row; None where there is none."""
        row = self.row(sql, **values)
        return None if row is None else next(iter(row.values()))

    def values(self, sql: str, /, **values: Any) -> list[Any]:
        return [next(iter(row.values())) for row in self.rows(sql, **values)]

    def insert(self, table: str, /, **columns: Any) -> int:
        """The id of the new row."""
        names = ", ".join(columns)
        places = ", ".join(f":{name}" for name in columns)
        cursor = self._connection.execute(
            f"INSERT INTO {table} ({names}) VALUES ({places})", columns
        )
        return int(cursor.lastrowid or 0)

    def event(self) -> int:
        return self.insert("events", time=time.time())


def run_script(path: Path, script: str, values: Mapping[str, str]) -> None:
    """From outside the hub: statements with :'name' where a value goes."""
    script = re.sub(r":'(\w+)'", r":\1", script)
    connection = sqlite3.connect(path, timeout=30)
    try:
        with connection:
            statement = ""
            for piece in script.split(";")[:-1]:
                statement += f"{piece};"
                if sqlite3.complete_statement(statement):
                    connection.execute(statement, dict(values))
                    statement = ""
    finally:
        connection.close()


def _as_dict(cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> Row:
    return {column[0]: value for column, value in zip(cursor.description, row)}


sqlite3.register_converter("BOOLEAN", lambda text: text != b"0")
sqlite3.register_converter("JSON", json.loads)
