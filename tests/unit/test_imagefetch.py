"""From an image in Koji to its file: fetched whatever the server does, cached."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.server
import json
import logging
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from koji_indirection import cache as cache_module
from koji_indirection import imagefetch
from koji_indirection.cache import Cache
from koji_indirection.config import Download, Settings
from koji_indirection.errors import BuilderFault, BuildFailed
from koji_indirection.imagefetch import fetch
from koji_indirection.sources import Source
from koji_indirection.units import GIB

pytest.importorskip("requests", reason="requests is not installed")

ARCH = "x86_64"
INPUT = "input image"
DATA = random.Random(3).randbytes(700_000)
FAST = Download(
    connect_timeout_seconds=10,
    read_timeout_seconds=10,
    total_timeout_seconds=60,
    retries=3,
    retry_wait_seconds=0.01,
)

# --- a server that can do everything wrong ------------------------------------------------------

Behaviour = Callable[["Handler", bytes, int], None]


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; each request is answered by the next of `plan`, well when there is none."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.plan: list[Behaviour] = []
        self.seen: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.release = threading.Event()
        self.reached = threading.Event()
        self.left_early = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/kojifiles"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients go away in the middle: that is what is tested


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = urllib.parse.unquote(self.path).partition("/kojifiles/")[2]
        with self.server.lock:
            self.server.seen.append({key.lower(): value for key, value in self.headers.items()})
            behaviour = self.server.plan.pop(0) if self.server.plan else well
        if name not in self.server.files and behaviour is well:
            self.send_error(404)
            return
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        behaviour(self, self.server.files.get(name, b""), start)

    def head(self, data: bytes, start: int, **headers: str) -> None:
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def well(handler: Handler, data: bytes, start: int) -> None:
    handler.head(data, start)
    handler.wfile.write(data[start:])


def cut_at(end: int) -> Behaviour:
    def behaviour(handler: Handler, data: bytes, start: int) -> None:
        handler.head(data, start)
        handler.wfile.write(data[start:end])
        handler.hang_up()

    return behaviour


def ignoring_range(behaviour: Behaviour) -> Behaviour:
    def ignoring(handler: Handler, data: bytes, start: int) -> None:
        del handler.headers["Range"]
        behaviour(handler, data, 0)

    return ignoring


def serving(other: bytes) -> Behaviour:
    return lambda handler, data, start: well(handler, other, start)


def without_length(other: bytes) -> Behaviour:
    def behaviour(handler: Handler, data: bytes, start: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(other)
        handler.hang_up()

    return behaviour


def endless(handler: Handler, data: bytes, start: int) -> None:
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(bytes(65536))


def hanging_at(end: int) -> Behaviour:
    def behaviour(handler: Handler, data: bytes, start: int) -> None:
        handler.head(data, start)
        handler.wfile.write(data[start:end])
        handler.wfile.flush()
        handler.server.reached.set()
        handler.server.release.wait(10)
        with contextlib.suppress(OSError):
            handler.wfile.write(data[max(start, end) :])

    return behaviour


def trickling(handler: Handler, data: bytes, start: int) -> None:
    handler.head(data, start)
    try:
        for position in range(start, start + 200):
            handler.wfile.write(data[position : position + 1])
            time.sleep(0.05)
    except OSError:
        handler.server.left_early.set()


def promising(handler: Handler, data: bytes, start: int) -> None:
    """Ten seconds of promises that an answer will come."""
    with contextlib.suppress(OSError):
        for _ in range(200):
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.05)
    handler.hang_up()


def never_answering(handler: Handler, data: bytes, start: int) -> None:
    handler.server.release.wait(10)
    handler.hang_up()


def status(code: int) -> Behaviour:
    return lambda handler, data, start: handler.send_error(code)


def redirecting(location: str) -> Behaviour:
    def behaviour(handler: Handler, data: bytes, start: int) -> None:
        handler.send_response(302)
        handler.send_header("Location", location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return behaviour


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.release.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache" / "images", max_bytes=10_000_000, keep_free_bytes=0)


def make_source(server: Server, name: str = "a.raw", data: bytes = DATA, **changes: Any) -> Source:
    """A source whose file the server has."""
    relpath = f"packages/a/1/1/images/{name}"
    server.files[relpath] = data
    source = Source(
        reference="a-1-1",
        role=INPUT,
        nvr="a-1-1",
        build_id=1,
        archive_id=1,
        task_id=None,
        filename=name,
        size_bytes=len(data),
        checksum=hashlib.sha256(data).hexdigest(),
        checksum_type=2,
        arch=ARCH,
        relpath=relpath,
    )
    return replace(source, **changes)


def get(server: Server, source: Source, cache: Cache, **options: Any) -> bytes:
    """The content that fetch() gives."""
    options = {"topdir": None, "download": FAST, **options}
    with fetch(source, topurl=server.url, cache=cache, **options) as path:
        return path.read_bytes()


def refused(source: Source, topurl: str | None, cache: Cache, **options: Any) -> BuilderFault:
    """The fault with which fetch() refuses."""
    with (
        pytest.raises(BuilderFault) as caught,
        fetch(source, topurl=topurl, topdir=None, cache=cache, **options),
    ):
        pass
    return caught.value


def left(cache: Cache) -> list[str]:
    """What is in the cache but locks."""
    return sorted(path.name for path in cache.directory.iterdir() if "lock" not in path.name)


def ranges(server: Server) -> list[str | None]:
    return [headers.get("range") for headers in server.seen]


# --- fetching ---------------------------------------------------------------------------------


def test_an_image_is_fetched_once_and_then_comes_from_the_cache(
    server: Server, cache: Cache
) -> None:
    source = make_source(server)
    seen: list[tuple[int, int]] = []
    assert get(server, source, cache, progress=lambda *now: seen.append(now)) == DATA
    assert seen[-1] == (len(DATA), len(DATA))
    assert get(server, source, cache) == DATA
    assert len(server.seen) == 1
    assert server.seen[0]["accept-encoding"] == "identity"
    assert left(cache) == [f"sha256-{source.checksum}"]
    mode = (cache.directory / left(cache)[0]).stat().st_mode
    assert mode & 0o777 == 0o444, "qemu's user can read it, nobody writes to it"


@pytest.mark.parametrize("end", [0, 1, 65536, 262144, 262145, len(DATA) - 1])
def test_a_cut_is_resumed_where_it_happened(server: Server, cache: Cache, end: int) -> None:
    server.plan = [cut_at(end)]
    assert get(server, make_source(server), cache) == DATA
    first, second = ranges(server)
    assert first is None
    assert second in (None, f"bytes={end}-") or int(second[6:-1]) <= end


def test_cuts_do_not_count_while_they_bring_something_new(server: Server, cache: Cache) -> None:
    server.plan = [cut_at(end) for end in range(50_000, 700_000, 50_000)]
    assert get(server, make_source(server), cache, download=replace(FAST, retries=1)) == DATA


def test_a_server_that_ignores_ranges_is_read_from_the_start_again(
    server: Server, cache: Cache
) -> None:
    server.plan = [cut_at(300_000), ignoring_range(well)]
    assert get(server, make_source(server), cache) == DATA
    assert ranges(server)[1] is not None


def test_a_server_that_ignores_ranges_and_always_cuts_is_given_up(
    server: Server, cache: Cache
) -> None:
    # What comes a second time is nothing new, even if less came in between.
    server.plan = [ignoring_range(cut_at(end)) for end in (300_000, 200_000) * 25]
    with pytest.raises(BuilderFault, match=r"a.raw of a-1-1 cannot be fetched from http"):
        get(server, make_source(server), cache)
    # A connection that is cut may lose the end of what was sent, which then is new once more.
    assert 2 + FAST.retries <= len(server.seen) < 25
    assert left(cache) == []


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(server: Server, cache: Cache, code: int) -> None:
    server.plan = [status(code), cut_at(1000), status(code)]
    assert get(server, make_source(server), cache) == DATA


def test_a_server_that_hangs_is_left_and_asked_again(server: Server, cache: Cache) -> None:
    server.plan = [never_answering, hanging_at(300_000)]
    options = replace(FAST, read_timeout_seconds=0.3)
    assert get(server, make_source(server), cache, download=options) == DATA
    assert len(server.seen) >= 3


def test_a_server_that_only_hangs_is_given_up(server: Server, cache: Cache) -> None:
    server.plan = [hanging_at(1000)] * 9
    options = replace(FAST, retries=1, read_timeout_seconds=0.1)
    with pytest.raises(BuilderFault, match=r"cannot be fetched .*timed out"):
        get(server, make_source(server), cache, download=options)
    assert left(cache) == []


def test_the_time_for_an_image_is_limited(server: Server, cache: Cache) -> None:
    server.plan = [hanging_at(n) for n in range(1000, 100_000, 1000)]
    options = replace(FAST, read_timeout_seconds=0.1, total_timeout_seconds=0.4)
    with pytest.raises(BuilderFault, match=r"could not be fetched within 0.4 s: .* of 683.6 KiB"):
        get(server, make_source(server), cache, download=options)


def test_a_server_that_only_promises_is_left_at_the_deadline(server: Server, cache: Cache) -> None:
    server.plan = [promising] * 9
    options = replace(FAST, total_timeout_seconds=1)
    with pytest.raises(BuilderFault, match=r"could not be fetched within 1 s: 0 B of"):
        get(server, make_source(server), cache, download=options)
    assert left(cache) == []


def test_a_server_that_trickles_is_left_at_the_deadline(server: Server, cache: Cache) -> None:
    server.plan = [trickling] * 2
    options = replace(FAST, total_timeout_seconds=1)
    with pytest.raises(BuilderFault, match=r"could not be fetched within 1 s: [0-9]+ B of"):
        get(server, make_source(server), cache, download=options)
    assert server.left_early.wait(20)
    assert left(cache) == []


def test_a_server_that_is_not_there_is_a_fault(server: Server, cache: Cache) -> None:
    source = make_source(server)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert "cannot be fetched from" in str(refused(source, url, cache, download=FAST))


WRONG = DATA[:-1] + bytes([DATA[-1] ^ 1])


@pytest.mark.parametrize(
    "behaviour",
    [
        serving(WRONG),
        serving(DATA[:-1]),
        serving(DATA + b"x"),
        serving(b""),
        without_length(WRONG + b"more"),
        endless,
    ],
    ids=["one bit", "short", "long", "empty", "no length", "endless"],
)
def test_wrong_data_is_fetched_once_more_and_then_refused(
    server: Server, cache: Cache, behaviour: Behaviour, caplog: pytest.LogCaptureFixture
) -> None:
    server.plan = [behaviour]
    assert get(server, make_source(server), cache) == DATA
    assert "fetching it once more" in caplog.text
    assert server.seen[1]["cache-control"] == "no-cache"

    other = make_source(server, data=DATA[1:])
    server.plan = [behaviour] * 3
    with pytest.raises(BuilderFault, match=r"fetched twice from .* is not what the hub describes"):
        get(server, other, cache)
    assert len(server.seen) == 4
    assert len(left(cache)) == 1, "the good one"


def test_data_that_ends_early_without_a_length_is_given_up(server: Server, cache: Cache) -> None:
    server.plan = [without_length(DATA[:-9])] * 20
    with pytest.raises(BuilderFault, match="the connection ended"):
        get(server, make_source(server), cache)
    assert left(cache) == []


def test_another_part_than_was_asked_for_is_not_used(server: Server, cache: Cache) -> None:
    def other_part(handler: Handler, data: bytes, start: int) -> None:
        handler.head(data, start - 10)
        handler.wfile.write(data[start - 10 :])

    def other_size(handler: Handler, data: bytes, start: int) -> None:
        well(handler, data + b"x", start)

    def no_range(handler: Handler, data: bytes, start: int) -> None:
        handler.send_response(206)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    for number, behaviour in enumerate([other_part, other_size, no_range, status(416)]):
        server.plan = [cut_at(300_000), behaviour]
        data = DATA + bytes([number])
        assert get(server, make_source(server, data=data), cache) == data


def test_bytes_are_taken_as_they_are_even_if_called_gzip(server: Server, cache: Cache) -> None:
    """Apache's AddEncoding labels every .gz file that way."""
    server.plan = [
        lambda handler, data, start: (
            handler.head(data, start, Content_Encoding="gzip"),
            handler.wfile.write(data),
        )[0]
    ]
    assert get(server, make_source(server, "a.raw.gz"), cache) == DATA
    assert len(server.seen) == 1


