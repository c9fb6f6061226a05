"""Which network a guest may have, and which proxy."""

from __future__ import annotations

import logging

import pytest

from koji_indirection import network
from koji_indirection.config import Settings
from koji_indirection.errors import UsageError


def proxies(
    of_this_machine: dict[str, str], name: str | None = "user", **settings: str
) -> dict[str, str]:
    return network.proxy_environment(name, Settings(**settings), of_this_machine)  # type: ignore[arg-type]


def test_a_network_is_allowed_by_name() -> None:
    settings = Settings(networks=("user", "build-net"))
    for name in (None, "user", "build-net"):
        network.require_allowed(name, settings)
    with pytest.raises(UsageError, match=r"network 'default'.*networks in \[guest\] is: user, b"):
        network.require_allowed("default", settings)
    with pytest.raises(UsageError, match=r"networks in \[guest\] is: none"):
        network.require_allowed("user", Settings())


def test_a_guest_without_a_network_gets_no_proxy() -> None:
    assert proxies({"http_proxy": "http://p:1"}, name=None) == {}


def test_a_guest_gets_this_machines_proxy_in_both_spellings() -> None:
    found = proxies({"http_proxy": "http://p:1", "HTTPS_PROXY": "http://q:2", "no_proxy": ".lan"})
    assert found == {
        "http_proxy": "http://p:1",
        "HTTP_PROXY": "http://p:1",
        "https_proxy": "http://q:2",
        "HTTPS_PROXY": "http://q:2",
        "no_proxy": ".lan,localhost,127.0.0.1,10.0.2.2",
        "NO_PROXY": ".lan,localhost,127.0.0.1,10.0.2.2",
    }
    assert proxies({}) == proxies({"no_proxy": "x"}) == {}


def test_the_settings_come_before_the_environment() -> None:
    found = proxies({"http_proxy": "http://p:1"}, guest_proxy="http://s:3", guest_no_proxy="h")
    assert found["http_proxy"] == found["https_proxy"] == "http://s:3"
    assert found["no_proxy"].startswith("h,")


def test_a_proxy_on_loopback_is_reached_by_the_hosts_address() -> None:
    found = proxies({"http_proxy": "http://localhost:3128/", "https_proxy": "127.0.0.1:8"})
    assert found["http_proxy"] == "http://10.0.2.2:3128/"
    assert found["https_proxy"] == "http://10.0.2.2:8"
    assert proxies({"http_proxy": "http://[::1]:3128"}, name="default") == {}


@pytest.mark.parametrize("odd", ["http://", "http://p:port", "http://p\n:1"])
def test_a_proxy_that_is_no_url_is_left_out(odd: str) -> None:
    assert proxies({"http_proxy": odd}) == {}


@pytest.mark.parametrize(
    "proxy",
    [
        "http://me:secret@p:1",
        "http://secret@p:1",
        "me:secret@p:1",
        "http://me:se/secret@p:1",
        "http://:secret@[x",
        "socks5h://me:secret@localhost:1",
    ],
)
def test_a_guest_gets_no_proxy_with_a_user_or_a_password_and_no_log_has_it(
    proxy: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    found = proxies({"http_proxy": proxy, "https_proxy": "http://q:2", "no_proxy": "u:secret@h,i"})
    assert "http_proxy" not in found
    assert found["https_proxy"] == "http://q:2"
    assert found["no_proxy"].startswith("i,")
    assert "secret" not in str(found) + caplog.text
    assert "http_proxy of this machine has a user name or a password in it" in caplog.text
    assert proxies({}, guest_proxy=proxy) == {}
