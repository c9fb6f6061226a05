"""Koji builder plugin: the tasks of `koji indirection-build`.

Thin: it knows the daemon and the hub's calls, koji_indirection knows the rest. It needs
koji.tasks and koji.daemon only, so it runs under kojid and under any other TaskManager.
It must import where the library is missing: kojid would not start otherwise.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import koji
import koji.daemon
import koji.tasks

try:
    from koji_indirection import kojibuild
    from koji_indirection.errors import BuilderFault, IndirectionError
    from koji_indirection.taskspec import TaskSpec

    MISSING = ""
except ImportError as error:
    MISSING = f"this builder cannot do indirection builds: {error}"

CONFIG = "/etc/kojid/plugins/indirection.conf"


class IndirectionBuildTask(koji.tasks.BaseTaskHandler):
    """One image build: everything for one arch."""

    Methods = ("indirectionBuild",)
    _taskWeight = 2.0

    def checkHost(self, hostdata):
        """Whether this host is of the right arch; a False here is for good.

        What may change is asked in handler(), whose refusals other hosts and later times may lift.
        """
        if MISSING:
            return True  # handler() says so, and the user can read it
        arches = self.params[0].get("arches") or []
        if len(arches) != 1:
            return True
        return kojibuild.runs_here(arches[0], hostdata["arches"].split())

    def handler(self, spec):
        if MISSING:
            raise koji.GenericError(MISSING)
        with _told_to_koji(), kojibuild.interrupted_once():
            return self._build(TaskSpec.from_dict(spec))

    def _build(self, spec):
        if len(spec.arches) != 1:
            raise koji.BuildError(
                "this version builds one arch in a task: submit one build for each arch"
            )
        (arch,) = spec.arches
        daemon = self._daemon(spec)
        settings = self._settings(spec, arch)
        target = kojibuild.check_target(self.session, spec)
        build = None if spec.scratch else kojibuild.own_build(self.session, self.id)
        if build is None or build["state"] != kojibuild.COMPLETE:
            inputs = kojibuild.find_inputs(daemon, spec, arch, settings)
            types = kojibuild.ArchiveTypes(self.session)
            types.check_patterns(spec.build_for(arch).results)
            with _refusals():
                kojibuild.require_space(inputs, settings)
            if spec.scratch:
                return self._scratch(daemon, spec, arch, inputs, settings)
            build = build or self._init_build(spec, inputs)
            self._complete(daemon, spec, arch, build, inputs, settings)
        if not spec.skip_tag:
            self._tag(target, build)
        return {"build_id": build["id"], "nvr": _nvr(build), "task_id": self.id}

    def _settings(self, spec, arch):
        parser = koji.read_config_files(CONFIG)
        with _refusals():
            settings = kojibuild.task_settings(parser, CONFIG, spec, Path(self.workdir) / "vm")
            kojibuild.require_host(spec.build_for(arch), settings)
        return settings

    def _init_build(self, spec, inputs):
        return self.session.host.initImageBuild(
            self.id,
            {
                "name": spec.name,
                "version": spec.version,
                "release": kojibuild.release_of(self.session, spec),
                "epoch": 0,
                "source": inputs.template_source,
                "extra": {"indirection": inputs.record()},
            },
        )

    def _complete(self, daemon, spec, arch, build, inputs, settings):
        """From BUILDING to COMPLETE, or to FAILED; an interrupted build stays as it is.

        Cancelled, the hub has marked it already; with kojid stopped, the task runs again.
        """
        try:
            entry = kojibuild.build_arch(daemon, spec, arch, _nvr(build), inputs, settings)
            self.session.host.completeImageBuild(
                self.id, build["id"], kojibuild.hub_results([entry])
            )
        except Exception:
            self._fail(build)
            raise
        self._record_inputs(build, [entry])

    def _fail(self, build):
        try:
            self.session.host.failBuild(self.id, build["id"])
        except Exception as error:  # noqa: BLE001 - the reason of the failure comes first
            self.logger.warning("build %s cannot be marked as failed: %s", build["id"], error)

    def _record_inputs(self, build, entries):
        """With the hub's plugin, if it has this call; build.extra tells the same in any case."""
        inputs = {entry["arch"]: entry["inputs"] for entry in entries}
        try:
            self.session.host.recordIndirectionInputs(self.id, build["id"], inputs)
        except koji.GenericError as error:
            self.logger.warning("the inputs of build %s are not linked: %s", build["id"], error)

    def _scratch(self, daemon, spec, arch, inputs, settings):
        nvr = f"{spec.name}-{spec.version}-{kojibuild.release_of(self.session, spec)}"
        entry = kojibuild.build_arch(daemon, spec, arch, nvr, inputs, settings)
        self.session.host.moveImageBuildToScratch(self.id, kojibuild.hub_results([entry]))
        return {"nvr": nvr, "files": entry["files"], "task_id": self.id}

    def _tag(self, target, build):
        """A label of its own: the hub gives a task that runs again the child it has already."""
        tag_task = self.session.host.subtask(
            method="tagBuild",
            arglist=[target["dest_tag"], build["id"], False, None, True],
            label="tag",
            parent=self.id,
            arch="noarch",
        )
        self.wait(tag_task)

    # The daemon's means

    def _daemon(self, spec):
        def upload(path, name):
            self.session.uploadWrapper(str(path), self.getUploadDir(), name)

        def append(file, name):
            koji.daemon.incremental_upload(self.session, name, file, self.getUploadDir())

        topdir = getattr(self.options, "topdir", None)
        return kojibuild.Daemon(
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
        checkout = scm.checkout(str(directory), self.session, self.getUploadDir(), str(log))
        return Path(checkout), scm.get_source()["source"]


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
    except kojibuild.Unsuitable as error:
        raise koji.tasks.RefuseTask(str(error)) from error
