"""The appliance's process: what it answers is bounded, and what it does not answer has an end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from koji_indirection import appliance
from koji_indirection.appliance import Appliance, ApplianceError, Drive, OutOfTime, TimeLimit

Start = Callable[[str], Appliance]


@pytest.fixture
def start() -> Iterator[Start]:
    """An appliance whose process is this Python text."""
    children = []

    def run(text: str) -> Appliance:
        child = subprocess.Popen(
            [sys.executable, "-c", text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        children.append(child)
        return Appliance(child)

    yield run
    for child in children:
        child.kill()
        child.communicate()


def test_a_call_that_is_not_answered_is_given_up_and_the_process_killed(start: Start) -> None:
    one = start("import time; time.sleep(300)")
    with pytest.raises(ApplianceError) as caught:
        one.call("mount_ro", "/dev/sda1", "/", timeout_seconds=0.3)
    assert caught.value.message == "libguestfs could not mount_ro: no answer within 0 s"
    assert one._child.wait(5) == -9
    with pytest.raises(ApplianceError, match="it died in an earlier call, mount_ro"):
        one.call("ls", "/")


@pytest.mark.parametrize("seconds_a_call", [0.2, 300])
def test_all_calls_together_have_a_deadline_however_quick_each_is(
    start: Start, seconds_a_call: float
) -> None:
    one = start(
        f"import sys, time\nfor line in sys.stdin: time.sleep({seconds_a_call});"
        "print('{\"value\": 1}', flush=True)"
    )
    one._limit = TimeLimit(1.5, "collecting", "leave less, or --max-collect-time allows more")
    one._ends = time.monotonic() + 1.5
    for _ in range(2):  # whoever goes on is told again
        with pytest.raises(OutOfTime) as caught:
            for _ in range(100):
                one.call("is_symlink", "/x")
        assert str(caught.value) == (
            "collecting took longer than 2 s (leave less, or --max-collect-time allows more)"
        )
    assert one._child.wait(5) == -9
    assert one.is_dead


def test_a_call_that_can_have_no_answer_is_not_waited_for(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appliance, "_STUCK_SECONDS", 0.1)
    one = start("import time; time.sleep(300)")
    said = iter([True, False, True, True])  # a disk may be full for a moment
    one._is_stuck = lambda: next(said)
    with pytest.raises(ApplianceError, match="could not tar_in: it hangs"):
        one.call("tar_in", "x", "/")
    assert list(said) == []


def test_an_answer_without_end_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appliance, "_ANSWER_BYTES", 1_000_000)
    one = start("import sys\nwhile True: sys.stdout.write('x' * 65536)")
    with pytest.raises(ApplianceError, match="the answer is longer than 1000000 bytes"):
        one.call("glob_expand", "/*", timeout_seconds=60)
    assert one._child.wait(5) == -9


def test_a_process_that_dies_is_said_to_have(start: Start) -> None:
    with pytest.raises(ApplianceError, match="its process has ended"):
        start("pass").call("launch", timeout_seconds=60)


def test_what_libguestfs_says_becomes_one_sentence() -> None:
    said = (
        "launch failed.\nThis may mean that it crashed.\nDo:\n  export LIBGUESTFS_DEBUG=1\nand ..."
    )
    error = ApplianceError("launch", said)
    assert error.reason == "launch failed. This may mean that it crashed."


class Guest:
    """Of libguestfs: a directory of so many names, written to a file by the library itself."""

    def __init__(self, tmpdir: Path, number: int) -> None:
        self.tmpdir = tmpdir
        self.number = number

    def get_tmpdir(self) -> str:
        return str(self.tmpdir)

    def ls0(self, _directory: str, path: str) -> None:
        try:
            with Path(path).open("wb", buffering=0) as file:
                for number in range(self.number):
                    file.write(b"name-%07d\0" % number)
        except OSError as error:
            raise RuntimeError(str(error)) from error


@pytest.mark.parametrize(("number", "complete"), [(0, True), (3, True), (500_000, False)])
def test_of_millions_of_names_some_thousands_are_read(
    tmp_path: Path, number: int, complete: bool
) -> None:
    guest: Any = Guest(tmp_path, number)
    names, all_of_them = appliance._names(guest, "/")
    assert all_of_them is complete
    assert names == [f"name-{index:07}" for index in range(len(names))]
    assert len(names) == number if complete else 1000 < len(names) < 10_000
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_only_read_is_read_through_an_overlay_that_names_its_format(
    tmp_path: Path,
) -> None:
    """libguestfs is never asked for a read-only drive: qemu would guess what is in it."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"QFI\xfb" + bytes(1024**2 - 4))
    with appliance._read_through(Drive(str(disk), "raw", readonly=True), tmp_path) as drive:
        assert (drive.format, drive.readonly) == ("qcow2", False)
        said = subprocess.run(
            ["qemu-img", "info", "--output=json", "-f", "qcow2", drive.path],
            capture_output=True,
            check=True,
        ).stdout
        info = json.loads(said)
        assert info["backing-filename"] == str(disk)
        assert info["backing-filename-format"] == "raw"
        assert info["virtual-size"] == 1024**2
    assert list(tmp_path.iterdir()) == [disk]

    asked: list[tuple[str, dict[str, str]]] = []
    guest = SimpleNamespace(
        **dict.fromkeys(
            ["set_backend", "set_backend_settings", "set_tmpdir", "set_network", "set_append"],
            lambda _value: None,
        ),
        add_drive_opts=lambda path, **options: asked.append((path, options)),
    )
    drives = [{"path": "/x", "format": "raw", "readonly": True}]
    appliance._perform(guest, "__setup__", [], {"drives": drives, "force_tcg": True, "tmpdir": "/"})
    assert asked == [("/x", {"format": "raw"})]


@pytest.mark.parametrize(
    ("environ", "cache"),
    [
        ({}, "/var/tmp"),
        ({"TMPDIR": "/big"}, "/big"),
        ({"TMPDIR": "/big", "LIBGUESTFS_CACHEDIR": "/cache"}, "/cache"),
    ],
)
def test_temporary_files_are_the_builds_and_the_appliance_stays_where_it_is(
    environ: dict[str, str], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TMPDIR", "LIBGUESTFS_CACHEDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert appliance._temporary_files_in(tmp_path) == {
        "TMPDIR": str(tmp_path),
        "LIBGUESTFS_CACHEDIR": cache,
    }
