"""What a Koji builder does around pipeline.build(): target and names, live logs, uploads.

The plugin lends it the daemon's means (taskrun.Daemon); nothing here imports the daemon. It
must never leave a VM behind when a task is cancelled, or let an upload delay the guest.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from . import arches, hubcalls, output, pipeline, sources
from .config import Settings
from .errors import BuildFailed, IndirectionError, UsageError
from .handover import build_extra, rpm_list, upload_verified
from .manifest import FILE_NAME as MANIFEST
from .manifest import Manifest
from .taskinputs import Inputs, build_spec, fetched
from .taskrun import Daemon, interrupt_main_thread, is_ours
from .taskspec import TaskSpec

log = logging.getLogger(__name__)

TASK_LOG = "task.log"
TEMPLATE_LOG = "template.log"
SCREENSHOT = "screenshot.png"


# --- target and build -------------------------------------------------------------------------


def check_target(session: Any, spec: TaskSpec) -> dict[str, Any]:
    """The build target. Raises UsageError when it is not there or the package may not go there."""
    target = session.getBuildTarget(spec.target)
    if not target:
        raise UsageError(f"there is no build target {spec.target}", "koji list-targets shows all")
    config = session.getBuildConfig(target["build_tag"])
    known = (config.get("arches") or "").split()
    for arch in spec.arches:
        if arches.koji_arch(arch) not in map(arches.koji_arch, known):
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
        if build["state"] in (hubcalls.BUILDING, hubcalls.COMPLETE):
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


# --- live logs --------------------------------------------------------------------------------


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
                ours = ours and getattr(error, "faultCode", None) not in hubcalls.LOST
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
        fetched(daemon, inputs.input_image, settings) as input_image,
        fetched(daemon, inputs.utility_image, settings) as utility_image,
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
