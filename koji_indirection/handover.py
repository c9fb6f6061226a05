"""What a builder gives the hub: verified uploads, which files make a build, and from what.

The hub compares nothing, and some of its calls cannot be made twice. This must never complete
a build with files that are not what was collected, or take one for failed that is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import hubcalls
from .errors import BuilderFault, BuildFailed
from .sources import Source
from .taskinputs import Inputs
from .taskrun import Daemon
from .taskspec import TaskSpec

log = logging.getLogger(__name__)

HANDOVER = "handover.json"

# --- uploads ----------------------------------------------------------------------------------

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
        if code is None or code in hubcalls.LOST:
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


# --- the end of a task ------------------------------------------------------------------------


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
        if daemon.session.getBuild(build["id"])["state"] != hubcalls.COMPLETE:
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


# --- what a build is made from ----------------------------------------------------------------


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


def rpm_list(session: Any, source: Source) -> list[dict[str, Any]]:
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
