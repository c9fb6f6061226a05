"""The set-up steps in the guest: job/setup.sh run for real, with package managers that pretend.

It runs under every shell that a guest may have as /bin/sh, on a root directory of
its own. What it leaves for each package manager is compared whole with the trees
in golden/repositories; to write those anew, and then to read the difference:

    KOJI_INDIRECTION_WRITE_GOLDEN=1 .venv/bin/pytest tests/unit/test_guestsetup.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from setupguest import MANAGERS, SHELLS, Guest

from koji_indirection.guestjob import (
    DIRECTORY,
    GuestFile,
    GuestJob,
    host_files,
    job_files,
    repository_files,
    results_directory,
    spec_repositories,
)
from koji_indirection.spec import BuildSpec
from koji_indirection.template import Command, Package, Repository

GOLDEN = Path(__file__).parent / "golden" / "repositories"
COMMANDS = (Command("run", "true"),)

REPOSITORIES = (
    Repository("Updates & more", "http://h/u/$basearch/"),
    Repository("updates-more", "https://h/s", signed=True, persisted=False, sslverify=True),
    Repository("lax", "https://files.example.com/lax?x=1", signed=True),
)
SUITE = Repository("debian", "http://h/debian bookworm main contrib", signed=True)


@pytest.fixture(params=list(SHELLS))
def guest(request: pytest.FixtureRequest, tmp_path: Path) -> Guest:
    if shutil.which(SHELLS[request.param][0]) is None:
        pytest.skip(f"{request.param} is not installed")
    return Guest(tmp_path, SHELLS[request.param])


def job(**fields: Any) -> GuestJob:
    return GuestJob(COMMANDS, **fields)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("script", ["setup.sh", "udhcpc.sh"])
def test_the_syntax_is_that_of_every_shell(shell: str, script: str, tmp_path: Path) -> None:
    if shutil.which(SHELLS[shell][0]) is None:
        pytest.skip(f"{shell} is not installed")
    text = resources.files("koji_indirection").joinpath("job", script).read_text("utf-8")
    (tmp_path / script).write_text(text)
    argv = [*SHELLS[shell], "-n", str(tmp_path / script)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# The job's files


def test_the_steps_are_in_ozs_order_and_only_those_that_are_needed() -> None:
    assert job().steps == ()
    everything = job(
        files=[GuestFile("/a", b"")],
        packages=[Package("p")],
        repositories=REPOSITORIES,
        media=("vdc", "ext4"),
        network="user",
    )
    assert everything.steps == ("network", "media", "repositories", "packages", "files")
    assert job(media=("vdc", "ext4")).steps == ("media", "repositories")


def test_a_job_without_set_up_has_nothing_of_it_in_the_guest() -> None:
    names = {name.removeprefix(f"{DIRECTORY}/").partition("/")[0] for name in job_files(job())}
    assert names == {"run", "settings", "environment", "commands"}


def test_template_text_is_never_part_of_a_script() -> None:
    evil = "a'; touch /x; '$(touch /y)`"
    files = job_files(
        job(
            packages=[Package(evil)],
            files=[GuestFile(f"/{evil}", evil.encode())],
            repositories=[Repository(evil, "http://h/")],
        )
    )
    for name, (content, mode) in files.items():
        assert mode in (0o755, 0o644, 0o600)
        if evil.encode() in content:
            assert mode != 0o755
            assert name.endswith(("packages", ".path", ".data", ".name", ".dnf", ".zypper"))


def test_a_file_that_is_large_is_not_read_into_memory(tmp_path: Path) -> None:
    large = job(files=[GuestFile("/a", b"small"), GuestFile("/b", tmp_path / "large")])
    assert host_files(large) == {f"{DIRECTORY}/files/0002.data": tmp_path / "large"}
    assert f"{DIRECTORY}/files/0002.data" not in job_files(large)


def test_settings_and_environment_survive_any_shell(guest: Guest) -> None:
    odd = "a b'c\"d$(e)\\"
    files = job_files(job(results_dir=f"/{odd}", environment={"http_proxy": odd}))
    assert files[f"{DIRECTORY}/environment"][1] == 0o600, "it may hold a proxy's password"
    script = b"".join(files[f"{DIRECTORY}/{name}"][0] for name in ("settings", "environment"))
    script += b'printf "%s\\n" "$RESULTS_DIR" "$http_proxy"\n'
    done = subprocess.run([*guest._shell, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"/{odd}\n{odd}\n"


def test_skipped_commands_are_said_where_they_would_have_run() -> None:
    files = job_files(GuestJob(COMMANDS, skipped=[Command("grub", "x", arch="ppc64le")]))
    assert files[f"{DIRECTORY}/commands/0001.head"][0].decode() == (
        "=== command grub is for ppc64le only: not run\n=== command 1 of 1: run\n"
    )


@pytest.mark.parametrize(
    ("results", "directory"),
    [
        ("/results/images/boot.iso", "/results/images"),
        ("/a*/b/c.iso", "/"),
        ("/out/*.iso", "/out"),
        ("/out/[ab]/c/*.iso", "/out"),
        ("/boot.iso", "/"),
    ],
)
def test_the_results_directory_is_that_of_the_first_result(results: str, directory: str) -> None:
    assert results_directory(BuildSpec(results=(results, "/else/where"))) == directory


# Repositories


@pytest.mark.parametrize("kind", ["dnf", "apt", "zypper"])
def test_repositories_become_the_files_of_the_golden_tree(kind: str, guest: Guest) -> None:
    guest.manager(kind)
    own = spec_repositories(["http://10.0.2.2:8000/repo"])
    declared = (*REPOSITORIES, *own, *([SUITE] if kind == "apt" else []))
    assert guest.run("repositories", job(repositories=declared)).status == 0
    made, golden = guest.tree(), GOLDEN / kind
    if os.environ.get("KOJI_INDIRECTION_WRITE_GOLDEN"):
        shutil.rmtree(golden, ignore_errors=True)
        for path, text in made.items():
            (golden / path[1:]).parent.mkdir(parents=True, exist_ok=True)
            (golden / path[1:]).write_text(text)
    assert made == {
        f"/{path.relative_to(golden)}": path.read_text()
        for path in golden.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(("kind", "left"), [("dnf", "repo"), ("zypper", "repo"), ("apt", "list")])
def test_what_is_not_persisted_is_gone_at_the_end(kind: str, left: str, guest: Guest) -> None:
    guest.manager(kind)
    three = job(repositories=REPOSITORIES)
    guest.run("repositories", three)
    assert len([path for path in guest.tree() if path.endswith(left)]) == 3
    assert guest.run("cleanup", three).status == 0
    names = {Path(path).stem for path in guest.tree() if path.endswith(left)}
    assert names == {"koji-indirection-Updates-more", "koji-indirection-lax"}


def test_every_repository_is_tried_by_itself(guest: Guest) -> None:
    guest.manager("dnf")
    guest.run("repositories", job(repositories=REPOSITORIES[:2]))
    assert guest.calls() == [
        f"dnf -y --disablerepo=* --enablerepo=koji-indirection-{name} makecache"
        for name in ("Updates-more", "updates-more-2")
    ]


UNREACHABLE = {
    "dnf": "echo 'Error: Failed to download metadata for repo: Curl error (7)'; exit 1",
    "zypper": "echo 'Error: Repository is invalid'; exit 4",
    "apt": "echo 'Err:1 http://u:pw@h ./'; echo 'E: Failed to fetch http://u:pw@h'; exit 100",
}


@pytest.mark.parametrize("kind", UNREACHABLE)
def test_a_repository_that_cannot_be_reached_is_named(kind: str, guest: Guest) -> None:
    guest.manager(kind, UNREACHABLE[kind])
    ended = guest.run("repositories", job(repositories=REPOSITORIES[:1]))
    assert ended.status == 1
    assert ended.reason.startswith("repository 'Updates & more' cannot be used: E")
    assert "pw" not in ended.reason


def test_an_old_apt_that_only_warns_is_not_believed(guest: Guest) -> None:
    guest.manager("apt", "echo 'W: Failed to fetch http://h/Packages'; exit 0")
    ended = guest.run("repositories", job(repositories=REPOSITORIES[:1]))
    assert ended.reason.endswith("cannot be used: W: Failed to fetch http://h/Packages")


def test_ways_of_compression_that_apt_tries_in_vain_are_no_failure(guest: Guest) -> None:
    guest.manager("apt", "echo 'Err:3 http://h ./ Packages'; echo 'Get:3 http://h ./ Packages'")
    assert guest.run("repositories", job(repositories=REPOSITORIES[:1])).status == 0


def test_a_debian_suite_is_for_apt_alone(guest: Guest) -> None:
    guest.manager("yum")
    ended = guest.run("repositories", job(repositories=[SUITE]))
    assert ended.reason == (
        "repository 'debian' has a suite, as apt's have, but this guest's package manager is yum"
    )


@pytest.mark.parametrize("step", ["repositories", "packages"])
def test_a_guest_without_a_package_manager_that_we_know_is_said(step: str, guest: Guest) -> None:
    guest.fake("apk", "exit 0")
    ended = guest.run(step, job(repositories=REPOSITORIES, packages=[Package("p")]))
    assert (ended.status, ended.reason) == (
        1,
        "the guest has no package manager that is supported: neither dnf, yum, zypper nor apt-get",
    )


def test_a_debian_with_dnf_installed_still_lives_by_apt(guest: Guest) -> None:
    guest.manager("dnf")
    guest.manager("apt")
    guest.run("packages", job(network="user", packages=[Package("p")]))
    assert {call.split()[0] for call in guest.calls()} == {"apt-get"}


# Packages


def last_call(guest: Guest) -> str:
    return guest.calls()[-1]


@pytest.mark.parametrize("kind", MANAGERS)
def test_packages_are_installed_in_one_call_each_an_argument(kind: str, guest: Guest) -> None:
    guest.manager(kind, 'for word; do echo "<$word>"; done')
    names = ["lorax", "@Development Tools", "a'b $(touch x) `y`", "*"]
    ended = guest.run("packages", job(network="user", packages=[Package(name) for name in names]))
    assert ended.status == 0, ended.output
    for name in names:
        assert f"<{name}>\n" in ended.output
    assert " install " in last_call(guest)
    assert any(word in last_call(guest).split() for word in ("-y", "--non-interactive"))


NOWHERE = {
    "dnf": "No match for argument: nope\nError: Unable to find a match: nope no-pe",
    "dnf5": "Failed to resolve the transaction:\nNo match for argument: nope",
    "yum": "No package nope available.\nError: Not tolerating missing names on install, stopping.",
    "apt": "Reading package lists...\nE: Unable to locate package nope",
    "zypper": "Loading repository data...\nPackage 'nope' not found.",
}


@pytest.mark.parametrize("kind", MANAGERS)
def test_a_package_that_is_nowhere_is_named(kind: str, guest: Guest) -> None:
    said = f"cat <<'END'\n{NOWHERE[kind]}\nEND\ncase $* in *install*) exit 100 ;; esac"
    guest.manager(kind, said)
    names = ("nop", "lorax", "nope", "no-pe")
    ended = guest.run("packages", job(network="user", packages=[Package(name) for name in names]))
    assert ended.status == 1
    assert ended.reason == "no repository of the guest's has package 'nope'"


NO_GROUP = {
    "yum": "Warning: Group Tools & more does not exist.",
    "dnf": "Module or Group 'Tools & more' is not available.",
    "dnf5": "No match for argument: @Tools & more",
}


@pytest.mark.parametrize("kind", list(NO_GROUP))
def test_an_installation_of_what_was_found_is_no_success(kind: str, guest: Guest) -> None:
    said = f"{NOWHERE[kind].splitlines()[-1]}\n{NOWHERE[kind].splitlines()[0]}\nComplete!"
    said += f"\n{NO_GROUP[kind]}"
    guest.manager(kind, f"cat <<'END'\n{said}\nEND")
    names = ("lorax", "nope", "@Tools & more")
    ended = guest.run("packages", job(network="user", packages=[Package(name) for name in names]))
    assert ended.status == 1
    assert ended.reason == "no repository of the guest's has package 'nope', '@Tools & more'"


def test_two_packages_that_are_nowhere_are_both_named(guest: Guest) -> None:
    guest.manager(
        "apt",
        "echo 'E: Unable to locate package a'; echo 'E: Unable to locate package b'; exit 100",
    )
    ended = guest.run("packages", job(network="user", packages=[Package("a"), Package("b")]))
    assert ended.reason == "no repository of the guest's has package 'a', 'b'"


def test_a_package_whose_needs_are_not_met_is_named(guest: Guest) -> None:
    said = " xorriso : Depends: libburn4 but it is not installable"
    guest.manager("apt", f"echo '{said}'; echo 'E: Unable to correct problems'; exit 100")
    ended = guest.run("packages", job(network="user", packages=[Package("xorriso")]))
    assert ended.reason == f"apt-get cannot install xorriso:{said}"


@pytest.mark.parametrize(("status", "outcome"), [(0, 0), (102, 0), (107, 0), (4, 1), (104, 1)])
def test_zyppers_advice_is_no_failure(status: int, outcome: int, guest: Guest) -> None:
    guest.manager("zypper", f"exit {status}")
    ended = guest.run("packages", job(network="user", packages=[Package("p")]))
    assert ended.status == outcome


def test_the_guests_own_repositories_may_be_out_of_reach(guest: Guest) -> None:
    guest.manager("apt", "case $* in *update*) exit 100 ;; esac")
    ended = guest.run("packages", job(network="user", packages=[Package("p")]))
    assert ended.status == 0
    assert "warning: not all of the guest's own repositories" in ended.output


# Media

MEDIA = ("vdc", "iso9660")


def put(directory: Path, *paths: str) -> None:
    for path in paths:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text("")


@pytest.mark.parametrize("kind", ["dnf", "yum", "zypper"])
def test_rpm_repositories_on_the_media_are_declared(kind: str, guest: Guest) -> None:
    guest.manager(kind)
    put(guest.media, "BaseOS/repodata/repomd.xml", "AppStream/repodata/repomd.xml", "Packages")
    assert guest.run("repositories", job(media=MEDIA)).status == 0
    tree = guest.tree()
    urls = [
        line.replace(str(guest.media), "MEDIA")
        for text in tree.values()
        for line in text.splitlines()
        if line.startswith("baseurl=")
    ]
    assert urls == ["baseurl=file://MEDIA/AppStream", "baseurl=file://MEDIA/BaseOS"]
    assert len(guest.calls()) == 2


@pytest.mark.parametrize(
    ("paths", "sources"),
    [
        (["Packages.gz", "a_1_all.deb"], ["deb [trusted=yes] file:MEDIA ./"]),
        (["debs/Packages", "debs/Packages.xz"], ["deb [trusted=yes] file:MEDIA/debs ./"]),
        (
            [
                "dists/bookworm/Release",
                "dists/bookworm/InRelease",
                "dists/bookworm/main/binary-amd64/Packages.gz",
                "dists/bookworm/main/binary-all/Packages.gz",
                "dists/bookworm/contrib/binary-amd64/Packages.gz",
                "dists/bookworm/main/source/Sources.gz",
            ],
            ["deb [trusted=yes] file:MEDIA bookworm contrib main"],
        ),
    ],
)
def test_apt_repositories_on_the_media_are_declared(
    paths: list[str], sources: list[str], guest: Guest
) -> None:
    guest.manager("apt")
    put(guest.media, *paths)
    ended = guest.run("repositories", job(media=MEDIA))
    assert ended.status == 0, ended.output
    found = {
        path: text.replace(str(guest.media), "MEDIA").rstrip()
        for path, text in guest.tree().items()
    }
    assert [text for path, text in found.items() if path.endswith(".list")] == sources
    assert guest.run("cleanup", job(media=MEDIA)).status == 0
    assert guest.tree() == {}, "nothing may point to media that are gone"


@pytest.mark.parametrize("kind", ["apt", "dnf"])
def test_media_without_a_repository_are_files_and_no_mistake(kind: str, guest: Guest) -> None:
    guest.manager(kind)
    put(guest.media, "kickstart.ks")
    ended = guest.run("repositories", job(media=MEDIA))
    assert ended.status == 0
    assert "no repository for this guest is on the media" in ended.output


def test_without_a_network_only_the_media_are_asked(guest: Guest) -> None:
    media = job(media=MEDIA, packages=[Package("p")])
    guest.manager("dnf")
    put(guest.media, "repodata/repomd.xml")
    guest.run("repositories", media)
    guest.run("packages", media)
    assert last_call(guest) == ("dnf -y install --disablerepo=* --enablerepo=koji-indirection-* p")


def test_apt_without_a_network_asks_the_media_and_updates_nothing(guest: Guest) -> None:
    media = job(media=MEDIA, packages=[Package("p")])
    guest.manager("apt", 'case $* in *install*) ls -R "$TMPDIR"/*/sources ;; esac')
    put(guest.media, "Packages")
    guest.run("repositories", media)
    before = len(guest.calls())
    ended = guest.run("packages", media)
    assert "koji-indirection-media-1.list" in ended.output
    assert len(guest.calls()) == before + 1
    assert "sourcelist=/dev/null" in last_call(guest)


def test_media_are_mounted_read_only(guest: Guest) -> None:
    guest.fake("mount", "exit 0")
    assert guest.run("media", job(media=MEDIA)).status == 0
    assert guest.calls() == ["mount -t iso9660 -o ro /dev/vdc /media"]


def test_media_that_do_not_mount_are_said(guest: Guest) -> None:
    guest.fake("mount", "echo 'mount: wrong fs type'; exit 32")
    ended = guest.run("media", job(media=MEDIA))
    assert ended.reason == "the media cannot be mounted from /dev/vdc: mount: wrong fs type"


# Files


def test_files_get_their_content_mode_and_owner(guest: Guest) -> None:
    guest.write("/etc/there", "old")
    (guest.root / "etc/there").chmod(0o640)
    owner = f"{os.getuid()}:{os.getgid()}"
    files = [
        GuestFile("/etc/new dir/a'b$(x)", b"\0\xff bytes"),
        GuestFile("/bin/tool", b"#!/bin/sh\n", 0o4755, owner),
        GuestFile("/etc/secret", b"", 0o600),
        GuestFile("/etc/there", b"new"),
    ]
    ended = guest.run("files", job(files=files))
    assert ended.status == 0, ended.output
    found = {
        file.name: ((guest.root / file.name[1:]).read_bytes(), mode)
        for file, mode in zip(files, (0o644, 0o4755, 0o600, 0o640))
    }
    for file in files:
        path = guest.root / file.name[1:]
        assert path.read_bytes() == file.data
        assert path.stat().st_mode & 0o7777 == found[file.name][1], file.name


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (GuestFile("/etc/", b"x"), "file '/etc/' is a directory in the guest"),
        (GuestFile("/etc/sub", b"x"), "file '/etc/sub' is a directory in the guest"),
        (GuestFile("/etc/file/x", b"x"), "the directory of file '/etc/file/x' cannot be made"),
        (
            GuestFile("/a", b"x", owner="no-such-user"),
            "file '/a' cannot be given to no-such-user: ",
        ),
    ],
)
def test_a_file_that_cannot_be_put_in_place_is_named(
    file: GuestFile, reason: str, guest: Guest
) -> None:
    guest.write("/etc/file", "")
    (guest.root / "etc/sub").mkdir()
    ended = guest.run("files", job(files=[file]))
    assert ended.status == 1
    assert ended.reason.startswith(reason)


# The network


@pytest.fixture
def wired(guest: Guest) -> Guest:
    """A guest with one interface, and no address yet."""
    guest.write("/sys/class/net/eth0/device/vendor", "")
    guest.write("/sys/class/net/lo/carrier", "")
    guest.write("/proc/net/route", "Iface\tDestination\tGateway\n")
    guest.write("/etc/resolv.conf", "nameserver 192.0.2.1\n")
    guest.fake("sleep", "exit 0")
    guest.fake("ip", "exit 0")
    return guest


def routed(guest: Guest, interface: str = "eth0") -> str:
    """Shell text that gives the guest an address, as the kernel would show it."""
    return f"printf '{interface}\\t0002000A\\t0\\n' >>{guest.root}/proc/net/route"


def test_a_guest_that_has_its_address_is_left_alone(wired: Guest) -> None:
    wired.write("/proc/net/route", "Iface\tDestination\neth0\t00000000\t0202000A\n")
    wired.fake("dhclient", "exit 0")
    assert wired.run("network", job(network="user")).status == 0
    assert not any("dhclient" in call for call in wired.calls())
    assert wired.tree()["/etc/resolv.conf"] == "nameserver 192.0.2.1\n"


def test_name_servers_are_waited_for_where_something_will_write_them_down(wired: Guest) -> None:
    wired.write("/proc/net/route", "Iface\tDestination\neth0\t00000000\t0202000A\n")
    wired.write("/proc/17/comm", "NetworkManager\n")
    wired.write("/etc/resolv.conf", "# nothing yet\n")
    wired.fake("sleep", f"echo nameserver 192.0.2.1 >{wired.root}/etc/resolv.conf")
    ended = wired.run("network", job(network="user"))
    assert (ended.status, ended.output.splitlines()[-1]) == (0, "nameserver 192.0.2.1")


@pytest.mark.parametrize("client", ["dhclient", "dhcpcd", "udhcpc"])
def test_a_guest_that_configures_nothing_is_helped(client: str, wired: Guest) -> None:
    wired.fake(client, routed(wired))
    ended = wired.run("network", job(network="default"))
    assert ended.status == 0, ended.output
    assert any(call.startswith(client) and "eth0" in call for call in wired.calls())


def test_without_any_program_a_user_network_has_fixed_addresses(wired: Guest) -> None:
    wired.fake("ip", f"case $* in *10.0.2.15*) {routed(wired)} ;; esac")
    wired.write("/etc/resolv.conf", "# nothing\n")
    assert wired.run("network", job(network="user")).status == 0
    assert "ip route add default via 10.0.2.2 dev eth0" in wired.calls()
    assert wired.tree()["/etc/resolv.conf"] == "nameserver 10.0.2.3\n"


def test_a_network_that_gives_no_address_is_said(wired: Guest) -> None:
    wired.fake("dhclient", "exit 2")
    ended = wired.run("network", job(network="default"))
    assert ended.status == 1
    assert ended.reason.startswith("the guest got no address on its network")


def test_routes_of_the_guests_own_bridges_are_no_network(wired: Guest) -> None:
    wired.write("/proc/net/route", "Iface\tDestination\ndocker0\t000011AC\n")
    wired.write("/sys/class/net/docker0/carrier", "")
    assert wired.run("network", job(network="default")).status == 1


def test_a_guest_without_the_driver_is_said(guest: Guest) -> None:
    guest.fake("sleep", "exit 0")
    ended = guest.run("network", job(network="user"))
    assert "sees no network interface" in ended.reason


def test_repositories_of_one_name_get_files_of_their_own() -> None:
    files = repository_files([Repository("a b", "http://h/1"), Repository("a-B", "http://h/2")])
    assert files["0001.id"] != files["0002.id"]
    assert files["0001.id"].lower() != files["0002.id"].lower()
