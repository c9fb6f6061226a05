"""What a Koji builder does around pipeline.build(): inputs, names, live logs, what the hub gets.

The plugin lends it the daemon's means (Daemon); nothing here imports the daemon. It must
never leave a VM behind when a task is cancelled, or let an upload delay the guest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, NoReturn

from . import (
    accel,
    cache,
    hubcalls,
    imagefetch,
    jobdir,
    output,
    pipeline,
    programs,
    sources,
    sweep,
    template,
)
from .address import has_credentials
from .config import Settings, load_settings, require_within_limits
from .errors import BuilderFault, BuildFailed, IndirectionError, UsageError
from .manifest import FILE_NAME as MANIFEST
from .manifest import KojiRecord, Manifest, Origin
from .spec import BuildSpec
from .taskspec import TaskSpec
from .template import Template
from .units import GIB, format_size

log = logging.getLogger(__name__)

# koji.BUILD_STATES
BUILDING = 0
COMPLETE = 1
_OPEN = 1  # of koji.TASK_STATES

TASK_LOG = "task.log"
TEMPLATE_LOG = "template.log"
SCREENSHOT = "screenshot.png"
HANDOVER = "handover.json"


@dataclass(frozen=True)
class Daemon:
    """What the plugin lends us of the builder's daemon and of one task.

    session -- a koji.ClientSession; used by one thread at a time.
    topdir -- where Koji's tree is mounted, if it is.
    work_dir -- the task's own directory, removed by the daemon after the task.
    checkout -- check out an SCM URL below a directory; returns where the files are, and
        the URL with the commit's id.
    upload -- put a file into the task's directory at the hub, under a name.
    append -- upload what a log has grown by since the file's position.
    """

    session: Any
    task_id: int
    topurl: str | None
    topdir: Path | None
    work_dir: Path
    checkout: Callable[[str, Path], tuple[Path, str]]
    upload: Callable[[Path, str], None]
    append: Callable[[IO[bytes], str], None]


# --- the host ---------------------------------------------------------------------------------


class Unsuitable(Exception):
    """This host cannot do the task now, another one may: one sentence."""


def task_settings(config: Path, spec: TaskSpec, work_dir: Path) -> Settings:
    """The builder's settings for one task, which works in its own directory unless told otherwise.

    Raises BuilderFault when the file is wrong: no user can mend it.
    """
    try:
        settings = load_settings([config], defaults=Settings(work_dir=work_dir))
    except UsageError as error:
        raise BuilderFault(error.message, error.hint) from error
    if settings.accel == "auto":
        settings = dataclasses.replace(settings, accel=spec.accel)
    return settings


def require_host(spec: TaskSpec, arch: str, settings: Settings) -> None:
    """Raise Unsuitable without the accelerator, the network or the free memory that a build needs.

    Raises UsageError above the host's limits: a softly refused task would wait for ever where
    no host grants more, and nobody would be told.
    """
    build = spec.build_for(arch)
    require_within_limits(build, settings)
    if build.network is not None and build.network not in settings.networks:
        raise Unsuitable(
            f"the build asks for the network {build.network},"
            f" this host allows {', '.join(settings.networks) or 'none'}"
        )
    if spec.accel not in ("auto", settings.accel):
        raise Unsuitable(f"the build asks for {spec.accel}, this host is set to {settings.accel}")
    try:
        accel.choose(settings.accel, cache_dir=settings.cache_dir)
    except BuilderFault as fault:
        raise Unsuitable(fault.message) from fault
    free, wanted = _available_memory_bytes(), build.memory_bytes
    if free is not None and free < wanted:
        raise Unsuitable(
            f"the guest is to have {format_size(wanted)} of memory, {format_size(free)} are free"
        )


def require_space(inputs: Inputs, settings: Settings) -> None:
    """Raise Unsuitable when the work area cannot even hold what the input image is unpacked to."""
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.work_dir).free
    needed = inputs.input_image.size_bytes + GIB
    if free < needed:
        raise Unsuitable(
            f"the build needs {format_size(needed)} in {settings.work_dir},"
            f" {format_size(free)} are free"
        )


def runs_here(arch: str, host_arches: Sequence[str]) -> bool:
    """Whether a host that Koji says to be of these arches can run a guest of this one."""
    machine = platform.machine()
    native = (machine, "i386") if machine == "x86_64" else (machine,)
    return _canonical(arch) in native and _canonical(arch) in map(_canonical, host_arches)


def _canonical(arch: str) -> str:
    import koji  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return str(koji.canonArch(arch))


def _available_memory_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


@dataclass(frozen=True)
class RunDirectory:
    """A directory for one run of a task, locked until it is removed.

    runs -- where it is noted for sweep.py; None when that cannot be written.
    """

    path: Path
    runs: Path | None
    _lock: int

    @classmethod
    def make(cls, task_dir: Path, runs: Path) -> RunDirectory:
        """A new one. kojid gives a task one directory; when kojid was killed, the run that it
        left behind and the new one are in it for some seconds. What dead runs left is removed.
        """
        task_dir.mkdir(parents=True, exist_ok=True)
        for left in task_dir.glob("run-*"):
            jobdir.remove_if_dead(left)
        path = Path(tempfile.mkdtemp(prefix="run-", dir=task_dir))
        path.chmod(0o755)  # qemu may run as another user
        lock = jobdir.lock(path)
        try:
            sweep.note_run(runs, path)
        except OSError as error:
            log.warning("should this builder be killed, %s is left: %s", path, error)
            return cls(path, None, lock)
        return cls(path, runs, lock)

    def remove(self) -> None:
        """And those of runs before it that were killed, which their watchdogs may still have
        guarded when this one began; the task's own, if no other run is in it.
        """
        jobdir.remove(self.path)
        os.close(self._lock)
        self._forget(self.path)
        for left in self.path.parent.glob("run-*"):
            if jobdir.remove_if_dead(left):
                self._forget(left)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    def _forget(self, path: Path) -> None:
        if self.runs is not None:
            with contextlib.suppress(OSError):
                sweep.forget_run(self.runs, path)


def runs_directory(config: Path) -> Path:
    """Where runs are noted."""
    return sweep.runs_directory(_settings_or_defaults(config))


def patient(config: Path, session: Any) -> hubcalls.PatientSession:
    """A task's session with the deadlines that the settings give it."""
    settings = _settings_or_defaults(config)
    return hubcalls.PatientSession(
        session, settings.hub_timeout_seconds, settings.hub_import_timeout_seconds
    )


