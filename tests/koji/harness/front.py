"""A server in front of another one, which does to each request what a test wants.

Put between a builder and its hub or topurl, it is the network that fails: connections that
are refused, cut or never answered, answers of a proxy, and other data than was asked for.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

_METHOD = re.compile(rb"<methodName>([^<]*)</methodName>")


@dataclass(frozen=True)
class Request:
    """call -- the hub's method; for an upload "upload NAME", for a GET "GET PATH"."""

    call: str
    size: int


class Trouble:
    """Instead of the answer."""

    def happen(self, handler: Handler, body: bytes) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Answer(Trouble):
    """One of its own, as a proxy gives it."""

    status: int
    body: bytes = b"<html>this is no hub</html>"
    location: str = ""

    def happen(self, handler: Handler, body: bytes) -> None:
        handler.send_response(self.status)
        if self.location:
            handler.send_header("Location", self.location)
        handler.send_header("Content-Length", str(len(self.body)))
        handler.end_headers()
        handler.wfile.write(self.body)


@dataclass(frozen=True)
class Hang(Trouble):
    """None as long as this is the trouble; or some of one."""

    after: bytes = b""
    length: int = 0

    def happen(self, handler: Handler, body: bytes) -> None:
        if self.length:
            handler.send_response(200)
            handler.send_header("Content-Length", str(self.length))
            handler.end_headers()
            handler.wfile.write(self.after)
        trouble = handler.front.trouble
        while handler.front.trouble is trouble and not handler.front.released.wait(0.05):
            pass
        handler.hang_up()


@dataclass(frozen=True)
class CutRequest(Trouble):
    """The server gets so many bytes of what is sent, and then the connection's end."""

    at: int

    def happen(self, handler: Handler, body: bytes) -> None:
        with socket.create_connection(("127.0.0.1", handler.front.port), timeout=30) as there:
            lines = [handler.requestline, *(f"{k}: {v}" for k, v in handler.headers.items())]
            there.sendall("\r\n".join([*lines, "", ""]).encode() + body[: self.at])
            there.shutdown(socket.SHUT_RDWR)
        handler.hang_up()


@dataclass(frozen=True)
class LoseAnswer(Trouble):
    """The server has done what it was asked for, and nobody hears of it."""

    def happen(self, handler: Handler, body: bytes) -> None:
        handler.ask(body)
        handler.hang_up()


@dataclass(frozen=True)
class Endless(Trouble):
    """Zeros, without a length and without an end."""

    def happen(self, handler: Handler, body: bytes) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not handler.front.released.is_set():
                handler.wfile.write(bytes(65536))
        handler.hang_up()


class Front:
    """trouble -- asked about each request; None lets it through. Can be set at any time."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.trouble: Callable[[Request], Trouble | None] = lambda request: None
        self.seen: list[tuple[str, Trouble | None]] = []
        self.released = threading.Event()
        self._server: _Server | None = None
        self._own_port = 0
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._own_port}"

    def listen(self) -> None:
        """From now on, or again."""
        self.released.clear()
        self._server = _Server(self._own_port, self)
        self._own_port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def refuse(self) -> None:
        """Connections, those that are there included, until listen()."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self.released.set()
            self._server.hang_up()
            self._server = None

    def troubled(self) -> list[str]:
        """The requests that got no good answer."""
        return [call for call, trouble in self.seen if trouble is not None]


@contextmanager
def front_of(url: str) -> Iterator[Front]:
    """On loopback, of a server that is there too; gone after the block."""
    port = urlsplit(url).port
    assert port is not None
    front = Front(port)
    front.listen()
    try:
        yield front
    finally:
        front.refuse()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False

    def __init__(self, port: int, front: Front) -> None:
        self.front = front
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone away."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    @property
    def front(self) -> Front:
        return self.server.front

    def do_GET(self) -> None:
        self._serve(b"", f"GET {self.path}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = parse_qs(urlsplit(self.path).query).get("filename")
        found = _METHOD.search(body)
        self._serve(body, f"upload {name[0]}" if name else found.group(1).decode() if found else "")

    def _serve(self, body: bytes, call: str) -> None:
        trouble = self.front.trouble(Request(call, len(body)))
        self.front.seen.append((call, trouble))
        if trouble is not None:
            trouble.happen(self, body)
            return
        status, headers, data = self.ask(body)
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The server itself."""
        there = http.client.HTTPConnection("127.0.0.1", self.front.port, timeout=300)
        with contextlib.closing(there):
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            there.request(self.command, self.path, body or None, headers)
            answer = there.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `seen` has it."""
