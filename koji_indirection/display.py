"""What a person sees while a build runs: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from .errors import without_passwords
from .guestlog import LineSplitter, printable

_LINE_LIMIT_BYTES = 2000


class Display:
    """Shows phases, log messages and, if asked, the guest's output, on one stream.

    verbose -- stream the commands' output as it comes; quiet -- show nothing.
    """

    def __init__(self, stream: TextIO, *, verbose: bool, quiet: bool) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True, quiet=quiet)
        self._verbose = verbose
        self._lines = LineSplitter(_LINE_LIMIT_BYTES)
        self._phase = "starting"
        self._last_line = ""
        self._build_started = self._phase_started = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal and not self._console.quiet:
            self._live = Live(get_renderable=self._status, console=self._console, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.guest_output(b"\n")  # a last line that did not end
        if self._live is not None:
            self._live.stop()

    def phase(self, name: str) -> None:
        self._phase, self._phase_started = name, time.monotonic()
        self.line(f"[{self._clock()}] {name}")

    def guest_output(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            # A progress bar rewrites its line: what counts is what stands there at the end.
            text = printable(re.split(rb"\r(?!$)", line)[-1], 500).rstrip()
            if text:
                self._last_line = text
                if self._verbose:
                    self.line(f"  {text}")

    def line(self, text: str) -> None:
        try:
            self._console.print(Text(text))
        except (OSError, SystemExit):  # rich exits when its reader has gone; a build goes on
            self._console.quiet = True

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._build_started)
        return f"{seconds // 60:3}:{seconds % 60:02}"

    def _status(self) -> Table:
        here = int(time.monotonic() - self._phase_started)
        row = Table.grid(padding=(0, 1))
        width = max(20, self._console.width - 30)
        row.add_row(
            Spinner("line"),
            Text(f"{self._clock()} {self._phase} {here} s"),
            Text(self._last_line[:width], style="dim"),
        )
        return row


class DisplayHandler(logging.Handler):
    """Hands the library's log messages to a display; errors are the last line's, not its."""

    def __init__(self, display: Display, level: int) -> None:
        super().__init__(level)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            return
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        self._display.line(f"        {prefix}{printable(without_passwords(record.getMessage()))}")


@contextlib.contextmanager
def log_shown_on(display: Display, level: int = logging.INFO) -> Iterator[None]:
    """Show the library's log messages on the display while the block runs."""
    logger = logging.getLogger(__package__)
    handler = DisplayHandler(display, level)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
