"""The two kinds of failure, and the wording they share.

Every error is one sentence that says what went wrong and where, and a hint
that says what to do about it. Nothing here imports anything of the project.
"""

from __future__ import annotations

import re

# The user information of a URL: all of it where a server takes a bare token for a password. It
# ends at the last @ of the host's part, since a password may have one that nobody has quoted.
_PASSWORD = re.compile(r"(?i)(//[^/?#\s@\"':]*:|\bhttps?://)[^/?#\s\"']+@")


def without_passwords(text: str) -> str:
    """Text for a log, a message or the manifest: of the URLs in it, no password is left."""
    return _PASSWORD.sub(r"\1***@", text)


def on_one_line(text: str) -> str:
    """Text that is one line on a terminal, and steers none, whatever is in it."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)


class IndirectionError(Exception):
    """Base of every error that this project raises on purpose.

    message -- one sentence without a full stop: what, and where.
    hint -- what the reader can do about it; may be empty.
    details -- lines worth seeing above the sentence (the guest's last console lines); may be empty.
    exit_status -- what `koji-indirection` exits with.
    """

    exit_status = 1
    label = "error"

    def __init__(self, message: str, hint: str = "", details: str = "") -> None:
        message = without_passwords(message)
        super().__init__(message)
        self.message = message
        self.hint = without_passwords(hint)
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def one_line(self) -> str:
        """The last line of a build: kind, reason and hint, on one line whatever they contain.

        It is shown on terminals, by Koji too: nothing in it may steer one.
        """
        return on_one_line(f"{self.label}: {self}")


class BuildFailed(IndirectionError):
    """The user's doing: a command failed, a result is missing, a template or image is wrong."""

    exit_status = 1
    label = "build failed"


class UsageError(IndirectionError):
    """The request itself makes no sense: an option's value, a file that is not there."""

    exit_status = 2
    label = "usage error"


class BuilderFault(IndirectionError):
    """Ours: libvirt is away, no space, the guest never reported. Trying again may help."""

    exit_status = 3
    label = "builder fault"
