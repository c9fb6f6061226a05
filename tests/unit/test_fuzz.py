"""Anything at all, given to what reads what others wrote: an answer or one of our errors.

The seeds are fixed, so that a failure is one for everybody. `make fuzz` takes new seeds, which it
prints, and many more examples; KOJI_INDIRECTION_FUZZ_EXAMPLES says how many.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from koji_indirection import imagefile, template, watch
from koji_indirection.errors import IndirectionError
from koji_indirection.guestlog import BoundedLog
from koji_indirection.watch import Deadlines, DiskLimit, Watch

EXAMPLES = int(os.environ.get("KOJI_INDIRECTION_FUZZ_EXAMPLES") or 0)
MIB = 1024**2


def examples(number: int) -> settings:
    return settings(
        max_examples=EXAMPLES or number,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


# The template parser

WORDS = ["template", "commands", "command", "packages", "package", "repositories", "repository",
         "files", "file", "url", "name", "arch"]  # fmt: skip
PIECES = st.one_of(
    st.sampled_from([f"<{word}>" for word in WORDS] + [f"</{word}>" for word in WORDS]),
    st.sampled_from(
        [
            '<command name="a">',
            '<file name="/etc/x" type="base64">',
            '<command name="a" type="base64" position="-1">',
            '<!DOCTYPE t [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
            "&x;&amp;&#0;&#xFFFFFF;",
            "<![CDATA[",
            "]]>",
            "<?xml version='1.0' encoding='utf-7'?>",
            "<!--",
            "-->",
        ]
    ),
    st.text(max_size=20),
)


@given(st.one_of(st.lists(PIECES, max_size=30).map("".join).map(str.encode), st.binary()))
@examples(300)
def test_any_text_is_a_template_or_refused(data: bytes) -> None:
    try:
        parsed = template.parse(data, source="fuzz")
    except IndirectionError as error:
        assert "\n" not in error.one_line()
        assert len(error.one_line()) < 2000
    else:
        assert all(command.name and "\0" not in command.name for command in parsed.commands)


# The status channel

# json.loads() makes half a surrogate pair of "\\ud800", which no file can be written with.
TEXT = st.text(st.characters(), max_size=8)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner)),
    max_leaves=6,
)
EVENTS = ["job-started", "setup-started", "setup-ended", "command-started", "command-ended",
          "sample", "job-ended", "else"]  # fmt: skip
KEYS = ["kernel", "shell", "selinux", "step", "reason", "index", "status", "seconds",
        "memory_bytes", "root_bytes", "workspace_bytes", "workspace_size_bytes",
        "oom_kills"]  # fmt: skip
NUMBERS = st.one_of(VALUES, st.integers(-1, 3), st.just(0), st.just("network"))
REPORTS = st.one_of(
    st.builds(
        lambda event, fields: json.dumps({"event": event, **fields}).encode() + b"\n",
        st.one_of(st.sampled_from(EVENTS), VALUES),
        st.dictionaries(st.sampled_from(KEYS), NUMBERS, max_size=9),
    ),
    st.builds(lambda value: json.dumps(value).encode() + b"\n", VALUES),
    st.binary(max_size=60),
    st.sampled_from([b"\n", b"\xff\xfe\n", b"\x1b[2J\n", b"[" * 5000 + b"\n", b'{"event":']),
)


class Machine:
    """A VM that has just ended; what its guest sent is still in the sockets."""

    def __init__(self, sent: bytes) -> None:
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.events.put("stopped")
        pairs = [socket.socketpair() for _ in range(3)]
        (self.status, status), (self.log, log), (self.console, console) = pairs
        self._guest = [(status, sent), (log, sent), (console, sent)]

    def play(self) -> None:
        for stream, data in self._guest:
            stream.sendall(data)
            stream.close()

    def is_active(self) -> bool:
        return False

    def screenshot(self, path: Path) -> bool:
        return False


@given(reports=st.lists(REPORTS, max_size=25))
@examples(150)
def test_any_reports_make_an_end_that_can_be_recorded(
    tmp_path_factory: pytest.TempPathFactory, reports: list[bytes]
) -> None:
    directory = tmp_path_factory.getbasetemp()
    machine = Machine(b"".join(reports))
    thread = threading.Thread(target=machine.play)
    with (
        BoundedLog(directory / "fuzz-job.log", limit_bytes=MIB) as job_log,
        BoundedLog(directory / "fuzz-console.log", limit_bytes=MIB) as console_log,
    ):
        one = Watch(
            machine,  # type: ignore[arg-type]
            command_names=["one", "two"],
            setup_steps=["network"],
            deadlines=Deadlines(boot=20, job=20, command=None, shutdown=20),
            job_log=job_log,
            console_log=console_log,
            on_output=lambda data: None,
            on_stage=lambda stage: None,
            disk_limit=DiskLimit((), None),
        )
        thread.start()
        try:
            one.follow(directory / "screenshot.png")
        except IndirectionError as error:
            assert "\x1b" not in str(error) + error.details
        finally:
            thread.join()
            for stream in (machine.status, machine.log, machine.console):
                stream.close()
    report = one.report
    assert report.status is None or 0 <= report.status <= 255
    assert [command.name for command in report.commands] == ["one", "two"][: len(report.commands)]
    recorded = [vars(one) for one in [*report.setup, *report.commands]], report.guest, report.peaks
    text = json.dumps(recorded, allow_nan=False, ensure_ascii=False)
    assert len(text.encode()) < 5000


# The inspection of images


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The beginnings of an image of each format that qemu-img makes."""
    directory = tmp_path_factory.mktemp("seeds")
    raw = directory / "raw"
    raw.write_bytes(bytes(510) + b"\x55\xaa" + b"data" * 5000)
    os.truncate(raw, MIB)
    found = [raw.read_bytes()]
    for kind in ("qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed"):
        path = directory / kind
        argv = ["qemu-img", "convert", "-f", "raw", "-O", kind, str(raw), str(path)]
        subprocess.run(argv, check=True)
        found.append(path.read_bytes()[: 2 * MIB])
    return found


