"""An HTTP proxy that can be slow, so that a builder fetches for as long as a test likes."""

from __future__ import annotations

import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class SlowProxy:
    """`slow` can be set and cleared at any time; requests are kept as (method, URL)."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.slow = threading.Event()
        self.requests: list[tuple[str, str]] = []


@contextmanager
def slow_proxy() -> Iterator[SlowProxy]:
    """On loopback, in a thread of its own; gone after the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            proxy.requests.append(("GET", self.path))
            headers = {"Range": self.headers["Range"]} if "Range" in self.headers else {}
            request = urllib.request.Request(self.path, headers=headers)
            try:
                with direct.open(request, timeout=30) as answer:
                    self.send_response(answer.status)
                    for name in ("Content-Length", "Content-Range"):
                        if answer.headers[name]:
                            self.send_header(name, answer.headers[name])
                    self.end_headers()
                    while proxy.slow.is_set() and (piece := answer.read(1024)):
                        self.wfile.write(piece)
                        time.sleep(0.2)
                    shutil.copyfileobj(answer, self.wfile)
            except urllib.error.HTTPError as error:
                self.send_error(error.code)
                error.close()
            except ConnectionError:
                self.close_connection = True  # whoever fetched has gone away

        def log_message(self, *arguments: object) -> None:
            """Nothing: the requests are kept."""

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        proxy = SlowProxy(server.server_port)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.slow.clear()
            server.shutdown()
            thread.join()