def _settings_or_defaults(config: Path) -> Settings:
    """For what is needed even where the settings are wrong, which is told elsewhere."""
    try:
        return load_settings([config])
    except UsageError:
        return Settings()


@contextlib.contextmanager
def checkout_deadline(settings: Settings) -> Iterator[None]:
    """Kill the programs that this process has started when the block takes too long.

    koji.daemon.SCM waits for git for ever. Raises BuilderFault in place of what it raises then.
    """
    seconds = settings.download.checkout_timeout_seconds
    over, done = threading.Event(), threading.Event()

    def watch() -> None:
        if done.wait(seconds):
            return
        over.set()
        while not done.wait(0.2):  # after one git comes the next
            programs.kill_descendants()

    thread = threading.Thread(target=watch, name="checkout-deadline", daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        if not over.is_set():
            raise
        raise BuilderFault(
            f"the template could not be checked out within {seconds:g} s",
            "see checkout.log, and whether its server is well; checkout_timeout in the"
            " configuration's [download] allows more",
        ) from error
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def interrupted_once() -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the task; those after it must not end its cleaning up.

    kojid sends SIGINT, SIGTERM twice and SIGKILL within five seconds.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- target and build -------------------------------------------------------------------------


def check_target(session: Any, spec: TaskSpec) -> dict[str, Any]:
    """The build target. Raises UsageError when it is not there or the package may not go there."""
    target = session.getBuildTarget(spec.target)
    if not target:
        raise UsageError(f"there is no build target {spec.target}", "koji list-targets shows all")
    config = session.getBuildConfig(target["build_tag"])
    known = (config.get("arches") or "").split()
    for arch in spec.arches:
        if _canonical(arch) not in map(_canonical, known):
            raise UsageError(
                f"{arch} is not an arch of the build tag {target['build_tag_name']}",
                f"its arches are {', '.join(known) or 'none'}",
            )
    if not spec.scratch and not spec.skip_tag:
        tag = target["dest_tag_name"]
        package = session.getPackageConfig(tag, spec.name)
        if package is None:
            raise UsageError(
                f"the package {spec.name} is not in the list of the tag {tag}",
                f"have it added with: koji add-pkg {tag} {spec.name}",
            )
        if package["blocked"]:
            raise UsageError(
                f"the package {spec.name} is blocked in the tag {tag}", "choose another target"
            )
    return dict(target)


def own_build(session: Any, task_id: int) -> dict[str, Any] | None:
    """The build that an earlier run of this very task began, or even completed."""
    builds = session.listBuilds(taskID=task_id)
    for build in builds:
        if build["state"] in (BUILDING, COMPLETE):
            found = session.getBuild(build["build_id"])
            return dict(found)
    return None


def init_build(
    session: Any, task_id: int, spec: TaskSpec, inputs: Mapping[str, Inputs]
) -> dict[str, Any]:
    """A new build, BUILDING."""
    info = {
        "name": spec.name,
        "version": spec.version,
        "release": release_of(session, spec),
        "epoch": 0,
        "source": next(iter(inputs.values())).template_source,
        "extra": build_extra(spec, inputs),
    }
    try:
        return dict(session.host.initImageBuild(task_id, info))
    except Exception as error:
        if getattr(error, "faultCode", None) != hubcalls.RETRY_ERROR:
            raise
        # It was done, and the answer was lost.
        build = own_build(session, task_id)
        if build is None:
            raise
        return build


def release_of(session: Any, spec: TaskSpec) -> str:
    """The release that was asked for, or the next one."""
    if spec.release is not None:
        return spec.release
    return str(session.getNextRelease({"name": spec.name, "version": spec.version}))


# --- names of results -------------------------------------------------------------------------


class ArchiveTypes:
    """What the hub accepts as an archive, by the end of a file's name."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def extension(self, name: str) -> str | None:
        """The end of the name, without its dot, that makes it an archive; None if nothing does."""
        found = self._session.getArchiveType(filename=name)
        if not found:
            return None
        known = found["extensions"].lower().split()
        parts = name.split(".")
        for start in range(len(parts)):
            extension = ".".join(parts[start:])
            if extension.lower() in known:
                return extension
        return None

    def require(self, name: str, what: str) -> str:
        """The same; BuildFailed when the hub would not take the file."""
        extension = self.extension(name)
        if extension is None:
            raise BuildFailed(
                f"{what} {name} is of no type that this Koji accepts as an archive",
                "give it the extension of one: iso, qcow2, raw.xz, tar.gz, json, ...;"
                " koji call listArchiveTypes shows all",
            )
        return extension

    def check_patterns(self, patterns: Sequence[str]) -> None:
        """Before the VM starts: refuse what can be told from the names that were asked for."""
        for pattern in patterns:
            name = pattern.rpartition("/")[2]
            if any(wildcard in name.rpartition(".")[2] for wildcard in "*?["):
                continue  # whatever it turns out to be
            plain = "".join("x" if letter in "*?[]" else letter for letter in name)
            if self.extension(plain) is None:
                self.require(name, "the result")


def archive_names(results: Sequence[str], nvr: str, arch: str, types: ArchiveTypes) -> list[str]:
    """The names that the results have in Koji, where all archives of a build are in one directory.

    One result is NVR.ARCH.EXTENSION, with the same EXTENSION; of several each keeps its own
    name before that. Raises BuildFailed when the hub would refuse one.
    """
    names = []
    for result in results:
        extension = types.require(result, "the result")
        stem = result[: -len(extension)].rstrip(".")
        prefix = f"{stem}-" if stem and len(results) > 1 else ""
        names.append(f"{prefix}{nvr}.{arch}.{extension}")
    return names


def manifest_name(nvr: str, arch: str) -> str:
    """The manifest's name as an archive of the build."""
    return f"{nvr}.{arch}.{MANIFEST}"


# --- inputs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What one arch is built from: found, vetted as far as it is here, nothing large fetched.

    template_source -- the SCM URL with its commit, or where the file was uploaded to.
    tag_repo -- below topurl, without the arch; None unless the build tag's is asked for.
    """

    template: Template
    template_text: bytes
    template_source: str
    input_image: sources.Source
    utility_image: sources.Source
    tag_repo: str | None = None

    def images(self, arch: str) -> list[dict[str, Any]]:
        """Both images as the hub's recordIndirectionInputs() takes them."""
        return [_source_record(one, arch) for one in (self.utility_image, self.input_image)]

    def origin(self) -> Origin:
        """What the manifest says of where all this is from."""
        return Origin(
            template=self.template_source,
            utility_image=_koji_record(self.utility_image),
            input_image=_koji_record(self.input_image),
        )

    def template_record(self) -> dict[str, str]:
        """The same call's extra data."""
        record = {"template_sha256": self.template.sha256}
        if self.template_commit:
            record["template_commit"] = self.template_commit
        return record

    @property
    def template_commit(self) -> str:
        """Empty for an uploaded template."""
        return self.template_source.partition("#")[2]

    def pinned(self) -> dict[str, Any]:
        """What another host needs to build from exactly this; plain data, see pinned_inputs()."""
        return {
            "template_source": self.template_source,
            "template_sha256": self.template.sha256,
            "tag_repo": self.tag_repo,
            "input_image": dataclasses.asdict(self.input_image),
            "utility_image": dataclasses.asdict(self.utility_image),
        }


def _koji_record(source: sources.Source) -> KojiRecord:
    return KojiRecord(
        reference=source.reference,
        role=source.role,
        nvr=source.nvr,
        build_id=source.build_id,
        archive_id=source.archive_id,
        task_id=source.task_id,
        filename=source.filename,
        arch=source.arch,
        checksum=source.checksum,
        checksum_type=source.checksum_name,
    )


def _source_record(source: sources.Source, arch: str) -> dict[str, Any]:
    record = {
        "arch": arch,
        "role": source.role,
        "reference": source.reference,
        "nvr": source.nvr,
        "archive_id": source.archive_id,
        "task_id": source.task_id,
        "filename": source.filename,
        "checksum": source.checksum,
        "checksum_type": source.checksum_type,
    }
    return {name: value for name, value in record.items() if value is not None}


def build_extra(spec: TaskSpec, inputs: Mapping[str, Inputs]) -> dict[str, Any]:
    """The build's extra data while it is being built; the hub's plugin writes the same later."""
    first = next(iter(inputs.values()))
    record = {
        "template": spec.template,
        "utility_image": spec.utility_image,
        "input_image": spec.input_image,
        "inputs": [image for arch, one in inputs.items() for image in one.images(arch)],
        **first.template_record(),
    }
    if spec.template_scm is not None:
        record["template_scm"] = spec.template_scm
    return {"indirection": record}


def find_inputs(
    daemon: Daemon, spec: TaskSpec, target: Mapping[str, Any], settings: Settings
) -> dict[str, Inputs]:
    """Get the template, once, and resolve both images for each arch.

    target -- as check_target() gives it.
    Raises what template and sources raise, and BuildFailed where the build tag has no repository.
    """
    tag_repo = tag_repo_of(daemon.session, target) if spec.tag_repo else None
    path, source = _fetch_template(daemon, spec, spec.template_scm, settings)
    parsed = template.load(path)
    parsed.require_network(spec.build.network)
    text = path.read_bytes()

    def resolved(reference: str, arch: str, glob: str | None, role: str) -> sources.Source:
        return sources.resolve(
            daemon.session,
            sources.Reference.parse(reference),
            arch,
            archive_glob=glob,
            role=role,
        )

    return {
        arch: Inputs(
            template=parsed,
            template_text=text,
            template_source=source,
            input_image=resolved(spec.input_image, arch, spec.input_archive, "input image"),
            utility_image=resolved(spec.utility_image, arch, spec.utility_archive, "utility image"),
            tag_repo=tag_repo,
        )
        for arch in spec.arches
    }


def pinned_inputs(
    daemon: Daemon, spec: TaskSpec, pinned: Mapping[str, Any], settings: Settings
) -> Inputs:
    """What the parent task has found, whatever a branch or a tag holds by now."""
    scm = pinned["template_source"] if spec.template_scm is not None else None
    path, source = _fetch_template(daemon, spec, scm, settings)
    parsed = template.load(path)
    if parsed.sha256 != pinned["template_sha256"]:
        raise BuilderFault(
            f"the template {spec.template} is not the one that the parent task has read",
            "submit the build again",
        )
    return Inputs(
        template=parsed,
        template_text=path.read_bytes(),
        template_source=source,
        input_image=sources.Source(**pinned["input_image"]),
        utility_image=sources.Source(**pinned["utility_image"]),
        tag_repo=pinned["tag_repo"],
    )


def tag_repo_of(session: Any, target: Mapping[str, Any]) -> str:
    """Where the build tag's latest repository is, below topurl."""
    tag = target["build_tag_name"]
    repo = session.getRepo(target["build_tag"])
    if not repo:
        raise BuildFailed(
            f"the build tag {tag} has no repository that is ready",
            f"have one made with: koji regen-repo {tag}",
        )
    return f"repos/{tag}/{repo['id']}"


def build_spec(daemon: Daemon, spec: TaskSpec, arch: str, inputs: Inputs) -> BuildSpec:
    """The build spec of one arch; with the build tag's repository, if it is asked for."""
    return with_tag_repo(spec.build_for(arch), inputs, arch, daemon.topurl)


def with_tag_repo(build: BuildSpec, inputs: Inputs, arch: str, topurl: str | None) -> BuildSpec:
    """A build spec that has the build tag's repository too, if the inputs have one."""
    if inputs.tag_repo is None:
        return build
    if not topurl:
        raise BuilderFault(
            "the build tag's repository has no address: there is no topurl here",
            "set topurl in Koji's configuration",
        )
    if has_credentials(topurl):
        raise BuilderFault(
            "the build tag's repository has no address that guests may know: topurl has a user"
            " name or password in it",
            "set topurl in Koji's configuration to one without",
        )
    # As koji.pathinfo and its repositories have it: i386 also for i686.
    path = urllib.parse.quote(f"{inputs.tag_repo}/{_canonical(arch)}")
    address = f"{topurl.rstrip('/')}/{path}"
    return dataclasses.replace(build, repos=tuple(dict.fromkeys((*build.repos, address))))


def _fetch_template(
    daemon: Daemon, spec: TaskSpec, scm: str | None, settings: Settings
) -> tuple[Path, str]:
    """A local copy, and where exactly it is from."""
    if scm is not None:
        scm_dir = daemon.work_dir / "scm"
        scm_dir.mkdir(parents=True)
        checkout, url = daemon.checkout(scm, scm_dir)
        return file_in_checkout(checkout, spec.template), url
    source = uploaded_template(daemon.session, spec)
    path = daemon.work_dir / "template.tdl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _fetched(daemon, source, settings) as fetched:
        shutil.copyfile(fetched, path)
    return path, f"{spec.template_upload}/{spec.template}"


def uploaded_template(session: Any, spec: TaskSpec) -> sources.Source:
    """Where the hub has a template that was uploaded; BuildFailed if it is not there any more."""
    assert spec.template_upload is not None
    uploaded = session.checkUpload(spec.template_upload, spec.template, verify="sha256")
    if not uploaded:
        raise BuildFailed(
            f"the template {spec.template} is not in {spec.template_upload} on the hub",
            "uploads are kept for some days only: submit the build again",
        )
    if uploaded["size"] > template.MAX_BYTES:
        raise BuildFailed(
            f"the template {spec.template} has {uploaded['size']} bytes",
            f"at most {template.MAX_BYTES} are allowed",
        )
    return sources.Source(
        reference=spec.template_upload,
        role="template",
        nvr=spec.template_upload,  # what messages call it
        build_id=None,
        archive_id=None,
        task_id=None,
        filename=spec.template,
        size_bytes=uploaded["size"],
        checksum=uploaded["hexdigest"],
        checksum_type=2,
        arch="noarch",
        relpath=f"work/{spec.template_upload}/{spec.template}",
    )


def file_in_checkout(checkout: Path, name: str) -> Path:
    """The template in a checkout, which whoever may push there has filled: links stay inside."""
    root, path = checkout.resolve(), (checkout / name).resolve()
    if root not in path.parents or ".git" in path.relative_to(root).parts:
        raise BuildFailed(
            f"the template {name} leads out of its checkout", "commit the file itself"
        )
    if not path.is_file():
        raise BuildFailed(f"there is no template {name} in the checkout", "check its path")
    return path


def _fetched(
    daemon: Daemon, source: sources.Source, settings: Settings
) -> contextlib.AbstractContextManager[Path]:
    return imagefetch.fetch(
        source,
        topurl=daemon.topurl,
        topdir=daemon.topdir,
        cache=cache.Cache.of(settings),
        download=settings.download,
    )


def rpm_list(session: Any, source: sources.Source) -> list[dict[str, Any]]:
    """The rpms in an image, as completeImageBuild() wants them; those of external repos too."""
    if source.archive_id is None:
        return []
    rpms = []
    for rpm in session.listRPMs(imageID=source.archive_id):
        if rpm.get("draft"):
            log.warning("%(nvr)s.%(arch)s is of a draft build, and not recorded", rpm)
            continue
        names = ("name", "version", "release", "epoch", "arch", "payloadhash", "size", "buildtime")
        entry = {name: rpm[name] for name in names}
        if rpm.get("external_repo_id"):
            entry["location"] = rpm["external_repo_name"]
        rpms.append(entry)
    return rpms


# --- live logs --------------------------------------------------------------------------------

# AuthError, ActionNotAllowed, AuthLockError, AuthExpired: the hub says that the task is not ours
# any more; koji's client has renewed by then what can be renewed.
_LOST = (1002, 1004, 1006, 1007)


def is_ours(daemon: Daemon, host_id: int) -> bool:
    """Whether a task still is this host's to do, as the hub sees it.

    Raises what the hub answers where the task was given to another run on the same host.
    """
    task = daemon.session.getTaskInfo(daemon.task_id)
    return bool(task["state"] == _OPEN and task["host_id"] == host_id)


class LiveLogs:
    """Uploads a directory's *.log as they grow, from a thread of its own.

    append -- uploads a file from its position to its end; may raise anything.
    ours -- asks the hub whether the task still is ours to do; may raise anything.
    lost -- called, in that thread, when it is not: cancelled, or given to somebody else. kojid
        would end us too, but seconds later, and not at all if it has been killed itself.
    A hub that is away delays nobody: what it missed is uploaded once it is back. On the
    way out all is uploaded, unless an interrupt leaves no time for it.
    """

    def __init__(
        self,
        directory: Path,
        append: Callable[[IO[bytes], str], None],
        ours: Callable[[], bool],
        lost: Callable[[], None],
        interval_seconds: float = 1.0,
    ) -> None:
        self._directory = directory
        self._append = append
        self._ours = ours
        self._lost = lost
        self._interval_seconds = interval_seconds
        self._files: dict[str, IO[bytes]] = {}
        self._ending = threading.Event()
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="live-logs", daemon=True)

    def __enter__(self) -> LiveLogs:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self._abandoned = self._abandoned or interrupted
        self._ending.set()
        self._thread.join(0.5 if interrupted else None)

    def _run(self) -> None:
        complained = False
        while True:
            ending = self._ending.wait(self._interval_seconds)
            if self._abandoned:
                break
            ours = True
            try:
                ours = self._ours()
                self._upload()
                complained = False
            except Exception as error:  # noqa: BLE001 - logs are not worth a build
                ours = ours and getattr(error, "faultCode", None) not in _LOST
                if ours and not complained:
                    log.warning("logs cannot be uploaded for now: %s", error)
                complained = True
            if not ours and not ending:
                self._lost()
            if ending or not ours:
                break
        for file in self._files.values():
            file.close()

    def _upload(self) -> None:
        for path in sorted(self._directory.glob("*.log")):
            file = self._files.get(path.name)
            if file is None:
                file = self._files[path.name] = path.open("rb", buffering=0)
            position = file.tell()
            try:
                self._append(file, path.name)
            except BaseException:
                file.seek(position)  # what was read has not arrived
                raise


