"""Settings of the machine that builds: where things go, and the limits it sets.

What a user asks of one build is in spec.py; what the machine grants is here.
Settings may come from an ini file; a key that nobody knows is refused, since a
limit that is silently not set is worse than none.
"""

from __future__ import annotations

import configparser
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .units import (
    DAY_SECONDS,
    GIB,
    HOUR_SECONDS,
    MIB,
    format_duration,
    format_exact_size,
    parse_duration,
    parse_size,
)

if TYPE_CHECKING:
    from .spec import BuildSpec


def default_cache_dir() -> Path:
    """/var/cache for root, the XDG cache directory for everybody else."""
    if os.geteuid() == 0:
        return Path("/var/cache/koji-indirection")
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "koji-indirection"


def default_work_dir() -> Path:
    """$TMPDIR, or /var/tmp, which is meant for files that are too large for /tmp."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108 - mkdtemp below it


@dataclass(frozen=True)
class Download:
    """How images are fetched over HTTP.

    connect_timeout_seconds, read_timeout_seconds -- until a connection is made, and
    between any two pieces of data.
    total_timeout_seconds -- for one image, retries and waiting for others included.
    retries -- cuts in a row that bring nothing new before it is given up.
    retry_wait_seconds -- before the first retry; doubles each time.
    max_redirects -- for each request.
    checkout_timeout_seconds -- for the checkout of a template by a builder of Koji.
    ca_bundle -- file or directory of CA certificates; None: REQUESTS_CA_BUNDLE,
    CURL_CA_BUNDLE or those that the requests module comes with.
    proxy -- URL of a proxy; None: what http_proxy, https_proxy and no_proxy say.
    """

    connect_timeout_seconds: float = 30
    read_timeout_seconds: float = 60
    total_timeout_seconds: float = 6 * HOUR_SECONDS
    retries: int = 5
    retry_wait_seconds: float = 2
    max_redirects: int = 5
    checkout_timeout_seconds: float = 600
    ca_bundle: Path | None = None
    proxy: str | None = None


@dataclass(frozen=True)
class Settings:
    """One machine's settings, each with a default that works.

    connect -- libvirt URI; None finds one that works.
    accel -- "auto", "kvm" or "tcg".
    work_dir -- has room for the overlay, the workspace and unpacked images.
    cache_dir -- verdicts, capabilities and fetched images, which outlive a build.
    max_image_bytes -- virtual size above which an image is refused.
    max_results, max_result_bytes -- number of results, bytes of all together.
    max_log_bytes -- of each log; of a longer one head and tail are kept.
    max_memory_bytes, max_cpus -- of the guest.
    max_workspace_bytes -- size of the workspace disk.
    max_timeout_seconds -- of the job, and so of each command.
    max_boot_timeout_seconds, max_shutdown_timeout_seconds -- of these two.
    max_disk_bytes -- what the guest's disks may take on the host, all together.
    max_silence_seconds -- how long a guest may say nothing at all during its job.
    max_collect_seconds -- for all that is read from the guest's disks at the end.
    max_cache_bytes -- of all fetched images together.
    cache_keep_free_bytes -- what fetched images leave free on their file system.
    cache_verify -- read a fetched image again, and compare its checksum, at each use.
    download -- how images are fetched.
    networks -- what a spec's network may be: "user" and names of libvirt networks.
    guest_proxy, guest_no_proxy -- what a guest with a network has for http_proxy and
    no_proxy; None: what this process has, unless a user name or a password is in it.
    file_hosts -- hosts from which a template's files of type url are fetched: names,
    "*.example.com", or "*" for any.
    max_file_bytes -- of all such files of one template together.
    media -- directory or ISO with packages that every guest gets as a read-only disk.
    hub_timeout_seconds, hub_import_timeout_seconds -- until a Koji hub that is silent counts as
    one that is away; the second while it reads or imports whole images.
    """

    connect: str | None = None
    accel: str = "auto"
    work_dir: Path = field(default_factory=default_work_dir)
    cache_dir: Path = field(default_factory=default_cache_dir)
    max_image_bytes: int = 1024 * GIB
    max_results: int = 50
    max_result_bytes: int = 20 * GIB
    max_log_bytes: int = 64 * MIB
    max_memory_bytes: int = 64 * GIB
    max_cpus: int = 64
    max_workspace_bytes: int = 1024 * GIB
    max_timeout_seconds: int = DAY_SECONDS
    max_boot_timeout_seconds: int = 2 * HOUR_SECONDS
    max_shutdown_timeout_seconds: int = HOUR_SECONDS
    max_disk_bytes: int = 100 * GIB
    max_silence_seconds: int = 600
    max_collect_seconds: int = 2 * HOUR_SECONDS
    max_cache_bytes: int = 50 * GIB
    cache_keep_free_bytes: int = 2 * GIB
    cache_verify: bool = False
    download: Download = field(default_factory=Download)
    networks: tuple[str, ...] = ()
    guest_proxy: str | None = None
    guest_no_proxy: str | None = None
    file_hosts: tuple[str, ...] = ()
    max_file_bytes: int = 256 * MIB
    media: Path | None = None
    hub_timeout_seconds: int = 300
    hub_import_timeout_seconds: int = 4 * HOUR_SECONDS


def load_settings(
    paths: Iterable[Path],
    *,
    other_sections: Collection[str] = (),
    defaults: Settings | None = None,
) -> Settings:
    """Settings from ini files; later ones win, and one that does not exist is no error.

    defaults -- what holds where no file says anything.
    Raises UsageError naming file, section and key.
    """
    parser = configparser.RawConfigParser()
    read = []
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:  # parser.read() passes over what it cannot
                parser.read_file(file)
            read.append(str(path))
        except FileNotFoundError:
            continue
        except configparser.Error as error:
            raise UsageError(
                f"{path} is not an ini file: {' '.join(str(error).split())}",
                "write sections in brackets and KEY = VALUE lines below them",
            ) from None
        except UnicodeDecodeError:
            raise UsageError(f"{path} is not UTF-8 text", "save it as UTF-8") from None
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}", "check the path") from None
    return settings_from(parser, ", ".join(read), other_sections=other_sections, defaults=defaults)


def settings_from(
    parser: configparser.RawConfigParser,
    where: str,
    *,
    other_sections: Collection[str] = (),
    defaults: Settings | None = None,
) -> Settings:
    """Settings from what was read already, by koji.read_config_files() for one.

    where -- the file's name, for messages.
    other_sections -- sections of the same file that somebody else reads.
    Raises UsageError naming file, section and key.
    """
    for section in parser.sections():
        if section not in _SECTIONS and section not in other_sections:
            known = [*_SECTIONS, *other_sections]
            raise UsageError(
                f"{where}: there is no section [{section}]", _suggestion(section, known)
            )
    if parser.defaults():
        raise UsageError(
            f"{where}: there is no section [{parser.default_section}]",
            _suggestion("", list(_SECTIONS)),
        )
    values = {section: _section(parser, section, where) for section in _SECTIONS}
    defaults = defaults or Settings()
    return dataclasses.replace(
        defaults,
        **values["indirection"],
        **values["cache"],
        **values["guest"],
        **values["hub"],
        download=dataclasses.replace(defaults.download, **values["download"]),
    )


# --- limits -----------------------------------------------------------------------------------

# Field of a spec, field of Settings that limits it, key in [indirection].
_LIMITS = (
    ("memory_bytes", "max_memory_bytes", "max_memory"),
    ("cpus", "max_cpus", "max_cpus"),
    ("workspace_size_bytes", "max_workspace_bytes", "max_workspace_size"),
    ("job_timeout_seconds", "max_timeout_seconds", "max_timeout"),
    ("command_timeout_seconds", "max_timeout_seconds", "max_timeout"),
    ("boot_timeout_seconds", "max_boot_timeout_seconds", "max_boot_timeout"),
    ("shutdown_timeout_seconds", "max_shutdown_timeout_seconds", "max_shutdown_timeout"),
)


def require_within_limits(spec: BuildSpec, settings: Settings) -> None:
    """Raise UsageError when a spec asks for more than this machine's settings grant.

    Refused, not cut down to the limit: a build with less than it asked for fails late, and
    nobody can tell from the spec why.
    """
    for name, limit_name, key in _LIMITS:
        asked, limit = getattr(spec, name), getattr(settings, limit_name)
        if asked is not None and asked > limit:
            what = name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")
            raise UsageError(
                f"{what} is {_shown(name, asked)}, above this machine's limit of"
                f" {_shown(name, limit)} ({key})",
                f"ask for less, or have an administrator raise {key} in the configuration's"
                " [indirection]",
            )


def _shown(name: str, value: int) -> str:
    """Exact: a value just above its limit must not look like it."""
    if name.endswith("_bytes"):
        return format_exact_size(value)
    return format_duration(value) if name.endswith("_seconds") else str(value)


# --- sections and keys ------------------------------------------------------------------------


def _whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise UsageError(f"{text[:80]!r} is not a whole number", "write digits only")
    return int(text)


def _cpus(text: str) -> int:
    number = _whole_number(text)
    if number < 1:
        raise UsageError("a guest has one CPU at least", "write 1 or more")
    return number


def yes_or_no(text: str) -> bool:
    """What ini files mean by yes, true, on and 1, and by their opposites; UsageError else."""
    try:
        return configparser.RawConfigParser.BOOLEAN_STATES[text.lower()]
    except KeyError:
        raise UsageError(
            f"{text[:80]!r} is neither true nor false", "write true or false"
        ) from None


def _seconds(text: str) -> int:
    seconds = parse_duration(text)
    if not 1 <= seconds <= 7 * DAY_SECONDS:
        raise UsageError(f"{text!r} is not between 1 s and 7 d", "choose a duration in between")
    return seconds


def _absolute_path(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_absolute():
        raise UsageError(f"{text[:80]!r} is not an absolute path", "begin it with a slash")
    return path


def _accel(text: str) -> str:
    if text not in ("auto", "kvm", "tcg"):
        raise UsageError(f"{text[:80]!r} is no accelerator", "write auto, kvm or tcg")
    return text


def _network_names(text: str) -> tuple[str, ...]:
    return _names(text, r"[A-Za-z0-9][A-Za-z0-9._-]*", "user, or the names of libvirt networks")


def _host_names(text: str) -> tuple[str, ...]:
    host = r"\*|(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?"
    return tuple(name.lower() for name in _names(text, host, "hosts, *.example.com, or *"))


def _names(text: str, pattern: str, wanted: str) -> tuple[str, ...]:
    """Names apart by commas or blanks."""
    names = tuple(dict.fromkeys(re.split(r"[\s,]+", text.strip(" \t\n,"))))
    for name in names:
        if not re.fullmatch(pattern, name):
            raise UsageError(f"{name[:80]!r} is no name", f"write {wanted}, with commas between")
    return names


def _proxy(text: str) -> str:
    if not text.startswith(("http://", "https://", "socks5://", "socks5h://")):
        raise UsageError("that is not the URL of a proxy", "write it as http://HOST:PORT")
    return text


def _guest_proxy(text: str) -> str:
    if "@" in text:
        raise UsageError(
            "a proxy with a user name or a password would give them to every command in a guest",
            "name a proxy that asks for none, such as one on this machine that adds them",
        )
    return _proxy(text)


_Key = tuple[str, Callable[[str], Any]]

# Section, key in the file -> field, and how its text is read. Units are part of the value.
_SECTIONS: Mapping[str, Mapping[str, _Key]] = {
    "indirection": {
        "connect": ("connect", str),
        "accel": ("accel", _accel),
        "work_dir": ("work_dir", _absolute_path),
        "cache_dir": ("cache_dir", _absolute_path),
        "max_image_size": ("max_image_bytes", parse_size),
        "max_results": ("max_results", _whole_number),
        "max_result_size": ("max_result_bytes", parse_size),
        "max_log_size": ("max_log_bytes", parse_size),
        "max_memory": ("max_memory_bytes", parse_size),
        "max_cpus": ("max_cpus", _cpus),
        "max_workspace_size": ("max_workspace_bytes", parse_size),
        "max_timeout": ("max_timeout_seconds", _seconds),
        "max_boot_timeout": ("max_boot_timeout_seconds", _seconds),
        "max_shutdown_timeout": ("max_shutdown_timeout_seconds", _seconds),
        "max_disk_size": ("max_disk_bytes", parse_size),
        "max_silence": ("max_silence_seconds", _seconds),
        "max_collect_time": ("max_collect_seconds", _seconds),
    },
    "cache": {
        "max_size": ("max_cache_bytes", parse_size),
        "keep_free": ("cache_keep_free_bytes", parse_size),
        "verify": ("cache_verify", yes_or_no),
    },
    "download": {
        "connect_timeout": ("connect_timeout_seconds", _seconds),
        "read_timeout": ("read_timeout_seconds", _seconds),
        "total_timeout": ("total_timeout_seconds", _seconds),
        "retries": ("retries", _whole_number),
        "retry_wait": ("retry_wait_seconds", _seconds),
        "max_redirects": ("max_redirects", _whole_number),
        "checkout_timeout": ("checkout_timeout_seconds", _seconds),
        "ca_bundle": ("ca_bundle", _absolute_path),
        "proxy": ("proxy", _proxy),
    },
    "guest": {
        "networks": ("networks", _network_names),
        "proxy": ("guest_proxy", _guest_proxy),
        "no_proxy": ("guest_no_proxy", str),
        "file_hosts": ("file_hosts", _host_names),
        "max_file_size": ("max_file_bytes", parse_size),
        "media": ("media", _absolute_path),
    },
    "hub": {
        "timeout": ("hub_timeout_seconds", _seconds),
        "import_timeout": ("hub_import_timeout_seconds", _seconds),
    },
}


def _section(parser: configparser.RawConfigParser, section: str, where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if not parser.has_section(section):
        return values
    keys = _SECTIONS[section]
    for key in parser.options(section):
        if key not in keys:
            raise UsageError(
                f"{where}: [{section}] has no key {key!r}", _suggestion(key, list(keys))
            )
        # raw: koji's parser interpolates, and a proxy's URL may have %40 in it.
        text = (parser.get(section, key, raw=True) or "").strip()
        if not text:
            continue  # "key =" is how a sample file shows a default
        name, read = keys[key]
        try:
            values[name] = read(text)
        except UsageError as error:
            raise UsageError(f"{where}: [{section}] {key}: {error.message}", error.hint) from None
    return values


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
