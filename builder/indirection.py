"""Koji builder plugin: the tasks of `koji indirection-build`.

Thin: it knows the daemon and the hub's calls, koji_indirection knows the rest. It needs
koji.tasks and koji.daemon only, so it runs under kojid and under any other TaskManager.
It must import where the library is missing: kojid would not start otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import os
import xmlrpc.client
from pathlib import Path

import koji
import koji.daemon
import koji.tasks

try:
    from koji_indirection import handover, hubcalls, kojibuild, sweep, taskinputs, taskrun
    from koji_indirection.errors import BuilderFault, IndirectionError
    from koji_indirection.taskspec import TaskSpec

    MISSING = ""
except ImportError as error:
    MISSING = f"this builder cannot do indirection builds: {error}"

CONFIG = Path("/etc/kojid/plugins/indirection.conf")

# Koji has it since 1.34. Before, only checkHost() can refuse a task, and never for good.
RefuseTask = getattr(koji.tasks, "RefuseTask", None)

# Of a VM, and of a task that only waits for others.
WEIGHT = 2.0
WEIGHT_OF_WAITING = 0.2


class _Task(koji.tasks.BaseTaskHandler):
    """What both kinds of task have in common."""

    def run(self):
        """In the process of the task, with a session of its own by now."""
        if not MISSING:
            self.session = taskrun.patient(CONFIG, self.session)
        return super().run()

    def createWorkdir(self):
        """A new one for each run, not one that an earlier run may still be using."""
        if MISSING:
            return
        runs = taskrun.runs_directory(CONFIG)
        self._run_directory = taskrun.RunDirectory.make(Path(self.workdir), runs)
        self.workdir = str(self._run_directory.path)

    def removeWorkdir(self):
        if not MISSING:
            self._run_directory.remove()

    def _suits(self, arch, hostdata):
        """A False is for good since Koji 1.34: what may change is asked in handler() there.

        Before 1.34 the task is offered again, and handler() could not refuse it.
        """
        if not taskrun.runs_here(arch, hostdata["arches"].split()):
            return False
        return RefuseTask is not None or not self._lacks_something(arch)

    def _lacks_something(self, arch):
        """What handler() asks, for a Koji in which it is too late then."""
        try:
            spec = TaskSpec.from_dict(self.params[0])
            settings = taskrun.task_settings(CONFIG, spec, Path(self.workdir))
            taskrun.require_host(spec, arch, settings)
        except taskrun.Unsuitable as reason:
            self.logger.warning("task %s is left to other hosts: %s", self.id, reason)
            return True
        except IndirectionError:
            pass  # the task itself will tell
        return False

    def _settings(self, spec, arch):
        """Of this host, which must suit the arch that it is to build, if it is to build one."""
        settings = taskrun.task_settings(CONFIG, spec, Path(self.workdir) / "vm")
        if arch is not None:
            with _refusals():
                taskrun.require_host(spec, arch, settings)
        return settings

    # The daemon's means

    def _daemon(self, spec):
        def upload(path, name):
            self.session.uploadWrapper(str(path), self.getUploadDir(), name)

        def append(file, name):
            koji.daemon.incremental_upload(self.session, name, file, self.getUploadDir())

        topdir = getattr(self.options, "topdir", None)
        return taskrun.Daemon(
            session=self.session,
            task_id=self.id,
            topurl=getattr(self.options, "topurl", None),
            topdir=Path(topdir) if topdir else None,
            work_dir=Path(self.workdir),
            checkout=lambda url, directory: self._checkout(url, directory, spec),
            upload=upload,
            append=append,
        )

    def _checkout(self, url, directory, spec):
        scm = koji.daemon.SCM(url)
        options = self.options
        scm.assert_allowed(
            allowed=getattr(options, "allowed_scms", ""),
            session=self.session,
            by_config=getattr(options, "allowed_scms_use_config", True),
            by_policy=getattr(options, "allowed_scms_use_policy", False),
            policy_data={
                "user_id": self.taskinfo["owner"],
                "channel": self.session.getChannel(self.taskinfo["channel_id"], strict=True)[
                    "name"
                ],
                "scratch": spec.scratch,
            },
        )
        scm.use_common = False  # a template needs no common/ directory beside it
        log = Path(self.workdir) / "checkout.log"
        # Nobody is there to be asked for a password.
        os.environ["GIT_TERMINAL_PROMPT"] = "0"
        settings = taskrun.task_settings(CONFIG, spec, Path(self.workdir))
        with taskinputs.checkout_deadline(settings):
            checkout = scm.checkout(str(directory), self.session, self.getUploadDir(), str(log))
        return Path(checkout), scm.get_source()["source"]


class IndirectionBuildTask(_Task):
    """One image build: the work itself for one arch, a subtask each for several."""

    Methods = ("indirectionBuild",)

    def weight(self):
        return WEIGHT if self._only_arch() else WEIGHT_OF_WAITING

    def checkHost(self, hostdata):
        arch = self._only_arch()
        return not arch or self._suits(arch, hostdata)

    def _only_arch(self):
        """The one that this task builds itself; None for several, or what handler() refuses."""
        spec = self.params[0] if self.params else None
        arches = spec.get("arches") if isinstance(spec, dict) else None
        if MISSING or not isinstance(arches, list) or len(arches) != 1:
            return None
        return arches[0]

    def handler(self, spec, target=None, opts=None):
        """The spec says it all; target and opts are for the hub's policies."""
        if MISSING:
            raise koji.GenericError(MISSING)
        with _told_to_koji(), taskrun.interrupted_once():
            return self._build(TaskSpec.from_dict(spec))

    def _build(self, spec):
        return self._scratch(spec) if spec.scratch else self._tagged(spec)

    def _tagged(self, spec):
        build = kojibuild.own_build(self.session, self.id)
        complete = build is not None and build["state"] == hubcalls.COMPLETE
        daemon = self._daemon(spec)
        with self._failing(build):
            settings = None if complete else self._settings(spec, self._only_arch())
            target = kojibuild.check_target(self.session, spec)
            inputs, no_image = (None, {}) if complete else self._inputs(spec, target, settings)
        if complete:
            _, entries = handover.handed_over(daemon) or (None, None)
        else:
            if build is None:
                with self._failing(None):
                    build = kojibuild.init_build(self.session, self.id, spec, inputs)
            with self._failing(build):
                entries = self._entries(spec, _nvr(build), inputs, no_image, settings)
                handover.complete_build(daemon, build, entries)
        if entries is not None:
            self._record_inputs(build, entries)
        if not spec.skip_tag:
            self._tag(daemon, target, build)
        return {"build_id": build["id"], "nvr": _nvr(build), "task_id": self.id}

    def _scratch(self, spec):
        daemon = self._daemon(spec)
        earlier = handover.handed_over(daemon)
        if earlier is not None:
            nvr, entries = earlier
            files = handover.move_to_scratch_again(daemon, entries)
        else:
            settings = self._settings(spec, self._only_arch())
            target = kojibuild.check_target(self.session, spec)
            inputs, no_image = self._inputs(spec, target, settings)
            nvr = f"{spec.name}-{spec.version}-{kojibuild.release_of(self.session, spec)}"
            entries = self._entries(spec, nvr, inputs, no_image, settings)
            files = handover.move_to_scratch(daemon, nvr, entries)
        return {"nvr": nvr, "files": files, "task_id": self.id}

    def _inputs(self, spec, target, settings):
        inputs, no_image = taskinputs.find_inputs(self._daemon(spec), spec, target, settings)
        types = kojibuild.ArchiveTypes(self.session)
        for arch in spec.arches:
            types.check_patterns(spec.build_for(arch).results)
        arch = self._only_arch()
        if arch is not None:
            with _refusals():
                taskrun.require_space(inputs[arch].input_image, settings)
        return inputs, no_image

    def _entries(self, spec, nvr, inputs, no_image, settings):
        """What build_arch() gave for each arch; of one that could fail maybe a fault."""
        arch = self._only_arch()
        if arch:
            return [
                kojibuild.build_arch(self._daemon(spec), spec, arch, nvr, inputs[arch], settings)
            ]
        pinned = {arch: one.pinned() for arch, one in inputs.items()}
        found = next(iter(inputs.values()))
        pinned.update((arch, found.without_image(why)) for arch, why in no_image.items())
        tasks = {
            arch: self.session.host.subtask(
                method="indirectionBuildArch",
                arglist=[spec.to_dict(), arch, nvr, pinned[arch]],
                label=arch,
                parent=self.id,
                arch=arch,
            )
            for arch in spec.arches
        }
        can_fail = [tasks[arch] for arch in spec.can_fail]
        return taskrun.wait_for_subtasks(self._daemon(spec), list(tasks.values()), can_fail)

    @contextlib.contextmanager
    def _failing(self, build):
        """From BUILDING to FAILED on any error; an interrupted or refused build stays as it is.

        Cancelled, the hub has marked it already; with kojid stopped, the task runs again.
        build -- None if the hub may have made one that we have not been told of.
        """
        try:
            yield
        except Exception as error:
            if RefuseTask is None or not isinstance(error, RefuseTask):
                self._fail(build)
            raise

    def _fail(self, build):
        """The hub refuses it for a build that is not BUILDING any more."""
        try:
            build = build or kojibuild.own_build(self.session, self.id)
            if build is not None:
                self.session.cancelTaskChildren(self.id)
                self.session.host.failBuild(self.id, build["id"])
        except Exception as error:  # noqa: BLE001 - the reason of the failure comes first
            self.logger.warning("the build cannot be marked as failed: %s", error)

    def _record_inputs(self, build, entries):
        """With the hub's plugin, if it has this call; build.extra tells the same in any case."""
        images, template = handover.provenance(entries)
        try:
            self.session.host.recordIndirectionInputs(self.id, build["id"], images, template)
        except (koji.GenericError, xmlrpc.client.Fault) as error:
            self.logger.warning("the inputs of build %s are not linked: %s", build["id"], error)

    def _tag(self, daemon, target, build):
        """A label of its own: the hub gives a task that runs again the child it has already."""
        tag_task = self.session.host.subtask(
            method="tagBuild",
            arglist=[target["dest_tag"], build["id"], False, None, True],
            label="tag",
            parent=self.id,
            arch="noarch",
        )
        taskrun.wait_for_subtasks(daemon, [tag_task])


