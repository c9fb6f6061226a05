"""`koji indirection-replay`: a task that exists, built again on this machine.

With what the task has used, as far as Koji has kept it: what its subtask was told, what its
build says, else what its references meant when it started. It imports on a plain client.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BuildFailed, IndirectionError, UsageError
from .localrun import Here, Hub, LocalOrder, fetched, inputs_of, read_template, template_in
from .manifest import FILE_NAME as MANIFEST
from .options import BUILD_FIELDS, REPLACES, REPLAY_GROUPS, read_command_line
from .sources import Reference, Source, ask, resolve
from .spec import BuildSpec
from .taskspec import INPUT_ROLES, MAX_ID, TaskSpec

if TYPE_CHECKING:
    from .config import Settings
    from .taskinputs import Inputs

log = logging.getLogger(__name__)

COMMAND = "indirection-replay"
METHOD = "indirectionBuild"
ARCH_METHOD = "indirectionBuildArch"


# --- the command line -------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplayRequest:
    """What one `koji indirection-replay` is to do.

    template_file -- instead of the task's own template.
    changes -- fields of the build spec, and of the task spec accel and tag_repo; None: the default.
    """

    task_id: int
    here: Here
    arch: str | None = None
    template_file: Path | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quiet: bool = False
    json: bool = False


def request_from(arguments: Sequence[str]) -> ReplayRequest:
    """Read the command line. Prints the help and exits for --help; raises UsageError."""
    options, positional = read_command_line(
        COMMAND,
        arguments,
        REPLAY_GROUPS,
        usages=("TASK_ID --output DIR [options]",),
        description="Build on this machine, without a task, what a task of indirection-build was"
        " to build: with its template, and the images that it has used. A failed one can be looked"
        " into, and a correction tried out.",
        epilog="What is not given is as the task has it, and an empty value means the default. The"
        " exit status is 0 when it was built, 1 when the build failed, 2 for usage errors, 3 for a"
        " fault of this machine, 130 when it was interrupted.",
    )
    if len(positional) != 1:
        raise UsageError(
            "TASK_ID is missing" if not positional else f"there are {len(positional)} arguments",
            "give the id of one task",
        )
    (text,) = positional
    if not (text.isascii() and text.isdigit() and 0 < int(text[:20]) <= MAX_ID):
        raise UsageError(f"{text[:80]!r} is no task's id", "give a whole number")
    given = {name: value for name, value in options.items() if value is not None}
    if "output" not in given:
        raise UsageError("--output is missing", "name a new directory with it")
    template_file = Path(given["template"]) if "template" in given else None
    if template_file is not None:
        read_template(template_file)
    return ReplayRequest(
        task_id=int(text),
        here=Here(
            **{one.name: given[one.name] for one in dataclasses.fields(Here) if one.name in given}
        ),
        arch=given.get("arch"),
        template_file=template_file,
        changes={
            name: value
            for name, value in options.items()
            if name in (*BUILD_FIELDS, "accel", "tag_repo")
        },
        quiet=given.get("quiet", False),
        json=given.get("json", False),
    )


# --- the task ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """What Koji has kept of a task's inputs: images by their roles, both or none of them."""

    images: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    template_sha256: str | None = None
    template_commit: str | None = None


@dataclass(frozen=True)
class _Task:
    """One arch of a task, and what is known of what it was built from.

    task_ids -- whose logs may have the template: that of the arch first.
    """

    spec: TaskSpec
    arch: str
    task_ids: tuple[int, ...]
    start_time: float | None
    record: _Record


def order_of(hub: Hub, request: ReplayRequest) -> LocalOrder:
    """What the task was to build, with the request's changes, to be built here.

    Raises UsageError for a task that is not there or is no indirection build.
    """
    task = _read_task(hub.session, request)
    spec = task.spec
    if "accel" in request.changes:
        spec = dataclasses.replace(spec, accel=request.changes["accel"] or "auto")
    tag_repo = bool(request.changes.get("tag_repo", spec.tag_repo))

    def find_inputs(settings: Settings, directory: Path) -> Inputs:
        if request.template_file is not None:
            text, source = read_template(request.template_file), str(request.template_file)
        else:
            text, source = _template(hub, task, settings, directory)
        return inputs_of(hub, spec, text, source, _images(hub.session, task), tag_repo=tag_repo)

    build = _changed(task.spec.build_for(task.arch), request.changes)
    return LocalOrder(spec, task.arch, build, find_inputs)


