"""`koji indirection-build`, from a command line to a task and its end, and `indirection-replay`.

What the command lines mean is the library's business (koji_indirection/submission.py and
replay.py), and so are builds on this machine (localrun.py); this talks to Koji. It must
load where the library does not: a plugin that fails to load breaks every koji command.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import koji
from koji.plugin import export_cli
from koji_cli.lib import (
    _progress_callback,
    _running_in_bg,
    activate_session,
    ensure_connection,
    unique_path,
    warn,
    watch_tasks,
)


@export_cli
def handle_indirection_build(goptions: Any, session: Any, args: list[str]) -> int:
    """[build] Make an image with the tools that are inside another image"""
    try:
        from koji_indirection import errors, submission
        from koji_indirection.taskspec import UPLOAD_PREFIX
    except ImportError as error:
        return _library_is_missing("indirection-build", error)
    try:
        request = submission.request_from(args, upload_dir=unique_path(UPLOAD_PREFIX))
        # Standard output is for the JSON alone.
        human_output = sys.stderr if request.json else sys.stdout
        if request.dry_run:
            return _dry_run(goptions, session, request)
        if request.here is not None:
            return _build_here(goptions, session, request, submission.local_order)
        with contextlib.redirect_stdout(human_output):
            task_id = _submit(goptions, session, request)
            quiet = goptions.quiet or request.quiet
            wait = request.wait or (request.wait is None and not _running_in_bg())
            if not quiet:
                print(f"Created task: {task_id}")
                print(f"Task info: {goptions.weburl}/taskinfo?taskID={task_id}")
            elif not wait and not request.json:
                print(task_id)
        if not wait:
            if request.json:
                print(submission.result_json(task_id, None, None))
            return 0
        return _watch(goptions, session, request, task_id, quiet, human_output)
    except errors.IndirectionError as error:
        warn(error.one_line())
        return error.exit_status


@export_cli
def handle_indirection_replay(goptions: Any, session: Any, args: list[str]) -> int:
    """[build] Build on this machine what a task of indirection-build was to build"""
    try:
        from koji_indirection import errors, replay
    except ImportError as error:
        return _library_is_missing("indirection-replay", error)
    try:
        request = replay.request_from(args)
        return _build_here(goptions, session, request, replay.order_of)
    except errors.IndirectionError as error:
        warn(error.one_line())
        return error.exit_status


def _library_is_missing(command: str, error: ImportError) -> int:
    warn(f"builder fault: koji {command} cannot be used here: {error}"
         " (install the Python module koji_indirection and what it needs)")  # fmt: skip
    return 3


def _build_here(goptions: Any, session: Any, request: Any, order_of: Any) -> int:
    """Without a task, and without a login where none is needed to read."""
    from koji_indirection import command, localrun

    ensure_connection(session, goptions)
    topdir = Path(goptions.topdir) if goptions.topdir else None
    hub = localrun.Hub(session, goptions.topurl, topdir)

    def run() -> int:
        order = order_of(hub, request)
        quiet = goptions.quiet or request.quiet
        return localrun.run(hub, request.here, order, quiet=quiet, as_json=request.json)

    status: int = command.exit_status_of(run)
    return status


def _submit(goptions: Any, session: Any, request: Any) -> int:
    from koji_indirection.errors import BuilderFault

    activate_session(session, goptions)
    spec = request.spec
    if request.template_file is not None:
        quiet = goptions.quiet or request.quiet or request.noprogress
        callback = None if quiet or _running_in_bg() else _progress_callback
        session.uploadWrapper(
            str(request.template_file), spec.template_upload, spec.template, callback=callback
        )
        if callback is not None:
            print()
    try:
        task_id: int = session.indirectionBuild(spec.to_dict(), priority=request.priority)
    except koji.GenericError as error:
        if "Invalid method" not in str(error):
            raise
        raise BuilderFault(
            f"the hub {goptions.server} knows no indirection builds",
            "its administrator installs and enables the hub plugin",
        ) from None
    return task_id


def _watch(
    goptions: Any, session: Any, request: Any, task_id: int, quiet: bool, human_output: Any
) -> int:
    from koji_indirection import submission

    session.logout()
    state = build = None
    try:
        with contextlib.redirect_stdout(human_output):
            status: int = watch_tasks(
                session,
                [task_id],
                quiet=quiet,
                poll_interval=goptions.poll_interval,
                topurl=goptions.topurl,
            )
        if request.json:
            state = koji.TASK_STATES[session.getTaskInfo(task_id)["state"]]
            build = _build_of(session, task_id)
    finally:
        # Also when it was interrupted, or the hub went away: the task is still there.
        if request.json:
            print(submission.result_json(task_id, state, build))
    return status


def _build_of(session: Any, task_id: int) -> dict[str, Any] | None:
    builds = session.listBuilds(taskID=task_id)
    if not builds:  # a scratch build, or one that failed early
        return None
    build = max(builds, key=lambda one: int(one["build_id"]))
    return {**build, "id": build["build_id"], "state": koji.BUILD_STATES[build["state"]]}


def _dry_run(goptions: Any, session: Any, request: Any) -> int:
    from koji_indirection import localrun, submission

    ensure_connection(session, goptions)
    localrun.require_target(session, request.spec)
    inputs = submission.resolve_inputs(session, request.spec)
    shown = submission.dry_run_json if request.json else submission.dry_run_text
    print(shown(request, inputs))
    return 0
