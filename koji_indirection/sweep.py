"""What earlier builds have left on a builder that was killed or rebooted: found, and removed.

    python -m koji_indirection.sweep CONFIG

kojid runs it when the plugin loads, in a process of its own: nothing that happens here may
break kojid, or keep it waiting. What belongs to a build that lives, or to another user, stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import appliancesockets, jobdir
from .config import Settings, load_settings
from .domain import NAME_PREFIX
from .errors import UsageError

log = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 300


def start(config: Path, logger: logging.Logger) -> threading.Thread:
    """Sweep in the background; what comes of it goes to the logger, in the returned thread."""
    thread = threading.Thread(target=_run, args=(config, logger), name="sweep", daemon=True)
    thread.start()
    return thread


def _run(config: Path, logger: logging.Logger) -> None:
    argv = [sys.executable, "-m", "koji_indirection.sweep", str(config)]
    try:
        # Into a file: a task that is forked meanwhile would hold a pipe open until it ends.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=jobdir.python_environment(),
                cwd="/",
                timeout=_TIMEOUT_SECONDS,
            )
            output.seek(0)
            lines = output.read().decode(errors="replace").splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("what earlier builds have left was not looked for: %s", error)
        return
    for line in lines:
        logger.log(logging.INFO if done.returncode == 0 else logging.WARNING, "%s", line)


def main(config: Path) -> int:
    """Sweep what this configuration's builds leave; the exit status is 1 if it is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        settings = load_settings([config])
    except UsageError as error:
        log.warning("what earlier builds have left was not looked for: %s", error)
        return 1
    runs = sweep_runs(runs_directory(settings))
    jobs = jobdir.sweep([settings.work_dir, jobdir.RUN_PARENT])
    runtime = os.environ.get("XDG_RUNTIME_DIR")  # of a user who is not root
    sockets = appliancesockets.sweep({jobdir.RUN_PARENT, Path(runtime or jobdir.RUN_PARENT)})
    for path in [*runs, *jobs, *sockets]:
        log.info("removed %s, which a dead build has left", path)
    for uri in [settings.connect] if settings.connect else ["qemu:///system"]:
        for name in _sweep_uri(uri):
            log.info("destroyed the VM %s, which a dead build has left", name)
    return 0


# --- runs of tasks ----------------------------------------------------------------------------


def runs_directory(settings: Settings) -> Path:
    """Where links say which directories of runs there are: kojid alone knows its workdir."""
    return settings.cache_dir / "runs"


def note_run(runs: Path, path: Path) -> None:
    """Remember the directory of a run, until forget_run()."""
    runs.mkdir(parents=True, exist_ok=True)
    _link(runs, path).symlink_to(path)


def forget_run(runs: Path, path: Path) -> None:
    """After the directory has been removed."""
    _link(runs, path).unlink(missing_ok=True)


def _link(runs: Path, path: Path) -> Path:
    return runs / f"{path.parent.name}-{path.name}"


def sweep_runs(runs: Path) -> list[Path]:
    """Remove the directories of runs that are dead; returns them."""
    removed = []
    for link in sorted(runs.glob("*")):
        try:
            path = link.readlink()
        except OSError:
            continue  # not a link of ours, or gone
        # The cache belongs to this user; what it names is checked all the same.
        if not path.is_absolute() or not path.name.startswith("run-") or path.is_symlink():
            continue
        there = path.is_dir()
        if jobdir.remove_if_dead(path):
            link.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # the task's own, if no other run is in it
            removed += [path] if there else []
    return removed


# --- VMs --------------------------------------------------------------------------------------


def _sweep_uri(uri: str) -> list[str]:
    """libvirtd ends a VM with the process that started it; unless both died at one time."""
    try:
        import libvirt
    except ImportError:
        return []
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        log.debug("libvirt %s: %s", uri, error)
        return []
    try:
        return sweep_domains(connection.listAllDomains())
    finally:
        connection.close()


def sweep_domains(domains: Iterable[Any]) -> list[str]:
    """Destroy the VMs among these (libvirt.virDomain) whose build is dead; returns their names.

    Of tasks only: the sockets of a build on the command line may be in a /tmp that kojid, as a
    service, does not see.
    """
    import libvirt

    destroyed = []
    for domain in domains:
        with contextlib.suppress(libvirt.libvirtError):  # it ended meanwhile
            name = domain.name()
            if name.startswith(f"{NAME_PREFIX}-task-"):
                sockets = _socket_directory(domain.XMLDesc())
                if sockets is not None and jobdir.is_dead(sockets):
                    domain.destroy()
                    destroyed.append(name)
    return destroyed


def _socket_directory(xml: str) -> Path | None:
    """Where the build of a VM has its sockets: as long as it lives, it has that locked."""
    from lxml import etree

    sources = etree.fromstring(xml.encode()).iter("source")
    sockets = [one.get("path", "") for one in sources if one.get("mode") == "bind"]
    directories = {Path(path).parent for path in sockets}
    return directories.pop() if len(directories) == 1 else None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