def _changed(build: BuildSpec, changes: Mapping[str, Any]) -> BuildSpec:
    own = {name: value for name, value in changes.items() if name in BUILD_FIELDS}
    dropped = {*own, *(name for one in own for name in REPLACES.get(one, ()))}
    kept = {name: value for name, value in build.to_dict().items() if name not in dropped}
    return BuildSpec.from_dict(
        {**kept, **{name: value for name, value in own.items() if value is not None}}
    )


def _read_task(session: Any, request: ReplayRequest) -> _Task:
    task_id = request.task_id
    info = ask(session, "getTaskInfo", task_id, request=True)
    if not info:
        raise UsageError(f"there is no task {task_id}", "`koji list-tasks` shows those that run")
    if info["method"] == ARCH_METHOD:
        return _read_subtask(session, info, request.arch)
    if info["method"] != METHOD:
        raise UsageError(
            f"task {task_id} is a {info['method']} task, and no indirection build",
            f"name a task of the kind {METHOD} or {ARCH_METHOD}",
        )
    spec = _spec(task_id, info["request"][0])
    arch = _arch(task_id, spec, request.arch)
    for child in sorted(ask(session, "getTaskChildren", task_id, request=True), key=_id):
        if child["method"] == ARCH_METHOD and child["request"][1] == arch:
            record = _pinned(child["request"][3])
            return _Task(spec, arch, (child["id"], task_id), info.get("start_ts"), record)
    record = _recorded(session, task_id, arch)
    return _Task(spec, arch, (task_id,), info.get("start_ts"), record)


def _id(record: Mapping[str, Any]) -> int:
    return -int(record["id"])


def _read_subtask(session: Any, info: Mapping[str, Any], wanted: str | None) -> _Task:
    data, arch, _nvr, pinned = info["request"]
    if wanted not in (None, arch):
        raise UsageError(
            f"task {info['id']} is for {arch}, not for {wanted}",
            f"name its parent, task {info['parent']}",
        )
    task_ids = (info["id"], *([info["parent"]] if info["parent"] else []))
    spec = _spec(info["id"], data)
    return _Task(spec, arch, task_ids, info.get("start_ts"), _pinned(pinned))


def _pinned(pinned: Mapping[str, Any]) -> _Record:
    """What the parent has told a subtask, see taskinputs.Inputs.pinned() and without_image()."""
    keys = {role: role.replace(" ", "_") for role in INPUT_ROLES}
    images = {role: pinned[key] for role, key in keys.items() if key in pinned}
    commit = str(pinned["template_source"]).partition("#")[2]
    return _Record(images, pinned["template_sha256"], commit or None)


def _spec(task_id: int, data: Any) -> TaskSpec:
    try:
        return TaskSpec.from_dict(data)
    except UsageError as error:
        message = f"task {task_id} cannot be replayed: {error.message}"
        raise BuildFailed(message, error.hint) from None


def _arch(task_id: int, spec: TaskSpec, wanted: str | None) -> str:
    arches = ", ".join(spec.arches)
    if wanted is not None and wanted not in spec.arches:
        raise UsageError(f"task {task_id} does not build {wanted}", f"its arches are {arches}")
    if wanted is None and len(spec.arches) > 1:
        raise UsageError(
            f"task {task_id} builds several arches: {arches}", "choose one with --arch"
        )
    return wanted or spec.arches[0]


def _recorded(session: Any, task_id: int, arch: str) -> _Record:
    """What the task's build says of its inputs, or the manifest that a task without one keeps.

    Neither is there of a task that has failed before it had found its inputs.
    """
    builds = ask(session, "listBuilds", taskID=task_id)
    if builds:
        newest = max(builds, key=lambda one: int(one["build_id"]))
        build = ask(session, "getBuild", newest["build_id"])
        extra = ((build or {}).get("extra") or {}).get("indirection") or {}
        images = {one["role"]: one for one in extra.get("inputs", ()) if one["arch"] == arch}
        if set(images) == set(INPUT_ROLES):
            return _Record(images, extra.get("template_sha256"), extra.get("template_commit"))
    for name in ask(session, "listTaskOutput", task_id):
        if name.endswith(f".{arch}.{MANIFEST}"):
            manifest = json.loads(ask(session, "downloadTaskOutput", task_id, name))
            return _of_manifest(manifest)
    return _Record()


def _of_manifest(manifest: Mapping[str, Any]) -> _Record:
    images = {}
    for role in INPUT_ROLES:
        image = (manifest.get(role.replace(" ", "_")) or {}).get("koji")
        if image is not None:
            images[role] = image
    template = manifest["template"]
    commit = (template.get("source") or "").partition("#")[2]
    return _Record(images, template["sha256"], commit or None)


