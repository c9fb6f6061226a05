"""A Koji reference (NVR, build, task, latest in a tag) -> an image file, fetched, verified, cached.

The hub's records and the server's data are not trusted: names become paths only
after they were checked, and a file is used only after size and checksum are right.
This module must never hold an image in memory. It imports on a plain client; koji and
requests are imported where they are used. cache.py keeps what it fetches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import logging
import re
import stat
import time
import urllib.parse
import xmlrpc.client
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from .cache import Cache, cached
from .config import Download
from .errors import BuilderFault, BuildFailed, UsageError, without_passwords
from .units import format_size

log = logging.getLogger(__name__)

_CHUNK_BYTES = 256 * 1024
_MAX_ID = 2**31 - 1  # ids are 32 bits wide in the hub's database; more is an SQL error there

# --- references -------------------------------------------------------------------------------

_NVR = re.compile(r"[^\s/:@-][^\s/:@]*-[^\s/:@-]+-[^\s/:@-]+", re.ASCII)
_LATEST = re.compile(r"latest:([^\s/:@]+)@([^\s/@]+)")
_HOW_TO_REFER = "write an NVR, build:ID, task:ID or latest:PACKAGE@TAG"


@dataclass(frozen=True)
class Reference:
    """What a user names: exactly one of nvr, build_id, task_id, or package and tag is set."""

    text: str
    nvr: str | None = None
    build_id: int | None = None
    task_id: int | None = None
    package: str | None = None
    tag: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read NVR, build:ID, task:ID or latest:PACKAGE@TAG; UsageError for anything else."""
        text = text.strip()
        kind, colon, rest = text.partition(":")
        if len(text) <= 500 and text.isprintable():
            if colon and kind in ("build", "task"):
                if rest.isascii() and rest.isdigit() and 0 < int(rest) <= _MAX_ID:
                    number = int(rest)
                    return (
                        cls(text, build_id=number) if kind == "build" else cls(text, task_id=number)
                    )
            elif match := _LATEST.fullmatch(text):
                return cls(text, package=match.group(1), tag=match.group(2))
            elif _NVR.fullmatch(text):
                return cls(text, nvr=text)
        hint = _HOW_TO_REFER
        if text.isascii() and text.isdigit() and len(text) < 11:
            hint = f"write build:{text} or task:{text}"
        raise UsageError(f"{text[:80]!r} refers to no image in Koji", hint)

    def __str__(self) -> str:
        return self.text


# --- what a reference resolves to -------------------------------------------------------------


class HubSession(Protocol):
    """The calls that are made of a hub; koji.ClientSession answers them, logged in or not."""

    def getBuild(self, buildInfo: int | str, /) -> Any: ...
    def getLatestBuilds(self, tag: str, /, *, package: str, type: str) -> Any: ...
    def listArchives(self, /, *, buildID: int, type: str) -> Any: ...
    def getTaskInfo(self, task_id: int, /) -> Any: ...
    def getTaskChildren(self, task_id: int, /) -> Any: ...
    def listTaskOutput(self, taskID: int, /, *, all_volumes: bool) -> Any: ...
    def checkUpload(self, path: str, name: str, /, *, verify: str, volume: str) -> Any: ...


# The names of koji.CHECKSUM_TYPES and their digests' lengths; archives have all three.
_CHECKSUMS = {0: ("md5", 32), 1: ("sha1", 40), 2: ("sha256", 64)}


@dataclass(frozen=True)
class Source:
    """One disk image in Koji, as its hub describes it.

    nvr, build_id, archive_id -- None for the output of a task; task_id is None for a build's.
    arch -- of the image; of a task's output the one that was asked for.
    checksum, checksum_type -- hex digest, and 0 md5, 1 sha1, 2 sha256, as Koji has them.
    relpath -- below topdir, and unquoted below topurl; has no '..' in it.
    """

    reference: str
    role: str
    nvr: str | None
    build_id: int | None
    archive_id: int | None
    task_id: int | None
    filename: str
    size_bytes: int
    checksum: str
    checksum_type: int
    arch: str
    relpath: str

    def url(self, topurl: str) -> str:
        """Where the file is fetched from."""
        return f"{topurl.rstrip('/')}/{urllib.parse.quote(self.relpath)}"

    def file(self, topdir: Path) -> Path:
        """Where the file is on a machine that has mounted Koji's tree."""
        return topdir / self.relpath

    @property
    def checksum_name(self) -> str:
        """ "md5", "sha1" or "sha256"."""
        return _CHECKSUMS[self.checksum_type][0]

    def __str__(self) -> str:
        return f"{self.filename} of {self.nvr or f'task {self.task_id}'}"


