"""Repositories and packages with the real dnf and zypper, which Debian has too, and its apt.

They work on a directory in the place of a guest's root. Only yum and dnf5, which Debian
does not have, are pretended in test_guestsetup.py alone.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from setupguest import Guest

from koji_indirection.guestjob import GuestJob
from koji_indirection.template import Command, Package, Repository

SPEC = """\
Name: {name}
Version: 1
Release: 1
Summary: a package of a test
License: none
BuildArch: noarch
{more}
%description
None.
%install
install -d %{{buildroot}}/opt
echo {name} >%{{buildroot}}/opt/{name}
%files
/opt/{name}
"""
# Each is told of the root, where a guest's own would find it at /.
REAL = {
    "dnf": "exec /usr/bin/dnf --installroot={root} --releasever=9 --setopt=timeout=5"
    ' --setopt=retries=1 --setopt=reposdir={root}/etc/yum.repos.d "$@"',
    # It runs programs of its own, and rpm.
    "zypper": 'PATH=/usr/sbin:/usr/bin:/sbin:/bin exec /usr/bin/zypper --root {root} "$@"',
}
COMMANDS = (Command("one", "true"),)
NEEDED = ("dnf", "zypper", "rpmbuild", "createrepo_c")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    directory = tmp_path_factory.mktemp("rpms")
    for name, more in (("tool", "Requires: library"), ("library", ""), ("broken", "Requires: no")):
        spec = directory / f"{name}.spec"
        spec.write_text(SPEC.format(name=name, more=more))
        argv = ["rpmbuild", "-bb", "--quiet", f"--define=_topdir {directory}/build", str(spec)]
        subprocess.run(argv, check=True, capture_output=True)
    repository = directory / "repository"
    repository.mkdir()
    for package in (directory / "build" / "RPMS").rglob("*.rpm"):
        shutil.move(package, repository)
    argv = ["createrepo_c", "--quiet", str(repository)]
    subprocess.run(argv, check=True, capture_output=True)
    return repository


@contextmanager
def served(directory: Path, certificate: Path | None = None) -> Iterator[str]:
    """Host and port where the directory is, over HTTP or HTTPS."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def certificate_of_nobody(directory: Path) -> Path:
    """For 127.0.0.1, and signed by itself alone."""
    certificate, key = directory / "server.pem", directory / "server.key"
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-batch"]
    new += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    new += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(new, check=True, capture_output=True)
    with certificate.open("a") as file:
        file.write(key.read_text())
    return certificate


@pytest.fixture
def address(repository: Path) -> Iterator[str]:
    with served(repository) as host:
        yield f"http://{host}/"


@pytest.fixture(params=list(REAL))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def guest(kind: str, tmp_path: Path) -> Guest:
    guest = Guest(tmp_path, ["dash"])
    guest.manager(kind, REAL[kind].format(root=guest.root))
    guest.write("/etc/os-release", 'ID="test"\nVERSION_ID="9"\n')
    return guest


def job(url: str, *packages: str, **fields: object) -> GuestJob:
    return GuestJob(
        COMMANDS,
        network="user",
        repositories=(Repository("the tools", url, persisted=False),),
        packages=tuple(Package(name) for name in packages),
        **fields,  # type: ignore[arg-type]
    )


def test_packages_and_what_they_need_are_installed_from_a_repository(
    guest: Guest, address: str
) -> None:
    wanted = job(address, "tool")
    declared = guest.run("repositories", wanted)
    assert declared.status == 0, declared.output
    installed = guest.run("packages", wanted)
    assert installed.status == 0, installed.output
    assert sorted(path.name for path in (guest.root / "opt").iterdir()) == ["library", "tool"]
    assert len(list(guest.root.glob("etc/**/koji-indirection-the-tools.repo"))) == 1
    assert guest.run("cleanup", wanted).status == 0
    assert not list(guest.root.glob("etc/**/koji-indirection-the-tools.repo"))


def test_a_package_that_is_nowhere_is_named_and_no_other(guest: Guest, address: str) -> None:
    wanted = job(address, "tool", "no-such-tool", "nor-this+one")
    assert guest.run("repositories", wanted).status == 0
    failed = guest.run("packages", wanted)
    assert failed.status == 1
    assert "'no-such-tool'" in failed.reason, failed.output
    assert "'tool'" not in failed.reason
    assert not (guest.root / "opt/tool").exists()


