"""External programs: real ones, with real deadlines, and nothing left running."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from koji_indirection import programs
from koji_indirection.errors import BuilderFault
from koji_indirection.jobdir import python_environment
from koji_indirection.programs import Limits, ProgramFailed


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s: {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has reaped does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def pids_in(path: Path, count: int) -> list[int]:
    def written() -> list[str]:
        return path.read_text().split() if path.exists() else []

    wait_until(lambda: len(written()) == count, f"{count} process ids in {path}")
    return [int(word) for word in written()]


def test_what_a_program_prints_is_returned() -> None:
    assert programs.run(["printf", r"a\nb\n"], timeout_seconds=5) == "a\nb\n"


def test_bytes_that_are_no_utf8_are_replaced() -> None:
    assert programs.run(["printf", r"a\377b"], timeout_seconds=5) == "a\ufffdb"


def test_no_shell_sees_the_arguments() -> None:
    hostile = "$(touch /tmp/x); `id` && *"
    assert programs.run(["printf", "%s", hostile], timeout_seconds=5) == hostile


def test_standard_input_is_what_is_given_and_empty_by_default() -> None:
    text = "zeile 1\nümlaut\n" * 20_000  # more than a pipe holds
    assert programs.run(["cat"], timeout_seconds=10, input_text=text) == text
    assert programs.run(["cat"], timeout_seconds=5) == ""


def test_messages_are_in_english_and_env_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("KEPT", "yes")
    said = programs.run(["env"], timeout_seconds=5, env={"ADDED": "too"}).splitlines()
    assert {"LC_ALL=C", "KEPT=yes", "ADDED=too"} <= set(said)


def test_a_missing_program_is_said_with_what_to_do() -> None:
    with pytest.raises(BuilderFault) as caught:
        programs.run(["no-such-program-here", "x"], timeout_seconds=5)
    assert caught.value.message == "no-such-program-here is not installed"
    assert "koji-indirection doctor" in caught.value.hint


def test_an_exit_status_comes_with_a_command_that_can_be_pasted(tmp_path: Path) -> None:
    odd = tmp_path / "it's; a $file"
    argv = ["ls", "--", str(odd)]
    with pytest.raises(ProgramFailed) as caught:
        programs.run(argv, timeout_seconds=5)
    error = caught.value
    assert error.returncode == 2
    assert error.message.startswith("ls exited with status 2: ls: cannot access")
    assert "No such file or directory" in error.stderr
    command = error.hint.removeprefix("the command was: ")
    assert shlex.split(command) == argv
    again = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (again.returncode, again.stderr.count("No such file")) == (2, 1)


def test_a_failure_without_words_has_no_dangling_colon() -> None:
    with pytest.raises(ProgramFailed) as caught:
        programs.run(["false"], timeout_seconds=5)
    assert caught.value.message == "false exited with status 1"


def test_a_program_killed_by_a_signal_is_told_apart_from_an_exit_status() -> None:
    with pytest.raises(ProgramFailed) as caught:
        programs.run(["sh", "-c", "kill -SEGV $$"], timeout_seconds=5)
    assert caught.value.returncode == -signal.SIGSEGV
    assert caught.value.message == "sh was killed by signal 11"


def test_of_a_long_complaint_the_end_is_kept() -> None:
    script = "i=0; while [ $i -lt 3000 ]; do echo line-$i >&2; i=$((i+1)); done; exit 4"
    with pytest.raises(ProgramFailed) as caught:
        programs.run(["sh", "-c", script], timeout_seconds=10)
    assert len(caught.value.stderr) <= 2000
    assert caught.value.stderr.endswith("line-2999")
    assert "line-0\n" not in caught.value.stderr


def test_a_program_that_floods_both_streams_does_not_block() -> None:
    script = "head -c 3000000 /dev/zero >&2; head -c 3000000 /dev/zero"
    assert len(programs.run(["sh", "-c", script], timeout_seconds=20)) == 3_000_000


def test_the_deadline_kills_the_program_and_its_grandchildren(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    # The grandchild ignores what can be ignored, and holds the pipes open.
    grandchild = f"trap '' TERM HUP INT; echo $$ >>{pids}; while :; do sleep 1; done"
    script = f"echo half way >&2; sh -c {shlex.quote(grandchild)} & echo $$ >>{pids}; wait"
    started = time.monotonic()
    with pytest.raises(ProgramFailed) as caught:
        programs.run(["sh", "-c", script], timeout_seconds=0.5)
    assert time.monotonic() - started < 3
    assert caught.value.returncode is None
    assert caught.value.message == "sh did not end within 0.5 s: half way"
    for pid in pids_in(pids, 2):
        wait_until(lambda pid=pid: not is_running(pid), f"process {pid} is gone")


def test_an_interrupt_kills_the_program_and_its_grandchildren(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"(echo 1 >/dev/null; sleep 300) & echo $$ $! >{pids}; wait"
    code = (
        "import signal, sys; from koji_indirection import programs\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"try: programs.run(['sh', '-c', {script!r}], timeout_seconds=300)\n"
        "except KeyboardInterrupt: sys.exit(42)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], env=python_environment(), cwd="/")
    try:
        children = pids_in(pids, 2)
        assert all(is_running(pid) for pid in children)
        holder.send_signal(signal.SIGINT)
        assert holder.wait(5) == 42
    finally:
        holder.kill()
        holder.wait()
    for pid in children:
        wait_until(lambda pid=pid: not is_running(pid), f"process {pid} is gone")


def test_the_program_is_in_a_session_of_its_own() -> None:
    stat = programs.run(["cat", "/proc/self/stat"], timeout_seconds=5)
    session = int(stat.rpartition(")")[2].split()[3])
    assert session != os.getsid(0)


def test_memory_is_limited_for_programs_that_read_what_others_made() -> None:
    argv = [sys.executable, "-c", "x = bytearray(600 * 1024 * 1024); print('had it')"]
    limits = Limits(address_space_bytes=400 * 1024**2, cpu_seconds=20)
    with pytest.raises(ProgramFailed, match="MemoryError"):
        programs.run(argv, timeout_seconds=20, limits=limits)


def test_cpu_seconds_are_limited_and_no_core_is_dumped(tmp_path: Path) -> None:
    with pytest.raises(ProgramFailed) as caught:
        programs.run(
            ["sh", "-c", f"cd {tmp_path}; while :; do :; done"],
            timeout_seconds=20,
            limits=Limits(cpu_seconds=1),
        )
    assert caught.value.returncode in (-signal.SIGKILL, -signal.SIGXCPU)
    assert list(tmp_path.iterdir()) == []
    said = programs.run(["sh", "-c", "ulimit -c"], timeout_seconds=5, limits=Limits())
    assert said == "0\n"


def test_a_program_whose_output_has_no_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_STDOUT_BYTES", 1_000_000)
    with pytest.raises(ProgramFailed) as caught:
        programs.run(["yes"], timeout_seconds=60)
    assert caught.value.returncode == -signal.SIGKILL
    assert caught.value.stderr == "it wrote more than 0 MiB"
