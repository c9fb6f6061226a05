"""The job as it is put into the guest: the archive's tree, and run.sh run for real.

run.sh runs here under every shell that a guest may have as /bin/sh. Its paths
lead into a temporary directory, the virtio-serial ports are FIFOs, and what
would touch the machine (power off, modprobe, sync) is taken out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from fakeguest import FakeGuest

from koji_indirection import guest
from koji_indirection.arches import ARCHES
from koji_indirection.errors import BuildFailed
from koji_indirection.guestjob import GuestFile, GuestJob, Terminal, job_files
from koji_indirection.initsystem import Start
from koji_indirection.template import Command

COMMANDS = [
    Command("mount", "mount /dev/vdb1 /mnt"),
    Command("make it", "#!/usr/bin/env python3\nprint('ü')"),
]
SHELLS = {"dash": ["dash"], "bash": ["bash", "--posix"], "busybox": ["busybox", "sh"]}
RUN_SH = resources.files("koji_indirection").joinpath("job", "run.sh").read_text(encoding="utf-8")

SETTINGS = (
    "STATUS_PORT=org.koji.indirection.status\nLOG_PORT=org.koji.indirection.log\n"
    "SAMPLE_SECONDS=5\nSTATUS_TTY=''\nLOG_TTY=''\n"
    "WORKSPACE=/dev/vdc1\nINPUT=/dev/vdb\nRESULTS_DIR='/my results'\n"
    "DISKS='/dev/vdc:workspace /dev/vdb:input'\nSETUP=''\nNETWORK=''\n"
    "MEDIA_DEVICE=''\nMEDIA_FS=''\n"
)
JOB_FILES = {
    "etc/koji-indirection/run": (0o755, RUN_SH),
    "etc/koji-indirection/settings": (0o644, SETTINGS),
    "etc/koji-indirection/environment": (0o600, ""),
    "etc/koji-indirection/commands/0001.cmd": (0o755, "mount /dev/vdb1 /mnt\n"),
    "etc/koji-indirection/commands/0001.head": (0o644, "=== command 1 of 2: mount\n"),
    "etc/koji-indirection/commands/0002.cmd": (0o755, "#!/usr/bin/env python3\nprint('ü')\n"),
    "etc/koji-indirection/commands/0002.head": (0o644, "=== command 2 of 2: make it\n"),
}
JOB = GuestJob(COMMANDS, workspace="/dev/vdc1", input="/dev/vdb", results_dir="/my results")


def tree(archive: bytes) -> dict[str, Any]:
    """Name -> (mode, text) of a file, or "-> target" of a link."""
    found: dict[str, Any] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            assert member.name not in found
            assert (member.uid, member.gid) == (0, 0)
            if member.issym():
                found[member.name] = f"-> {member.linkname}"
            else:
                assert member.isreg()
                content = tar.extractfile(member)
                assert content is not None
                found[member.name] = (member.mode, content.read().decode())
    return found


START = Start("any", {"etc/start": ("x", 0o755)}, {"etc/link": "start"})


def archive(selinux_config: str | None = None) -> bytes:
    return guest.job_archive(JOB, start=START, selinux_config=selinux_config)


# The archive


def test_a_shell_is_told_of_its_terminal_and_a_job_of_none() -> None:
    commands = (Command("one", "true"),)
    files = job_files(GuestJob(commands, terminal=Terminal("xterm", rows=30, columns=100)))
    settings = files["etc/koji-indirection/settings"][0].decode()
    for line in ("SHELL_TTY=/dev/hvc0", "TERMINAL_TYPE=xterm", "TERMINAL_SIZE='rows 30 cols 100'"):
        assert line in settings.splitlines()
    assert files["etc/koji-indirection/shell"][1] == 0o755
    without = job_files(GuestJob(commands))
    assert b"SHELL_TTY" not in without["etc/koji-indirection/settings"][0]
    assert "etc/koji-indirection/shell" not in without


def test_a_shells_terminal_is_not_the_serial_port_of_power() -> None:
    for arch, tty in (("x86_64", "/dev/hvc0"), ("ppc64le", "/dev/hvc1"), ("s390x", "/dev/hvc0")):
        job = dataclasses.replace(
            JOB, terminal=Terminal("xterm", 30, 100), shell_tty=ARCHES[arch].virtio_console
        )
        settings = job_files(job)["etc/koji-indirection/settings"][0].decode()
        assert f"SHELL_TTY={tty}" in settings.splitlines()


def test_the_whole_tree_is_the_job_and_what_starts_it() -> None:
    assert tree(archive()) == {**JOB_FILES, "etc/start": (0o755, "x"), "etc/link": "-> start"}


def test_a_permissive_selinux_config_is_part_of_it() -> None:
    assert tree(archive("SELINUX=permissive\n"))["etc/selinux/config"] == (
        0o644,
        "SELINUX=permissive\n",
    )
    assert "etc/selinux/config" not in tree(archive())


def test_a_hundred_commands_keep_their_order_under_a_glob() -> None:
    commands = [Command(f"n{number}", f"echo {number}") for number in range(1, 101)]
    files = tree(guest.job_archive(GuestJob(commands), start=START, selinux_config=None))
    in_order = [files[name][1] for name in sorted(files) if name.endswith(".cmd")]
    assert in_order == [f"echo {number}\n" for number in range(1, 101)]


# What is found in the image


DEBIAN = {
    "/sbin/init": "",
    "/lib/systemd/systemd": "",
    "/etc/os-release": 'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian"\n',
}


def inject(files: FakeGuest, tmp_path: Path) -> guest.GuestSystem:
    return guest.inject(files, JOB, tmp_dir=tmp_path)  # type: ignore[arg-type]


def test_a_systemd_guest_is_found_among_other_file_systems(tmp_path: Path) -> None:
    devices = {
        "/dev/sda15": "vfat",
        "/dev/sda3": "swap",
        "/dev/broken": "ext4",
        "/dev/sda2": "xfs",
        "/dev/sda1": "ext4",
    }
    system = inject(FakeGuest(DEBIAN, devices), tmp_path)
    assert system == guest.GuestSystem("/dev/sda1", "debian", "12", "systemd", selinux=False)


def test_an_image_without_a_system_is_said_with_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed) as caught:
        inject(FakeGuest({}, {"/dev/sda1": "ext4", "/dev/sda2": "swap"}), tmp_path)
    assert caught.value.message == (
        "the utility image holds no operating system;"
        " file systems found: /dev/sda1 (ext4), /dev/sda2 (swap)"
    )
    with pytest.raises(BuildFailed, match="file systems found: none"):
        inject(FakeGuest({}, {}), tmp_path)


def test_what_stands_in_the_way_is_moved_and_removed_before_files_are_written(
    tmp_path: Path,
) -> None:
    files = FakeGuest(
        {
            "/sbin/init": "",
            "/etc/inittab": "::sysinit:/etc/rc.local\n",
            "/etc/rc.local": "own",
        }
    )
    assert inject(files, tmp_path).init == "rc.local"
    assert files.files["/etc/rc.local.own"] == "own"
    assert "etc/rc.local" in tree(files.archive)


@pytest.mark.parametrize(
    ("config", "written"),
    [
        (
            "# c\nSELINUX=enforcing\nSELINUXTYPE=targeted\n",
            "# c\nSELINUX=permissive\nSELINUXTYPE=targeted\n",
        ),
        (" SELINUX = enforcing \n", "SELINUX=permissive\n"),
        ("SELINUX=Enforcing\n\n# end\n", "SELINUX=permissive\n\n# end\n"),
        ("SELINUX=permissive\n", None),
        ("SELINUX=disabled\n", None),
        ("# SELINUX=enforcing\n", None),
    ],
)
def test_a_guest_that_enforces_selinux_boots_permissive(
    tmp_path: Path, config: str, written: str | None
) -> None:
    files = FakeGuest({**DEBIAN, "/etc/selinux/config": config})
    system = inject(files, tmp_path)
    assert system.selinux == (written is not None)
    assert tree(files.archive).get("etc/selinux/config") == (
        None if written is None else (0o644, written)
    )


@pytest.mark.parametrize(
    ("releases", "known"),
    [
        (["6.1.0-13-cloud-amd64"], True),
        (["4.0.0"], True),
        (["3.16.0-4-amd64"], False),
        (["2.6.32-754.el6.x86_64"], False),
        (["3.10.0-229.el7.x86_64"], False),
        (["3.10.0-327.el7.x86_64"], True),
        (["3.10.0-1160.el7.x86_64"], True),
        (["3.16.0-4-amd64", "4.9.0-9-amd64"], True),
        ([], True),
    ],
)
def test_the_age_of_the_kernels_says_whether_they_know_virtio_1(
    tmp_path: Path, releases: list[str], known: bool
) -> None:
    kernels = {f"/lib/modules/{release}/modules.dep": "" for release in releases}
    assert inject(FakeGuest({**DEBIAN, **kernels}), tmp_path).knows_virtio_1 == known


def test_a_guest_that_would_relabel_its_files_and_reboot_does_not(tmp_path: Path) -> None:
    files = FakeGuest({**DEBIAN, "/.autorelabel": ""})
    inject(files, tmp_path)
    assert "/.autorelabel" not in files.files


# run.sh


@pytest.mark.parametrize("shell", SHELLS)
def test_the_runners_syntax_is_that_of_every_shell(shell: str, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(RUN_SH)
    if shutil.which(SHELLS[shell][0]) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([*SHELLS[shell], "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


RUN_COMMANDS = [
    ("plain", "echo to stdout\necho to stderr >&2\npwd\ncat\nread line || echo stdin is empty"),
    ("reopen", "echo first >/dev/stderr\necho second >/dev/stdout\necho third >>/dev/stderr"),
    ("python", "#!/usr/bin/env python3\nimport sys\nprint('shebang', len(sys.argv))"),
    ("environment", 'echo "$HOME $USER $TERM $(umask)"; echo "path $PATH"; echo "lang $LANG"'),
    ("descriptors", "for n in 3 4 5; do [ -e /proc/self/fd/$n ] && echo open $n; done; :"),
    ("no newline", "printf 'no newline'"),
    ("daemon", "sleep 300 & echo $! >{daemon}"),
    ("slow", "sleep 0.4"),
    ("fails", "echo before\nsh -c 'exit 7'"),
    ("never", "touch {never}"),
]


class Job:
    """run.sh at work under one shell, its two ports read to their ends."""

    def __init__(
        self, directory: Path, shell: str, commands: list[tuple[str, str]], **more: Any
    ) -> None:
        directory.mkdir()
        self.daemon, self.never = directory / "daemon", directory / "never"
        job_directory, ports = directory / "job", directory / "ports"
        (job_directory / "commands").mkdir(parents=True)
        ports.mkdir()
        texts = [
            Command(
                name, text.replace("{daemon}", str(self.daemon)).replace("{never}", str(self.never))
            )
            for name, text in commands
        ]
        job = GuestJob(texts, workspace="/dev/vdz1", results_dir="/my results", **more)
        members = tree(guest.job_archive(job, start=START, selinux_config=None))
        for name, (mode, text) in ((n, m) for n, m in members.items() if "koji-indirection/" in n):
            path = job_directory / name.removeprefix("etc/koji-indirection/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(mode)
        if (job_directory / "setup").exists():
            setup, old = (job_directory / "setup").read_text(), "\nJOB=/etc/koji-indirection\n"
            assert old in setup
            (job_directory / "setup").write_text(setup.replace(old, f"\nJOB={job_directory}\n"))
        (job_directory / "run").write_text(self._tamed(RUN_SH, directory))
        self.status_data, self.log_data = bytearray(), bytearray()
        self._threads = []
        for port, data in (("status", self.status_data), ("log", self.log_data)):
            fifo = ports / f"org.koji.indirection.{port}"
            os.mkfifo(fifo)
            thread = threading.Thread(target=self._read, args=(fifo, data), daemon=True)
            thread.start()
            self._threads.append(thread)
        self.started = time.monotonic()
        self.child = subprocess.Popen(
            [*SHELLS[shell], str(job_directory / "run")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd=directory,
        )

    @staticmethod
    def _tamed(script: str, directory: Path) -> str:
        for old, new in (
            ("JOB=/etc/koji-indirection\n", f"JOB={directory}/job\n"),
            ("/dev/virtio-ports/", f"{directory}/ports/"),
            ("/run/koji-indirection.", f"{directory}/pipe."),
            ("    if [ -d /run/systemd/system ]; then\n", "    exit 0\n    if false; then\n"),
            ("for entry in $DISKS", "for entry in"),
            ("\nmodprobe ", "\n: modprobe "),
            ("\nsync &\n", "\n: sync &\n"),
            ("mount -o remount,rw /", ": mount -o remount,rw /"),
            ('[ "$tries" -lt 5 ]', '[ "$tries" -lt 1 ]'),
        ):
            assert old in script, f"run.sh has changed: {old!r} is not in it"
            script = script.replace(old, new)
        return script

    @staticmethod
    def _read(fifo: Path, data: bytearray) -> None:
        with fifo.open("rb", buffering=0) as file:
            while piece := file.read(65536):
                data += piece

    def end(self) -> None:
        """Wait for the end of the script, then kill what it left, as a power-off does."""
        try:
            self.exit_status = self.child.wait(10)
        finally:
            self.seconds = time.monotonic() - self.started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
        assert self.child.stderr is not None
        self.complaints = self.child.stderr.read().decode()
        self.child.stderr.close()
        for thread in self._threads:
            thread.join(5)
        self.reports = [json.loads(line) for line in self.status_data.splitlines()]
        self.log = self.log_data.decode()

    def output_of(self, name: str) -> str:
        """What stands in the log between a command's head and its end."""
        _, _, rest = self.log.partition(f": {name}\n")
        return rest.partition("=== exit status ")[0]

    @property
    def last_report(self) -> dict[str, Any]:
        """The last one but for samples: the sampler works beside the job and may be late."""
        return next(report for report in self.reports[::-1] if report["event"] != "sample")

    def events(self, event: str) -> list[dict[str, Any]]:
        return [report for report in self.reports if report["event"] == event]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """The same job under every shell, all at once."""
    directory = tmp_path_factory.mktemp("jobs")
    installed = [shell for shell, argv in SHELLS.items() if shutil.which(argv[0])]
    running = {shell: Job(directory / shell, shell, RUN_COMMANDS) for shell in installed}
    for job in running.values():
        job.end()
    yield running


