"""The stand-in hub: HTTP, XML-RPC, and which function answers which call.

One process with a thread for each connection; one call at a time, in one transaction.
"""

from __future__ import annotations

import argparse
import configparser
import http.server
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from urllib.parse import parse_qsl, urlsplit

import koji
import koji.plugin
import koji.util
import koji.xmlrpcplus
from koji.context import context

from . import files, kojihub, policies
from .builds import BuildCalls, BuildHostCalls
from .database import Database
from .etc import covered
from .files import FileCalls
from .records import RecordCalls
from .sessions import Session, SessionCalls
from .tasks import SchedulerCalls, TaskCalls, TaskHostCalls

VERSION = koji.__version__
log = logging.getLogger("standin.hub")


class RootCalls(SessionCalls, RecordCalls, TaskCalls, BuildCalls, FileCalls):
    """All that has no prefix."""

    def getAPIVersion(self) -> int:
        return koji.API_VERSION

    def getKojiVersion(self) -> str:
        return VERSION

    def echo(self, *args: Any) -> list[Any]:
        return list(args)

    def hello(self, *args: Any) -> str:
        return "Hello World"

    def evalPolicy(self, name: str, data: Any) -> str | None:
        return policies.eval_policy(name, data)


class HostCalls(TaskHostCalls, BuildHostCalls):
    """All of host.*"""


class Handlers:
    """By name; what a plugin finds as context.handlers."""

    def __init__(self) -> None:
        self._functions: dict[str, Callable[..., Any]] = {"_listapi": self._list}
        for prefix, calls in (
            ("", RootCalls()),
            ("host.", HostCalls()),
            ("scheduler.", SchedulerCalls()),
        ):
            for name in dir(calls):
                if not name.startswith("_"):
                    self._functions[prefix + name] = getattr(calls, name)
        self._functions["system.listMethods"] = lambda: list(self._functions)

    def add_plugin(self, plugin: Any) -> None:
        for one in vars(plugin).values():
            if callable(one) and not isinstance(one, type):
                if getattr(one, "exported", False):
                    self._functions[getattr(one, "export_alias", one.__name__)] = one
                for kind in getattr(one, "callbacks", None) or ():
                    koji.plugin.register_callback(kind, one)

    def get(self, name: str) -> Callable[..., Any]:
        if name not in self._functions:
            raise koji.GenericError(f"Invalid method: {name}")
        return self._functions[name]

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        return self.get(name)(*args, **options)

    def _list(self) -> list[dict[str, Any]]:
        return [{"name": name, "doc": one.__doc__} for name, one in self._functions.items()]


class Hub:
    """Answers calls and takes uploads."""

    def __init__(
        self, config: Mapping[str, Any], policy: Mapping[str, str], database: Path
    ) -> None:
        self._opts = dict(config)
        self._lock = threading.Lock()
        self._database = Database(database)
        self._policy = policies.rule_sets(policy)
        self._handlers = Handlers()
        self._offline = ""
        koji.pathinfo.topdir = koji.BASEDIR = config["kojidir"]
        sys.modules["kojihub"] = kojihub
        tracker = koji.plugin.PluginTracker(path=config["pluginpath"].split(":"))
        for name in config["plugins"].split():
            try:
                self._handlers.add_plugin(tracker.load(name))
            except Exception:
                log.exception("the plugin %s cannot be loaded", name)
                self._offline = "configuration error"

    def call(self, headers: Mapping[str, Any], body: bytes) -> str:
        """The answer, or the fault, as XML."""
        params, method = koji.xmlrpcplus.loads(body)

        def answer() -> Any:
            if method in ("multiCall", "system.multicall"):
                return self._several(params[0])
            return self._one(method, params)

        return self._answer(headers, method, answer)

    def upload(
        self, headers: Mapping[str, Any], query: Mapping[str, str], content: Any, length: int
    ) -> str:
        return self._answer(headers, None, lambda: files.upload(query, content, length))

    def _answer(
        self, headers: Mapping[str, Any], method: str | None, answer: Callable[[], Any]
    ) -> str:
        try:
            if self._offline:
                raise koji.ServerOffline(self._offline)
            with self._lock, self._database.transaction():
                self._fill_context(headers, method)
                try:
                    before = self._database.changes()
                    value = answer()
                    if context.session.callnum is not None and before != self._database.changes():
                        context.session.keep_number()
                finally:
                    context._threadclear()
            return str(koji.xmlrpcplus.dumps((value,), methodresponse=1))
        except Exception as error:
            log.info("%s: %s", method or "upload", _traceback(error))
            return str(koji.xmlrpcplus.dumps(_fault(error)))

    def _fill_context(self, headers: Mapping[str, Any], method: str | None) -> None:
        context._threadclear()
        context.db = self._database
        context.cnx = SimpleNamespace(commit=lambda: None)
        context.opts = self._opts
        context.policy = self._policy
        context.handlers = self._handlers
        context.method = method
        context.environ = {}
        context.session = Session(headers, method)

    def _one(self, method: str, params: Any) -> Any:
        args, options = koji.decode_args(*params)
        return koji.util.call_with_argcheck(self._handlers.get(method), args, options)

    def _several(self, calls: Any) -> list[Any]:
        """Each undone alone if it fails."""
        results: list[Any] = []
        for call in calls:
            try:
                with self._database.savepoint():
                    results.append([self._one(call["methodName"], call["params"])])
            except Exception as error:
                fault = _fault(error)
                results.append({"faultCode": fault.faultCode, "faultString": fault.faultString})
        return results


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def _fault(error: Exception) -> koji.xmlrpcplus.Fault:
    """Koji's own errors in their words, any other with its traceback."""
    if isinstance(error, koji.xmlrpcplus.Fault):
        return error
    if isinstance(error, koji.GenericError):
        return koji.xmlrpcplus.Fault(error.faultCode, str(error))
    return koji.xmlrpcplus.Fault(1, _traceback(error))


class _Rest:
    """What is still to be read of a request: of a refused upload all of it."""

    def __init__(self, stream: IO[bytes], length: int) -> None:
        self._stream = stream
        self._left = length

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._left))
        self._left -= len(data)
        return data

    def skip(self) -> None:
        while self.read(files.BLOCK_BYTES):
            pass


class Handler(http.server.BaseHTTPRequestHandler):
    """POST /kojihub."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        query = dict(parse_qsl(urlsplit(self.path).query))
        if self.headers.get("Content-Type") == "application/octet-stream":
            content = _Rest(self.rfile, length)
            text = self.hub.upload(self.headers, query, content, length)
            content.skip()
        else:
            text = self.hub.call(self.headers, self.rfile.read(length))
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Koji-Version", VERSION)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="hub.conf")
    parser.add_argument("--etc", type=Path, required=True, help="what it sees as /etc")
    parser.add_argument("--database", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    config = configparser.RawConfigParser()
    config.read(options.config)
    policy = dict(config["policy"]) if config.has_section("policy") else {}
    with covered(options.etc):
        Handler.hub = Hub(dict(config["hub"]), policy, options.database)
        server = Server(("127.0.0.1", options.port), Handler)
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        server.serve_forever()


if __name__ == "__main__":
    main()
