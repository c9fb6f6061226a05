"""What a guest writes, within bounds: nothing of it steers a terminal or fills a disk."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from koji_indirection.guestlog import BoundedLog, LineSplitter, printable

MIB = 1024**2


# printable


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"plain\ttext\nline 2", "plain\ttext\nline 2"),
        (b"\x1b[31mred\x1b[0m \x1b[2J\x1b[1;1Hhome", "red home"),
        (b"\x1b[?25lhidden\x1b[>0c", "hidden"),
        (b"\x1b]0;evil title\x07text", "text"),
        (b"\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        (b"\x1bPq#0;2;0;0;0\x1b\\sixel", "sixel"),
        (b"\x1b_apc\x1b\\\x1b^pm\x1b\\rest", "rest"),
        (b"\x1bcreset \x1b(Bcharset \x1b7saved", "reset charset saved"),
        (b"lone escape at the end\x1b", "lone escape at the end"),
        (b"bell\x07 back\x08space del\x7f nul\x00 cr\r", "bell backspace del nul cr"),
        ("c1 \x9b31m \x90dcs \x85nel".encode(), "c1 31m dcs nel"),
        ("bidi \u202eevil\u202c \u2066isolate\u2069".encode(), "bidi evil isolate"),
        ("marks \u200e\u200f\u061c and \u2028lines", "marks  and lines"),
        ("half \ud800 a pair", "half  a pair"),
        ("Größe ✓ 漢字".encode(), "Größe ✓ 漢字"),
        (b"bad \xff\xfe utf-8 \xc3", "bad \ufffd\ufffd utf-8 \ufffd"),
        ("text\x1b[1m that is a str", "text that is a str"),
        (b"", ""),
    ],
)
def test_guest_text_loses_what_steers_a_terminal(data: bytes | str, shown: str) -> None:
    assert printable(data) == shown


def test_long_text_is_cut_where_the_limit_is() -> None:
    assert printable(b"x" * 100, 100) == "x" * 100
    assert printable(b"x" * 101, 100) == "x" * 100 + "..."


@given(st.one_of(st.binary(max_size=300), st.text(st.characters(), max_size=300)))
def test_nothing_that_a_guest_sends_leaves_a_control_character(data: bytes | str) -> None:
    shown = printable(data, 50)
    assert len(shown) <= 53
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    shown.encode()


@given(st.lists(st.sampled_from(["\x1b", "[", "]", "0", ";", "m", "\x07", "\\", "a", "\x9b"])))
def test_nested_and_broken_escape_sequences_leave_no_escape(pieces: list[str]) -> None:
    assert "\x1b" not in printable("".join(pieces))


# BoundedLog


def log_of(path: Path, limit: int, pieces: list[bytes]) -> bytes:
    with BoundedLog(path, limit_bytes=limit) as log:
        for piece in pieces:
            log.write(piece)
        assert log.total_bytes == sum(map(len, pieces))
    return path.read_bytes()


MARK = re.compile(
    rb"\n\[\.\.\. (\d+) bytes left out here: the log is limited to (\d+) bytes,"
    rb" see --max-log-size \(max_log_size on a builder\) \.\.\.\]\n"
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    limit=st.integers(4, 3000),
    sizes=st.lists(st.integers(0, 1500), max_size=12),
    around=st.integers(-3, 3),
)
def test_head_and_tail_are_exact_and_the_mark_says_what_is_missing(
    tmp_path: Path, limit: int, sizes: list[int], around: int
) -> None:
    sizes = [*sizes, max(0, limit - sum(sizes) + around)]  # sums near the limit too
    total = sum(sizes)
    source = bytes(ord("a") + number % 26 for number in range(total))
    pieces, start = [], 0
    for size in sizes:
        pieces.append(source[start : start + size])
        start += size
    content = log_of(tmp_path / "log", limit, pieces)
    if total <= limit:
        assert content == source
        return
    parts = MARK.split(content)
    assert len(parts) == 4, "exactly one mark"
    head, left_out, stated_limit, tail = parts
    assert int(stated_limit) == limit
    assert len(head) + len(tail) == limit
    assert int(left_out) == total - limit
    assert source.startswith(head)
    assert source.endswith(tail)
    assert len(tail) == limit // 4


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_even_the_smallest_limit_bounds_the_log(tmp_path: Path, limit: int) -> None:
    content = log_of(tmp_path / "log", limit, [b"x" * 1000] * 10)
    assert len(MARK.sub(b"", content)) == limit
    assert b"%d bytes left out" % (10_000 - limit) in content


def test_the_head_can_be_followed_while_the_log_is_written(tmp_path: Path) -> None:
    with BoundedLog(tmp_path / "log", limit_bytes=1000) as log:
        log.write(b"first line\n")
        assert (tmp_path / "log").read_bytes() == b"first line\n"


def test_gigabytes_stay_within_memory_and_disk(tmp_path: Path) -> None:
    piece = b"y" * 65536
    tracemalloc.start()
    try:
        with BoundedLog(tmp_path / "log", limit_bytes=8 * MIB) as log:
            for _ in range(8192):  # 512 MiB
                log.write(piece)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "log").stat().st_size < 8 * MIB + 200
    assert peak_bytes < 6 * MIB


def test_the_log_is_whole_after_an_exception_and_may_be_closed_twice(tmp_path: Path) -> None:
    with pytest.raises(KeyError), BoundedLog(tmp_path / "log", limit_bytes=100) as log:
        log.write(b"x" * 90)
        raise KeyError
    log.close()
    assert (tmp_path / "log").read_bytes() == b"x" * 90


def test_the_last_lines_are_printable_and_not_blank(tmp_path: Path) -> None:
    with BoundedLog(tmp_path / "log", limit_bytes=10_000) as log:
        log.write(b"one\r\n\r\n\x1b[31mtwo\x1b[0m  \n \nth\xffree\n50%\r100%\nno newline")
        assert log.last_lines(10) == ["one", "two", "th\ufffdree", "50%", "100%", "no newline"]
        assert log.last_lines(2) == ["100%", "no newline"]


def test_the_last_lines_are_the_last_ones_even_behind_a_full_log(tmp_path: Path) -> None:
    with BoundedLog(tmp_path / "log", limit_bytes=64) as log:
        for number in range(100_000):
            log.write(b"line %d\n" % number)
        assert log.last_lines(3) == ["line 99997", "line 99998", "line 99999"]


def test_a_silent_guest_has_no_last_lines(tmp_path: Path) -> None:
    with BoundedLog(tmp_path / "log", limit_bytes=64) as log:
        assert log.last_lines(5) == []


def test_a_last_line_without_end_is_cut(tmp_path: Path) -> None:
    with BoundedLog(tmp_path / "log", limit_bytes=MIB) as log:
        log.write(b"z" * 500_000)
        (line,) = log.last_lines(5)
    assert line == "z" * 300 + "..."


# LineSplitter


def test_half_lines_wait_for_their_other_half() -> None:
    splitter = LineSplitter(100)
    assert splitter.feed(b"on") == []
    assert splitter.feed(b"e\ntwo\nth") == [b"one", b"two"]
    assert splitter.feed(b"") == []
    assert splitter.feed(b"ree\n\n") == [b"three", b""]


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=8))
def test_where_the_stream_is_cut_makes_no_difference(data: bytes, cuts: list[int]) -> None:
    splitter, lines, start = LineSplitter(50), [], 0
    for cut in [*sorted(cuts), len(data)]:
        lines += splitter.feed(data[start:cut])
        start = max(start, cut)
    assert lines == [line[:50] for line in data.split(b"\n")[:-1]]


def test_a_line_without_end_is_cut_and_costs_no_memory() -> None:
    splitter = LineSplitter(4096)
    piece = b"x" * 65536
    tracemalloc.start()
    try:
        for _ in range(800):  # 50 MiB
            assert splitter.feed(piece) == []
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < MIB
    assert splitter.feed(b"\nnext\n") == [b"x" * 4096, b"next"]