_NOT_OURS = "the task is no longer ours: it was cancelled or given to another builder"


def interrupt_main_thread() -> None:
    """As kojid does."""
    log.error(_NOT_OURS)
    os.kill(os.getpid(), signal.SIGINT)


@contextlib.contextmanager
def task_log(path: Path) -> Iterator[None]:
    """The library's messages from INFO on, into a file; pipeline.build() keeps the others."""
    logger = logging.getLogger(__package__)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setLevel(logging.INFO)
    handler.setFormatter(pipeline.LogFormatter())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except IndirectionError as error:
        log.error("%s", error.one_line())
        raise
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


class _Phases:
    """pipeline.Progress: a line in the task's log for each phase."""

    def phase(self, name: str) -> None:
        log.info("phase: %s", name)

    def guest_output(self, data: bytes) -> None:
        """Is in job.log."""


# --- subtasks ---------------------------------------------------------------------------------

_SUBTASKS_SECONDS = 5.0


def wait_for_subtasks(
    daemon: Daemon, tasks: Sequence[int], can_fail: Sequence[int] = ()
) -> list[Any]:
    """Until all have ended; their results, in their order, of one that can fail maybe a fault.

    The first of the others that fails ends the rest, and its fault is raised. kojid wakes us
    with SIGUSR2 when a subtask ends. We look without being woken too, and at whether the task
    still is ours: kojid may have been killed, and nobody would ever wake us, or end us.
    """
    session, task_id = daemon.session, daemon.task_id
    woken, checked = threading.Event(), set(can_fail)
    before = signal.signal(signal.SIGUSR2, lambda _number, _frame: woken.set())
    try:
        host_id = session.host.getID()
        session.host.taskSetWait(task_id, list(tasks))
        while True:
            _stop_unless_ours(daemon, host_id)
            finished, unfinished = session.host.taskWait(task_id)
            if not unfinished:
                break
            for one in set(finished) - checked:
                checked.add(one)
                _require_success(session, task_id, one)
            woken.wait(_SUBTASKS_SECONDS)
            woken.clear()
    finally:
        signal.signal(signal.SIGUSR2, before)
    results = session.host.taskWaitResults(task_id, list(tasks), canfail=list(can_fail))
    by_task = {int(one): result for one, result in results}
    return [by_task[one] for one in tasks]


