"""Koji hub plugin: takes indirection builds from users, and records what they were made from.

It must never break the hub: whatever it needs beyond Koji is imported when a call needs
it, and its absence is that call's error. What a spec may say is the library's business
(koji_indirection.taskspec); who may ask for what is decided here.
"""

from __future__ import annotations

import configparser
import json

import koji
import koji.tasks
import kojihub
from koji.context import context
from koji.plugin import export, export_in

CONFIG_FILE = "/etc/koji-hub/plugins/indirection.conf"
CONFIG_SECTION = "indirection"
DEFAULTS = {"channel": "image"}
METHOD = "indirectionBuild"
MAX_PRIORITY = 1000
POLICY = "indirection"
UPLOAD_POLICY = "indirection_template_upload"

# So that Koji's own policies find what they know by these names: target, and scratch in opts. The
# builder reads the spec alone. kojiweb, a process of its own, loads no plugins: it shows a list.
koji.tasks.LEGACY_SIGNATURES.update(
    {
        METHOD: [[["spec", "target", "opts"], None, None, (None, None)]],
        "indirectionBuildArch": [[["spec", "arch", "nvr", "pinned"], None, None, None]],
    }
)


@export
def indirectionBuild(spec, priority=None):
    """
    Start an image build with the tools of another image

    spec: what to build; koji_indirection.taskspec.SCHEMA describes it
    priority: added to Koji's default priority: above 0 others go first, and below 0,
              which needs the permission admin, this task does

    Needs the permission image, and the consent of the policy named indirection; for an
    uploaded template, unless the build is scratch, of indirection_template_upload too.
    Returns the id of the task.
    """
    context.session.assertPerm("image")
    checked = _task_spec(spec)
    target = kojihub.get_build_target(checked.target)
    if target is None:
        raise koji.ParameterError(f"target: there is no build target {checked.target!r}")
    _check_arches(checked, target)
    task_options = {
        "channel": _settings()["channel"],
        # One arch is built by the task itself, several by a subtask each.
        "arch": checked.arches[0] if len(checked.arches) == 1 else "noarch",
    }
    if priority is not None:
        task_options["priority"] = koji.PRIO_DEFAULT + _checked_priority(priority)
    policy_data = _policy_data(checked, target, task_options["channel"])
    if checked.template_upload is not None and not checked.scratch:
        _check_upload(policy_data)
    kojihub.assert_policy(POLICY, policy_data)
    if not checked.scratch and not checked.skip_tag:
        _check_package(checked.name, target)
    arguments = [checked.to_dict(), target["name"], {"scratch": checked.scratch}]
    return kojihub.make_task(METHOD, arguments, **task_options)


@export_in("host")
def recordIndirectionInputs(task_id, build_id, inputs, extra=None):
    """
    Record what a finished build was made from

    task_id: the indirectionBuild task; it is open, and on the host that calls
    build_id: its build; COMPLETE
    inputs: list of maps, an input image and a utility image for each arch: arch, role
            ("utility image" or "input image"), reference, filename, checksum,
            checksum_type, and archive_id of a build's archive or task_id of a task's output
    extra: map with, if known, template_commit and template_sha256

    Archives of builds become components of the build's archives of the same arch, so
    that listArchives(imageID=...) shows them; all of it is put into the build's extra,
    under indirection. It can be called again.

    Returns what is now in the build's extra under indirection
    """
    host = kojihub.Host()
    host.verify()
    task = kojihub.Task(task_id)
    task.assertHost(host.id)
    info = task.getInfo(strict=True, request=True)
    if info["method"] != METHOD:
        raise koji.GenericError(f"task {task.id} is not an {METHOD} task")
    spec = _task_spec(info["request"][0])
    extra = {} if extra is None else extra
    _check_provenance(spec, inputs, extra)
    build = _finished_build(task.id, build_id)
    _add_components(_components(spec, build, inputs))
    return _put_into_extra(build, _record(spec, inputs, extra))


# --- the library and the settings -------------------------------------------------------------


