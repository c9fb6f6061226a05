"""The kinds of failure: what a user reads, and what a script sees."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest

from koji_indirection import pipeline
from koji_indirection.display import Display, log_shown_on
from koji_indirection.errors import (
    BuilderFault,
    BuildFailed,
    IndirectionError,
    UsageError,
    without_passwords,
)
from koji_indirection.manifest import Manifest


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


def test_the_last_line_steers_no_terminal() -> None:
    error = BuildFailed("a\x1b[31mb\x07c\x9bd", "\u202eleft")
    assert error.one_line() == "build failed: a?[31mb?c?d (?left)"


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


# Passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see http://user:pa55@proxy:3128/x", "see http://***@proxy:3128/x"),
        ("git+https://t0ken@host/a.git#main", "git+https://***@host/a.git#main"),
        ("socks5h://u:p%40ss@[::1]:1080", "socks5h://u:***@[::1]:1080"),
        ("//user:pa55@host and ftp://a:b@c", "//user:***@host and ftp://a:***@c"),
        ("http://u:p@55@proxy:1 or http://a:b:c@d@e", "http://***@proxy:1 or http://***@e"),
        ("socks5://u:p@55@proxy:1", "socks5://u:***@proxy:1"),
        ("git+ssh://git@host/a.git", "git+ssh://git@host/a.git"),
        ("http://host/a@b:c and pkg@tag", "http://host/a@b:c and pkg@tag"),
        ("https://host?q=a@b https://host#a@b", "https://host?q=a@b https://host#a@b"),
    ],
)
def test_no_password_of_a_url_is_shown(text: str, shown: str) -> None:
    assert without_passwords(text) == shown
    assert BuilderFault(text, text).one_line() == f"builder fault: {shown} ({shown})"


def test_no_password_of_a_url_gets_into_logs_and_manifest(tmp_path: Path) -> None:
    url = "http://user:pa55@proxy:3128"
    shown = io.StringIO()
    display = Display(shown, verbose=True, quiet=False)
    with pipeline._build_log(tmp_path / "build.log"), log_shown_on(display):
        logging.getLogger("koji_indirection.x").warning("fetching through %s", url)
        try:
            raise ValueError(url)
        except ValueError:
            logging.getLogger("koji_indirection.x").exception("internal error")
    record = Manifest(spec={}, template={"source": url}, timeline=[], reason=f"no way to {url}")
    record.write(tmp_path)
    for text in ((tmp_path / "build.log").read_text(), shown.getvalue(),
                 (tmp_path / "manifest.json").read_text()):  # fmt: skip
        assert "proxy:3128" in text
        assert "pa55" not in text
