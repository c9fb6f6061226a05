"""The job as files for the guest: settings, set-up steps and commands; job/ then works on them.

Everything that a package manager will read is written here, once for each kind
of package manager; the guest takes what fits it. Template text goes into files
only, never into a command line or a script of ours.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

from .spec import BuildSpec
from .template import Command, Package, Repository

STATUS_PORT = "org.koji.indirection.status"
LOG_PORT = "org.koji.indirection.log"
SAMPLE_SECONDS = 5
MEDIA_SERIAL = "media"  # of the disk: what the guest finds it by

DIRECTORY = "etc/koji-indirection"

# Content and mode of a file, by its path relative to the guest's root.
Files = dict[str, tuple[bytes, int]]


@dataclass(frozen=True)
class GuestFile:
    """A file to be put in place in the guest.

    data -- its bytes, or where on the host they are.
    mode, owner -- as in template.File.
    """

    name: str
    data: bytes | Path
    mode: int | None = None
    owner: str | None = None


@dataclass(frozen=True)
class Terminal:
    """Whose shell runs in the guest; type is the value of TERM, sizes are in characters."""

    type: str
    rows: int
    columns: int


@dataclass(frozen=True)
class GuestJob:
    """All that the guest is to do, in the order of the fields.

    network -- "user", a libvirt network's name, or None: what to wait for.
    media -- (name, file system) of a disk with packages, e.g. ("vdc", "iso9660"), or None.
    commands -- those of the template that run; skipped -- those for other arches.
    environment -- more variables for set-up and commands.
    workspace -- the device with the workspace's file system.
    input -- the input image's device, or its path in the workspace.
    serial_reports -- whether status and log go to serial ports: there are no virtio ones.
    results_dir -- the directory in the workspace where the first result is expected.
    terminal -- None; or where a shell runs instead of the commands, which only lie in place.
    shell_tty -- what the log's stream then is, in the guest.
    """

    commands: Sequence[Command]
    network: str | None = None
    media: tuple[str, str] | None = None
    repositories: Sequence[Repository] = ()
    packages: Sequence[Package] = ()
    files: Sequence[GuestFile] = ()
    skipped: Sequence[Command] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    workspace: str = "/dev/vdb1"
    input: str = "/input_image.raw"
    results_dir: str = "/"
    terminal: Terminal | None = None
    shell_tty: str = "/dev/hvc0"
    serial_reports: bool = False

    @property
    def steps(self) -> tuple[str, ...]:
        """The set-up steps, in Oz's order."""
        wanted = {
            "network": self.network is not None,
            "media": self.media is not None,
            "repositories": bool(self.repositories) or self.media is not None,
            "packages": bool(self.packages),
            "files": bool(self.files),
        }
        return tuple(step for step, is_wanted in wanted.items() if is_wanted)


def results_directory(spec: BuildSpec) -> str:
    """The directory in the workspace of the first result, as far as no glob is in it."""
    parts = spec.results[0].split("/")[1:-1]
    plain = []
    for part in parts:
        if re.search(r"[*?\[]", part):
            break
        plain.append(part)
    return "/" + "/".join(plain)


def job_files(job: GuestJob) -> Files:
    """What is to be below DIRECTORY in the guest, but for the content of files on the host."""
    files: Files = {
        "run": (_script("run.sh"), 0o755),
        "settings": (_settings(job), 0o644),
        "environment": (_environment(job), 0o600),
    }
    if job.steps:
        files["setup"] = (_script("setup.sh"), 0o755)
        files["udhcpc"] = (_script("udhcpc.sh"), 0o755)
    if job.terminal is not None:
        files["shell"] = (_script("shell.sh"), 0o755)
    if job.media is not None:
        # apt reads as a user of its own, who need not see what is on somebody's disk.
        files["apt-media.conf"] = (b'APT::Sandbox::User "root";\n', 0o644)
    for path, content in repository_files(job.repositories).items():
        files[f"repositories/{path}"] = (content.encode(), 0o644)
    if job.packages:
        names = "".join(f"{package.name}\n" for package in job.packages)
        files["packages"] = (names.encode(), 0o644)
    for number, file in enumerate(job.files, start=1):
        files.update(_guest_file(f"files/{number:04}", file))
    files.update(_commands(job))
    return {f"{DIRECTORY}/{name}": content for name, content in files.items()}


def host_files(job: GuestJob) -> dict[str, Path]:
    """Path in the guest -> file on the host, for those files that are too large for memory."""
    return {
        f"{DIRECTORY}/files/{number:04}.data": file.data
        for number, file in enumerate(job.files, start=1)
        if isinstance(file.data, Path)
    }


def _settings(job: GuestJob) -> bytes:
    device, file_system = job.media or ("", "")
    values = {
        "STATUS_PORT": STATUS_PORT,
        "LOG_PORT": LOG_PORT,
        "SAMPLE_SECONDS": str(SAMPLE_SECONDS),
        # The ports beside that of the console: what a guest has that has no virtio driver.
        "STATUS_TTY": "/dev/ttyS1" if job.serial_reports else "",
        "LOG_TTY": "/dev/ttyS2" if job.serial_reports else "",
        "WORKSPACE": job.workspace,
        "INPUT": job.input,
        "RESULTS_DIR": job.results_dir,
        "DISKS": " ".join(_disks(job)),
        "SETUP": " ".join(job.steps),
        "NETWORK": job.network or "",
        "MEDIA_DEVICE": f"/dev/{device}" if device else "",
        "MEDIA_FS": file_system,
    }
    if job.terminal is not None:
        values |= {
            "SHELL_TTY": values["LOG_TTY"] or job.shell_tty,
            "TERMINAL_TYPE": job.terminal.type,
            "TERMINAL_SIZE": f"rows {job.terminal.rows} cols {job.terminal.columns}",
        }
    return "".join(f"{key}={shlex.quote(value)}\n" for key, value in values.items()).encode()