@pytest.fixture(params=list(SHELLS))
def job(request: pytest.FixtureRequest, jobs: dict[str, Job]) -> Job:
    if request.param not in jobs:
        pytest.skip(f"{request.param} is not installed")
    return jobs[request.param]


def test_the_runner_ends_without_a_complaint(job: Job) -> None:
    assert job.exit_status == 0
    assert job.complaints == ""


def test_the_first_report_says_what_guest_this_is(job: Job) -> None:
    first = job.reports[0]
    assert first["event"] == "job-started"
    assert first["kernel"] == os.uname().release
    assert first["shell"].startswith("/")
    assert first["selinux"] in ("none", "permissive", "enforcing")


def test_every_command_is_reported_in_order_until_one_fails(job: Job) -> None:
    assert [one["index"] for one in job.events("command-started")] == list(range(1, 10))
    ended = job.events("command-ended")
    assert [one["index"] for one in ended] == list(range(1, 10))
    assert [one["status"] for one in ended] == [0] * 8 + [7]
    assert job.last_report == {"event": "job-ended", "status": 7}
    assert not job.never.exists(), "a command ran after one that failed"


def test_the_seconds_are_those_that_passed(job: Job) -> None:
    ended = job.events("command-ended")
    assert 0.3 < ended[7]["seconds"] < 2
    assert all(0 <= one["seconds"] < 5 for one in ended)