# --- the images -------------------------------------------------------------------------------


def _images(session: Any, task: _Task) -> tuple[Source, Source]:
    """Input and utility image: the very files that the task has used, where that is known."""
    spec, arch = task.spec, task.arch
    images = task.record.images
    if set(images) == set(INPUT_ROLES):
        return (
            _again(session, images["input image"], arch),
            _again(session, images["utility image"], arch),
        )
    then: Any = _Then(session, task.start_time)

    def found(reference: str, archive: str | None, role: str) -> Source:
        return resolve(then, Reference.parse(reference), arch, archive_glob=archive, role=role)

    return (
        found(spec.input_image, spec.input_archive, "input image"),
        found(spec.utility_image, spec.utility_archive, "utility image"),
    )


def _again(session: Any, record: Mapping[str, Any], arch: str) -> Source:
    """The file of a record that was made when the task ran; BuildFailed if it is gone."""
    role, filename = record["role"], record["filename"]
    if record.get("archive_id") is not None:
        archive = ask(session, "getArchive", record["archive_id"])
        if not archive:
            raise BuildFailed(
                f"{role} {record['reference']}: Koji has no archive {record['archive_id']}"
                " any more, which the task has used",
                "submit a new build",
            )
        reference = f"build:{archive['build_id']}"
    else:
        reference = f"task:{record['task_id']}"
    source = resolve(
        session,
        Reference.parse(reference),
        arch,
        archive_glob=glob.escape(filename),
        role=role,
    )
    if source.checksum != record["checksum"]:
        raise BuildFailed(
            f"{role} {source}: it is not the file any more that the task has used",
            "submit a new build",
        )
    return dataclasses.replace(source, reference=record["reference"])


class _Then:
    """A hub's answers, with what was latest in a tag when a task started."""

    def __init__(self, session: Any, start_time: float | None) -> None:
        self._session = session
        self._start_time = start_time

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def getLatestBuilds(self, tag: str, **wanted: Any) -> Any:
        if self._start_time is not None:
            event = self._session.getLastEvent(before=self._start_time)
            wanted["event"] = event["id"]
        return self._session.getLatestBuilds(tag, **wanted)


# --- the template -----------------------------------------------------------------------------


def _template(hub: Hub, task: _Task, settings: Settings, directory: Path) -> tuple[bytes, str]:
    """The text that the task had, and where it is from."""
    from .kojibuild import TEMPLATE_LOG

    wanted = task.record.template_sha256
    for task_id in task.task_ids:
        text = _kept_template(hub.session, task_id)
        if text is not None and wanted in (None, hashlib.sha256(text).hexdigest()):
            return text, f"{TEMPLATE_LOG} of task {task_id}"
    try:
        text, source = _original_template(hub, task, settings, directory)
    except (UsageError, BuildFailed) as error:
        hint = f"{error.hint}; or give a template with --template FILE"
        raise type(error)(error.message, hint.lstrip("; ")) from error
    if wanted not in (None, hashlib.sha256(text).hexdigest()):
        raise BuildFailed(
            f"the template {task.spec.template} is not the one any more that the task has used",
            "give a template with --template FILE",
        )
    return text, source


def _kept_template(session: Any, task_id: int) -> bytes | None:
    """The log that the builder keeps it as; None before it has got it, or once it is expired."""
    from .kojibuild import TEMPLATE_LOG

    if TEMPLATE_LOG not in ask(session, "listTaskOutput", task_id):
        return None
    try:
        text = ask(session, "downloadTaskOutput", task_id, TEMPLATE_LOG)
    except IndirectionError as error:  # a link to what was moved or deleted
        log.info("%s", error)
        return None
    return bytes(text)


def _original_template(
    hub: Hub, task: _Task, settings: Settings, directory: Path
) -> tuple[bytes, str]:
    from . import taskinputs

    spec = task.spec
    if spec.template_scm is not None:
        return template_in(_scm_url(task, spec.template_scm), spec.template, directory)
    source = taskinputs.uploaded_template(hub.session, spec)
    with fetched(hub, source, settings) as path:
        return path.read_bytes(), f"{spec.template_upload}/{spec.template}"


def _scm_url(task: _Task, asked: str) -> str:
    """The URL with the commit that the task has used, if it is known."""
    commit = task.record.template_commit
    if commit:
        return f"{asked.rpartition('#')[0]}#{commit}"
    log.warning("the template's commit is not known: %s as it is now", asked)
    return asked
