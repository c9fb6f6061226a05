"""Settings from ini files: typed, and nothing in them is overlooked."""

from __future__ import annotations

import configparser
import os
from pathlib import Path

import pytest

from koji_indirection.config import (
    Download,
    Settings,
    default_cache_dir,
    default_work_dir,
    load_settings,
    require_within_limits,
    settings_from,
)
from koji_indirection.errors import UsageError
from koji_indirection.spec import BuildSpec
from koji_indirection.units import GIB, MIB

WHOLE = """
[indirection]
connect = qemu:///system
accel = kvm
work_dir = /srv/work
cache_dir = /srv/cache
max_image_size = 100G
max_results = 7
max_result_size = 2 GiB
max_log_size = 1M
max_memory = 8G
max_cpus = 4
max_workspace_size = 90G
max_timeout = 6h
max_boot_timeout = 10m
max_shutdown_timeout = 5m
max_disk_size = 7G
max_collect_time = 20m
max_silence = 3m

[cache]
max_size = 200G
keep_free = 5G
verify = yes

[download]
connect_timeout = 10
read_timeout = 2m
total_timeout = 1h
retries = 3
retry_wait = 1s
max_redirects = 0
ca_bundle = /etc/pki/koji-ca.pem
proxy = http://user%40realm:secret@proxy:3128

[guest]
networks = user, default
proxy = http://proxy:3128
no_proxy = .example.com
file_hosts = Files.example.com *.example.org
max_file_size = 1M
media = /srv/repo.iso
"""


def load(path: Path, text: str) -> Settings:
    path.write_text(text, encoding="utf-8")
    return load_settings([path])


def test_every_key_is_read_with_its_unit(tmp_path: Path) -> None:
    assert load(tmp_path / "indirection.conf", WHOLE) == Settings(
        connect="qemu:///system",
        accel="kvm",
        work_dir=Path("/srv/work"),
        cache_dir=Path("/srv/cache"),
        max_image_bytes=100 * GIB,
        max_results=7,
        max_result_bytes=2 * GIB,
        max_log_bytes=MIB,
        max_memory_bytes=8 * GIB,
        max_cpus=4,
        max_workspace_bytes=90 * GIB,
        max_timeout_seconds=6 * 3600,
        max_boot_timeout_seconds=600,
        max_shutdown_timeout_seconds=300,
        max_disk_bytes=7 * GIB,
        max_collect_seconds=1200,
        max_silence_seconds=180,
        max_cache_bytes=200 * GIB,
        cache_keep_free_bytes=5 * GIB,
        cache_verify=True,
        download=Download(
            connect_timeout_seconds=10,
            read_timeout_seconds=120,
            total_timeout_seconds=3600,
            retries=3,
            retry_wait_seconds=1,
            max_redirects=0,
            ca_bundle=Path("/etc/pki/koji-ca.pem"),
            proxy="http://user%40realm:secret@proxy:3128",
        ),
        networks=("user", "default"),
        guest_proxy="http://proxy:3128",
        guest_no_proxy=".example.com",
        file_hosts=("files.example.com", "*.example.org"),
        max_file_bytes=MIB,
        media=Path("/srv/repo.iso"),
    )


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"memory_bytes": 8 * GIB + 1}, "memory is 8589934593 B, .* 8 GiB .max_memory"),
        ({"cpus": 5}, "cpus is 5, above this machine's limit of 4 .max_cpus"),
        (
            {"workspace_size_bytes": 91 * GIB},
            "size is 91 GiB.* 90 GiB .max_workspace_size",
        ),
        ({"job_timeout_seconds": 6 * 3600 + 1}, "job timeout is 21601 s.* 6 h .max_timeout"),
        ({"command_timeout_seconds": 7 * 3600}, "command timeout is 7 h.* 6 h .max_timeout"),
        ({"boot_timeout_seconds": 601}, "boot timeout is 601 s.* 10 m .max_boot_timeout"),
        ({"shutdown_timeout_seconds": 301}, "shutdown timeout is .* 5 m .max_shutdown_timeout"),
    ],
)
def test_a_spec_above_a_limit_is_refused_with_the_limit_and_its_setting(
    tmp_path: Path, asked: dict[str, int], sentence: str
) -> None:
    settings = load(tmp_path / "indirection.conf", WHOLE)
    with pytest.raises(UsageError, match=sentence) as caught:
        require_within_limits(BuildSpec(**asked), settings)  # type: ignore[arg-type]
    assert "in the configuration's [indirection]" in caught.value.hint


def test_a_spec_at_the_limits_is_granted_and_so_is_one_that_asks_for_nothing(
    tmp_path: Path,
) -> None:
    settings = load(tmp_path / "indirection.conf", WHOLE)
    at_the_limits = BuildSpec(
        memory_bytes=8 * GIB,
        cpus=4,
        workspace_size_bytes=90 * GIB,
        job_timeout_seconds=6 * 3600,
        command_timeout_seconds=6 * 3600,
        boot_timeout_seconds=600,
        shutdown_timeout_seconds=300,
    )
    for spec in (at_the_limits, BuildSpec()):
        require_within_limits(spec, settings)
        require_within_limits(spec, Settings())


