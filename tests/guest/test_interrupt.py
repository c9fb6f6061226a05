"""Ctrl-C in every phase: out within five seconds, and nothing left (the `build` fixture looks)."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from .conftest import RESULT, Builder, run

COMMANDS = [("make", f"mount /dev/vdb1 /mnt && {RESULT}"), ("last", "sleep 4; echo ready; sync")]

# Seconds into the phase, so that its main work has begun.
PHASES = {
    "vet": 0.2,  # unpacks
    "prepare": 0.1,
    "inject": 3,
    "boot": 3,
    "job": 2,
    "shutdown": 0.1,
    "collect": 3,
}


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_ends_the_build_within_five_seconds(
    build: Builder, tiny_image: Path, tiny_raw: Path, phase: str
) -> None:
    image = tiny_image
    if phase == "vet":
        run("xz", "-1", tiny_raw)
        image = tiny_raw.with_suffix(".raw.xz")
    running = build.start(COMMANDS, "--workspace-fs", "ext2", input_image=image)
    running.wait_for_phase(phase)
    time.sleep(PHASES[phase])
    assert running.process.poll() is None
    started = time.monotonic()
    running.interrupt()
    built = running.finish(60)
    seconds = time.monotonic() - started

    assert built.status == 130, built.stderr
    assert built.last_line.startswith("interrupted: ")
    assert "Traceback" not in built.stderr
    assert built.manifest["outcome"] == "interrupted"
    assert built.manifest["timeline"][-1]["phase"] == phase
    assert [path.name for path in built.output.iterdir() if path.name == "boot.iso"] == []
    assert not build.leftovers()
    assert seconds < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_other_signals_end_a_build_as_ctrl_c_does(build: Builder, number: int) -> None:
    running = build.start(COMMANDS)
    running.wait_for_phase("boot")
    running.process.send_signal(number)
    built = running.finish(60)
    assert built.status == 130, built.stderr
    assert built.last_line.startswith("interrupted: ")
    assert not build.leftovers()