def _stop_unless_ours(daemon: Daemon, host_id: int) -> None:
    try:
        ours = is_ours(daemon, host_id)
    except Exception as error:
        if getattr(error, "faultCode", None) not in _LOST:
            raise
        ours = False
    if not ours:
        log.error(_NOT_OURS)
        raise KeyboardInterrupt


def _require_success(session: Any, task_id: int, subtask: int) -> None:
    try:
        session.getTaskResult(subtask)
    except Exception as error:
        if getattr(error, "faultCode", None) is not None:
            session.cancelTaskChildren(task_id)
        raise


# --- the build of one arch --------------------------------------------------------------------


def build_arch(
    daemon: Daemon, spec: TaskSpec, arch: str, nvr: str, inputs: Inputs, settings: Settings
) -> dict[str, Any]:
    """Fetch, build, upload; returns what hub_results() and provenance() read.

    Logs, manifest and, after a failure, the screenshot are with the task however it ends,
    unless it is interrupted. Raises BuildFailed or BuilderFault.
    """
    directory = output.prepare(daemon.work_dir / "output", force=True)
    logs = directory / output.LOGS
    (logs / TEMPLATE_LOG).write_bytes(inputs.template_text)
    types = ArchiveTypes(daemon.session)

    host_id = daemon.session.host.getID()

    def ours() -> bool:
        return is_ours(daemon, host_id)

    try:
        # The session is the thread's alone in this block: nothing else in it calls the hub.
        with LiveLogs(logs, daemon.append, ours, interrupt_main_thread), task_log(logs / TASK_LOG):
            record = _fetch_and_build(daemon, spec, arch, inputs, settings, directory)
    except Exception:
        _keep_evidence(daemon, directory, manifest_name(nvr, arch))
        raise
    checksums = _upload_results(daemon, directory, record, nvr, arch, types)
    uploaded = daemon.session.listTaskOutput(daemon.task_id)
    return {
        "task_id": daemon.task_id,
        "arch": arch,
        "files": list(checksums),
        "checksums": checksums,
        "logs": sorted(name for name in uploaded if name.endswith(".log")),
        "rpmlist": [] if spec.scratch else rpm_list(daemon.session, inputs.input_image),
        "inputs": inputs.images(arch),
        "template": inputs.template_record(),
    }