def test_the_defaults_need_no_file(tmp_path: Path) -> None:
    assert load_settings([]) == load_settings([tmp_path / "missing.conf"]) == Settings()
    assert load(tmp_path / "empty.conf", "[indirection]\nconnect =\n# a comment\n") == Settings()


def test_a_later_file_wins(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("[cache]\nmax_size = 1G\nverify = on\n")
    (tmp_path / "b").write_text("[cache]\nmax_size = 2G\n")
    settings = load_settings([tmp_path / "a", tmp_path / "b"])
    assert (settings.max_cache_bytes, settings.cache_verify) == (2 * GIB, True)


def test_a_file_says_what_differs_from_the_defaults_given(tmp_path: Path) -> None:
    path = tmp_path / "local.conf"
    path.write_text("[guest]\nfile_hosts = a.example.com\n")
    local = Settings(networks=("user",), file_hosts=("*",), download=Download(retries=9))
    settings = load_settings([path], defaults=local)
    assert settings.networks == ("user",)
    assert settings.file_hosts == ("a.example.com",)
    assert settings.download.retries == 9


def test_nothing_of_the_network_is_allowed_by_default() -> None:
    assert Settings().networks == ()
    assert Settings().file_hosts == ()


def test_a_parser_that_interpolates_is_read_as_the_file_stands() -> None:
    """koji.read_config_files() gives such a one."""
    parser = configparser.ConfigParser()
    parser.read_string("[download]\nproxy = http://a%40b@proxy:1\n[libvirt]\nx = 1\n")
    settings = settings_from(parser, "indirection.conf", other_sections=["libvirt"])
    assert settings.download.proxy == "http://a%40b@proxy:1"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[cach]\nmax_size = 1G", r"there is no section \[cach\] \(did you mean 'cache'\?\)"),
        ("[DEFAULT]\nx = 1", r"there is no section \[DEFAULT\] \(there are: indirection, cache"),
        ("[cache]\nmax_sice = 1G", r"\[cache\] has no key 'max_sice' \(did you mean 'max_size'"),
        ("[cache]\nmax_size = 1GB", r"\[cache\] max_size: '1GB' is not a size"),
        ("[cache]\nverify = maybe", r"\[cache\] verify: 'maybe' is neither true nor false"),
        ("[indirection]\naccel = xen", r"\[indirection\] accel: 'xen' is no accelerator"),
        ("[indirection]\nwork_dir = tmp", "work_dir: 'tmp' is not an absolute path"),
        ("[indirection]\nmax_results = -1", "max_results: '-1' is not a whole number"),
        ("[indirection]\nmax_cpus = 0", "max_cpus: a guest has one CPU at least"),
        ("[indirection]\nmax_memory = much", "max_memory: 'much' is not a size"),
        ("[indirection]\nmax_timeout = 8d", "max_timeout: '8d' is not between 1 s and 7 d"),
        ("[download]\nretries = 1.5", "retries: '1.5' is not a whole number"),
        ("[download]\nread_timeout = 0", "read_timeout: '0' is not between 1 s and 7 d"),
        ("[download]\nread_timeout = 8d", "not between 1 s and 7 d"),
        ("[download]\nread_timeout = soon", "read_timeout: 'soon' is not a duration"),
        ("[guest]\nproxy = http://me:s3cret@p:1", "proxy: a proxy with a user name or a password"),
        ("[guest]\nproxy = http://s3cret@p:1", "proxy: a proxy with a user name or a password"),
        ("[guest]\nproxy = me:s3cret@p:1", "proxy: a proxy with a user name or a password"),
        ("[download]\nproxy = proxy:3128", "proxy: that is not the URL of a proxy"),
        ("[guest]\nnetworks = user, br 0$", r"\[guest\] networks: '0\$' is no name"),
        ("[guest]\nfile_hosts = http://h/", "file_hosts: 'http://h/' is no name"),
        ("[guest]\nmedia = repo.iso", "media: 'repo.iso' is not an absolute path"),
        ("max_size = 1G", "is not an ini file: .*no section headers"),
        ("[cache]\nverify = 1\nverify = 0", "is not an ini file: .*already exists"),
    ],
)
def test_a_mistake_is_named_with_file_section_and_key(
    tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        load(tmp_path / "indirection.conf", text)
    assert "indirection.conf" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "binary.conf").write_bytes(b"[cache]\n# \xff\xfe\n")
    with pytest.raises(UsageError, match=r"binary\.conf is not UTF-8 text"):
        load_settings([tmp_path / "binary.conf"])
    (tmp_path / "directory.conf").mkdir()
    with pytest.raises(UsageError, match=r"directory\.conf cannot be read"):
        load_settings([tmp_path / "directory.conf"])


def test_root_caches_in_var_and_others_in_their_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_cache_dir() == Path("/var/cache/koji-indirection")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_cache_dir() == Path("/home/someone/.cache/koji-indirection")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_cache_dir() == Path("/elsewhere/koji-indirection")


def test_large_files_go_to_var_tmp_unless_tmpdir_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    assert default_work_dir() == Path("/var/tmp")
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert default_work_dir() == Path("/scratch")
    assert Settings().work_dir == Path("/scratch"), "read when settings are made"