class _Candidate(NamedTuple):
    """A file that may be the one; arch is None where nothing tells it."""

    name: str
    arch: str | None
    record: dict[str, Any]

    def shown(self) -> str:
        return _shown(self.name)


def resolve(
    session: HubSession,
    reference: Reference,
    arch: str,
    *,
    archive_glob: str | None = None,
    role: str,
) -> Source:
    """Find the one disk image that a reference means for an arch.

    archive_glob -- picks the file by name where there are several disks; also takes
    one whose name is not that of a disk.
    role -- "utility image" or "input image": for messages.

    The checksum of a task's output is computed by the hub during this call, which
    takes it some seconds per GB. Raises UsageError when the reference or the glob
    names nothing or too much, BuildFailed when what it names is of no use,
    BuilderFault when the hub does not answer or answers nonsense.
    """
    what = f"{role} {reference}"
    if reference.task_id is not None:
        return _resolve_task(session, reference, arch, archive_glob, role, what)
    build = _find_build(session, reference, what)
    return _resolve_build(session, reference, build, arch, archive_glob, role, what)


# --- builds -----------------------------------------------------------------------------------

# koji.BUILD_STATES
_COMPLETE = 1
_BUILD_STATES = {
    0: ("is still being built", "wait until it is complete"),
    2: ("was deleted", "name another build"),
    3: ("failed", "name a build that is complete"),
    4: ("was canceled", "name a build that is complete"),
}


def _find_build(session: HubSession, reference: Reference, what: str) -> dict[str, Any]:
    if reference.tag is None:
        key = reference.build_id if reference.nvr is None else reference.nvr
        assert key is not None
        build = ask(session, "getBuild", key)
        if not build:
            raise UsageError(f"{what}: there is no such build", _HOW_TO_REFER)
        if build["state"] != _COMPLETE:
            state, hint = _BUILD_STATES.get(build["state"], (f"is in state {build['state']}", ""))
            raise BuildFailed(f"{what}: the build {_shown(build['nvr'])} {state}", hint)
        return dict(build)
    package, tag = reference.package, reference.tag
    assert package is not None
    try:
        # "image": the package may have rpm builds too, and a later one would hide the image.
        builds = ask(session, "getLatestBuilds", tag, package=package, type="image")
    except _HubRefused as refusal:
        raise UsageError(f"{what}: {refusal}", "check the name of the tag") from None
    if not builds:
        raise UsageError(
            f"{what}: no image build of {package} is tagged into {tag} or what it inherits from",
            "check both names; the package may be blocked in the tag",
        )
    return dict(builds[0])  # the first is the latest, and what the hub means by it


def _resolve_build(
    session: HubSession,
    reference: Reference,
    build: dict[str, Any],
    arch: str,
    glob: str | None,
    role: str,
    what: str,
) -> Source:
    what = what if reference.nvr else f"{what} ({_shown(build['nvr'])})"
    archives = ask(session, "listArchives", buildID=build["id"], type="image")
    if not archives:
        raise BuildFailed(
            f"{what}: the build has no image archives", "name an image build, not one of rpms"
        )
    candidates = [
        _Candidate(one["filename"], _known_arch(one.get("arch")) or _arch_in(one["filename"]), one)
        for one in archives
    ]
    chosen = _choose(candidates, arch, glob, role, what)
    archive = chosen.record
    if archive.get("metadata_only"):
        raise BuildFailed(
            f"{what}: Koji knows {_shown(archive['filename'])} but does not keep the file",
            "name a build whose images were imported whole",
        )
    volume = build.get("volume_name")
    parts = [] if volume in (None, "DEFAULT") else ["vol", volume]
    parts += ["packages", build["name"], build["version"], build["release"]]
    return _checked(
        Source(
            reference=reference.text,
            role=role,
            nvr=build["nvr"],
            build_id=build["id"],
            archive_id=archive["id"],
            task_id=None,
            filename=archive["filename"],
            size_bytes=archive["size"],
            checksum=archive.get("checksum", ""),
            checksum_type=archive.get("checksum_type", -1),
            arch=chosen.arch or arch,
            relpath=_relpath([*parts, "images", archive["filename"]], what),
        ),
        what,
    )


