"""The kinds of failure: what a user reads, and what a script sees."""

from __future__ import annotations

import pytest

from koji_indirection.errors import BuilderFault, BuildFailed, IndirectionError, UsageError


@pytest.mark.parametrize(
    ("kind", "exit_status", "label"),
    [
        (BuildFailed, 1, "build failed"),
        (UsageError, 2, "usage error"),
        (BuilderFault, 3, "builder fault"),
    ],
)
def test_each_kind_has_its_exit_status_and_its_label(
    kind: type[IndirectionError], exit_status: int, label: str
) -> None:
    error = kind("the disk is full", "free some space")
    assert error.exit_status == exit_status
    assert error.one_line() == f"{label}: the disk is full (free some space)"


def test_an_error_without_a_hint_has_no_empty_parentheses() -> None:
    assert str(BuildFailed("it broke")) == "it broke"
    assert BuildFailed("it broke").one_line() == "build failed: it broke"


def test_the_last_line_is_one_line_whatever_the_message_holds() -> None:
    error = BuilderFault("qemu-img said:\r\n  no\u2028such\x85file\v\f\t!", "look\nthere")
    line = error.one_line()
    assert line == "builder fault: qemu-img said: no such file ! (look there)"
    assert len(line.splitlines()) == 1


def test_the_kinds_are_told_apart_and_have_one_base() -> None:
    for kind in (BuildFailed, UsageError, BuilderFault):
        assert issubclass(kind, IndirectionError)
    assert not issubclass(BuildFailed, BuilderFault)
    assert not issubclass(BuilderFault, BuildFailed)
    assert not issubclass(UsageError, BuildFailed)


def test_details_are_kept_apart_from_the_sentence() -> None:
    error = BuildFailed("it broke", "mend it", details="line 1\nline 2")
    assert error.details == "line 1\nline 2"
    assert "line 1" not in error.one_line()
