"""Files that a template names by their address: what is fetched, from where, and how much."""

from __future__ import annotations

import contextlib
import http.server
import logging
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from koji_indirection.config import Download, Settings
from koji_indirection.errors import BuilderFault, BuildFailed
from koji_indirection.filefetch import Fetcher, require_allowed

ANYWHERE = Settings(file_hosts=("*",))


class Handler(http.server.BaseHTTPRequestHandler):
    """/data: bytes; /to?URL: a redirection; /cut: less than announced; /slow: ten seconds of
    bytes, one by one; /promise: as long, that an answer will come; else 404.
    """

    left_early = threading.Event()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", query)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path == "/slow":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            except OSError:
                self.left_early.set()
        elif path == "/promise":
            with contextlib.suppress(OSError):
                for _ in range(200):
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    time.sleep(0.05)
        elif path in ("/data", "/cut", "/endless"):
            self.send_response(200)
            if path != "/endless":
                self.send_header("Content-Length", "2000")
            self.end_headers()
            self.wfile.write(b"x" * (2000 if path != "/cut" else 100))
        else:
            self.send_error(404)

    def log_message(self, *_args: object) -> None:
        return


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def fetch(url: str, target: Path, settings: Settings = ANYWHERE) -> bytes:
    Fetcher(settings).fetch("/etc/x", url, target)
    return target.read_bytes()


def refused(url: str, target: Path, settings: Settings = ANYWHERE) -> str:
    with pytest.raises(BuildFailed) as caught:
        fetch(url, target, settings)
    assert "file '/etc/x'" in caught.value.message
    assert caught.value.hint
    return str(caught.value)


def test_a_file_is_fetched_and_its_origin_noted(
    server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert fetch(f"{server}/data?token=secret", tmp_path / "f") == b"x" * 2000
    assert f"2000 bytes from {server}/data, sha256 " in caplog.text
    assert "secret" not in caplog.text


def test_a_redirection_is_followed_where_it_is_allowed(server: str, tmp_path: Path) -> None:
    assert len(fetch(f"{server}/to?{server}/data", tmp_path / "f")) == 2000


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file:///etc/passwd", "HTTP status 302, a redirection that is not followed"),
        ("ftp://127.0.0.1/x", "and only http and https are fetched"),
        ("http://other.example.com/x", "is at other.example.com, from where the settings"),
        ("http://[::1/", "cannot be fetched from"),
    ],
)
def test_a_redirection_to_elsewhere_is_not_followed(
    target: str, message: str, server: str, tmp_path: Path
) -> None:
    here = Settings(file_hosts=("127.0.0.1",))
    assert message in refused(f"{server}/to?{target}", tmp_path / "f", here)


def test_redirections_end(server: str, tmp_path: Path) -> None:
    url = f"{server}/data"
    for _ in range(3):
        url = f"{server}/to?{url}"
    two = Settings(file_hosts=("*",), download=Download(max_redirects=2))
    assert "too many redirections" in refused(url, tmp_path / "f", two)


def test_only_hosts_that_the_settings_name_are_asked(tmp_path: Path) -> None:
    url = "http://files.example.com/x"
    assert "its setting file_hosts in [guest] is: none" in refused(url, tmp_path / "f", Settings())
    for hosts in (("example.com",), ("*.example.org",), ("s.example.com",)):
        assert "is at files.example.com" in refused(url, tmp_path / "f", Settings(file_hosts=hosts))


@pytest.mark.parametrize("allowed", ["files.example.com", "*.example.com", "*"])
def test_hosts_may_be_named_by_their_domain(allowed: str) -> None:
    settings = Settings(file_hosts=(allowed,))
    require_allowed("/etc/x", "https://Files.Example.com:8443/x", settings)


@pytest.mark.parametrize("path", ["/data", "/endless"])
def test_what_is_too_large_is_refused(path: str, server: str, tmp_path: Path) -> None:
    small = Settings(file_hosts=("*",), max_file_bytes=1999)
    assert "is too large" in refused(f"{server}{path}", tmp_path / "f", small)


def test_the_limit_is_for_all_files_together(server: str, tmp_path: Path) -> None:
    fetcher = Fetcher(Settings(file_hosts=("*",), max_file_bytes=3000))
    fetcher.fetch("/a", f"{server}/data", tmp_path / "a")
    with pytest.raises(BuildFailed, match=r"file '/b' .* is too large"):
        fetcher.fetch("/b", f"{server}/data", tmp_path / "b")


def test_a_file_that_arrives_in_part_is_no_file(server: str, tmp_path: Path) -> None:
    assert "cannot be fetched from" in refused(f"{server}/cut", tmp_path / "f")


HASTY = Settings(file_hosts=("*",), download=Download(total_timeout_seconds=1))


def test_a_server_that_trickles_is_left_at_the_deadline(server: str, tmp_path: Path) -> None:
    said = refused(f"{server}/slow", tmp_path / "f", HASTY)
    assert "it takes longer than 1 s, see total_timeout in [download]" in said
    assert Handler.left_early.wait(20)


def test_a_server_that_only_promises_is_left_at_the_deadline(server: str, tmp_path: Path) -> None:
    said = refused(f"{server}/promise", tmp_path / "f", HASTY)
    assert "it takes longer than 1 s, see total_timeout in [download]" in said


def test_what_is_not_there_is_said_with_the_servers_answer(server: str, tmp_path: Path) -> None:
    said = refused(f"{server}/none?token=secret", tmp_path / "f")
    assert f"cannot be fetched from {server}/none: HTTP status 404" in said
    assert "secret" not in said


def test_a_server_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert "Connection refused" in refused("http://127.0.0.1:1/x", tmp_path / "f")


def test_a_server_has_to_prove_who_it_is(tmp_path: Path) -> None:
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-batch"]
    new += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    certificate, key = tmp_path / "server.crt", tmp_path / "server.key"
    new += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(new, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        url = f"https://127.0.0.1:{httpd.server_address[1]}/data"
        assert "certificate verify failed" in refused(url, tmp_path / "refused")
        known = replace(ANYWHERE, download=Download(ca_bundle=certificate))
        assert len(fetch(url, tmp_path / "fetched", known)) == 2000
        httpd.shutdown()
        thread.join()


def test_a_ca_bundle_that_is_none_is_a_fault(tmp_path: Path) -> None:
    settings = Settings(file_hosts=("*",), download=Download(ca_bundle=tmp_path / "none.pem"))
    with pytest.raises(BuilderFault, match="holds no CA certificates"):
        fetch("https://127.0.0.1:1/x", tmp_path / "f", settings)