CHANGES = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 128), st.integers(0, 400_000)),
        st.one_of(
            st.binary(min_size=1, max_size=16),
            st.sampled_from([b"\xff" * 4, b"\xff" * 8, bytes(8), b"QFI\xfb", b"CD001", b"KDMV"]),
        ),
    ),
    max_size=6,
)


@given(which=st.integers(0, 6), changes=CHANGES, cut=st.one_of(st.none(), st.integers(0, 500_000)))
@examples(120)
def test_any_change_of_an_image_leaves_one_that_is_accepted_or_refused(
    seeds: list[bytes],
    tmp_path_factory: pytest.TempPathFactory,
    which: int,
    changes: list[tuple[int, bytes]],
    cut: int | None,
) -> None:
    data = bytearray(seeds[which])
    for offset, new in changes:
        data[offset : offset + len(new)] = new
    directory = tmp_path_factory.getbasetemp() / "fuzz-images"
    directory.mkdir(exist_ok=True)
    path = directory / "image"
    path.write_bytes(bytes(data[:cut]))
    work = directory / "work"
    work.mkdir(exist_ok=True)
    try:
        image = imagefile.vet(
            path, max_virtual_size_bytes=64 * MIB, work_dir=work, role=imagefile.INPUT_IMAGE
        )
    except IndirectionError as error:
        assert error.exit_status == 1, error
        assert "\n" not in error.one_line()
    else:
        assert image.format in ("raw", "qcow2")
        assert 0 < image.virtual_size_bytes <= 64 * MIB
    assert list(work.iterdir()) == []


@pytest.fixture(autouse=True)
def quick_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LATE_EVENT_SECONDS", 0.0)