def test_redirects_are_followed_a_few_times_and_only_to_http(
    server: Server, cache: Cache, tmp_path: Path
) -> None:
    source = make_source(server)
    there = source.url(server.url)
    server.plan = [redirecting(there), redirecting("/kojifiles/" + source.relpath), cut_at(1000)]
    assert get(server, source, cache) == DATA

    source = make_source(server, data=DATA[2:])
    server.plan = [redirecting(there)] * 99
    with pytest.raises(BuilderFault, match="redirects more than 5 times"):
        get(server, source, cache)
    secret = tmp_path / "secret"
    secret.write_bytes(DATA[2:])
    for target in (secret.as_uri(), "ftp://127.0.0.1/x", "http://[bad", "http://a..b\x7f/"):
        server.plan = [redirecting(target)]
        with pytest.raises(BuilderFault):
            get(server, source, cache, download=replace(FAST, retries=0))


@pytest.mark.parametrize("code", [404, 410])
def test_a_file_that_is_not_there_is_the_users_doing_only_for_tasks(
    server: Server, cache: Cache, code: int
) -> None:
    source = make_source(server)
    server.plan = [status(code)] * 2
    with pytest.raises(BuilderFault, match=f"the server answers {code} .* to http"):
        get(server, source, cache)
    with pytest.raises(BuildFailed, match=r"a.raw of task 7 was deleted or has expired"):
        get(server, replace(source, nvr=None, task_id=7), cache)
    assert len(server.seen) == 2