def _upload_results(
    daemon: Daemon, directory: Path, record: Manifest, nvr: str, arch: str, types: ArchiveTypes
) -> dict[str, str]:
    """Upload results and manifest; their names in Koji, and their sha256."""
    names = archive_names([one.name for one in record.outputs], nvr, arch, types)
    checksums = {}
    for one, name in zip(record.outputs, names):
        upload_verified(daemon, directory / one.name, name, one.sha256)
        checksums[name] = one.sha256
    name = manifest_name(nvr, arch)
    checksums[name] = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
    upload_verified(daemon, directory / MANIFEST, name, checksums[name])
    return checksums


# Before the second, third, ... attempt. A hub whose connection was cut in the middle of a file
# may have that locked until it notices.
UPLOAD_WAITS_SECONDS = (1, 2, 4, 8, 15, 30, 60)


def upload_verified(daemon: Daemon, path: Path, name: str, sha256: str) -> None:
    """Upload a file that has this checksum; the hub must then have one with it too.

    The hub itself compares what it imports with nothing. A mismatch is retried once, a refusal
    for some two minutes; then it is a BuilderFault. What tells that the task is no longer ours
    is raised as it is.
    """
    damaged = 0
    for wait in (*UPLOAD_WAITS_SECONDS, None):
        problem = _refusal_of_upload(daemon, path, name)
        if problem is None:
            problem = _problem_of_upload(daemon, name, sha256)
            if problem is None:
                return
            damaged += 1
        log.warning("%s, uploaded, is not there as it is here: %s", name, problem)
        if damaged == 2:
            raise BuilderFault(
                f"{name}, uploaded twice, is not on the hub as it is here: {problem}",
                "the network, a proxy, or the hub's file system damages it",
            )
        if wait is not None:
            time.sleep(wait)
    raise BuilderFault(
        f"{name} cannot be uploaded: {problem}", "see the hub's log, and its file system"
    )


