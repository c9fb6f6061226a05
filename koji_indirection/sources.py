"""A Koji reference (NVR, build, task, latest in a tag) -> one image of it, as the hub describes it.

The hub's records are not trusted: names become paths only after they were checked. It imports
on a plain client; koji is imported where it is used. imagefetch.py gets the file.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import re
import urllib.parse
import xmlrpc.client
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .arches import koji_arch
from .errors import BuilderFault, BuildFailed, UsageError
from .hubcalls import BUILDING, COMPLETE, one_line

log = logging.getLogger(__name__)

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

# Of koji.BUILD_STATES: those of a build that is not COMPLETE.
_BUILD_STATES = {
    BUILDING: ("is still being built", "wait until it is complete"),
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
        if build["state"] != COMPLETE:
            state, hint = _BUILD_STATES.get(build["state"], (f"is in state {build['state']}", ""))
            raise BuildFailed(f"{what}: the build {shown(build['nvr'])} {state}", hint)
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
    what = what if reference.nvr else f"{what} ({shown(build['nvr'])})"
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
            f"{what}: Koji knows {shown(archive['filename'])} but does not keep the file",
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
# Of a task's output.
EXPIRED_HINT = "run the task again; if it made a build, name that build instead"


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
        raise BuildFailed(f"{what}: the task ({shown(task['method'])}) {state}", hint)

    candidates: list[_Candidate] = []
    # A task of several arches leaves its images with its children; one that can fail may have.
    children = ask(session, "getTaskChildren", task_id)
    for one in [task, *sorted(children, key=lambda child: int(child["id"]))]:
        if one["state"] == _CLOSED:
            candidates += _outputs(session, one)
    if not candidates:
        raise BuildFailed(
            f"{what}: the task has no output, or its output was deleted or has expired",
            EXPIRED_HINT,
        )
    # The images of osbuildImage, for one, are in its build alone.
    or_else = "; if the task made a build, name that build"
    chosen = _choose(candidates, arch, glob, role, what, or_else=or_else)
    owner, volume = chosen.record["task_id"], chosen.record["volume"]
    *folders, filename = chosen.name.split("/")
    task_path = _relpath(["tasks", str(owner % 10000), str(owner), *folders], what)
    work = ["work"] if volume == "DEFAULT" else ["vol", volume, "work"]
    relpath = _relpath([*work, *task_path.split("/"), filename], what)

    log.info("%s: the hub computes the checksum of %s", what, shown(chosen.name))
    upload = ask(session, "checkUpload", task_path, filename, verify="sha256", volume=volume)
    if not upload:  # the task's directory keeps links to scratch files that are gone
        raise BuildFailed(
            f"{what}: {shown(chosen.name)} of task {owner} was deleted or has expired", EXPIRED_HINT
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
                f"{what}: nothing matches {option} {shown(glob)}",
                f"there is {_names(disks or candidates)}",
            )
    of_arch = [one for one in wanted if one.arch == arch]
    of_arch = of_arch or [
        one for one in wanted if one.arch and koji_arch(one.arch) == koji_arch(arch)
    ]
    of_arch = of_arch or [one for one in wanted if one.arch is None]
    if not of_arch:
        arches = ", ".join(sorted({shown(str(one.arch))[:40] for one in wanted}))
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


def _is_disk(name: str) -> bool:
    base = name.rpartition("/")[2]
    return bool(_DISK_NAME.search(base)) and not _NO_DISK_NAME.search(base)


def _matches(name: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.rpartition("/")[2], glob)


def _names(candidates: Iterable[_Candidate]) -> str:
    names = [shown(one.name) for one in candidates]
    rest = len(names) - _NAMES_SHOWN_MAX
    return ", ".join(names[:_NAMES_SHOWN_MAX]) + (f" and {rest} more" if rest > 0 else "")


def shown(name: str) -> str:
    """A name for a message: as it is if that is one line of no great length, else its repr()."""
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
        raise BuilderFault(f"the Koji hub is offline: {one_line(error)}", "try later") from error
    except koji.LockError as error:
        raise BuilderFault(
            f"the Koji hub is still writing the file: {one_line(error)}", "try later"
        ) from error
    except koji.GenericError as error:
        kind = _HubRefused if type(error) is koji.GenericError else BuilderFault
        raise kind(f"the Koji hub refused {name}: {one_line(error)}") from error
    except (xmlrpc.client.Error, OSError) as error:  # requests' errors are OSErrors
        raise BuilderFault(
            f"the Koji hub did not answer {name}: {one_line(error)}",
            "check the server's address, or try later",
        ) from error


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
        raise BuildFailed(f"{what}: {shown(source.filename)} is empty", "name another image")
    checksum = source.checksum.lower() if isinstance(source.checksum, str) else ""
    if not length or not re.fullmatch(f"[0-9a-f]{{{length}}}", checksum):
        raise BuilderFault(
            f"{what}: the hub gives {source.checksum!r:.80} as a checksum"
            f" of type {source.checksum_type!r:.20}",
            "tell its administrators",
        )
    return dataclasses.replace(source, size_bytes=size, checksum=checksum)
