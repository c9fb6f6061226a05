"""Fetch what a template's <file type='url'> names: http and https, allowed hosts, bounded.

The address comes from a user and is opened by the builder, from where it may
reach what the user cannot: so hosts are limited by the settings, and each
redirection is held against the same rules.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from .config import Settings
from .errors import BuilderFault, BuildFailed, IndirectionError
from .threadcall import Call, GivenUp
from .units import format_size

log = logging.getLogger(__name__)

_PIECE_BYTES = 1024 * 1024
_HEADERS = {"User-Agent": "koji-indirection"}


def require_allowed(name: str, url: str, settings: Settings) -> None:
    """Raise BuildFailed when the settings do not allow to fetch a file from there.

    name -- of the file in the guest, for messages.
    """
    what = f"file {name!r}"
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower().rstrip(".")
        scheme = parts.scheme.lower()
    except ValueError:  # half an IPv6 address
        host = scheme = ""
    if scheme not in ("http", "https") or not host:
        raise BuildFailed(
            f"{what} is at {_shown(url)}, and only http and https are fetched",
            "give an http or https address",
        )
    if not any(_matches(host, allowed) for allowed in settings.file_hosts):
        allowed_hosts = ", ".join(settings.file_hosts) or "none"
        raise BuildFailed(
            f"{what} is at {host}, from where the settings of this machine allow no files",
            f"its setting file_hosts in [guest] is: {allowed_hosts}",
        )


class Fetcher:
    """Fetches the files of one template; what all of them may take is one limit."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._left_bytes = settings.max_file_bytes

    def fetch(self, name: str, url: str, target: Path) -> None:
        """Write what is at url into a new file, at most what is left of the limit.

        name -- of the file in the guest, for messages.
        Raises BuildFailed where the template is to blame, or the server.
        """
        require_allowed(name, url, self._settings)
        seconds = self._settings.download.total_timeout_seconds
        try:
            # In a thread: a server may send headers, or announce them, for days.
            Call(self._fetch, name, url, target, time.monotonic() + seconds).value(seconds)
        except GivenUp:
            raise self._out_of_time(f"file {name!r}", _shown(url)) from None

    def _fetch(self, name: str, url: str, target: Path, deadline: float) -> None:
        what, shown = f"file {name!r}", _shown(url)
        try:
            with (
                self._opener(name).open(
                    urllib.request.Request(url, headers=_HEADERS),  # noqa: S310 - checked above
                    timeout=self._settings.download.read_timeout_seconds,
                ) as response,
                target.open("xb") as file,
            ):
                size_bytes, sha256 = self._copy(what, shown, response, file, deadline)
        except IndirectionError:
            raise
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"HTTP status {error.code}"
            if 300 <= error.code < 400:
                reason += ", a redirection that is not followed"
            raise _unreachable(what, shown, reason) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.filename == str(target):
                raise
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise _unreachable(what, shown, str(reason)[:200]) from None
        log.info("%s: %d bytes from %s, sha256 %s", what, size_bytes, shown, sha256)

    def _out_of_time(self, what: str, shown: str) -> BuildFailed:
        seconds = self._settings.download.total_timeout_seconds
        reason = f"it takes longer than {seconds:g} s, see total_timeout in [download]"
        return _unreachable(what, shown, reason)

    def _copy(
        self, what: str, shown: str, response: Any, file: IO[bytes], deadline: float
    ) -> tuple[int, str]:
        digest, size_bytes = hashlib.sha256(), 0
        # What has come: read() would wait for a whole piece, from a server that trickles for days.
        while piece := response.read1(_PIECE_BYTES):
            size_bytes += len(piece)
            self._left_bytes -= len(piece)
            if self._left_bytes < 0:
                raise BuildFailed(
                    f"{what} from {shown} is too large: all files that are fetched may have"
                    f" {format_size(self._settings.max_file_bytes)} together",
                    "put large content into the utility image; max_file_size in [guest] of the"
                    " settings is the limit",
                )
            if time.monotonic() > deadline:
                raise self._out_of_time(what, shown)
            digest.update(piece)
            file.write(piece)
        expected = response.headers.get("Content-Length")
        if expected is not None and expected.isdecimal() and int(expected) != size_bytes:
            raise _unreachable(what, shown, f"{size_bytes} of {expected} bytes arrived")
        return size_bytes, digest.hexdigest()

    def _opener(self, name: str) -> urllib.request.OpenerDirector:
        """One that knows http and https only: urllib's own reads file: and ftp: too."""
        download = self._settings.download
        context = ssl.create_default_context()
        if download.ca_bundle is not None:
            try:
                directory = download.ca_bundle.is_dir()
                context.load_verify_locations(
                    **{"capath" if directory else "cafile": str(download.ca_bundle)}
                )
            except (OSError, ssl.SSLError) as error:
                raise BuilderFault(
                    f"{download.ca_bundle} holds no CA certificates: {error}",
                    "correct ca_bundle in [download] of the settings",
                ) from None
        proxies = (
            None if download.proxy is None else dict.fromkeys(("http", "https"), download.proxy)
        )
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(proxies),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=context),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _Redirects(name, self._settings),
        ):
            opener.add_handler(handler)
        return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, name: str, settings: Settings) -> None:
        self._name, self._settings, self._followed = name, settings, 0

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        """As urllib does it, and with nothing left open where it is refused."""
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except (IndirectionError, ValueError):
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """Held against the rules before it is followed."""
        self._followed += 1
        if self._followed > self._settings.download.max_redirects:
            shown = _shown(req.full_url)
            raise _unreachable(f"file {self._name!r}", shown, "too many redirections")
        require_allowed(self._name, newurl, self._settings)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _matches(host: str, allowed: str) -> bool:
    if allowed == "*":
        return True
    return host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed


def _unreachable(what: str, shown: str, reason: str) -> BuildFailed:
    return BuildFailed(
        f"{what} cannot be fetched from {shown}: {reason}", "check the address and the server"
    )


def _shown(url: str) -> str:
    """The address without credentials and query, which may be secret."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "an address that is none"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:200]