@pytest.mark.parametrize("kind", [0, 1])
def test_old_checksums_are_verified_too_but_never_shared(
    server: Server, cache: Cache, kind: int
) -> None:
    checksum = [hashlib.md5, hashlib.sha1][kind](DATA).hexdigest()
    source = make_source(server, checksum=checksum, checksum_type=kind)
    server.plan = [serving(WRONG)]
    assert get(server, source, cache) == DATA
    assert get(server, replace(source, archive_id=2), cache) == DATA
    assert len(server.seen) == 3, "two archives of one weak checksum are two images"


@pytest.mark.parametrize("topurl", [None, "", "file:///mnt/koji", "koji.example.com"])
def test_without_a_topurl_there_is_nothing_to_fetch_from(
    server: Server, cache: Cache, topurl: str | None
) -> None:
    assert "cannot be fetched: topurl is" in str(refused(make_source(server), topurl, cache))


def test_proxies_come_from_the_configuration_or_the_environment(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = server.url.partition("/kojifiles")[0]
    source = make_source(server)
    options = replace(FAST, proxy=origin)
    with fetch(
        source, topurl="http://koji.invalid/kojifiles", topdir=None, cache=cache, download=options
    ) as path:
        assert path.read_bytes() == DATA
    assert server.seen[0]["host"] == "koji.invalid"

    monkeypatch.setenv("http_proxy", origin)
    source = make_source(server, data=DATA[3:])
    with fetch(
        source, topurl="http://koji.invalid/kojifiles", topdir=None, cache=cache, download=FAST
    ) as path:
        assert path.read_bytes() == DATA[3:]


def test_a_ca_file_that_is_missing_is_said_to_be(server: Server, cache: Cache) -> None:
    options = replace(FAST, ca_bundle=Path("/nonexistent/ca.pem"))
    url = server.url.replace("http:", "https:")
    fault = refused(make_source(server), url, cache, download=options)
    assert "/nonexistent/ca.pem" in str(fault)


def test_the_servers_certificate_is_verified_by_the_ca_of_the_settings_or_the_environment(
    server: Server, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    new = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-batch",
        "-subj",
        "/CN=koji",
    ]
    new += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(ca), "-keyout", str(key)]
    subprocess.run(new, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    topurl = server.url.replace("http:", "https:")
    source = make_source(server)

    assert "is not trusted" in str(refused(source, topurl, cache, download=FAST))
    known = replace(FAST, ca_bundle=ca)
    with fetch(source, topurl=topurl, topdir=None, cache=cache, download=known) as path:
        assert path.read_bytes() == DATA
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(ca))
    other = make_source(server, data=DATA[1:])
    with fetch(other, topurl=topurl, topdir=None, cache=cache, download=FAST) as path:
        assert path.read_bytes() == DATA[1:]


