"""Real builds in real VMs: the installed command, run as a user runs it, seen from outside.

Every test gets `build`; after it nothing of the test's builds may be left on the machine.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import pytest
from lxml import etree
from lxml.builder import E

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGES = REPOSITORY / ".cache" / "images"
COMMAND = Path(sys.executable).with_name("koji-indirection")
ROOT_OFFSET = 1024 * 1024  # of the only partition, in every example image

# The commands of a template: (name, shell text); or a file.
Commands = Union[Sequence[tuple[str, str]], Path]
RESULT = "mkdir -p /mnt/results/images && echo made > /mnt/results/images/boot.iso"
# Small and quick; a test's own options come later on the command line and win.
SMALL = ("--memory", "256M", "--cpus", "1", "--workspace-size", "1G", "--boot-timeout", "2m")


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return value


def run(*argv: object, **options: Any) -> str:
    words = [str(word) for word in argv]
    return subprocess.run(words, check=True, capture_output=True, text=True, **options).stdout


# Images


@pytest.fixture(scope="session")
def tiny_image() -> Path:
    return _image("tiny", "tiny-guest")


@pytest.fixture(scope="session")
def utility_image() -> Path:
    return _image("utility", "debian-utility")


@pytest.fixture(scope="session")
def input_image() -> Path:
    return _image("input", "debian-input")


@pytest.fixture(scope="session")
def bare_image() -> Path:
    """A utility image without tools or repositories."""
    return _image("bare", "debian-utility", "--bare")


def special_image(kind: str) -> Path:
    """A utility image of this kind: images/make-image --help lists them."""
    return _made(kind, REPOSITORY / "tests" / "guest" / "images" / "make-image", kind)


def _image(name: str, recipe: str, *options: str) -> Path:
    return _made(name, REPOSITORY / "examples" / recipe / "make-image", *options)


def _made(name: str, *command: object) -> Path:
    """What `make images` makes; made here when it is missing, by one worker of them all."""
    image = IMAGES / f"{name}.qcow2"
    IMAGES.mkdir(parents=True, exist_ok=True)
    with (IMAGES / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not image.exists():
            run(*command, image)
    return image


@pytest.fixture
def tiny_raw(tiny_image: Path, tmp_path: Path) -> Path:
    """A raw copy of the tiny image, to be changed or packed by the test."""
    return raw_copy(tiny_image, tmp_path / "tiny.raw")


def raw_copy(image: Path, copy: Path) -> Path:
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, copy)
    return copy


def change_root(disk: Path, *debugfs_commands: str) -> None:
    """Change the root file system of a raw copy of an example image."""
    script = "\n".join(debugfs_commands) + "\n"
    run("debugfs", "-w", "-f", "-", f"{disk}?offset={ROOT_OFFSET}", input=script)


def replace_in_root(disk: Path, path: str, text: str, scratch: Path) -> None:
    """Put an executable file with this text into the root file system."""
    source = scratch / "replacement"
    source.write_text(text)
    mode = "set_inode_field {} mode 0100755"
    change_root(disk, f"rm {path}", f"write {source} {path}", mode.format(path))


def why_no_mounts() -> str:
    """Why no file system can be mounted; empty when one can."""
    with tempfile.TemporaryDirectory() as directory:
        argv = ["mount", "-t", "tmpfs", "-o", "size=64K", "tmpfs", directory]
        if subprocess.run(argv, capture_output=True).returncode != 0:
            return "mounting a tmpfs is not permitted here"
        run("umount", directory)
    return ""


@contextmanager
def mounted_tmpfs(directory: Path, size: str) -> Iterator[Path]:
    """A small file system of its own, for what happens when a disk is full."""
    if why_no_mounts():
        pytest.skip(why_no_mounts())
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory)
    try:
        yield directory
    finally:
        run("umount", directory)


# libvirtd

# Its own /etc/libvirt, state and sockets, in a mount namespace: nothing of the machine is touched.
# No /dev/kvm: where qemu's user may not open it, libvirtd would ask qemu for its capabilities again
# and again, 100 s for one VM.
_START_LIBVIRTD = """
set -e
for place in /etc /run /var/lib /var/cache /var/log; do
    place=$place/libvirt
    mkdir -p $place $1$place
    chmod 755 $1$place
    mount --bind $1$place $place