def _task_spec(data):
    """A TaskSpec that is valid; ParameterError naming the field, GenericError without library."""
    library = _library()
    try:
        return library.taskspec.TaskSpec.from_dict(data)
    except library.errors.UsageError as error:
        raise koji.ParameterError(str(error)) from error
    except library.errors.IndirectionError as error:
        raise koji.GenericError(f"the hub cannot take indirection builds: {error}") from error


def _check_provenance(spec, inputs, extra):
    library = _library()
    try:
        library.taskspec.check_provenance(spec, inputs, extra)
    except library.errors.UsageError as error:
        raise koji.ParameterError(str(error)) from error


def _library():
    try:
        import koji_indirection.errors
        import koji_indirection.taskspec
    except ImportError as error:
        raise koji.GenericError(
            "the hub cannot take indirection builds: the Python module koji_indirection "
            f"cannot be imported ({error}): install it on the hub"
        ) from error
    return koji_indirection


def _settings():
    """The settings as they are now: a change needs no restart."""
    try:
        config = koji.read_config_files(CONFIG_FILE, raw=True)
    except (configparser.Error, koji.GenericError, OSError, ValueError) as error:
        raise koji.GenericError(f"{CONFIG_FILE} cannot be read: {error}") from error
    for section in config.sections():
        for key in config.options(section):
            if section != CONFIG_SECTION or key not in DEFAULTS:
                raise koji.GenericError(f"{CONFIG_FILE}: there is no setting {key} in [{section}]")
    given = dict(config.items(CONFIG_SECTION)) if config.has_section(CONFIG_SECTION) else {}
    return {key: given.get(key) or default for key, default in DEFAULTS.items()}


# --- who may ask for what ---------------------------------------------------------------------


def _checked_priority(priority):
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise koji.ParameterError(f"priority is {priority!r:.80}, which is not a whole number")
    if abs(priority) > MAX_PRIORITY:
        raise koji.ParameterError(f"priority is {priority}: give at most {MAX_PRIORITY}")
    if priority < 0 and not context.session.hasPerm("admin"):
        raise koji.ActionNotAllowed(
            f"priority is {priority}: one below 0 needs the permission admin"
        )
    return priority


def _check_arches(spec, target):
    config = context.handlers.call("getBuildConfig", target["build_tag"])
    possible = (config["arches"] or "").split()
    # Koji compares canonical arches: a tag with i686 is good for i386.
    canonical = {koji.canonArch(arch) for arch in possible}
    for arch in spec.arches:
        if koji.canonArch(arch) not in canonical:
            raise koji.ParameterError(
                f"arches has {arch!r}, which the build tag {config['name']} of target "
                f"{target['name']} does not have (its arches: {', '.join(possible) or 'none'})"
            )


def _check_package(name, target):
    """The builder checks it too, when it starts; a user should not wait for that."""
    tag = target["dest_tag_name"]
    config = context.handlers.call("getPackageConfig", target["dest_tag"], name)
    if config is None:
        raise koji.BuildError(f"package {name} is not in the list of tag {tag}")
    if config["blocked"]:
        raise koji.BuildError(f"package {name} is blocked in tag {tag}")


def _check_upload(policy_data):
    """Raise ActionNotAllowed unless a policy allows builds whose template nobody can look up."""
    reason = ""
    # Koji takes a policy that is missing for one that allows, as long as MissingPolicyOk is set.
    if context.policy.get(UPLOAD_POLICY):
        allowed, reason = kojihub.check_policy(UPLOAD_POLICY, policy_data)
        if allowed:
            return
    raise koji.ActionNotAllowed(
        "a build that is not scratch needs its template from source control: "
        "give template_scm instead of template_upload" + (f" ({reason})" if reason else "")
    )