def _refusal_of_upload(daemon: Daemon, path: Path, name: str) -> str | None:
    try:
        daemon.upload(path, name)
    except Exception as error:
        code = getattr(error, "faultCode", None)
        if code is None or code in _LOST:
            raise
        # Of a traceback, the last line says what it was.
        text = str(getattr(error, "faultString", error)).strip() or "?"
        return hubcalls.one_line(Exception(text.splitlines()[-1]))
    return None


def _problem_of_upload(daemon: Daemon, name: str, sha256: str) -> str | None:
    task_id = daemon.task_id
    there = daemon.session.checkUpload(_upload_directory(task_id), name, verify="sha256")
    if not there:
        return "the hub does not have it"
    if there["hexdigest"] != sha256:
        return f"the hub has {there['size']} bytes with the sha256 {there['hexdigest']}"
    return None


def _upload_directory(task_id: int) -> str:
    """Below the hub's work directory, as koji.pathinfo has it."""
    return f"tasks/{task_id % 10000}/{task_id}"


def _fetch_and_build(
    daemon: Daemon,
    spec: TaskSpec,
    arch: str,
    inputs: Inputs,
    settings: Settings,
    directory: Path,
) -> Manifest:
    log.info("input image: %s; utility image: %s", inputs.input_image, inputs.utility_image)
    log.info("template: %s, sha256 %s", inputs.template_source, inputs.template.sha256)
    started = time.monotonic()
    with (
        _fetched(daemon, inputs.input_image, settings) as input_image,
        _fetched(daemon, inputs.utility_image, settings) as utility_image,
    ):
        log.info("both images are here, after %.0f s", time.monotonic() - started)
        order = pipeline.Order(
            spec=build_spec(daemon, spec, arch, inputs),
            template=inputs.template,
            template_name=Path(spec.template).name,
            input_image=input_image,
            utility_image=utility_image,
            arch=arch,
            output=directory,
            label=f"task-{daemon.task_id}",
            origin=inputs.origin(),
        )
        with _as_users_know_it(
            {input_image: inputs.input_image, utility_image: inputs.utility_image}
        ):
            return pipeline.build(order, settings, _Phases())


