"""What a person sees: plain lines without a terminal, and nothing that a guest can steer."""

from __future__ import annotations

import io
import logging

import pytest

from koji_indirection.display import Display, log_shown_on

logger = logging.getLogger("koji_indirection.test_display")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_opinion_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(logging.getLogger("koji_indirection"), "level", logging.DEBUG)


def shown(*, verbose: bool = False, quiet: bool = False, stream: io.StringIO | None = None) -> str:
    stream = io.StringIO() if stream is None else stream
    with Display(stream, verbose=verbose, quiet=quiet) as display, log_shown_on(display):
        display.phase("boot")
        logger.debug("a detail")
        logger.info("the kernel is %s", "6.1")
        logger.warning("this is slow")
        logger.error("the reason, which is the last line's")
        display.guest_output(b"hel")
        display.guest_output(b"lo\n\n 10%\r 99%\r\n\x1b[31mred\x1b[0m \x1b]0;t\x07\x9b2J\nhalf")
        display.phase("job")
    return stream.getvalue()


def test_without_a_terminal_there_are_plain_lines() -> None:
    assert shown().splitlines() == [
        "[  0:00] boot",
        "        the kernel is 6.1",
        "        warning: this is slow",
        "[  0:00] job",
    ]


def test_verbose_streams_the_guests_output_as_safe_lines() -> None:
    lines = shown(verbose=True).splitlines()
    assert lines[3:] == ["  hello", "   99%", "  red \ufffd2J", lines[-2], "  half"]


def test_quiet_shows_nothing() -> None:
    assert shown(quiet=True) == ""
    assert shown(quiet=True, verbose=True) == ""
    assert shown(quiet=True, stream=Terminal()) == ""


def test_a_long_line_is_not_broken() -> None:
    stream = io.StringIO()
    with Display(stream, verbose=True, quiet=False) as display:
        display.guest_output(b"x" * 400 + b"\n")
    assert stream.getvalue() == "  " + "x" * 400 + "\n"


def test_markup_of_a_guest_is_text() -> None:
    stream = io.StringIO()
    with Display(stream, verbose=True, quiet=False) as display:
        display.guest_output(b"[bold red]hi[/] [link=http://evil]x[/link] :smile:\n")
    assert stream.getvalue() == "  [bold red]hi[/] [link=http://evil]x[/link] :smile:\n"


def test_a_line_without_end_does_not_grow() -> None:
    stream = io.StringIO()
    with Display(stream, verbose=True, quiet=False) as display:
        for _ in range(2000):
            display.guest_output(b"x" * 4096)
        display.guest_output(b"\n")
    assert len(stream.getvalue()) < 600


def test_on_a_terminal_no_escape_sequence_of_the_guests_gets_through() -> None:
    text = shown(stream=Terminal(), verbose=True)
    assert "hello" in text
    assert "red" in text
    assert "\x1b[31mred" not in text
    assert "\x1b]0;t" not in text
    assert "\x9b" not in text


def test_escape_sequences_in_log_messages_are_taken_out() -> None:
    stream = io.StringIO()
    with Display(stream, verbose=False, quiet=False) as display, log_shown_on(display):
        logger.info("collected %s", "\x1b[2J\u202eevil")
    assert stream.getvalue() == "        collected evil\n"


def test_after_the_block_the_log_is_shown_no_more() -> None:
    stream = io.StringIO()
    with Display(stream, verbose=False, quiet=False) as display:
        with log_shown_on(display):
            pass
        logger.info("too late")
    assert stream.getvalue() == ""
