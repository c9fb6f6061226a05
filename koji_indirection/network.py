"""What a guest's network may be, and the proxy that is handed to it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit, urlunsplit

from .config import Settings
from .errors import UsageError
from .spec import NO_NETWORK, USER_NETWORK

log = logging.getLogger(__name__)

# This machine, as a guest with a user-mode network sees it.
HOST_ADDRESS = "10.0.2.2"

_PROXIES = ("http_proxy", "https_proxy", "ftp_proxy")
_OWN_HOST = re.compile(r"localhost(\.localdomain)?|127\.[0-9.]+|::1")


def require_allowed(network: str | None, settings: Settings) -> None:
    """Raise UsageError when a build asks for a network that this machine's settings do not allow.

    A guest with a network reaches what the machine reaches; so its administrator says.
    """
    if network is None or network in settings.networks:
        return
    allowed = ", ".join(settings.networks) or NO_NETWORK
    raise UsageError(
        f"the build asks for network {network!r}, which the settings of this machine do not allow",
        f"its setting networks in [guest] is: {allowed}",
    )


def proxy_environment(
    network: str | None, settings: Settings, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The proxy variables of a guest with a network, in small and in capital letters.

    No user name and no password is among them: every command in the guest could read it.
    """
    if network is None:
        return {}
    found: dict[str, str] = {}
    for name in _PROXIES:
        value = settings.guest_proxy or environ.get(name) or environ.get(name.upper(), "")
        reachable = _from_guest(name, value, network) if value else None
        if reachable:
            found[name] = reachable
    if not found:
        return {}
    bypass = settings.guest_no_proxy or environ.get("no_proxy") or environ.get("NO_PROXY", "")
    own = ["localhost", "127.0.0.1", *([HOST_ADDRESS] if network == USER_NETWORK else [])]
    hosts = [host for host in re.split(r"[\s,]+", bypass) if host and "@" not in host]
    found["no_proxy"] = ",".join(dict.fromkeys([*hosts, *own]))
    log.info("the guest gets the proxy settings of this machine: %s", ", ".join(found))
    return {**found, **{name.upper(): value for name, value in found.items()}}


def _from_guest(name: str, proxy: str, network: str) -> str | None:
    """The proxy's URL as a guest can use it; None when there is none."""
    if "@" in proxy:
        log.warning(
            "%s of this machine has a user name or a password in it: the guest does not get it"
            " (proxy in [guest] of the configuration names one for guests)",
            name,
        )
        return None
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        host, port = parts.hostname or "", parts.port
    except ValueError:  # a port that is no number, half an IPv6 address
        host = ""
    if not host or not proxy.isprintable():
        log.warning("%s of this machine is no URL: the guest does not get it", name)
        return None
    if not _OWN_HOST.fullmatch(host):
        return proxy
    if network != USER_NETWORK:
        log.warning("this machine's proxy listens on loopback, where the guest cannot reach it")
        return None
    return urlunsplit(parts._replace(netloc=HOST_ADDRESS + (f":{port}" if port else "")))