@contextlib.contextmanager
def _as_users_know_it(images: Mapping[Path, sources.Source]) -> Iterator[None]:
    """Errors name an image as Koji does; its path in this builder's cache tells nobody anything."""
    try:
        yield
    except IndirectionError as error:
        for path, source in images.items():
            error.message = error.message.replace(str(path), str(source))
            error.hint = error.hint.replace(str(path), source.filename)
        raise


def _keep_evidence(daemon: Daemon, directory: Path, name: str) -> None:
    """Upload what helps to see why a build failed; the reason must not be hidden by this."""
    evidence = [(directory / MANIFEST, name), (directory / output.LOGS / SCREENSHOT, SCREENSHOT)]
    for path, remote in evidence:
        if path.exists():
            try:
                daemon.upload(path, remote)
            except Exception as error:  # noqa: BLE001 - see above
                log.warning("%s cannot be uploaded: %s", remote, error)


# --- what the hub is given at the end -----------------------------------------------------------


def hand_over(daemon: Daemon, nvr: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Keep with the task what the hub is about to be given, should the task have to run again.

    Between that and the end of the task its process can die; the next run then finds
    a build that is COMPLETE, or scratch files that have been moved, and nothing else tells it
    what they were made from.
    """
    path = daemon.work_dir / HANDOVER
    content = json.dumps({"nvr": nvr, "entries": list(entries)}).encode()
    path.write_bytes(content)
    upload_verified(daemon, path, HANDOVER, hashlib.sha256(content).hexdigest())


def handed_over(daemon: Daemon) -> tuple[str, list[dict[str, Any]]] | None:
    """NVR and entries that an earlier run of this task had handed over; None if none had."""
    if HANDOVER not in daemon.session.listTaskOutput(daemon.task_id):
        return None
    try:
        record = json.loads(daemon.session.downloadTaskOutput(daemon.task_id, HANDOVER))
        return str(record["nvr"]), list(record["entries"])
    except (ValueError, KeyError, TypeError):  # the run was killed in mid-upload
        return None


def complete_build(
    daemon: Daemon, build: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> None:
    """From BUILDING to COMPLETE. What the hub raises is no error if it has done it all the same."""
    results = hub_results(entries)
    hand_over(daemon, "{name}-{version}-{release}".format(**build), entries)
    try:
        daemon.session.host.completeImageBuild(daemon.task_id, build["id"], results)
    except Exception as error:
        # Its answer may have got lost; koji's client then asks again, and the hub refuses that.
        if daemon.session.getBuild(build["id"])["state"] != COMPLETE:
            raise
        log.warning("the build is complete, although the hub said: %s", error)


def move_to_scratch(daemon: Daemon, nvr: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Have the hub keep the files of a scratch build; returns their names."""
    results = hub_results(entries)
    hand_over(daemon, nvr, entries)
    try:
        daemon.session.host.moveImageBuildToScratch(daemon.task_id, results)
    except Exception as error:
        if getattr(error, "faultCode", None) != hubcalls.RETRY_ERROR:
            raise
        _require_moved(daemon, entries)
    return [name for entry in results.values() for name in entry["files"]]


def move_to_scratch_again(daemon: Daemon, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """In a run after one that had handed over: it moved all, nothing, or was cut short.

    A second try cannot be: uploads to what was moved are refused. Raises BuilderFault when
    files are gone.
    """
    results = hub_results(entries)
    log.info("an earlier run of this task has built all this, and handed it over")
    _require_moved(daemon, entries)
    try:
        daemon.session.host.moveImageBuildToScratch(daemon.task_id, results)
    except Exception as error:
        if "exists" not in str(error):
            raise
        log.info("its files have been moved: %s", error)
    return [name for entry in results.values() for name in entry["files"]]


def _require_moved(daemon: Daemon, entries: Sequence[Mapping[str, Any]]) -> None:
    """All files are whole: in scratch, with a link in the task's directory, or still there."""
    for entry in entries:
        for name, sha256 in entry.get("checksums", {}).items():
            owner = dataclasses.replace(daemon, task_id=entry["task_id"])
            problem = _problem_of_upload(owner, name, sha256)
            if problem is not None:
                raise BuilderFault(
                    f"an earlier run of this scratch task has made {name}, and now {problem}",
                    "submit the build again",
                )


def hub_results(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What completeImageBuild and moveImageBuildToScratch take, from build_arch()'s entries.

    The hub passes over an entry that failed, and would tag a build without any archive.
    """
    wanted = ("task_id", "arch", "files", "logs", "rpmlist")
    results = {
        str(entry["task_id"]): {key: entry[key] for key in wanted}
        for entry in entries
        if "task_id" in entry
    }
    if not results:
        reasons = [str(entry.get("faultString", "unknown")) for entry in entries]
        raise BuildFailed(f"no arch was built: {'; '.join(reasons)}")
    return results


def provenance(
    entries: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The images of all arches that were built, and what is known of the template.

    As each arch has used them: a parent that runs again may find other ones than its subtasks.
    """
    built = [entry for entry in entries if "task_id" in entry]
    return [image for entry in built for image in entry["inputs"]], built[0]["template"]