def _policy_data(spec, target, channel):
    """What docs/hub-admin.md promises to whoever writes the policy."""
    # Of networks that differ between arches, having none matters least: a rule for "none" must
    # not let a network through, and one against a network must see it.
    networks = [name for name in spec.networks if name != "none"]
    data = {
        "method": METHOD,
        "user_id": context.session.user_id,
        "target": target["name"],
        "build_tag": target["build_tag"],
        "package": spec.name,
        "version": spec.version,
        # Not None: a pattern that meets it is an error before Koji 1.35, and so is to leave it out.
        "release": spec.release or "",
        "channel": channel,
        "arches": list(spec.arches),
        "scratch": spec.scratch,
        "skip_tag": spec.skip_tag,
        "accel": spec.accel,
        "network": " ".join(sorted(networks)) or "none",
        "networks": list(spec.networks),
        "repos": sorted({url for arch in spec.arches for url in spec.build_for(arch).repos}),
        "tag_repo": spec.tag_repo,
        "utility_image": spec.utility_image,
        "input_image": spec.input_image,
        "template_source": "upload" if spec.template_scm is None else "scm",
        "source": spec.template_scm or "",
        "btypes": ["image"],
    }
    if not spec.scratch and not spec.skip_tag:
        data["tag"] = target["dest_tag"]
    return data


# --- what a build was made from ---------------------------------------------------------------


def _finished_build(task_id, build_id):
    build = kojihub.get_build(kojihub.convert_value(build_id, cast=int), strict=True)
    if build["task_id"] != task_id:
        raise koji.ActionNotAllowed(f"build {build['nvr']} does not belong to task {task_id}")
    if build["state"] != koji.BUILD_STATES["COMPLETE"]:
        raise koji.GenericError(f"build {build['nvr']} is not complete")
    return build


def _components(spec, build, inputs):
    """Pairs of ids: an archive of the build, an archive that it was made from."""
    images = {}
    for archive in kojihub.list_archives(buildID=build["id"], type="image"):
        images.setdefault(archive["arch"], []).append(archive["id"])
    pairs = set()
    for one in inputs:
        if one["arch"] not in images and one["arch"] not in spec.can_fail:
            raise koji.GenericError(f"build {build['nvr']} has no archive for {one['arch']}")
        if one.get("archive_id") is not None:
            component = _input_archive(build, one)
            pairs.update((image, component["id"]) for image in images.get(one["arch"], ()))
    return pairs


def _input_archive(build, one):
    archive = kojihub.get_archive(one["archive_id"], strict=True)
    what = f"archive {archive['id']} ({one['role']})"
    if archive["btype"] != "image":
        raise koji.GenericError(f"{what} is no image but of type {archive['btype']}")
    if archive["build_id"] == build["id"]:
        raise koji.GenericError(f"{what} belongs to build {build['nvr']} itself")
    for key in ("filename", "checksum", "checksum_type"):
        if archive[key] != one[key]:
            raise koji.GenericError(f"{what} has {key} {archive[key]}, not {one[key]}")
    # A build that has been deleted since it was fetched is still what was used.
    used = kojihub.get_build(archive["build_id"], strict=True)
    if used["state"] not in (koji.BUILD_STATES["COMPLETE"], koji.BUILD_STATES["DELETED"]):
        raise koji.GenericError(f"{what} belongs to {used['nvr']}, which is not complete")
    return archive


def _add_components(pairs):
    """Those that are not there yet; the lock on the task keeps other callers out."""
    insert = kojihub.BulkInsertProcessor("archive_components")
    new = pairs - _recorded_components({image for image, _ in pairs})
    for image, component in sorted(new):
        insert.add_record(archive_id=image, component_id=component)
    if new:
        insert.execute()


def _recorded_components(images):
    query = kojihub.QueryProcessor(
        tables=["archive_components"],
        columns=["archive_id", "component_id"],
        clauses=["archive_id IN %(images)s"],
        values={"images": sorted(images)},
    )
    rows = query.execute() if images else []
    return {(row["archive_id"], row["component_id"]) for row in rows}


def _record(spec, inputs, extra):
    record = {
        "template": spec.template,
        "utility_image": spec.utility_image,
        "input_image": spec.input_image,
        "inputs": [
            {key: value for key, value in one.items() if value is not None} for one in inputs
        ],
        **extra,
    }
    if spec.template_scm is not None:
        record["template_scm"] = spec.template_scm
    return record


def _put_into_extra(build, record):
    extra = {**(build["extra"] or {}), "indirection": record}
    update = kojihub.UpdateProcessor(
        "build", clauses=["id = %(build_id)i"], values={"build_id": build["id"]}
    )
    update.set(extra=json.dumps(extra))
    update.execute()
    return record