class IndirectionBuildArchTask(_Task):
    """One arch of several, from what the parent task has found."""

    Methods = ("indirectionBuildArch",)
    _taskWeight = WEIGHT

    def checkHost(self, hostdata):
        _, arch, _, pinned = self.params
        return bool(MISSING) or not taskinputs.has_image(pinned) or self._suits(arch, hostdata)

    def handler(self, spec, arch, nvr, pinned):
        if MISSING:
            raise koji.GenericError(MISSING)
        with _told_to_koji(), taskrun.interrupted_once():
            taskinputs.require_image(pinned)  # before any host is asked for what it would need
            spec = TaskSpec.from_dict(spec)
            daemon, settings = self._daemon(spec), self._settings(spec, arch)
            inputs = taskinputs.pinned_inputs(daemon, spec, pinned, settings)
            with _refusals():
                taskrun.require_space(inputs.input_image, settings)
            return kojibuild.build_arch(daemon, spec, arch, nvr, inputs, settings)


def _nvr(build):
    return "{name}-{version}-{release}".format(**build)


@contextlib.contextmanager
def _told_to_koji():
    """Errors of the library as Koji shows them to users: one sentence, no traceback."""
    try:
        yield
    except BuilderFault as error:
        raise koji.GenericError(error.one_line()) from error
    except IndirectionError as error:
        raise koji.BuildError(error.one_line()) from error


@contextlib.contextmanager
def _refusals():
    """Soft ones, with their reason in the hub's log; only before anything has been done."""
    try:
        yield
    except taskrun.Unsuitable as error:
        if RefuseTask is None:
            raise BuilderFault(str(error)) from error
        raise RefuseTask(str(error)) from error


if not MISSING:
    sweep.start(CONFIG, logging.getLogger("koji.plugin.indirection"))