done
touch $1/no-kvm
chmod 600 $1/no-kvm
[ ! -e /dev/kvm ] || mount --bind $1/no-kvm /dev/kvm
exec libvirtd --config $1/libvirtd.conf --pid-file $1/pid
"""
_LIBVIRTD_CONF = """
unix_sock_dir = "{directory}/sock"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "2:file:{directory}/libvirtd.log"
"""
# Without cgroups, namespaces and virtlogd, as in a container; user and ownership as by default.
_QEMU_CONF = """
cgroup_controllers = []
namespaces = []
security_driver = "none"
stdio_handler = "file"
"""


def why_no_libvirtd(*namespaces: str) -> str:
    """What a private libvirtd would need and is not here; empty when it can be had.

    namespaces -- besides a mount namespace, as options of unshare(1).
    """
    if shutil.which("libvirtd") is None:
        return "libvirtd is not installed"
    return why_no_namespace(*namespaces)


def why_no_namespace(*more: str) -> str:
    """Why there is no private mount namespace, and these besides; empty when there are."""
    argv = ["unshare", "--mount", *more, "true"]
    if subprocess.run(argv, capture_output=True).returncode != 0:
        return "private namespaces are not permitted here"
    return ""


class Libvirtd:
    """A private libvirtd, which may be killed, and started again with what it had on its disk."""

    def __init__(self, directory: Path, *namespaces: str) -> None:
        self._directory = directory
        self._namespaces = namespaces
        self._socket = directory / "sock" / "libvirt-sock"
        self.uri = f"qemu:///system?socket={self._socket}"
        qemu_conf = directory / "etc/libvirt/qemu.conf"
        qemu_conf.parent.mkdir(parents=True)
        (directory / "sock").mkdir()
        qemu_conf.write_text(_QEMU_CONF)
        (directory / "libvirtd.conf").write_text(_LIBVIRTD_CONF.format(directory=directory))

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)  # a killed one leaves it
        argv = ["unshare", "--mount", *self._namespaces, "sh", "-c", _START_LIBVIRTD, "sh"]
        argv.append(str(self._directory))
        with (self._directory / "output").open("ab") as output:
            self._process = subprocess.Popen(argv, stdout=output, stderr=output)
        wait_until(self._socket.exists, 30, f"libvirtd's socket; see {self._directory}")

    def send(self, number: int) -> None:
        """Send it a signal; one that ends it is waited for."""
        self._process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self._process.wait(30)

    def domains(self) -> list[str]:
        """The VMs that it knows of."""
        import libvirt

        connection = libvirt.open(self.uri)
        try:
            return [domain.name() for domain in connection.listAllDomains()]
        finally:
            connection.close()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        self._process.wait(30)


@contextmanager
def private_libvirtd(parent: Path = Path("/tmp"), *namespaces: str) -> Iterator[Libvirtd]:
    """A libvirtd of one's own, in a new directory below this one; its path must be short."""
    directory = Path(tempfile.mkdtemp(prefix="libvirtd-", dir=parent))
    directory.chmod(0o755)
    try:
        daemon = Libvirtd(directory, *namespaces)
        daemon.start()
        try:
            yield daemon
        finally:
            daemon.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# Builds


@dataclass(frozen=True)
class Built:
    """What a user sees of a build that has ended."""

    status: int
    stdout: str
    stderr: str
    output: Path

    @property
    def last_line(self) -> str:
        return self.stderr.rstrip("\n").rpartition("\n")[2]

    @property
    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.output / "manifest.json").read_text())
        return manifest

    def log(self, name: str) -> str:
        return (self.output / "logs" / name).read_text(errors="replace")

    def succeeded(self) -> Built:
        assert self.status == 0, self.stderr
        assert self.manifest["outcome"] == "built"
        return self

    def failed(self, message: str, *, status: int = 1) -> Built:
        """The message is a regular expression; the manifest must tell the same story."""
        label = {1: "build failed", 3: "builder fault"}[status]
        assert self.status == status, self.stderr
        assert re.match(f"{label}: .*{message}", self.last_line), self.stderr
        assert (self.manifest["outcome"], self.manifest["outputs"]) == (label, [])
        assert f"{label}: {self.manifest['reason']}" == self.last_line
        return self