# --- tasks ------------------------------------------------------------------------------------

# koji.TASK_STATES
_CLOSED = 2
_TASK_STATES = {
    0: ("is waiting for a builder", "wait until it has ended"),
    1: ("is still running", "wait until it has ended"),
    3: ("was canceled", "name a task that succeeded"),
    4: ("is waiting for a builder", "wait until it has ended"),
    5: ("failed", "name a task that succeeded"),
}
_EXPIRED_HINT = "run the task again; if it made a build, name that build instead"


def _resolve_task(
    session: HubSession,
    reference: Reference,
    arch: str,
    glob: str | None,
    role: str,
    what: str,
) -> Source:
    task_id = reference.task_id
    assert task_id is not None
    task = ask(session, "getTaskInfo", task_id)
    if not task:
        raise UsageError(f"{what}: there is no such task", _HOW_TO_REFER)
    if task["state"] != _CLOSED:
        state, hint = _TASK_STATES.get(task["state"], (f"is in state {task['state']}", ""))
        raise BuildFailed(f"{what}: the task ({_shown(task['method'])}) {state}", hint)

    candidates: list[_Candidate] = []
    # A task of several arches leaves its images with its children; one that can fail may have.
    children = ask(session, "getTaskChildren", task_id)
    for one in [task, *sorted(children, key=lambda child: int(child["id"]))]:
        if one["state"] == _CLOSED:
            candidates += _outputs(session, one)
    if not candidates:
        raise BuildFailed(
            f"{what}: the task has no output, or its output was deleted or has expired",
            _EXPIRED_HINT,
        )
    # The images of osbuildImage, for one, are in its build alone.
    or_else = "; if the task made a build, name that build"
    chosen = _choose(candidates, arch, glob, role, what, or_else=or_else)
    owner, volume = chosen.record["task_id"], chosen.record["volume"]
    *folders, filename = chosen.name.split("/")
    task_path = _relpath(["tasks", str(owner % 10000), str(owner), *folders], what)
    work = ["work"] if volume == "DEFAULT" else ["vol", volume, "work"]
    relpath = _relpath([*work, *task_path.split("/"), filename], what)

    log.info("%s: the hub computes the checksum of %s", what, chosen.shown())
    upload = ask(session, "checkUpload", task_path, filename, verify="sha256", volume=volume)
    if not upload:  # the task's directory keeps links to scratch files that are gone
        raise BuildFailed(
            f"{what}: {chosen.shown()} of task {owner} was deleted or has expired", _EXPIRED_HINT
        )
    return _checked(
        Source(
            reference=reference.text,
            role=role,
            nvr=None,
            build_id=None,
            archive_id=None,
            task_id=owner,
            filename=filename,
            size_bytes=upload["size"],
            checksum=upload.get("hexdigest", ""),
            checksum_type=2,
            arch=arch,
            relpath=relpath,
        ),
        what,
    )


def _outputs(session: HubSession, task: dict[str, Any]) -> list[_Candidate]:
    # Not stat=True: it is an error at the hub as soon as one link dangles.
    output = ask(session, "listTaskOutput", task["id"], all_volumes=True)
    task_arch = _known_arch(task.get("arch"))
    return [
        _Candidate(name, _arch_in(name) or task_arch, {"task_id": task["id"], "volume": volumes[0]})
        for name, volumes in sorted(output.items())
        if not name.rpartition("/")[2].startswith(".") and volumes
    ]


def _known_arch(arch: str | None) -> str | None:
    return None if arch in (None, "", "noarch") else arch


_ARCH_IN_NAME = re.compile(
    r"(?<![a-z0-9])(x86_64|aarch64|ppc64le|ppc64|s390x|riscv64|i[3-6]86|armv7hl|armhfp)"
    r"(?![a-z0-9_])"
)