def test_samples_are_whole_numbers(job: Job) -> None:
    samples = job.events("sample")
    assert samples
    for sample in samples:
        assert sample["memory_bytes"] > 0
        assert sample["root_bytes"] > 0
        assert sample["workspace_bytes"] == 0, "nothing is mounted from /dev/vdz1"
        assert sample["workspace_size_bytes"] == 0
        assert sample["oom_kills"] >= 0


def test_the_log_delimits_each_command(job: Job) -> None:
    heads = [line for line in job.log.splitlines() if line.startswith("=== command ")]
    assert heads == [
        f"=== command {index} of 10: {name}"
        for index, (name, _) in enumerate(RUN_COMMANDS[:9], start=1)
    ]
    assert job.log.count("=== exit status 0 after ") == 8
    assert "=== exit status 7 after 0." in job.log


def test_output_and_errors_go_to_the_log_and_input_is_empty(job: Job) -> None:
    assert job.output_of("plain") == "to stdout\nto stderr\n/\nstdin is empty\n"


def test_tools_may_open_their_output_again(job: Job) -> None:
    assert job.output_of("reopen") == "first\nsecond\nthird\n"


def test_a_command_with_a_shebang_is_run_by_its_interpreter(job: Job) -> None:
    assert job.output_of("python") == "shebang 1\n"