def test_a_package_whose_needs_are_not_met_is_named(guest: Guest, address: str) -> None:
    wanted = job(address, "broken")
    assert guest.run("repositories", wanted).status == 0
    failed = guest.run("packages", wanted)
    assert failed.status == 1
    assert "cannot install broken: " in failed.reason, failed.output
    assert "nothing provides" in failed.reason, failed.output


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://no-such-host.invalid/repository/"])
def test_a_repository_that_cannot_be_reached_is_named(guest: Guest, url: str) -> None:
    failed = guest.run("repositories", job(url))
    assert failed.status == 1
    why = "(Curl error .*|Error message): .*(connect to|resolve host)"
    assert re.match(f"repository 'the tools' cannot be used: {why}", failed.reason), failed.output


def test_a_repository_without_metadata_is_named(guest: Guest, address: str) -> None:
    failed = guest.run("repositories", job(f"{address}elsewhere/"))
    assert failed.status == 1
    why = ".*(Status code: 404 for http|not found on medium|type can't be determined)"
    assert re.match(f"repository 'the tools' cannot be used: {why}", failed.reason), failed.output


def test_a_certificate_is_checked_only_where_the_template_says_so(
    guest: Guest, repository: Path, tmp_path: Path
) -> None:
    certificate = certificate_of_nobody(tmp_path)
    with served(repository, certificate) as host:
        believed = guest.run("repositories", job(f"https://{host}/"))
        assert believed.status == 0, believed.output
        checked = Repository("checked", f"https://{host}/", sslverify=True)
        refused = guest.run("repositories", GuestJob(COMMANDS, repositories=(checked,)))
    assert refused.status == 1
    why = "repository 'checked' cannot be used: .*certificate"
    assert re.match(why, refused.reason), refused.output


def test_packages_are_installed_from_the_media_alone(guest: Guest, repository: Path) -> None:
    shutil.copytree(repository, guest.media / "AppStream")
    # The guest's own repository cannot be reached, and is not asked.
    path = {"dnf": "yum.repos.d", "zypper": "zypp/repos.d"}
    kind = "dnf" if (guest.bin / "dnf").exists() else "zypper"
    own = "[own]\nname=own\nbaseurl=http://127.0.0.1:1/\nenabled=1\ngpgcheck=0\n"
    guest.write(f"/etc/{path[kind]}/own.repo", own)
    wanted = GuestJob(COMMANDS, media=("vdc", "iso9660"), packages=(Package("tool"),))
    assert guest.run("repositories", wanted).status == 0
    installed = guest.run("packages", wanted)
    assert installed.status == 0, installed.output
    assert (guest.root / "opt/tool").exists()


# apt, which guests of tests/guest install with; here only what it believes.

APT_CONF = """\
Dir "{root}";
Dir::Bin::methods "/usr/lib/apt/methods";
APT::Sandbox::User "root";
"""


@pytest.fixture
def debian(tmp_path: Path) -> Guest:
    if shutil.which("apt-get") is None:
        pytest.skip("apt is not installed")
    guest = Guest(tmp_path, ["dash"])
    guest.manager("apt", f'APT_CONFIG={tmp_path}/apt.conf exec /usr/bin/apt-get "$@"')
    (tmp_path / "apt.conf").write_text(APT_CONF.format(root=guest.root))
    for directory in ("var/lib/apt/lists/partial", "var/cache/apt", "etc/apt/apt.conf.d"):
        (guest.root / directory).mkdir(parents=True)
    return guest


@pytest.fixture
def debs(tmp_path: Path) -> Path:
    """A flat repository with nothing in it, and nobody's signature."""
    directory = tmp_path / "debs"
    directory.mkdir()
    (directory / "Packages").write_text("")
    digest = hashlib.sha256(b"").hexdigest()
    (directory / "Release").write_text(
        f"Suite: test\nDate: Tue, 24 Nov 2020 00:00:00 UTC\nSHA256:\n {digest} 0 Packages\n"
    )
    return directory


def declare(guest: Guest, url: str, **fields: bool) -> tuple[int, str]:
    repository = Repository("the tools", url, **fields)
    ended = guest.run("repositories", GuestJob(COMMANDS, repositories=(repository,)))
    return ended.status, ended.reason


def test_apt_asks_for_a_signature_only_where_the_template_says_so(
    debian: Guest, debs: Path
) -> None:
    with served(debs) as host:
        assert declare(debian, f"http://{host}/") == (0, "")
        status, reason = declare(debian, f"http://{host}/", signed=True)
    assert status == 1
    assert re.match("repository 'the tools' cannot be used: .*not signed", reason), reason


def test_apt_checks_a_certificate_only_where_the_template_says_so(
    debian: Guest, debs: Path, tmp_path: Path
) -> None:
    with served(debs, certificate_of_nobody(tmp_path)) as host:
        status, reason = declare(debian, f"https://{host}/", sslverify=True)
        assert declare(debian, f"https://{host}/") == (0, "")
    assert status == 1
    assert re.match("repository 'the tools' cannot be used: .*certificate", reason), reason
