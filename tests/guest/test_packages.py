"""What a template brings along: packages over a network and from a disk, files, and variables.

A repository is made of Debian packages that apt fetches here, from wherever it is told to.
"""

from __future__ import annotations

import gzip
import http.server
import select
import shutil
import socket
import ssl
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .conftest import REPOSITORY, Builder, Built, change_root, raw_copy, run

DEBIAN = ("--memory", "1G", "--cpus", "2", "--workspace-size", "2G", "--boot-timeout", "10m")
PACKAGES_TDL = REPOSITORY / "examples" / "packages.tdl"
DECLARED = "/etc/apt/sources.list.d/koji-indirection-repo-1.list"
TOOLS = ("squashfs-tools", "xorriso")
NO_MORE = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat apt repository with the tools and all that they need."""
    if shutil.which("dpkg-scanpackages") is None:
        pytest.skip("dpkg-dev is not installed")
    directory = tmp_path_factory.mktemp("repository")
    unwanted = [f"--no-{kind}" for kind in NO_MORE]
    depends = run("apt-cache", "depends", "--recurse", *unwanted, *TOOLS)
    names = sorted({line for line in depends.splitlines() if line[:1] not in (" ", "<", "|")})
    download = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download"]
    run(*download, *(name for name in names if ":" not in name), cwd=directory)
    index = run("dpkg-scanpackages", "--multiversion", ".", cwd=directory)
    (directory / "Packages.gz").write_bytes(gzip.compress(index.encode()))
    return directory


class Server:
    """Serves a directory on loopback, which a guest with a user network sees as 10.0.2.2."""

    def __init__(self, directory: Path, certificate: Path | None = None) -> None:
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: object) -> None:
                super().__init__(*args, directory=str(directory))  # type: ignore[arg-type]

            def do_GET(self) -> None:
                outer.requests.append(self.path)
                # Flat, wherever it is said to be; and a proxy is told the host, too.
                self.path = f"/{urlsplit(self.path).path.rpartition('/')[2]}"
                super().do_GET()

            def do_CONNECT(self) -> None:
                outer.requests.append(f"CONNECT {self.path}")
                outer.tunnel(self.connection)

            def log_message(self, *_args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.port = self._server.server_address[1]

    def tunnel(self, connection: socket.socket) -> None:
        raise NotImplementedError

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Proxy(Server):
    """To it every host is itself; a tunnel leads to another server, wherever it is to go."""

    def __init__(self, directory: Path, behind: Server) -> None:
        super().__init__(directory)
        self._behind = behind

    def tunnel(self, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with socket.create_connection(("127.0.0.1", self._behind.port)) as other:
            to = {connection: other, other: connection}
            while True:
                for end in select.select(list(to), [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    to[end].sendall(data)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of an authority of our own; server.pem beside it is signed by it."""
    directory = tmp_path_factory.mktemp("authority")
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-batch"]
    run(*new, "-subj", "/CN=Tests", "-keyout", "ca.key", "-out", "ca.pem", cwd=directory)
    run(
        *new,
        *("-subj", "/CN=repository.test", "-addext", "subjectAltName=DNS:repository.test"),
        *("-addext", "basicConstraints=critical,CA:FALSE", "-CA", "ca.pem", "-CAkey", "ca.key"),
        *("-keyout", "server.key", "-out", "server.crt"),
        cwd=directory,
    )
    both = (directory / "server.key").read_text() + (directory / "server.crt").read_text()
    (directory / "server.pem").write_text(both)
    return directory / "ca.pem"


def template(tmp_path: Path, inside: str) -> Path:
    path = tmp_path / "template.tdl"
    path.write_text(f"<template>{inside}</template>")
    return path


def steps(built: Built) -> dict[str, int]:
    return {step["name"]: step["status"] for step in built.manifest["setup"]}


def assert_the_iso_holds_the_system(built: Built) -> None:
    listing = run("xorriso", "-indev", built.output / "boot.iso", "-find", "/", "-type", "f")
    assert "'/live/filesystem.squashfs'" in listing


# Packages


