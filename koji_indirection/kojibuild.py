"""What a Koji builder does around pipeline.build(): inputs, names, live logs, what the hub gets.

The plugin lends it the daemon's means (Daemon); nothing here imports the daemon. It must
never leave a VM behind when a task is cancelled, or let an upload delay the guest.
"""

from __future__ import annotations

import configparser
import contextlib
import dataclasses
import fcntl
import logging
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, NoReturn

from . import accel, output, pipeline, sources, template
from .config import Settings, settings_from
from .errors import BuilderFault, BuildFailed, IndirectionError, UsageError
from .manifest import FILE_NAME as MANIFEST
from .manifest import Manifest
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


def task_settings(
    parser: configparser.RawConfigParser, where: str, spec: TaskSpec, work_dir: Path
) -> Settings:
    """The builder's settings for one task, which works in its own directory unless told otherwise.

    Raises BuilderFault when the file is wrong: no user can mend it.
    """
    try:
        settings = settings_from(parser, where)
    except UsageError as error:
        raise BuilderFault(error.message, error.hint) from error
    if not (parser.get("indirection", "work_dir", raw=True, fallback="") or "").strip():
        settings = dataclasses.replace(settings, work_dir=work_dir)
    if settings.accel == "auto":
        settings = dataclasses.replace(settings, accel=spec.accel)
    return settings


def require_host(spec: TaskSpec, arch: str, settings: Settings) -> None:
    """Raise Unsuitable without the accelerator or the free memory that a build needs."""
    if spec.accel not in ("auto", settings.accel):
        raise Unsuitable(f"the build asks for {spec.accel}, this host is set to {settings.accel}")
    try:
        accel.choose(settings.accel, cache_dir=settings.cache_dir)
    except BuilderFault as fault:
        raise Unsuitable(fault.message) from fault
    free, wanted = _available_memory_bytes(), spec.build_for(arch).memory_bytes
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


def run_directory(task_dir: Path) -> tuple[Path, int]:
    """A new directory for one run of a task, and the lock that marks it as being in use.

    kojid gives a task one directory; when kojid was killed, the run that it left behind and
    the new one are in it for some seconds. What runs that are dead have left is removed.
    """
    task_dir.mkdir(parents=True, exist_ok=True)
    for left in task_dir.glob("run-*"):
        lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        os.close(lock)
    path = Path(tempfile.mkdtemp(prefix="run-", dir=task_dir))
    path.chmod(0o755)  # qemu may run as another user
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return path, lock


def remove_run_directory(path: Path, lock: int) -> None:
    """And the task's own, if no other run is in it."""
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


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
    """

    template: Template
    template_text: bytes
    template_source: str
    input_image: sources.Source
    utility_image: sources.Source

    def images(self, arch: str) -> list[dict[str, Any]]:
        """Both images as the hub's recordIndirectionInputs() takes them."""
        return [_source_record(one, arch) for one in (self.utility_image, self.input_image)]

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
            "input_image": dataclasses.asdict(self.input_image),
            "utility_image": dataclasses.asdict(self.utility_image),
        }


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


def find_inputs(daemon: Daemon, spec: TaskSpec, settings: Settings) -> dict[str, Inputs]:
    """Get the template, once, and resolve both images for each arch.

    Raises what template and sources raise.
    """
    path, source = _fetch_template(daemon, spec, spec.template_scm, settings)
    parsed = template.load(path)
    template.require_supported(parsed)
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
    )


def _fetch_template(
    daemon: Daemon, spec: TaskSpec, scm: str | None, settings: Settings
) -> tuple[Path, str]:
    """A local copy, and where exactly it is from."""
    if scm is not None:
        scm_dir = daemon.work_dir / "scm"
        scm_dir.mkdir(parents=True)
        checkout, url = daemon.checkout(scm, scm_dir)
        return file_in_checkout(checkout, spec.template), url
    assert spec.template_upload is not None
    uploaded = daemon.session.checkUpload(spec.template_upload, spec.template, verify="sha256")
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
    source = sources.Source(
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
    path = daemon.work_dir / "template.tdl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _fetched(daemon, source, settings) as fetched:
        shutil.copyfile(fetched, path)
    return path, f"{spec.template_upload}/{spec.template}"


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
    return sources.fetch(
        source,
        topurl=daemon.topurl,
        topdir=daemon.topdir,
        cache=sources.Cache.of(settings),
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

# ActionNotAllowed, AuthLockError, AuthExpired: the hub says that the task is not ours any more.
_LOST = (1004, 1006, 1007)


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


def interrupt_main_thread() -> None:
    """As kojid does."""
    log.error("the task is no longer ours: it was cancelled or given to another builder")
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

    def ours() -> bool:
        return bool(daemon.session.getTaskInfo(daemon.task_id)["state"] == _OPEN)

    try:
        # The session is the thread's alone in this block: nothing else in it calls the hub.
        with LiveLogs(logs, daemon.append, ours, interrupt_main_thread), task_log(logs / TASK_LOG):
            record = _fetch_and_build(daemon, spec, arch, inputs, settings, directory)
    except Exception:
        _keep_evidence(daemon, directory, manifest_name(nvr, arch))
        raise
    results = [one.name for one in record.outputs]
    names = archive_names(results, nvr, arch, types)
    for result, name in zip(results, names):
        daemon.upload(directory / result, name)
    daemon.upload(directory / MANIFEST, manifest_name(nvr, arch))
    uploaded = daemon.session.listTaskOutput(daemon.task_id)
    return {
        "task_id": daemon.task_id,
        "arch": arch,
        "files": [*names, manifest_name(nvr, arch)],
        "logs": sorted(name for name in uploaded if name.endswith(".log")),
        "rpmlist": [] if spec.scratch else rpm_list(daemon.session, inputs.input_image),
        "inputs": inputs.images(arch),
        "template": inputs.template_record(),
    }


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
            spec=spec.build_for(arch),
            template=inputs.template,
            template_name=Path(spec.template).name,
            input_image=input_image,
            utility_image=utility_image,
            output=directory,
        )
        return pipeline.build(order, settings, _Phases())


def _keep_evidence(daemon: Daemon, directory: Path, name: str) -> None:
    """Upload what helps to see why a build failed; the reason must not be hidden by this."""
    evidence = [(directory / MANIFEST, name), (directory / output.LOGS / SCREENSHOT, SCREENSHOT)]
    for path, remote in evidence:
        if path.exists():
            try:
                daemon.upload(path, remote)
            except Exception as error:  # noqa: BLE001 - see above
                log.warning("%s cannot be uploaded: %s", remote, error)


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
