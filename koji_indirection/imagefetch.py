"""An image of Koji -> a file on this machine: in place, or fetched, resumed, verified, cached.

What a server sends is not trusted: a file is used only after size and checksum are those that
the hub has told. This module must never hold an image in memory. requests is imported where it
is used; cache.py keeps what is fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import socket
import stat
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .cache import Cache, cached
from .config import Download
from .errors import BuilderFault, BuildFailed, without_passwords
from .hubcalls import one_line
from .sources import EXPIRED_HINT, Source, shown
from .threadcall import Call, GivenUp
from .units import format_size

log = logging.getLogger(__name__)

_CHUNK_BYTES = 256 * 1024

Progress = Callable[[int, int], None]


@contextlib.contextmanager
def fetch(
    source: Source,
    *,
    topurl: str | None,
    topdir: Path | None,
    cache: Cache,
    download: Download | None = None,
    progress: Progress = lambda done_bytes, size_bytes: None,
) -> Iterator[Path]:
    """The image's file, for as long as the block lasts; nobody may write to it.

    It is read in place where topdir is mounted and holds the file with the right
    size (its content is the administrator's own and is not checked again), else it
    comes from the cache, into which it is fetched from topurl.

    progress -- called with the bytes that are there and those of the whole image.
    Raises BuildFailed when the output of a task is gone, BuilderFault for the rest:
    the server is away or sends the wrong file, there is no room.
    """
    mounted = _in_place(source, topdir)
    if mounted is not None:
        log.info("%s: reading it in place, %s", source, mounted)
        yield mounted
        return
    if not topurl or urllib.parse.urlsplit(topurl).scheme not in ("http", "https"):
        raise BuilderFault(
            f"{source} cannot be fetched: topurl is {topurl!r}",
            "set topurl in Koji's configuration to an http:// or https:// URL",
        )
    options = download or Download()
    deadline = time.monotonic() + options.total_timeout_seconds

    def fill(file: IO[bytes]) -> None:
        transfer = _Transfer(source, source.url(topurl), file, options, deadline, progress)
        transfer.run()

    with cached(cache, source, fill, options.total_timeout_seconds) as path:
        yield path


def _in_place(source: Source, topdir: Path | None) -> Path | None:
    """The file below topdir; scratch files there are links, which are followed."""
    if topdir is None:
        return None
    path = source.file(topdir)
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size == source.size_bytes:
            path.open("rb").close()
            return path
    except OSError:
        return None
    log.warning("%s: %s is not what the hub describes, not used", source, path)
    return None


class _Cut(Exception):
    """The connection failed; what arrived is good, and the rest may come another time."""


class _WrongData(Exception):
    """What the server has is not what the hub describes."""


_TRY_AGAIN_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19}|\*)", re.ASCII)
_MAX_WAIT_SECONDS = 60.0


class _Transfer:
    """One image on its way into a file: hashed as it comes, resumed after a cut."""

    def __init__(
        self,
        source: Source,
        url: str,
        file: IO[bytes],
        options: Download,
        deadline: float,
        progress: Progress,
    ) -> None:
        try:
            import requests  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError as error:
            raise BuilderFault(
                "the Python module requests is not installed", "install python3-requests"
            ) from error
        self.source = source
        self.url = url
        self.file = file
        self.options = options
        self.deadline = deadline
        self.progress = progress
        self.http = requests.Session()
        self.fresh = False
        self.report = _ProgressLog(source)
        self._restart()

    def run(self) -> None:
        log.info(
            "%s: fetching %s from %s",
            self.source,
            format_size(self.source.size_bytes),
            without_passwords(self.url),  # kojid's own log has this too
        )
        with self.http:
            try:
                self._receive_verified()
                return
            except _WrongData as error:
                log.warning("%s: %s; fetching it once more", self.source, error)
            self.fresh = True  # a proxy may have kept something old
            self._restart()
            try:
                self._receive_verified()
            except _WrongData as error:
                raise BuilderFault(
                    f"{self.source}, fetched twice from {self.url}, is not what the hub describes:"
                    f" {error}",
                    "the file in Koji, or a proxy on the way to it, is damaged",
                ) from None

    def _restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.received = 0
        self.digest = hashlib.new(self.source.checksum_name, usedforsecurity=False)

    def _receive_verified(self) -> None:
        self._receive()
        digest = self.digest.hexdigest()
        if digest != self.source.checksum:
            raise _WrongData(f"its {self.source.checksum_name} is {digest}")

    def _receive(self) -> None:
        """All bytes, in as many requests as it takes while each of a few brings something new."""
        most = failures = 0
        while self.received < self.source.size_bytes:
            try:
                self._request()
            except _Cut as cut:
                failures = 0 if self.received > most else failures + 1
                most = max(most, self.received)
                if failures > self.options.retries:
                    raise BuilderFault(
                        f"{self.source} cannot be fetched from {self.url}: {cut}",
                        "see whether the server is well, and can be reached from here",
                    ) from None
                log.info(
                    "%s: %s after %s; trying again", self.source, cut, format_size(self.received)
                )
                wait = min(self.options.retry_wait_seconds * 2**failures, _MAX_WAIT_SECONDS)
                time.sleep(max(0.0, min(wait, self.deadline - time.monotonic())))
            self._check_deadline()

    def _check_deadline(self) -> None:
        if time.monotonic() > self.deadline and self.received < self.source.size_bytes:
            raise self._out_of_time()

    def _out_of_time(self) -> BuilderFault:
        return BuilderFault(
            f"{self.source} could not be fetched within"
            f" {self.options.total_timeout_seconds:g} s: {format_size(self.received)} of"
            f" {format_size(self.source.size_bytes)} arrived",
            "raise total_timeout in the configuration's [download], or use a nearer server",
        )

    def _request(self) -> None:
        """Ask for what is missing, and take what comes. Raises _Cut when that is not all."""
        headers = {"Accept-Encoding": "identity"}
        if self.received:
            headers["Range"] = f"bytes={self.received}-"
        if self.fresh:
            headers["Cache-Control"] = "no-cache"
        try:
            # In a thread: a server may send headers, or announce them, for days.
            opened = Call(self._open, headers).value(self.deadline - time.monotonic())
        except GivenUp:
            raise self._out_of_time() from None
        with contextlib.closing(opened) as response:
            self._check_status(response)
            with _connection_until(self.deadline, response):
                self._read(response)

    def _open(self, headers: dict[str, str]) -> Any:
        """GET, and follow redirects: by hand, since requests reads their bodies without a limit."""
        import requests
        import urllib3  # type: ignore[import-not-found,unused-ignore]

        url, options = self.url, self.options
        for _ in range(options.max_redirects + 1):
            try:
                response = self.http.get(
                    url,
                    headers=headers,
                    stream=True,
                    allow_redirects=False,
                    timeout=(options.connect_timeout_seconds, options.read_timeout_seconds),
                    # True, not None: requests then looks at REQUESTS_CA_BUNDLE.
                    verify=str(options.ca_bundle) if options.ca_bundle else True,
                    proxies=dict.fromkeys(("http", "https"), options.proxy)
                    if options.proxy
                    else None,
                )
            except requests.exceptions.SSLError as error:
                raise BuilderFault(
                    f"{self.source}: the server of {shown(url)} is not trusted: {one_line(error)}",
                    "name its CA with ca_bundle in the configuration's [download]",
                ) from error
            except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
                raise _Cut(one_line(error)) from error
            # An URL that is none, a CA file that is not there.
            except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
                raise BuilderFault(
                    f"{self.source} cannot be fetched from {shown(url)}: {one_line(error)}",
                    "check topurl in Koji's configuration, and ca_bundle in ours",
                ) from error
            target = self.http.get_redirect_target(response)
            if target is None:
                return response
            response.close()
            url = _redirected(url, target)
        raise BuilderFault(
            f"{self.source}: {self.url} redirects more than {options.max_redirects} times",
            "check topurl, or raise max_redirects in the configuration's [download]",
        )

    def _check_status(self, response: Any) -> None:
        status = response.status_code
        if status == 200:
            if self.received:
                log.info("%s: the server cannot resume, starting over", self.source)
                self._restart()
            length = response.headers.get("content-length", "")
            if length.isascii() and length.isdigit() and int(length) != self.source.size_bytes:
                raise _WrongData(
                    f"it has {length:.20} bytes on the server, not {self.source.size_bytes}"
                )
        elif status == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            if not match or int(match.group(1)) != self.received:
                raise _WrongData("the server sends another part of it than was asked for")
            if match.group(2) not in ("*", str(self.source.size_bytes)):
                raise _WrongData(
                    f"it has {match.group(2)} bytes on the server, not {self.source.size_bytes}"
                )
        elif status == 416:
            raise _WrongData(f"it has not even {self.received} bytes on the server")
        elif status in _TRY_AGAIN_STATUSES:
            raise _Cut(f"the server answers {_status(response)}")
        elif status in (404, 410) and self.source.task_id is not None:
            raise BuildFailed(f"{self.source} was deleted or has expired", EXPIRED_HINT)
        else:
            raise BuilderFault(
                f"{self.source} cannot be fetched: the server answers {_status(response)}"
                f" to {shown(response.url)}",
                "check topurl in Koji's configuration, and the server",
            )

    def _read(self, response: Any) -> None:
        import urllib3  # type: ignore[import-not-found,unused-ignore]

        size = self.source.size_bytes
        while self.received < size:
            self._check_deadline()
            try:
                # Not decoded: a server may say "Content-Encoding: gzip" of a file that is .gz.
                chunk = response.raw.read(
                    min(_CHUNK_BYTES, size - self.received), decode_content=False
                )
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise _Cut(one_line(error)) from error
            if not chunk:
                raise _Cut("the connection ended")
            self.file.write(chunk)
            self.digest.update(chunk)
            self.received += len(chunk)
            self.progress(self.received, size)
            self.report.update(self.received)


@contextlib.contextmanager
def _connection_until(deadline: float, response: Any) -> Iterator[None]:
    """End the connection at the deadline: a read from a server that trickles may take days."""
    try:
        connection = socket.socket(fileno=os.dup(response.raw.fileno()))
    except (OSError, ValueError, AttributeError):  # it has ended, there is nothing to read
        yield
        return
    with connection:
        seconds = max(0.0, deadline - time.monotonic())
        timer = threading.Timer(seconds, _shut_down, [connection])
        timer.daemon = True  # should an interrupt come before it can be cancelled
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the server was quicker
        connection.shutdown(socket.SHUT_RDWR)


def _status(response: Any) -> str:
    return f"{response.status_code} {shown(response.reason or '')[:40]}".rstrip()


def _redirected(url: str, target: str) -> str:
    """Where a redirect leads. Raises BuilderFault when that is not HTTP."""
    with contextlib.suppress(ValueError):
        joined = urllib.parse.urljoin(url, target)
        if urllib.parse.urlsplit(joined).scheme in ("http", "https"):
            return joined
    raise BuilderFault(
        f"{shown(url)} redirects to {target!r:.200}, which is no HTTP address",
        "check topurl in Koji's configuration",
    )


class _ProgressLog:
    """A log line every 10 s or 10 %, whichever comes first, but not more than one a second."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.started = self.said = time.monotonic()
        self.said_bytes = 0

    def update(self, received: int) -> None:
        now, size = time.monotonic(), self.source.size_bytes
        much = abs(received - self.said_bytes) * 10 >= size
        if received < size and now - self.said < (1 if much else 10):
            return
        rate = received / max(now - self.started, 0.001)
        log.info(
            "%s: %d %% of %s, %s/s",
            self.source,
            received * 100 // size,
            format_size(size),
            format_size(int(rate)),
        )
        self.said, self.said_bytes = now, received