def test_tools_are_installed_over_the_network_and_make_the_iso(
    build: Builder,
    bare_image: Path,
    tiny_image: Path,
    repository: Path,
    authority: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By HTTP and HTTPS, through a proxy on this machine and past it."""
    image = raw_copy(bare_image, tmp_path / "bare.raw")
    trusted = "/etc/ssl/certs/ca-certificates.crt"
    change_root(image, "mkdir /etc/ssl", "mkdir /etc/ssl/certs", f"write {authority} {trusted}")
    with (
        Server(repository) as near,
        Server(repository, authority.with_name("server.pem")) as secure,
        Proxy(repository, secure) as proxy,
    ):
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        repositories = (
            "<repositories><repository name='checked'><url>https://repository.test/secure</url>"
            "<sslverify>yes</sslverify></repository><repository name='near'>"
            f"<url>http://10.0.2.2:{near.port}/near</url></repository></repositories>"
        )
        tdl = tmp_path / "with-repositories.tdl"
        tdl.write_text(
            PACKAGES_TDL.read_text().replace("<packages>", f"{repositories}<packages>", 1)
        )
        running = build.start(
            tdl,
            *DEBIAN,
            *("--network", "user", "--repo", "http://repository.test/plain"),
            *("--collect-log", DECLARED),
            utility_image=image,
            input_image=tiny_image,
        )
        built = running.finish(900).succeeded()
    assert_the_iso_holds_the_system(built)
    assert steps(built) == {"network": 0, "repositories": 0, "packages": 0, "files": 0}
    by_proxy, tunnelled, past_it = (" ".join(one.requests) for one in (proxy, secure, near))
    assert "http://repository.test/plain/./Packages" in by_proxy
    assert "CONNECT repository.test:443" in by_proxy
    assert "/near/" not in by_proxy
    assert "/secure/./Packages" in tunnelled
    assert "/near/./Packages" in past_it
    assert "/xorriso_" in by_proxy + tunnelled + past_it
    assert "=== setup: packages\n" in built.log("job.log")
    assert f"log {DECLARED}: there is no such file" in built.log("build.log"), (
        "it has to be removed"
    )


def test_tools_are_installed_from_a_disk_without_any_network(
    build: Builder, bare_image: Path, tiny_image: Path, repository: Path
) -> None:
    running = build.start(
        PACKAGES_TDL,
        *DEBIAN,
        *("--media", repository),
        utility_image=bare_image,
        input_image=tiny_image,
    )
    built = running.finish(900).succeeded()
    assert_the_iso_holds_the_system(built)
    assert steps(built) == {"media": 0, "repositories": 0, "packages": 0, "files": 0}


def test_a_package_that_does_not_exist_is_named(
    build: Builder, bare_image: Path, tiny_image: Path, repository: Path, tmp_path: Path
) -> None:
    tdl = template(
        tmp_path,
        "<packages><package name='xorriso'/><package name='no-such-tool'/></packages>"
        "<commands><command name='never'>echo ran</command></commands>",
    )
    running = build.start(
        tdl, *DEBIAN, "--media", repository, utility_image=bare_image, input_image=tiny_image
    )
    built = running.finish(600).failed(
        "set-up step 'packages' failed: no repository of the guest's has package 'no-such-tool'"
    )
    assert built.manifest["commands"] == []


def test_a_repository_that_cannot_be_reached_is_named(
    build: Builder,
    bare_image: Path,
    tiny_image: Path,
    repository: Path,
    authority: Path,
    tmp_path: Path,
) -> None:
    with Server(tmp_path) as server:
        port = server.port  # nobody listens there any more
    with Server(repository, authority.with_name("server.pem")) as server:
        # The guest knows no authority at all, and is told to believe whoever answers.
        tdl = template(
            tmp_path,
            "<repositories>"
            f"<repository name='believed'><url>https://10.0.2.2:{server.port}/</url></repository>"
            f"<repository name='tools'><url>http://10.0.2.2:{port}/</url></repository>"
            "</repositories><packages><package name='xorriso'/></packages>"
            "<commands><command name='never'>echo ran</command></commands>",
        )
        running = build.start(
            tdl, *DEBIAN, "--network", "user", utility_image=bare_image, input_image=tiny_image
        )
        built = running.finish(600).failed(
            "set-up step 'repositories' failed: repository 'tools' cannot be used: "
        )
    assert steps(built) == {"network": 0, "repositories": 1}


def test_a_guest_without_a_package_manager_is_told_from_one_without_the_package(
    build: Builder, tmp_path: Path
) -> None:
    tdl = template(
        tmp_path,
        "<packages><package name='xorriso'/></packages>"
        "<commands><command name='never'>echo ran</command></commands>",
    )
    build(tdl).failed("set-up step 'packages' failed: the guest has no package manager that is")


# Files, variables, arches, networks

LOOK = """
set -e
cd /etc/app
stat -c '%a %u:%g %n' raw secret coded fetched
cat raw fetched
sh coded
env | grep ^INDIRECTION_ | sort
ls /sys/class/net
ls /run/koji-indirection-media
cat "$INDIRECTION_MEDIA/hello"
! touch "$INDIRECTION_MEDIA/changed"
"""


def test_files_variables_and_media_are_as_the_template_and_the_options_say(
    build: Builder, tmp_path: Path
) -> None:
    media = tmp_path / "media"
    media.mkdir()
    (media / "hello").write_text("hello from the media\n")
    iso = tmp_path / "media.iso"
    run("xorriso", "-as", "mkisofs", "-quiet", "-R", "-o", iso, media)
    with Server(media) as server:
        tdl = template(
            tmp_path,
            "<files><file name='/etc/app/raw'>it's $(raw) &amp; `quoted`</file>"
            "<file name='/etc/app/secret' mode='0600' owner='42:43'>s</file>"
            "<file name='/etc/app/coded' type='base64' mode='4755'>ZWNobyBkZWNvZGVkCg==</file>"
            f"<file name='/etc/app/fetched' type='url'>http://127.0.0.1:{server.port}/hello</file>"
            f"</files><commands><command name='look'><![CDATA[{LOOK}]]></command>"
            "<command name='other' arch='s390x'>exit 9</command>"
            "<command name='result'>mount $INDIRECTION_WORKSPACE /mnt"
            " &amp;&amp; mkdir -p /mnt$INDIRECTION_RESULTS_DIR"
            " &amp;&amp; cmp -n 512 /mnt$INDIRECTION_INPUT /dev/vda"
            " &amp;&amp; echo made &gt; /mnt$INDIRECTION_RESULTS_DIR/a.iso; umount /mnt"
            "</command></commands>",
        )
        built = build(tdl, "--media", iso, "--results", "/out/*.iso").succeeded()
    log = built.log("job.log")
    assert "644 0:0 raw\n600 42:43 secret\n4755 0:0 coded\n644 0:0 fetched\n" in log
    assert "it's $(raw) & `quoted`hello from the media\ndecoded\n" in log
    assert (
        "INDIRECTION_INPUT=/input_image.raw\n"
        "INDIRECTION_MEDIA=/run/koji-indirection-media\n"
        "INDIRECTION_RESULTS_DIR=/out\n"
        "INDIRECTION_WORKSPACE=/dev/vdb1\n"
        "lo\nhello\nhello from the media\n"
    ) in log
    assert "=== command other is for s390x only: not run\n" in log
    assert [command["status"] for command in built.manifest["commands"]] == [0, 0]


SEEK = """
find /etc /run /tmp /proc/1/environ /proc/self/environ /proc/cmdline -type f \
    -exec grep -l 's3cre[t]' {} +
env | grep -i proxy | sort
exit 5
"""


def test_a_guest_that_configures_no_interface_gets_its_address_and_no_password_of_a_proxy(
    build: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://me:s3cret@proxy.invalid:3128")
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    monkeypatch.setenv("no_proxy", ".lan")
    (tmp_path / "hello").write_text("hello over the network\n")
    with Server(tmp_path) as server:
        tdl = template(
            tmp_path,
            "<commands><command name='fetch'>"
            f"wget -q -O - http://10.0.2.2:{server.port}/hello; <![CDATA[{SEEK}]]>"
            "</command></commands>",
        )
        built = build(tdl, "--network", "user").failed("command 'fetch' exited with status 5")
    proxy, bypass = "http://proxy.invalid:3128", ".lan,localhost,127.0.0.1,10.0.2.2"
    assert (
        "\nhello over the network\n"
        f"HTTPS_PROXY={proxy}\nNO_PROXY={bypass}\nhttps_proxy={proxy}\nno_proxy={bypass}\n"
    ) in built.log("job.log")
    assert steps(built) == {"network": 0}
    assert "http_proxy of this machine has a user name or a password in it" in built.stderr
    written = [path for path in built.output.rglob("*") if path.is_file()]
    assert len(written) >= 4
    assert not [path for path in written if b"s3cret" in path.read_bytes()]
    assert "s3cret" not in built.stderr + built.stdout


# Networks that are not to be had


def test_a_network_that_the_settings_do_not_allow_is_refused(
    build: Builder, tmp_path: Path
) -> None:
    commands = [("never", "true")]
    settings = tmp_path / "machine.conf"
    settings.write_text("[guest]\nnetworks = default\n")
    said = build(commands, "--network", "user", "--config", settings)
    assert said.status == 2
    assert said.last_line == (
        "usage error: the build asks for network 'user', which the settings of this machine do not"
        " allow (its setting networks in [guest] is: default)"
    )
    assert not said.output.exists()


def test_a_named_network_that_is_not_there_is_a_fault_in_one_line(
    build: Builder, tmp_path: Path
) -> None:
    settings = tmp_path / "machine.conf"
    settings.write_text("[guest]\nnetworks = nowhere\n")
    built = build([("never", "true")], "--network", "nowhere", "--config", settings)
    built.failed("could not start the VM on network 'nowhere': ", status=3)