def _arch_in(name: str) -> str | None:
    """The one arch that a file's name names; it is more to the point than where the task ran."""
    found = set(_ARCH_IN_NAME.findall(name.rpartition("/")[2]))
    return str(found.pop()) if len(found) == 1 else None


# --- choosing among files ---------------------------------------------------------------------

# What imagefile.vet() can use; vmdk, vhd and the like it would refuse after a long download.
_DISK_NAME = re.compile(r"\.(qcow2|raw|img)(\.(xz|gz|zst|zstd))?$", re.IGNORECASE)
# Koji has no type of its own for a .img that is a disk: to it, all are an initramfs.
_NO_DISK_NAME = re.compile(r"(^|[-_.])(initrd|initramfs|efiboot)\b.*\.img$", re.IGNORECASE)
_ISO_NAME = re.compile(r"\.iso(\.(xz|gz|zst|zstd))?$", re.IGNORECASE)
_NAMES_SHOWN_MAX = 10


def _choose(
    candidates: list[_Candidate],
    arch: str,
    glob: str | None,
    role: str,
    what: str,
    *,
    or_else: str = "",
) -> _Candidate:
    """The one that is meant; whichever it is not, the message names what there is.

    or_else -- what else can be done where there is no disk, for the hint.
    """
    utility = role.startswith("utility")
    option, kinds = "--utility-archive", "qcow2, raw or img"
    if not utility:
        option, kinds = "--input-archive", "qcow2, raw, img or iso"
    disks = [one for one in candidates if _is_disk(one.name)]
    if not disks and not utility:
        # All that a livemedia build has. It is a disk to work on, but none to boot and write to.
        disks = [one for one in candidates if _ISO_NAME.search(one.name)]
    if not disks and glob is None:
        raise BuildFailed(
            f"{what}: there is no disk image ({kinds}) among {_names(candidates)}",
            f"{option} picks a file whatever its name is{or_else}",
        )
    wanted = disks
    if glob is not None:
        wanted = [one for one in disks if _matches(one.name, glob)]
        wanted = wanted or [one for one in candidates if _matches(one.name, glob)]
        if not wanted:
            raise UsageError(
                f"{what}: nothing matches {option} {_shown(glob)}",
                f"there is {_names(disks or candidates)}",
            )
    of_arch = [one for one in wanted if one.arch == arch]
    of_arch = of_arch or [one for one in wanted if one.arch and _same_arch(one.arch, arch)]
    of_arch = of_arch or [one for one in wanted if one.arch is None]
    if not of_arch:
        arches = ", ".join(sorted({_plain(str(one.arch)) for one in wanted}))
        raise BuildFailed(
            f"{what}: there is no image for {arch}, only for {arches}",
            "build for one of these arches, or name another image",
        )
    if len(of_arch) > 1:
        raise UsageError(
            f"{what}: there are {len(of_arch)} disk images for {arch}: {_names(of_arch)}",
            f"pick one with {option} GLOB",
        )
    return of_arch[0]


def _same_arch(one: str, other: str) -> bool:
    """As Koji sees it: an image for i386 is one for i686."""
    import koji  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return bool(koji.canonArch(one) == koji.canonArch(other))


def _is_disk(name: str) -> bool:
    base = name.rpartition("/")[2]
    return bool(_DISK_NAME.search(base)) and not _NO_DISK_NAME.search(base)


def _matches(name: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.rpartition("/")[2], glob)


def _names(candidates: Iterable[_Candidate]) -> str:
    names = [one.shown() for one in candidates]
    rest = len(names) - _NAMES_SHOWN_MAX
    return ", ".join(names[:_NAMES_SHOWN_MAX]) + (f" and {rest} more" if rest > 0 else "")


def _plain(text: str) -> str:
    return text[:40] if text.isprintable() else repr(text)[:40]


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) <= 255 else repr(name)[:255]


# --- what the hub says ------------------------------------------------------------------------


class _HubRefused(BuilderFault):
    """The hub answered with koji.GenericError itself, which is how it says "no such thing"."""


