"""Sizes and durations, read and written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koji_indirection.errors import UsageError
from koji_indirection.units import (
    GIB,
    MIB,
    TIB,
    format_duration,
    format_exact_size,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("30G", 30 * GIB),
        ("30GiB", 30 * GIB),
        ("30 gib", 30 * GIB),
        ("512M", 512 * MIB),
        ("1.5T", 3 * TIB // 2),
        ("64k", 65536),
        ("4096", 4096),
        ("4096B", 4096),
        (" 1G ", GIB),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "G",
        "-1G",
        "30GB",
        "30X",
        "1,5G",
        "0.3",
        "1e9",
        "30G 1",
        "٣G",
        "1\u212a",
        "9" * 99,
        "0x10",
    ],
)
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a size .*write a number of bytes") as caught:
        parse_size(text)
    assert repr(text)[:77] in caught.value.message


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("15m", 900), ("4h", 14400), ("1d", 86400), (" 2 h ", 7200)],
)
def test_durations_are_read_as_people_write_them(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1", "1.5h", "1w", "1h30m", "soon", "٣"])
def test_what_is_no_duration_is_named(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a duration .*write a whole number") as caught:
        parse_duration(text)
    assert repr(text) in caught.value.message


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (MIB - 1, "1 MiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (30 * GIB, "30 GiB"),
        (5000 * TIB, "5000 TiB"),
    ],
)
def test_sizes_are_written_as_people_read_them(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@settings(deadline=None)
@given(st.integers(1, 1023), st.sampled_from([1, 1024, MIB, GIB, TIB]))
def test_a_whole_size_survives_writing_and_reading(number: int, unit: int) -> None:
    assert parse_size(format_size(number * unit)) == number * unit


@settings(deadline=None)
@given(st.integers(0, 10**7))
def test_a_duration_survives_writing_and_reading(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(0, 2**45))
def test_an_exact_size_is_exact(size_bytes: int) -> None:
    assert parse_size(format_exact_size(size_bytes)) == size_bytes


def test_an_exact_size_has_the_largest_unit_that_fits() -> None:
    sizes = [TIB, 1025 * GIB, 1000 * MIB, 1000, 0]
    assert [format_exact_size(one) for one in sizes] == [
        "1 TiB",
        "1025 GiB",
        "1000 MiB",
        "1000 B",
        "0 B",
    ]
