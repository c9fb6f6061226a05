"""Addresses of package repositories, checked alike in the template and in the build spec.

Only the text is looked at: nothing here resolves a name or fetches anything.
"""

from __future__ import annotations

import re

MAX_ADDRESS_LENGTH = 2000

_ADDRESS = re.compile(r"(?i)https?://([^/?#\s]+)([/?#]\S*)?")
# Debian's SUITE and COMPONENTs may follow: "http://host/debian bookworm main".
_WORD = re.compile(r"[A-Za-z0-9.$][A-Za-z0-9.$_/+~-]*")
_HOST = re.compile(r"([a-z0-9_.$-]+|\[[0-9a-f:.]+\])(:[0-9]*)?")
_OWN_HOST = re.compile(r"(localhost(\.localdomain)?|127\.[0-9.]+|\[::1\])(:[0-9]*)?")


def repository_problem(address: str) -> tuple[str, str] | None:
    """What is wrong with a repository's address, as (rest of a sentence, hint); None if nothing.

    The sentence goes on after "repository 'x'" or "repos".
    """
    quoted = repr(address if len(address) <= 60 else f"{address[:60]}...")
    hint = "write http://host/path or https://host/path, for apt followed by SUITE and COMPONENTs"
    if len(address) > MAX_ADDRESS_LENGTH:
        return f"has an address of {len(address)} characters", "give a shorter one"
    # A line break would let one value become two lines of a repository file in the guest;
    # brackets, quotes and backslashes mean something there.
    url, *words = address.split(" ")
    match = _ADDRESS.fullmatch(url)
    unsafe = not address.isprintable() or not address.isascii() or set(address) & set("\"'\\<>`")
    if not match or unsafe or not all(_WORD.fullmatch(word) for word in words):
        return f"has {quoted} for a URL", hint
    host = match.group(1).rpartition("@")[2].lower()
    if not _HOST.fullmatch(host):
        return f"has {quoted} for a URL", hint
    if _OWN_HOST.fullmatch(host):
        return (
            f"is at {host[:60]!r}, which in the guest is the guest itself",
            "give a host that the guest can reach",
        )
    return None


def has_credentials(address: str) -> bool:
    """Whether a user name or a password is in the address."""
    return "@" in re.split("[/?#]", address.partition("://")[2], maxsplit=1)[0]


def has_secret(address: str) -> bool:
    """The same, but a plain user name is none where it is no token: over SSH, not over HTTP."""
    scheme, _, rest = address.partition("://")
    user, at, _ = re.split("[/?#]", rest, maxsplit=1)[0].rpartition("@")
    return bool(at) and (":" in user or scheme.endswith(("http", "https")))