def _disks(job: GuestJob) -> list[str]:
    """DEVICE:SERIAL of each disk that the guest has besides its own."""
    disks = [f"{job.workspace[:-1]}:workspace"]
    if job.input.startswith("/dev/"):
        disks.append(f"{job.input}:input")
    if job.media is not None:
        disks.append(f"/dev/{job.media[0]}:{MEDIA_SERIAL}")
    return disks


def _environment(job: GuestJob) -> bytes:
    lines = (f"export {key}={shlex.quote(value)}\n" for key, value in job.environment.items())
    return "".join(lines).encode()


def _guest_file(stem: str, file: GuestFile) -> Files:
    files: Files = {f"{stem}.path": (f"{file.name}\n".encode(), 0o644)}
    if isinstance(file.data, bytes):
        files[f"{stem}.data"] = (file.data, 0o600)
    if file.mode is not None:
        files[f"{stem}.mode"] = (f"{file.mode:04o}\n".encode(), 0o644)
    if file.owner is not None:
        files[f"{stem}.owner"] = (f"{file.owner}\n".encode(), 0o644)
    return files


def _commands(job: GuestJob) -> Files:
    files: Files = {}
    skipped = "".join(
        f"=== command {command.name} is for {command.arch} only: not run\n"
        for command in job.skipped
    )
    for number, command in enumerate(job.commands, start=1):
        head = f"{skipped}=== command {number} of {len(job.commands)}: {command.name}\n"
        files[f"commands/{number:04}.cmd"] = (f"{command.text}\n".encode(), 0o755)
        files[f"commands/{number:04}.head"] = (head.encode(), 0o644)
        skipped = ""
    return files


def _script(name: str) -> bytes:
    return resources.files("koji_indirection").joinpath("job", name).read_bytes()


# --- repositories -----------------------------------------------------------------------------


def spec_repositories(addresses: Sequence[str]) -> tuple[Repository, ...]:
    """A build spec's own repositories: unsigned, and gone when the job ends."""
    return tuple(
        Repository(f"repo-{number}", address, persisted=False)
        for number, address in enumerate(addresses, start=1)
    )


def repository_files(repositories: Sequence[Repository]) -> dict[str, str]:
    """For each repository: its name and id, and its file for dnf and yum, apt and zypper.

    NNNN.temporary is there for one that is to be removed before the job ends. A
    repository with a SUITE is apt's alone.
    """
    files: dict[str, str] = {}
    taken: set[str] = set()
    for number, repository in enumerate(repositories, start=1):
        stem = f"{number:04}"
        identity = _identity(repository.name, taken)
        url, _, suite = repository.url.partition(" ")
        files[f"{stem}.name"] = f"{repository.name}\n"
        files[f"{stem}.id"] = f"{identity}\n"
        files[f"{stem}.apt"] = _apt_source(repository, url, suite)
        if url.lower().startswith("https:") and not repository.sslverify:
            files[f"{stem}.apt-conf"] = _apt_without_verification(url)
        if not suite:
            files[f"{stem}.dnf"] = _dnf_repository(repository, identity, url)
            files[f"{stem}.zypper"] = _zypper_repository(repository, identity, url)
        if not repository.persisted:
            files[f"{stem}.temporary"] = ""
    return files


def _identity(name: str, taken: set[str]) -> str:
    """A name that is safe as a file's and a section's."""
    plain = re.sub("[^A-Za-z0-9]+", "-", name).strip("-")[:50] or "repository"
    identity, number = f"koji-indirection-{plain}", 1
    while identity.lower() in taken:
        number += 1
        identity = f"koji-indirection-{plain}-{number}"
    taken.add(identity.lower())
    return identity


def _dnf_repository(repository: Repository, identity: str, url: str) -> str:
    return (
        f"[{identity}]\nname={repository.name}\nbaseurl={url}\nenabled=1\n"
        # Unreachable must be an error: what is to be installed would come from elsewhere.
        f"skip_if_unavailable=0\ngpgcheck={repository.signed:d}\n"
        # A guest may want the metadata signed, too.
        + ("" if repository.signed else "repo_gpgcheck=0\n")
        + f"sslverify={repository.sslverify:d}\n"
    )


def _zypper_repository(repository: Repository, identity: str, url: str) -> str:
    if not repository.sslverify and url.lower().startswith("https:"):
        url += "&ssl_verify=no" if "?" in url else "?ssl_verify=no"
    return (
        f"[{identity}]\nname={repository.name}\nbaseurl={url}\ntype=rpm-md\nenabled=1\n"
        f"autorefresh=1\ngpgcheck={repository.signed:d}\n"
    )


def _apt_source(repository: Repository, url: str, suite: str) -> str:
    options = "" if repository.signed else "[trusted=yes] "
    return f"deb {options}{url} {suite or './'}\n"


def _apt_without_verification(url: str) -> str:
    host = urlsplit(url).hostname or ""
    return "".join(f'Acquire::https::{host}::Verify-{what} "false";\n' for what in ("Peer", "Host"))