def test_the_environment_is_a_sane_one(job: Job) -> None:
    first, path, lang = job.output_of("environment").splitlines()
    assert first == "/root root dumb 0022"
    assert path == "path /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert lang in ("lang C.UTF-8", "lang en_US.UTF-8")


def test_commands_inherit_no_descriptor_of_the_runners(job: Job) -> None:
    assert "open 3" not in job.output_of("descriptors")
    assert "open 4" not in job.output_of("descriptors")


def test_output_without_a_newline_is_not_lost(job: Job) -> None:
    assert job.output_of("no newline").startswith("no newline")


def test_a_daemon_that_holds_the_log_open_does_not_hold_up_the_end(job: Job) -> None:
    assert int(job.daemon.read_text()) > 1
    assert job.seconds < 8
    assert job.events("job-ended")


SEES = 'env | grep -e ^INDIRECTION_ -e ^REASON -e ^http_proxy | sort; cat "{path}"'


@pytest.mark.parametrize("shell", SHELLS)
def test_set_up_steps_come_first_and_commands_see_what_they_did(shell: str, tmp_path: Path) -> None:
    if shutil.which(SHELLS[shell][0]) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "a file"
    job = Job(
        tmp_path / "job",
        shell,
        [("see", SEES.format(path=path))],
        files=[GuestFile(str(path), b"put there\n")],
        environment={"http_proxy": "http://it's:1"},
    )
    job.end()
    assert job.output_of("see") == (
        "INDIRECTION_INPUT=/input_image.raw\nINDIRECTION_RESULTS_DIR=/my results\n"
        "INDIRECTION_WORKSPACE=/dev/vdz1\nhttp_proxy=http://it's:1\nput there\n"
    )
    (ended,) = job.events("setup-ended")
    assert (ended["step"], ended["status"], ended["reason"]) == ("files", 0, "")
    assert job.log.startswith(f"=== setup: files\n{path}\n=== exit status 0 after ")
    assert job.complaints == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_no_command_runs_after_a_set_up_step_that_failed(shell: str, tmp_path: Path) -> None:
    if shutil.which(SHELLS[shell][0]) is None:
        pytest.skip(f"{shell} is not installed")
    directory = tmp_path / 'a "quoted\\ one'
    directory.mkdir()
    job = Job(
        tmp_path / "job",
        shell,
        [("never", "touch {never}")],
        files=[GuestFile(str(directory), b"x")],
    )
    job.end()
    (ended,) = job.events("setup-ended")
    assert ended["status"] == 1
    assert ended["reason"].endswith("a quoted one' is a directory in the guest")
    assert job.events("command-started") == []
    assert job.last_report == {"event": "job-ended", "status": 1}
    assert not job.never.exists()


def test_a_guest_that_reboots_does_not_run_the_job_twice(tmp_path: Path) -> None:
    job = Job(tmp_path / "dash", "dash", [("one", "echo once")])
    job.end()
    again = subprocess.run(
        ["dash", tmp_path / "dash" / "job" / "run"], stdin=subprocess.DEVNULL, timeout=5
    )
    assert again.returncode == 0
    assert job.log.count("once\n") == 1
    assert job.last_report == {"event": "job-ended", "status": 0}
