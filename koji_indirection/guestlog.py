"""What a guest writes, kept within bounds: logs with a head and a tail, and safe text.

Everything here comes from a guest: it is bytes, so many of them, and nothing else.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor movement
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC, DCS, SOS, PM, APC strings
    r"|\x1b[ -/]*[0-~]?"  # two-character escapes, a lone ESC
)
# And what turns the direction of text, or cannot be encoded: JSON may have half a surrogate pair.
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(data: bytes | str, limit: int = 2000) -> str:
    """Guest text that is safe on a terminal and in a message: no escape sequences, no controls.

    Tabs and newlines stay; what follows the first `limit` characters is cut.
    """
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    text = _CONTROLS.sub("", _ESCAPES.sub("", text[: limit * 4]))
    return text if len(text) <= limit else text[:limit] + "..."


class BoundedLog:
    """A log file that never grows past a limit: its head, a mark that says what was cut, its tail.

    The head goes to the file as it arrives, so that it can be followed; once
    the head is full, the last `tail_bytes` are held in memory until close().
    """

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        self.path = path
        self.total_bytes = 0
        tail_bytes = min(limit_bytes // 4, 1024 * 1024)
        self._head_left = limit_bytes - tail_bytes
        self._limit_bytes = limit_bytes
        self._tail = _Tail(tail_bytes)
        self._recent = _Tail(16 * 1024)
        self._file: BinaryIO = path.open("wb", buffering=0)

    def write(self, data: bytes) -> None:
        self.total_bytes += len(data)
        self._recent.append(data)
        head, rest = data[: self._head_left], data[self._head_left :]
        if head:
            self._file.write(head)
            self._head_left -= len(head)
        if rest:
            self._tail.append(rest)

    def last_lines(self, count: int) -> list[str]:
        """The last lines written, made printable; blank ones left out."""
        text = self._recent.content().decode("utf-8", "replace")
        lines = [printable(line, 300).rstrip() for line in re.split(r"[\r\n]+", text)]
        return [line for line in lines if line][-count:]

    def close(self) -> None:
        if self._file.closed:
            return
        if self._tail.dropped_bytes:
            mark = (
                f"\n[... {self._tail.dropped_bytes} bytes left out here:"
                f" the log is limited to {self._limit_bytes} bytes, see --max-log-size"
                " (max_log_size on a builder) ...]\n"
            )
            self._file.write(mark.encode())
        self._file.write(self._tail.content())
        self._file.close()

    def __enter__(self) -> BoundedLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Tail:
    """The last so many bytes of a stream."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held = bytearray()
        self._total_bytes = 0

    @property
    def dropped_bytes(self) -> int:
        return max(0, self._total_bytes - self._limit_bytes)

    def append(self, data: bytes) -> None:
        self._total_bytes += len(data)
        self._held += data[max(0, len(data) - self._limit_bytes) :]  # [-0:] would be all
        if len(self._held) > 2 * self._limit_bytes:  # seldom, so that small pieces stay cheap
            del self._held[: -self._limit_bytes]

    def content(self) -> bytes:
        return bytes(self._held[-self._limit_bytes :])


class LineSplitter:
    """Cuts a byte stream into lines; a line without end is cut at a limit."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._partial = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that this piece of the stream completes, without their newlines."""
        *lines, rest = (self._partial + data).split(b"\n")
        self._partial = rest[: self._limit_bytes]
        return [line[: self._limit_bytes] for line in lines]