def ask(session: HubSession, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the hub; whatever it raises becomes one sentence."""
    try:
        import koji  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise BuilderFault(
            "the Python module koji is not installed", "install python3-koji"
        ) from error
    try:
        return getattr(session, name)(*args, **kwargs)
    except koji.ServerOffline as error:
        raise BuilderFault(f"the Koji hub is offline: {_one_line(error)}", "try later") from error
    except koji.LockError as error:
        raise BuilderFault(
            f"the Koji hub is still writing the file: {_one_line(error)}", "try later"
        ) from error
    except koji.GenericError as error:
        kind = _HubRefused if type(error) is koji.GenericError else BuilderFault
        raise kind(f"the Koji hub refused {name}: {_one_line(error)}") from error
    except (xmlrpc.client.Error, OSError) as error:  # requests' errors are OSErrors
        raise BuilderFault(
            f"the Koji hub did not answer {name}: {_one_line(error)}",
            "check the server's address, or try later",
        ) from error


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())[:300] or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def _relpath(parts: list[str], what: str) -> str:
    """Join names from the hub, each of which must stay in its directory."""
    for part in parts:
        if not isinstance(part, str) or part in ("", ".", "..") or len(part) > 255:
            break
        if "/" in part or not part.isprintable():  # NUL, line breaks, lone surrogates
            break
    else:
        return "/".join(parts)
    raise BuilderFault(
        f"{what}: the hub gives {part!r:.80} as a name, which is none for a file or directory",
        "tell Koji's administrators",
    )


def _checked(source: Source, what: str) -> Source:
    """The record, if its numbers make sense: they decide what is fetched, and its cached name."""
    size = source.size_bytes
    _, length = _CHECKSUMS.get(source.checksum_type, ("", 0))
    # Sizes are i8 in XML-RPC; an old hub sends those above 2 GiB as text.
    if isinstance(size, str) and size.isascii() and size.isdigit():
        size = int(size)
    if not isinstance(size, int) or size < 0:
        raise BuilderFault(
            f"{what}: the hub gives {size!r:.80} as a size", "tell its administrators"
        )
    if size == 0:
        raise BuildFailed(f"{what}: {_shown(source.filename)} is empty", "name another image")
    checksum = source.checksum.lower() if isinstance(source.checksum, str) else ""
    if not length or not re.fullmatch(f"[0-9a-f]{{{length}}}", checksum):
        raise BuilderFault(
            f"{what}: the hub gives {source.checksum!r:.80} as a checksum"
            f" of type {source.checksum_type!r:.20}",
            "tell its administrators",
        )
    return dataclasses.replace(source, size_bytes=size, checksum=checksum)


# --- fetching ---------------------------------------------------------------------------------

Progress = Callable[[int, int], None]


@contextlib.contextmanager
def fetch(
    source: Source,
    *,
    topurl: str | None,
    topdir: Path | None,
    cache: Cache,
    download: Download | None = None,
    progress: Progress = lambda done_bytes, size_bytes: None,
) -> Iterator[Path]:
    """The image's file, for as long as the block lasts; nobody may write to it.

    It is read in place where topdir is mounted and holds the file with the right
    size (its content is the administrator's own and is not checked again), else it
    comes from the cache, into which it is fetched from topurl.

    progress -- called with the bytes that are there and those of the whole image.
    Raises BuildFailed when the output of a task is gone, BuilderFault for the rest:
    the server is away or sends the wrong file, there is no room.
    """
    mounted = _in_place(source, topdir)
    if mounted is not None:
        log.info("%s: reading it in place, %s", source, mounted)
        yield mounted
        return
    if not topurl or urllib.parse.urlsplit(topurl).scheme not in ("http", "https"):
        raise BuilderFault(
            f"{source} cannot be fetched: topurl is {topurl!r}",
            "set topurl in Koji's configuration to an http:// or https:// URL",
        )
    options = download or Download()
    deadline = time.monotonic() + options.total_timeout_seconds

    def fill(file: IO[bytes]) -> None:
        transfer = _Transfer(source, source.url(topurl), file, options, deadline, progress)
        transfer.run()

    with cached(cache, source, fill, options.total_timeout_seconds) as path:
        yield path


def _in_place(source: Source, topdir: Path | None) -> Path | None:
    """The file below topdir; scratch files there are links, which are followed."""
    if topdir is None:
        return None
    path = source.file(topdir)
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size == source.size_bytes:
            path.open("rb").close()
            return path
    except OSError:
        return None
    log.warning("%s: %s is not what the hub describes, not used", source, path)
    return None


class _Cut(Exception):
    """The connection failed; what arrived is good, and the rest may come another time."""


class _WrongData(Exception):
    """What the server has is not what the hub describes."""


_TRY_AGAIN_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19}|\*)", re.ASCII)
_MAX_WAIT_SECONDS = 60.0


class _Transfer:
    """One image on its way into a file: hashed as it comes, resumed after a cut."""

    def __init__(
        self,
        source: Source,
        url: str,
        file: IO[bytes],
        options: Download,
        deadline: float,
        progress: Progress,
    ) -> None:
        try:
            import requests  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError as error:
            raise BuilderFault(
                "the Python module requests is not installed", "install python3-requests"
            ) from error
        self.source = source
        self.url = url
        self.file = file
        self.options = options
        self.deadline = deadline
        self.progress = progress
        self.http = requests.Session()
        self.fresh = False
        self.report = _ProgressLog(source)
        self._restart()

    def run(self) -> None:
        log.info(
            "%s: fetching %s from %s",
            self.source,
            format_size(self.source.size_bytes),
            without_passwords(self.url),  # kojid's own log has this too
        )
        with self.http:
            try:
                self._receive_verified()
                return
            except _WrongData as error:
                log.warning("%s: %s; fetching it once more", self.source, error)
            self.fresh = True  # a proxy may have kept something old
            self._restart()
            try:
                self._receive_verified()
            except _WrongData as error:
                raise BuilderFault(
                    f"{self.source}, fetched twice from {self.url}, is not what the hub describes:"
                    f" {error}",
                    "the file in Koji, or a proxy on the way to it, is damaged",
                ) from None

    def _restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.received = 0
        self.digest = hashlib.new(self.source.checksum_name, usedforsecurity=False)

    def _receive_verified(self) -> None:
        self._receive()
        digest = self.digest.hexdigest()
        if digest != self.source.checksum:
            raise _WrongData(f"its {self.source.checksum_name} is {digest}")

    def _receive(self) -> None:
        """All bytes, in as many requests as it takes while each of a few brings something new."""
        most = failures = 0
        while self.received < self.source.size_bytes:
            try:
                self._request()
            except _Cut as cut:
                failures = 0 if self.received > most else failures + 1
                most = max(most, self.received)
                if failures > self.options.retries:
                    raise BuilderFault(
                        f"{self.source} cannot be fetched from {self.url}: {cut}",
                        "see whether the server is well, and can be reached from here",
                    ) from None
                log.info(
                    "%s: %s after %s; trying again", self.source, cut, format_size(self.received)
                )
                wait = self.options.retry_wait_seconds * 2**failures
                time.sleep(min(wait, _MAX_WAIT_SECONDS))
            self._check_deadline()

    def _check_deadline(self) -> None:
        if time.monotonic() > self.deadline and self.received < self.source.size_bytes:
            raise BuilderFault(
                f"{self.source} could not be fetched within"
                f" {self.options.total_timeout_seconds:g} s: {format_size(self.received)} of"
                f" {format_size(self.source.size_bytes)} arrived",
                "raise total_timeout in the configuration's [download], or use a nearer server",
            )

    def _request(self) -> None:
        """Ask for what is missing, and take what comes. Raises _Cut when that is not all."""
        headers = {"Accept-Encoding": "identity"}
        if self.received:
            headers["Range"] = f"bytes={self.received}-"
        if self.fresh:
            headers["Cache-Control"] = "no-cache"
        with contextlib.closing(self._open(headers)) as response:
            self._check_status(response)
            self._read(response)

    def _open(self, headers: dict[str, str]) -> Any:
        """GET, and follow redirects: by hand, since requests reads their bodies without a limit."""
        import requests
        import urllib3  # type: ignore[import-not-found,unused-ignore]

        url, options = self.url, self.options
        for _ in range(options.max_redirects + 1):
            try:
                response = self.http.get(
                    url,
                    headers=headers,
                    stream=True,
                    allow_redirects=False,
                    timeout=(options.connect_timeout_seconds, options.read_timeout_seconds),
                    # True, not None: requests then looks at REQUESTS_CA_BUNDLE.
                    verify=str(options.ca_bundle) if options.ca_bundle else True,
                    proxies=dict.fromkeys(("http", "https"), options.proxy)
                    if options.proxy
                    else None,
                )
            except requests.exceptions.SSLError as error:
                raise BuilderFault(
                    f"{self.source}: the server of {_shown(url)} is not trusted:"
                    f" {_one_line(error)}",
                    "name its CA with ca_bundle in the configuration's [download]",
                ) from error
            except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
                raise _Cut(_one_line(error)) from error
            # An URL that is none, a CA file that is not there.
            except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
                raise BuilderFault(
                    f"{self.source} cannot be fetched from {_shown(url)}: {_one_line(error)}",
                    "check topurl in Koji's configuration, and ca_bundle in ours",
                ) from error
            target = self.http.get_redirect_target(response)
            if target is None:
                return response
            response.close()
            url = _redirected(url, target)
        raise BuilderFault(
            f"{self.source}: {self.url} redirects more than {options.max_redirects} times",
            "check topurl, or raise max_redirects in the configuration's [download]",
        )

    def _check_status(self, response: Any) -> None:
        status = response.status_code
        if status == 200:
            if self.received:
                log.info("%s: the server cannot resume, starting over", self.source)
                self._restart()
            length = response.headers.get("content-length", "")
            if length.isascii() and length.isdigit() and int(length) != self.source.size_bytes:
                raise _WrongData(
                    f"it has {length:.20} bytes on the server, not {self.source.size_bytes}"
                )
        elif status == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            if not match or int(match.group(1)) != self.received:
                raise _WrongData("the server sends another part of it than was asked for")
            if match.group(2) not in ("*", str(self.source.size_bytes)):
                raise _WrongData(
                    f"it has {match.group(2)} bytes on the server, not {self.source.size_bytes}"
                )
        elif status == 416:
            raise _WrongData(f"it has not even {self.received} bytes on the server")
        elif status in _TRY_AGAIN_STATUSES:
            raise _Cut(f"the server answers {_status(response)}")
        elif status in (404, 410) and self.source.task_id is not None:
            raise BuildFailed(f"{self.source} was deleted or has expired", _EXPIRED_HINT)
        else:
            raise BuilderFault(
                f"{self.source} cannot be fetched: the server answers {_status(response)}"
                f" to {_shown(response.url)}",
                "check topurl in Koji's configuration, and the server",
            )

    def _read(self, response: Any) -> None:
        import urllib3  # type: ignore[import-not-found,unused-ignore]

        size = self.source.size_bytes
        while self.received < size:
            self._check_deadline()
            try:
                # Not decoded: a server may say "Content-Encoding: gzip" of a file that is .gz.
                chunk = response.raw.read(
                    min(_CHUNK_BYTES, size - self.received), decode_content=False
                )
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise _Cut(_one_line(error)) from error
            if not chunk:
                raise _Cut("the connection ended")
            self.file.write(chunk)
            self.digest.update(chunk)
            self.received += len(chunk)
            self.progress(self.received, size)
            self.report.update(self.received)


def _status(response: Any) -> str:
    return f"{response.status_code} {_plain(response.reason or '')}".rstrip()


def _redirected(url: str, target: str) -> str:
    """Where a redirect leads. Raises BuilderFault when that is not HTTP."""
    with contextlib.suppress(ValueError):
        joined = urllib.parse.urljoin(url, target)
        if urllib.parse.urlsplit(joined).scheme in ("http", "https"):
            return joined
    raise BuilderFault(
        f"{_shown(url)} redirects to {target!r:.200}, which is no HTTP address",
        "check topurl in Koji's configuration",
    )


class _ProgressLog:
    """A log line every 10 s or 10 %, whichever comes first, but not more than one a second."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.started = self.said = time.monotonic()
        self.said_bytes = 0

    def update(self, received: int) -> None:
        now, size = time.monotonic(), self.source.size_bytes
        much = abs(received - self.said_bytes) * 10 >= size
        if received < size and now - self.said < (1 if much else 10):
            return
        rate = received / max(now - self.started, 0.001)
        log.info(
            "%s: %d %% of %s, %s/s",
            self.source,
            received * 100 // size,
            format_size(size),
            format_size(int(rate)),
        )
        self.said, self.said_bytes = now, received