def test_progress_is_logged_now_and_then(
    server: Server, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    get(server, make_source(server), cache)
    lines = [line for line in caplog.messages if "% of" in line]
    assert len(lines) == 1
    assert lines[0].startswith("a.raw of a-1-1: 100 % of 683.6 KiB, ")


def test_progress_lines_come_every_ten_percent_or_ten_seconds(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    report = imagefetch._ProgressLog(make_source(server, data=bytes(1000)))
    for received in range(0, 1001):
        now += 0.25
        report.update(received)
    assert len([line for line in caplog.messages if "% of" in line]) == 26  # 250 s
    caplog.clear()
    report = imagefetch._ProgressLog(make_source(server, data=bytes(1000)))
    for received in range(0, 1001, 10):
        now += 0.2
        report.update(received)
    assert len([line for line in caplog.messages if "% of" in line]) == 10


# --- in place ---------------------------------------------------------------------------------


def test_a_mounted_file_is_read_in_place(server: Server, cache: Cache, tmp_path: Path) -> None:
    source = make_source(server)
    mounted = source.file(tmp_path / "koji")
    mounted.parent.mkdir(parents=True)
    scratch = tmp_path / "koji" / "scratch.raw"
    scratch.write_bytes(DATA)
    mounted.symlink_to(scratch)  # as the hub leaves them in a scratch task's directory
    with fetch(source, topurl=None, topdir=tmp_path / "koji", cache=cache) as path:
        assert path == mounted
    assert not server.seen
    assert not cache.directory.exists()


def test_a_mounted_file_that_is_not_the_one_is_fetched_instead(
    server: Server, cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_source(server)
    assert get(server, source, cache, topdir=tmp_path / "not there") == DATA
    mounted = source.file(tmp_path / "koji")
    mounted.parent.mkdir(parents=True)
    mounted.write_bytes(DATA[:-1])
    with fetch(source, topurl=server.url, topdir=tmp_path / "koji", cache=cache) as path:
        assert path.parent == cache.directory
    assert "is not what the hub describes" in caplog.text
    mounted.unlink()
    mounted.mkdir()
    assert get(server, source, cache, topdir=tmp_path / "koji") == DATA


# --- the cache --------------------------------------------------------------------------------


def small(server: Server, number: int, size: int = 1000) -> Source:
    return make_source(server, f"d{number}.raw", bytes([number]) * size)


def test_the_image_used_least_recently_goes_first(server: Server, cache: Cache) -> None:
    cache = replace(cache, max_bytes=3500)
    one, two, three, four = (small(server, number) for number in range(1, 5))
    for source in (one, two, three, one, four):
        get(server, source, cache)
        time.sleep(0.02)
    assert left(cache) == sorted(f"sha256-{source.checksum}" for source in (one, three, four))
    assert {path.name for path in cache.directory.glob("*.lock")} == {
        f"sha256-{source.checksum}.lock" for source in (one, three, four)
    }


def test_an_image_in_use_is_never_evicted(server: Server, cache: Cache) -> None:
    cache = replace(cache, max_bytes=2500)
    one, two, three, four = (small(server, number) for number in range(1, 5))
    with fetch(one, topurl=server.url, topdir=None, cache=cache) as path:
        get(server, two, cache)
        get(server, three, cache)
        assert path.read_bytes() == bytes([1]) * 1000
        assert f"sha256-{one.checksum}" in left(cache)
        with fetch(three, topurl=server.url, topdir=None, cache=cache):
            fault = refused(four, server.url, cache)
        assert "whose other images are in use (raise max_size" in str(fault)
    get(server, four, cache)
    assert f"sha256-{one.checksum}" not in left(cache)


def test_an_image_larger_than_the_cache_is_refused_and_evicts_nothing(
    server: Server, cache: Cache
) -> None:
    cache = replace(cache, max_bytes=2500)
    get(server, small(server, 1), cache)
    with pytest.raises(BuilderFault, match=r"d2.raw of a-1-1 \(2.9 KiB\) does not fit"):
        get(server, small(server, 2, 3000), cache)
    assert len(left(cache)) == 1
    assert len(server.seen) == 1, "it was not even asked for"


def test_an_image_for_which_there_is_no_space_is_refused(server: Server, cache: Cache) -> None:
    free = os.statvfs(cache.directory.parent.parent)
    cache = replace(cache, keep_free_bytes=free.f_bavail * free.f_frsize + 10**9)
    with pytest.raises(BuilderFault, match=r"no room for a.raw .* more than there is once"):
        get(server, make_source(server), cache)
    assert not server.seen


def test_a_disk_that_fills_up_on_the_way_is_a_fault_and_leaves_nothing(
    server: Server, cache: Cache
) -> None:
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(
            BuilderFault, match=r"the image cache .* cannot be used: File too large"
        ):
            get(server, make_source(server), cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert left(cache) == []


def test_a_cache_that_cannot_be_made_is_a_fault(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuilderFault, match=r"the image cache .* cannot be used"):
        get(server, make_source(server), Cache(tmp_path / "file" / "cache"))


def test_the_cache_is_where_the_settings_say(tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path, max_cache_bytes=5, cache_verify=True)
    assert Cache.of(settings) == Cache(tmp_path / "images", 5, 2 * GIB, True)


def test_a_cached_file_of_the_wrong_size_is_dropped(server: Server, cache: Cache) -> None:
    source = make_source(server)
    get(server, source, cache)
    path = cache.directory / left(cache)[0]
    path.unlink()
    path.write_bytes(DATA[:-1])
    assert get(server, source, cache) == DATA
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert get(server, source, cache) == DATA
    assert len(server.seen) == 3


def test_a_cached_file_of_the_right_size_is_read_again_only_on_request(
    server: Server, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_source(server)
    get(server, source, cache)
    path = cache.directory / left(cache)[0]
    path.unlink()
    path.write_bytes(WRONG)
    assert get(server, source, cache) == WRONG
    cache = replace(cache, verify=True)
    assert get(server, source, cache) == DATA
    assert "is damaged in the cache" in caplog.text
    assert get(server, source, cache) == DATA
    assert len(server.seen) == 2


def test_a_lock_file_that_was_removed_while_we_locked_it_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two processes would hold "the" lock: one of the old file, one of a new one."""
    path, real = tmp_path / "x.lock", cache_module.fcntl.flock
    removed = []

    def flock(lock: int, operation: int) -> None:
        if not removed:
            path.unlink()
            removed.append(lock)
        real(lock, operation)

    monkeypatch.setattr(cache_module.fcntl, "flock", flock)
    lock = cache_module._try_lock(path, cache_module.fcntl.LOCK_EX)
    assert lock is not None
    assert cache_module._try_lock(path, cache_module.fcntl.LOCK_SH) is None
    os.close(lock)


def test_using_an_image_does_not_touch_it(server: Server, cache: Cache) -> None:
    """The pipeline takes a changed mtime for a changed image."""
    source = make_source(server)
    get(server, source, cache)
    before = (cache.directory / left(cache)[0]).stat()
    get(server, source, cache)
    after = (cache.directory / left(cache)[0]).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_an_image_counts_as_used_from_the_start_of_its_use(server: Server, cache: Cache) -> None:
    """Whoever uses it may be killed, and then there is no end of its use."""
    source = make_source(server)
    get(server, source, cache)
    lock = next(cache.directory.glob("sha256-*.lock"))
    os.utime(lock, (1, 1))
    with fetch(source, topurl=server.url, topdir=None, cache=cache):
        assert lock.stat().st_mtime > 1


def test_an_interrupted_fetch_leaves_nothing(server: Server, cache: Cache) -> None:
    def interrupt(done: int, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server, make_source(server), cache, progress=interrupt)
    assert left(cache) == []
    assert get(server, make_source(server), cache) == DATA


def test_what_happens_in_the_block_is_not_taken_for_a_fault_of_the_cache(
    server: Server, cache: Cache
) -> None:
    fetching = fetch(make_source(server), topurl=server.url, topdir=None, cache=cache)
    with pytest.raises(FileNotFoundError), fetching:
        Path("/nonexistent").read_bytes()


def test_two_threads_fetch_one_image_once(server: Server, cache: Cache) -> None:
    source, found = make_source(server), []
    server.plan = [hanging_at(1000)]
    threads = [
        threading.Thread(target=lambda: found.append(get(server, source, cache))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert server.reached.wait(5)
    server.release.set()
    for thread in threads:
        thread.join()
    assert found == [DATA] * 4
    assert len(server.seen) == 1


# --- processes --------------------------------------------------------------------------------

WORKER = """
import dataclasses, json, sys
from pathlib import Path
from koji_indirection.config import Download
from koji_indirection.errors import IndirectionError
from koji_indirection.cache import Cache
from koji_indirection.imagefetch import fetch
from koji_indirection.sources import Source

order = json.loads(Path(sys.argv[1]).read_text())
cache = Cache(Path(order["directory"]), max_bytes=order["max_bytes"], keep_free_bytes=0)
print("ready", flush=True)
while True:
    for record in order["sources"]:
        try:
            with fetch(Source(**record), topurl=order["url"], topdir=None, cache=cache,
                       download=Download(retry_wait_seconds=0.01)) as path:
                print("holding", len(path.read_bytes()), flush=True)
                if order["hold"]:
                    sys.stdin.readline()
        except IndirectionError as error:
            print("error", error, flush=True)
    if order["hold"]:
        break
"""


class Worker:
    """Another process that fetches: once, holding the image until told, or for ever."""

    def __init__(
        self, directory: Path, server: Server, cache: Cache, *wanted: Source, hold: bool = True
    ) -> None:
        order = {
            "sources": [asdict(source) for source in wanted],
            "directory": str(cache.directory),
            "max_bytes": cache.max_bytes,
            "url": server.url,
            "hold": hold,
        }
        path = directory / f"order-{random.getrandbits(64):x}.json"
        path.write_text(json.dumps(order))
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def let_go(self) -> None:
        self.process.communicate("\n", timeout=10)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@pytest.fixture
def start(tmp_path: Path, server: Server, cache: Cache) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def start_worker(*wanted: Source, max_bytes: int = 10**9, hold: bool = True) -> Worker:
        limited = replace(cache, max_bytes=max_bytes)
        workers.append(Worker(tmp_path, server, limited, *wanted, hold=hold))
        return workers[-1]

    yield start_worker
    for worker in workers:
        worker.kill()


def test_two_processes_fetch_one_image_once(server: Server, start: Callable[..., Worker]) -> None:
    source = make_source(server)
    server.plan = [hanging_at(1000)]
    workers = [start(source), start(source)]
    assert [worker.line() for worker in workers] == ["ready"] * 2
    assert server.reached.wait(5)
    time.sleep(0.3)  # the other one is at the lock by now
    server.release.set()
    assert [worker.line() for worker in workers] == [f"holding {len(DATA)}"] * 2
    assert len(server.seen) == 1


def test_another_process_that_never_has_the_image_is_not_waited_for_for_ever(
    server: Server, cache: Cache
) -> None:
    source = make_source(server)
    cache.directory.mkdir(parents=True)
    with (cache.directory / f"sha256-{source.checksum}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        hasty = replace(FAST, total_timeout_seconds=0.3)
        said = str(refused(source, server.url, cache, download=hasty))
    assert "another process has not fetched it within 0.3 s" in said
    assert "total_timeout in the configuration's [download]" in said


def test_whoever_waits_takes_over_from_a_process_that_was_killed(
    server: Server, cache: Cache, start: Callable[..., Worker]
) -> None:
    source = make_source(server)
    server.plan = [hanging_at(400_000)]
    first = start(source)
    assert server.reached.wait(5)
    second = start(source)
    assert second.line() == "ready"
    time.sleep(0.2)
    first.kill()
    assert second.line() == f"holding {len(DATA)}"
    assert left(cache) == [f"sha256-{source.checksum}"]


def test_what_a_killed_process_left_is_swept_by_the_next_fetch_of_anything(
    server: Server, cache: Cache, start: Callable[..., Worker]
) -> None:
    one, two = make_source(server), small(server, 2)
    server.plan = [hanging_at(400_000)]
    first = start(one)
    assert server.reached.wait(5)
    get(server, two, cache)
    assert len(left(cache)) == 2, "its fetch is under way, and stays"
    first.kill()
    get(server, small(server, 3), cache)
    assert not any(name.endswith(".part") for name in left(cache))


def test_room_is_kept_for_what_others_fetch_at_the_same_time(
    server: Server, cache: Cache, start: Callable[..., Worker]
) -> None:
    server.plan = [hanging_at(400_000)]
    start(make_source(server))
    assert server.reached.wait(5)
    cache = replace(cache, max_bytes=len(DATA) + 500)
    with pytest.raises(BuilderFault, match="does not fit"):
        get(server, small(server, 2), cache)


def test_an_image_that_another_process_uses_is_not_evicted_until_it_dies(
    server: Server, cache: Cache, start: Callable[..., Worker]
) -> None:
    one, two = small(server, 1), small(server, 2)
    holder = start(one)
    assert [holder.line(), holder.line()] == ["ready", "holding 1000"]
    cache = replace(cache, max_bytes=1500)
    with pytest.raises(BuilderFault, match="whose other images are in use"):
        get(server, two, cache)
    holder.kill()
    assert get(server, two, cache) == bytes([2]) * 1000
    assert left(cache) == [f"sha256-{two.checksum}"]


def test_kill_minus_nine_at_any_moment_leaves_a_cache_that_is_right(
    server: Server, cache: Cache, start: Callable[..., Worker]
) -> None:
    wanted = [small(server, number, 300_000) for number in range(1, 6)]
    chance = random.Random(9)
    for _ in range(6):
        # Room for three of five: each fetch evicts, while the other process does the same.
        workers = [
            start(*chance.sample(wanted, 5), max_bytes=1_000_000, hold=False) for _ in range(2)
        ]
        for worker in workers:
            assert worker.line() == "ready"
        for worker in workers:
            time.sleep(chance.random() * 0.2)
            worker.kill()
        for name in left(cache):
            if not name.endswith(".part"):
                data = (cache.directory / name).read_bytes()
                assert name == f"sha256-{hashlib.sha256(data).hexdigest()}"
    for source in wanted:
        get(server, source, replace(cache, max_bytes=1_000_000))
    assert len(left(cache)) == 3
    assert not any(name.endswith(".part") for name in left(cache))
    assert len(list(cache.directory.iterdir())) == 7, "three images, their locks, the cache's lock"
