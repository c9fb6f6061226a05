"""Where the Koji under test is, and what is missing to run it.

Nothing of Koji is in this repository: it is an unpacked source tree (KOJI_TEST_ROOT),
or an installed koji-hub.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Module, and what brings it: a Debian package, or the extra of our setup.py.
MODULES = {
    "gunicorn": "the extra koji-test",
    "multilib": "the extra koji-test",
    "requests": "the extra koji-test",
    "six": "the extra koji-test",
    "dateutil": "the extra koji-test",
    "defusedxml": "the extra koji-test",
    "psycopg2": "python3-psycopg2",
    "rpm": "python3-rpm",
    "dnf": "python3-dnf",
    "libcomps": "python3-libcomps",
    "librepo": "python3-librepo",
    "Cheetah": "python3-cheetah",
}
PROGRAMS = {"env": "coreutils", "setpriv": "util-linux", "unshare": "util-linux", "mount": "mount"}
POSTGRESQL_PROGRAMS = ("initdb", "postgres", "psql")


class WrongRoot(Exception):
    """KOJI_TEST_ROOT is set, but is no Koji: somebody's mistake, so no reason to skip."""


@dataclass(frozen=True)
class Install:
    """The parts of one Koji. python_path comes before everything else that is importable."""

    python_path: tuple[Path, ...]
    kojid: Path
    cli: Path
    schema: Path


def find() -> Install | None:
    root = os.environ.get("KOJI_TEST_ROOT")
    return _unpacked(Path(root).resolve()) if root else _installed()


def _unpacked(root: Path) -> Install:
    install = Install(
        (root, root / "cli"),
        root / "builder" / "kojid",
        root / "cli" / "koji",
        root / "schemas" / "schema.sql",
    )
    for path in (root / "kojihub", install.kojid, install.cli, install.schema):
        if not path.exists():
            raise WrongRoot(f"KOJI_TEST_ROOT is {root}, but there is no {path}")
    return install


def _installed() -> Install | None:
    hub = importlib.util.find_spec("kojihub")
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
    kojid = shutil.which("kojid", path=path)
    cli = shutil.which("koji", path="/usr/bin")  # a venv's own `koji` is of another version
    schema = Path("/usr/share/koji/schema.sql")
    if hub is None or hub.origin is None or kojid is None or cli is None or not schema.exists():
        return None
    # Its neighbour is the `koji` of the same version; the venv may have another one.
    return Install((Path(hub.origin).parents[1],), Path(kojid), Path(cli), schema)


def missing() -> str | None:
    """Why no real Koji can run here, in one sentence; None when one can."""
    if find() is None:
        return (
            "there is no Koji: KOJI_TEST_ROOT does not name an unpacked one, and"
            " kojihub, kojid, koji and /usr/share/koji/schema.sql are not all installed"
        )
    absent = [
        f"the module {name} ({source})"
        for name, source in MODULES.items()
        if importlib.util.find_spec(name) is None
    ]
    # tests/koji itself would do for a package without a file, hence the look at the origin.
    client = importlib.util.find_spec("koji")
    if client is None or client.origin is None:
        absent.append("the module koji (the extra koji-test)")
    absent += [
        f"the program {name} ({package})"
        for name, package in PROGRAMS.items()
        if shutil.which(name) is None
    ]
    absent += [
        f"the program {name} (postgresql)"
        for name in POSTGRESQL_PROGRAMS
        if postgresql_program(name) is None
    ]
    if absent:
        return "to run the real Koji there is missing: " + ", ".join(absent)
    return None if can_mount() else "mounting in a private name space is not permitted here"


def postgresql_program(name: str) -> Path | None:
    """Of the newest PostgreSQL; Debian keeps its programs off the PATH."""

    def version(program: Path) -> float:
        return float(program.parents[1].name)

    found = sorted(Path("/usr/lib/postgresql").glob(f"[0-9]*/bin/{name}"), key=version)
    on_path = shutil.which(name)
    if found:
        return found[-1]
    return Path(on_path) if on_path else None


def unshare() -> list[str]:
    """A mount name space of one's own; without being root, in a user name space too."""
    return ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount"]


def can_mount() -> bool:
    mount = ["mount", "-t", "overlay", "-o", "ro,lowerdir=/var:/etc", "overlay", "/etc"]
    return subprocess.run([*unshare(), *mount], capture_output=True).returncode == 0


def python_path(install: Install, repository: Path) -> str:
    """PYTHONPATH for the hub, kojid and the command line: their own Koji, then our library."""
    return os.pathsep.join(str(path) for path in (*install.python_path, repository))


def python() -> str:
    return sys.executable