class RunningBuild:
    """`koji-indirection build`, started."""

    def __init__(self, argv: Sequence[str], output: Path, scratch: Path) -> None:
        self.output = output
        self._stdout, self._stderr = scratch / "stdout", scratch / "stderr"
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float = 180) -> None:
        """Until a line on standard error matches."""

        def seen() -> bool:
            if re.search(pattern, self.stderr, re.MULTILINE):
                return True
            assert self.process.poll() is None, f"ended before {pattern!r}:\n{self.stderr}"
            return False

        wait_until(seen, seconds, f"{pattern!r} on standard error")

    def wait_for_phase(self, phase: str) -> None:
        self.wait_for(rf"^\[ *\d+:\d\d\] {phase}$")

    def interrupt(self) -> None:
        """As a terminal's Ctrl-C does, for the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self, seconds: float = 240) -> Built:
        status = self.process.wait(seconds)
        return Built(status, self._stdout.read_text(), self.stderr, self.output)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Builder:
    """Runs builds below the test's own directory, and knows what they may leave behind."""

    def __init__(
        self, directory: Path, default_image: Path, public: Path = Path("/var/tmp")
    ) -> None:
        # Where qemu's own user can get to, as in /var/tmp; pytest's directories are private.
        self._public = Path(tempfile.mkdtemp(prefix="ki-test-", dir=public))
        self._public.chmod(0o711)
        self.work = self._public / "work"
        self.directory = directory
        self.default_image = default_image
        self._started: list[RunningBuild] = []

    def start(
        self,
        commands: Commands,
        *options: object,
        input_image: Path | None = None,
        utility_image: Path | None = None,
        output: Path | None = None,
        runner: str | None = None,
        tmp: Path | None = None,
    ) -> RunningBuild:
        """Start a build; without images the tiny one is both input and utility.

        runner -- Python text that runs the command line instead of the command.
        tmp -- a directory that the build is to have for its /tmp.
        """
        scratch = self.directory / f"build-{len(self._started) + 1}"
        scratch.mkdir()
        argv: list[object] = []
        if tmp is not None:
            script = 'mount --bind "$1" /tmp && shift && exec "$@"'
            argv += ["unshare", "--mount", "sh", "-c", script, "sh", tmp]
        argv += [COMMAND] if runner is None else [sys.executable, "-c", runner]
        argv += ["build", "--template", _template(commands, scratch)]
        argv += ["--input-image", input_image or self.default_image]
        if utility_image is not None:
            argv += ["--utility-image", utility_image]
        output = output or scratch / "out"
        argv += ["--output", output, "--work-dir", self.work, *SMALL, *options]
        running = RunningBuild([str(word) for word in argv], output, scratch)
        self._started.append(running)
        return running

    def __call__(
        self, commands: Commands, *options: object, seconds: float = 240, **more: Any
    ) -> Built:
        """Run a build to its end, which is a mistake of ours if it takes longer than this."""
        return self.start(commands, *options, **more).finish(seconds)

    def processes(self) -> dict[int, str]:
        """Every process whose command line names the work directory, but the command itself."""
        own = {running.process.pid for running in self._started}
        return {
            pid: command
            for pid, command in _command_lines()
            if str(self.work) in command and pid not in own
        }

    def qemu(self) -> int | None:
        """The process of the utility VM."""
        return next(
            (
                pid
                for pid, command in self.processes().items()
                if "qemu" in command.split()[0]
                and "koji-indirection-" in command
                and "guest=koji-indirection" in command
            ),
            None,
        )

    def leftovers(self) -> list[str]:
        """What is there and must not be, once every build has ended."""
        found = [f"process {pid}: {command[:200]}" for pid, command in self.processes().items()]
        if self.work.exists():
            found += [str(path) for path in self.work.iterdir()]
        for running in self._started:
            found += _strangers_in(running.output)
        return found

    def remove(self) -> None:
        shutil.rmtree(self._public, ignore_errors=True)

    def stop_all(self) -> None:
        for running in self._started:
            if running.process.poll() is None:
                running.kill()


def _template(commands: Commands, scratch: Path) -> Path:
    if isinstance(commands, Path):
        return commands
    path = scratch / "template.tdl"
    elements = (E.command(text, name=name) for name, text in commands)
    path.write_bytes(etree.tostring(E.template(E.commands(*elements))))
    return path


def _command_lines() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            yield int(entry.name), b" ".join(words).decode(errors="replace")


def _strangers_in(output: Path) -> Iterable[str]:
    """Files in an output directory that no manifest names."""
    manifest = {"outputs": [], "logs": []}
    if (output / "manifest.json").exists():
        manifest = json.loads((output / "manifest.json").read_text())
        logs = {*manifest["logs"]}
    else:  # killed before it could write one
        logs = {"build.log", "job.log", "console.log", "screenshot.png"}
    expected = {"logs", "manifest.json", *(entry["name"] for entry in manifest["outputs"])}
    for directory, names in ((output, expected), (output / "logs", logs)):
        if directory.exists():
            yield from (str(path) for path in directory.iterdir() if path.name not in names)


def unused(directories: Iterable[Path]) -> set[Path]:
    """Those of the directories that no running process names."""
    commands = " ".join(command for _, command in _command_lines())
    return {path for path in directories if str(path) not in commands}


def unused_run_directories() -> set[Path]:
    """Socket directories of builds that have ended; nothing of what other tests make."""
    return unused(Path("/tmp").glob(f"ki-{'[0-9a-f]' * 12}"))


@pytest.fixture(autouse=True)
def build(tmp_path: Path, tiny_image: Path) -> Iterator[Builder]:
    before = unused_run_directories()
    builder = Builder(tmp_path, tiny_image)
    try:
        yield builder
    finally:
        builder.stop_all()

    def leftovers() -> list[str]:
        return builder.leftovers() + [str(path) for path in unused_run_directories() - before]

    deadline = time.monotonic() + 3
    while leftovers() and time.monotonic() < deadline:
        time.sleep(0.2)  # a killed process may take a moment to vanish
    left = leftovers()
    builder.remove()
    shutil.rmtree(tmp_path, ignore_errors=True)  # images are large, and pytest keeps directories
    assert not left, f"left behind: {left}"
