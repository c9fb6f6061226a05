"""Builds and their archives: made, imported, tagged, listed."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import koji
import koji.plugin
from koji.context import context

from . import files, policies, records, tasks
from .database import Row, with_times

BUILDING, COMPLETE, DELETED, FAILED, CANCELED = (
    koji.BUILD_STATES[name] for name in ("BUILDING", "COMPLETE", "DELETED", "FAILED", "CANCELED")
)
SHA256 = koji.CHECKSUM_TYPES["sha256"]

_BUILD = """
    SELECT build.id, build.id AS build_id, package.name, package.name AS package_name,
        build.version, build.release, build.epoch, build.draft, build.state, build.task_id,
        build.start_time, build.completion_time, build.source, build.extra, build.owner AS owner_id,
        users.name AS owner_name, build.pkg_id AS package_id, build.volume_id,
        volume.name AS volume_name, build.create_event AS creation_event_id,
        events.time AS creation_time, build.cg_id, content_generator.name AS cg_name,
        package.name || '-' || version || '-' || release AS nvr
    FROM build JOIN package ON package.id = pkg_id JOIN users ON users.id = owner
        JOIN volume ON volume.id = volume_id JOIN events ON events.id = build.create_event
        LEFT JOIN content_generator ON content_generator.id = build.cg_id
"""


def _as_build(row: Row) -> Row:
    row.update(promoter_id=None, promoter_name=None, promotion_time=None)
    return with_times(row, "start", "completion", "creation", "promotion")


def get_build(buildInfo: Any, strict: bool = False) -> Row | None:
    """buildInfo -- an id, NVR, or map with an id or name, version and release."""
    if isinstance(buildInfo, dict) and "id" in buildInfo:
        buildInfo = buildInfo["id"]
    if isinstance(buildInfo, int):
        row = context.db.row(f"{_BUILD} WHERE build.id = %(id)s", id=buildInfo)
    else:
        try:
            nvr = koji.parse_NVR(buildInfo) if isinstance(buildInfo, str) else buildInfo
        except koji.GenericError:
            nvr = {"name": None, "version": None, "release": None}
        row = context.db.row(
            f"{_BUILD} WHERE package.name = %(name)s AND version = %(version)s"
            " AND release = %(release)s",
            **{name: nvr[name] for name in ("name", "version", "release")},
        )
    return records.found(row and _as_build(row), strict, f"No such build: {buildInfo!r}")


def required(build: Any) -> Row:
    row = get_build(build, strict=True)
    assert row is not None
    return row


def new_build(data: Mapping[str, Any], **columns: Any) -> int:
    """A BUILDING one; one that has failed or was cancelled makes room for it."""
    old = get_build({name: data[name] for name in ("name", "version", "release")})
    row = {
        "pkg_id": records.package_id(data["name"]),
        "version": data["version"],
        "release": data["release"],
        "epoch": data.get("epoch"),
        "task_id": data.get("task_id"),
        "source": data.get("source"),
        "extra": json.dumps(data["extra"]) if data.get("extra") is not None else None,
        "state": BUILDING,
        "start_time": time.time(),
        "completion_time": None,
        "create_event": context.db.event(),
        **columns,
    }
    if old is None:
        return int(context.db.insert("build", **row))
    if old["state"] == BUILDING:
        if old["task_id"] is not None and old["task_id"] == row["task_id"]:
            return int(old["id"])
        raise koji.GenericError(f"Build already in progress (task {old['task_id']})")
    if old["state"] not in (FAILED, CANCELED):
        state = koji.BUILD_STATES[old["state"]]
        raise koji.GenericError(f"Build already exists (id={old['id']}, state={state}): {data}")
    context.db.rows("DELETE FROM build_types WHERE build_id = %(id)s", id=old["id"])
    _change(old["id"], row)
    return int(old["id"])


def _change(build_id: int, columns: Mapping[str, Any]) -> None:
    places = ", ".join(f"{name} = %({name})s" for name in columns)
    context.db.rows(f"UPDATE build SET {places} WHERE id = %(id)s", {**columns, "id": build_id})


def end_build(build_id: int, state: int) -> None:
    """Tells the plugins, before and after."""
    for when in ("pre", "post"):
        info = required(build_id)
        koji.plugin.run_callbacks(
            f"{when}BuildStateChange", attribute="state", old=BUILDING, new=state, info=info
        )
        if when == "pre":
            _change(build_id, {"state": state, "completion_time": time.time()})


def cancel_builds_of(task_id: int) -> None:
    for build_id in context.db.values(
        "SELECT id FROM build WHERE task_id = %(task)s AND state = %(state)s",
        task=task_id,
        state=BUILDING,
    ):
        end_build(build_id, CANCELED)


def type_of(filename: str) -> Row | None:
    """The longest extension that is known counts: tar.gz before gz."""
    known = context.db.rows("SELECT * FROM archivetypes ORDER BY id")
    parts = filename.lower().split(".")
    for start in range(len(parts)):
        extension = ".".join(parts[start:])
        for one in known:
            if extension in one["extensions"].split():
                return dict(one)
    return None


# Archives

_ARCHIVE = """
    SELECT archiveinfo.id, type_id, btype_id, btype.name AS btype, build_id, buildroot_id, filename,
        size, checksum, checksum_type, metadata_only, archiveinfo.extra,
        archivetypes.name AS type_name, archivetypes.description AS type_description,
        archivetypes.extensions AS type_extensions, archivetypes.compression_type
    FROM archiveinfo JOIN archivetypes ON archivetypes.id = type_id
        JOIN btype ON btype.id = btype_id
"""
_FILTERS = {
    "buildID": "build_id = %(buildID)s",
    "buildrootID": "buildroot_id = %(buildrootID)s",
    "imageID": "archiveinfo.id IN"
    " (SELECT component_id FROM archive_components WHERE archive_id = %(imageID)s)",
    "type": "btype.name = %(type)s",
    "filename": "filename = %(filename)s",
    "size": "size = %(size)s",
    "checksum": "checksum = %(checksum)s",
    "checksum_type": "checksum_type = %(checksum_type)s",
    "archiveID": "archiveinfo.id = %(archiveID)s",
}


def list_archives(buildID: Any = None, **filters: Any) -> list[Row]:
    """filters -- those of _FILTERS; with the type image each archive has its arch."""
    filters = {**filters, "buildID": buildID}
    given = {name: filters[name] for name in _FILTERS if filters.get(name) is not None}
    clauses = "".join(f" AND {_FILTERS[name]}" for name in given)
    archives: list[Row] = context.db.rows(
        f"{_ARCHIVE} WHERE TRUE{clauses} ORDER BY archiveinfo.id", given
    )
    if filters.get("type") == "image":
        for archive in archives:
            archive["arch"] = _image_arch(archive["id"])
    return archives


def _image_arch(archive_id: int) -> Any:
    return context.db.value(
        "SELECT arch FROM image_archives WHERE archive_id = %(id)s", id=archive_id
    )


def get_archive(archive_id: Any, strict: bool = False) -> Row | None:
    row = context.db.row(f"{_ARCHIVE} WHERE archiveinfo.id = %(id)s", id=archive_id)
    if row is not None and row["btype"] == "image":
        row.update(arch=_image_arch(row["id"]), rootid=False)
    return records.found(row, strict, f"No such archive: {archive_id!r}")


def import_archive(build: Row, file: Path, arch: str, **columns: Any) -> int:
    """The id of the new archive; the file is moved to where images of the build are."""
    kind = type_of(file.name)
    if kind is None:
        raise koji.BuildError(f"Unsupported file type: {file.name}")
    if not file.is_file():
        raise koji.GenericError(f"No such file: {file}")
    new: int = context.db.insert(
        "archiveinfo",
        type_id=kind["id"],
        btype_id=context.db.value("SELECT id FROM btype WHERE name = 'image'"),
        build_id=build["id"],
        filename=file.name,
        size=file.stat().st_size,
        checksum=files.sha256_of(file),
        checksum_type=SHA256,
        **columns,
    )
    context.db.insert("image_archives", archive_id=new, arch=arch)
    files.move(file, Path(koji.pathinfo.imagebuild(build)) / file.name)
    return new


def _import_image(build: Row, image: Row) -> None:
    """One entry of completeImageBuild(): its files, all logs of its task, its rpms."""
    directory = files.task_directory(image["task_id"])
    archives = [import_archive(build, directory / one, image["arch"]) for one in image["files"]]
    logs = Path(koji.pathinfo.build(build)) / "data" / "logs" / "image" / image["arch"]
    for log in sorted(directory.glob("*.log")):
        files.move(log, logs / log.name)
    rpms = {_rpm_id(rpm) for rpm in image["rpmlist"]}
    for archive_id in archives:
        for rpm_id in sorted(rpms):
            context.db.insert("archive_rpm_components", archive_id=archive_id, rpm_id=rpm_id)


def _rpm_id(rpm: Row) -> int:
    """Of one that Koji has built, or of one of a repository, which becomes known by this."""
    keys = ("name", "version", "release", "arch")
    repository = 0
    if rpm.get("location"):
        name = rpm["location"]
        repository = context.db.value(
            "SELECT id FROM external_repo WHERE name = %(name)s", name=name
        )
        if repository is None:
            raise koji.GenericError(f"No such external repo: {name}")
    known = context.db.value(
        "SELECT id FROM rpminfo WHERE external_repo_id = %(repository)s AND "
        + " AND ".join(f"{key} = %({key})s" for key in keys),
        repository=repository,
        **{key: rpm[key] for key in keys},
    )
    if known is None and repository == 0:
        raise koji.GenericError(f"No such rpm: {rpm}")
    columns = (*keys, "epoch", "payloadhash", "size", "buildtime")
    return known or context.db.insert(
        "rpminfo", external_repo_id=repository, **{name: rpm[name] for name in columns}
    )


# Tags of builds


def tag_build(tag: Any, build: Any, user_id: int, force: bool = False) -> None:
    tag_info, build_info = records.get_tag(tag, strict=True), required(build)
    assert tag_info is not None
    data = {"tag": tag_info["name"], "build": build_info["id"], "fromtag": None}
    policies.assert_policy("tag", {**data, "user_id": user_id, "operation": "tag"}, force=force)
    entry = records.package_in_tag(tag_info["id"], build_info["package_id"])
    if entry is None:
        raise koji.TagError(f"Package {build_info['name']} not in list for {tag_info['name']}")
    if entry["blocked"]:
        raise koji.TagError(f"Package {build_info['name']} blocked in {tag_info['name']}")
    _put_into_tag(tag_info, build_info)


def _put_into_tag(tag: Row, build: Row) -> None:
    if build["state"] != COMPLETE:
        state = koji.BUILD_STATES[build["state"]]
        raise koji.TagError(f"build {build['nvr']} not complete: state {state}")
    if context.db.rows(
        "SELECT * FROM tag_listing WHERE build_id = %(build)s AND tag_id = %(tag)s",
        build=build["id"],
        tag=tag["id"],
    ):
        raise koji.TagError(f"build {build['nvr']} already tagged ({tag['name']})")
    context.db.insert(
        "tag_listing", build_id=build["id"], tag_id=tag["id"], create_event=context.db.event()
    )


# Content generators


def _import_of_generator(metadata: Any, directory: str, token: str | None) -> Row:
    data = metadata["build"]
    generator = metadata["buildroots"][0]["content_generator"]["name"]
    cg_id = _generator(generator)
    owner = records.get_user(data.get("owner"), strict=True)
    assert owner is not None
    if data.get("build_id") is None:
        build_id = new_build(data, owner=owner["id"], cg_id=cg_id)
    else:
        build_id = _reserved(data["build_id"], token)
        extra = json.dumps(data["extra"]) if data.get("extra") is not None else None
        _change(build_id, {"owner": owner["id"], "source": data.get("source"), "extra": extra})
    build = required(build_id)
    buildroots = {
        one["id"]: context.db.insert("buildroot", cg_id=cg_id) for one in metadata["buildroots"]
    }
    _set_type(build_id)
    for output in metadata["output"]:
        _import_output(build, output, directory, buildroots[output["buildroot_id"]])
    end_build(build_id, COMPLETE)
    return required(build_id)


def _generator(name: str) -> int:
    """Its id; the caller may import for it."""
    cg_id = context.db.value("SELECT id FROM content_generator WHERE name = %(name)s", name=name)
    if cg_id is None:
        raise koji.GenericError(f"No such content generator: {name}")
    users = context.db.values("SELECT user_id FROM cg_users WHERE cg_id = %(cg)s", cg=cg_id)
    if context.session.user_id not in users:
        raise koji.ActionNotAllowed(f"Content generator access required: {name}")
    return int(cg_id)


def _reserved(build_id: int, token: str | None) -> int:
    expected = context.db.value(
        "SELECT token FROM build_reservations WHERE build_id = %(id)s", id=build_id
    )
    if expected is None or token != expected:
        raise koji.GenericError(f"Token doesn't match build ID {build_id}")
    context.db.rows("DELETE FROM build_reservations WHERE build_id = %(id)s", id=build_id)
    return build_id


def _import_output(build: Row, output: Row, directory: str, buildroot_id: int) -> None:
    file = Path(koji.pathinfo.work()) / directory / output["filename"]
    if not file.is_file() or file.stat().st_size != output["filesize"]:
        raise koji.GenericError(f"{output['filename']} is not there, or of another size")
    if files.sha256_of(file) != output["checksum"]:
        raise koji.GenericError(f"Checksum mismatch for {output['filename']}")
    if output["type"] == "log":
        logs = Path(koji.pathinfo.build(build)) / "data" / "logs"
        files.move(file, logs / output["filename"])
        return
    archive_id = import_archive(
        build,
        file,
        output["extra"]["image"]["arch"],
        buildroot_id=buildroot_id,
        extra=json.dumps(output["extra"]),
    )
    for component in output.get("components", ()):
        if component["type"] == "kojifile":
            archive = get_archive(component["archive_id"], strict=True)
            assert archive is not None
            context.db.insert(
                "archive_components", archive_id=archive_id, component_id=archive["id"]
            )


def _set_type(build_id: int) -> None:
    context.db.insert(
        "build_types",
        build_id=build_id,
        btype_id=context.db.value("SELECT id FROM btype WHERE name = 'image'"),
    )


# Calls


class BuildHostCalls:
    """host.*, the builder's calls for builds."""

    def initImageBuild(self, task_id: int, build_info: Row) -> Row:
        owner = tasks.own_task(task_id).getOwner()
        data = {**build_info, "task_id": task_id, "owner": owner, "state": BUILDING}
        if data.get("release") is None:
            data["release"] = next_release(data)
        new = get_build({name: data[name] for name in ("name", "version", "release")})
        build_id = new_build(data, owner=owner)
        if new is None or new["state"] != BUILDING:
            _set_type(build_id)
        return {**data, "completion_time": None, "id": build_id}

    def completeImageBuild(self, task_id: int, build_id: int, results: Mapping[str, Row]) -> None:
        tasks.own_task(task_id)
        build = required(build_id)
        for image in results.values():
            if "task_id" in image:  # one that has failed has none
                _import_image(build, image)
        end_build(build["id"], COMPLETE)

    def moveImageBuildToScratch(self, task_id: int, results: Mapping[str, Row]) -> None:
        owner = records.get_user(tasks.own_task(task_id).getOwner(), strict=True)
        assert owner is not None
        for image in results.values():
            if "task_id" not in image:
                continue
            target = Path(koji.pathinfo.scratch()) / owner["name"] / f"task_{image['task_id']}"
            for name in [*image["files"], *image["logs"]]:
                files.move(files.task_directory(image["task_id"]) / name, target / name)

    def failBuild(self, task_id: int, build_id: int) -> None:
        tasks.own_task(task_id)
        build = required(build_id)
        if build["state"] != BUILDING:
            state = koji.BUILD_STATES[build["state"]]
            raise koji.GenericError(f"cannot update build {build_id}, state: {state}")
        end_build(build["id"], FAILED)

    def tagBuild(
        self, task_id: int, tag: Any, build: Any, force: bool = False, fromtag: Any = None
    ) -> None:
        """As the user whose task it is."""
        tag_build(tag, build, tasks.own_task(task_id).getOwner(), force)

    def tagNotification(self, *args: Any, **options: Any) -> None:
        """Nobody is told: notifications are off."""
        tasks.calling_host()


def next_release(build_info: Row, incr: int = 1) -> str:
    """After that of the newest build of this version that is not a failed one."""
    last = context.db.value(
        "SELECT release FROM build JOIN package ON package.id = pkg_id WHERE name = %(name)s"
        " AND version = %(version)s AND state IN %(states)s ORDER BY build.id DESC",
        name=build_info["name"],
        version=build_info["version"],
        states=(COMPLETE, DELETED, BUILDING),
    )
    if last is None:
        return str(incr)
    first, dot, rest = last.partition(".")
    if not first.isdigit():
        raise koji.BuildError(f"Unable to increment release value: {last}")
    return f"{int(first) + incr}{dot}{rest}"


class BuildCalls:
    """Everybody's calls for builds."""

    def getBuild(self, buildInfo: Any, strict: bool = False) -> Any:
        return get_build(buildInfo, strict)

    def getNextRelease(self, build_info: Row, incr: int = 1) -> str:
        return next_release(build_info, incr)

    def getMavenBuild(self, buildInfo: Any, strict: bool = False) -> None:
        return None

    def getWinBuild(self, buildInfo: Any, strict: bool = False) -> None:
        return None

    def getImageBuild(self, buildInfo: Any, strict: bool = False) -> Any:
        types = self.getBuildType(buildInfo, strict)
        return {"id": required(buildInfo)["id"]} if "image" in types else None

    def getBuildType(self, buildInfo: Any, strict: bool = False) -> dict[str, Any]:
        build = get_build(buildInfo, strict)
        if build is None:
            return {}
        names = context.db.values(
            "SELECT name FROM btype JOIN build_types ON btype_id = btype.id"
            " WHERE build_id = %(id)s",
            id=build["id"],
        )
        typeinfo = (build["extra"] or {}).get("typeinfo", {})
        return {name: typeinfo.get(name) for name in names}

    def listBTypes(self, query: Any = None, queryOpts: Any = None) -> list[Row]:
        rows: list[Row] = context.db.rows("SELECT id, name FROM btype ORDER BY id")
        return rows

    def listBuilds(
        self,
        packageID: Any = None,
        userID: Any = None,
        taskID: Any = None,
        prefix: Any = None,
        state: Any = None,
        queryOpts: Any = None,
        **unused: Any,
    ) -> list[Row]:
        wanted = {
            "pkg_id": packageID,
            "owner": userID,
            "task_id": taskID,
            "state": state,
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        clauses = "".join(f" AND build.{name} = %({name})s" for name in given)
        rows = context.db.rows(f"{_BUILD} WHERE TRUE{clauses} ORDER BY build.id", given)
        builds = [_as_build(row) for row in rows]
        for build in builds:
            del build["id"], build["cg_id"], build["cg_name"]
        return [one for one in builds if one["name"].startswith(prefix or "")]

    def listTagged(
        self,
        tag: Any,
        event: Any = None,
        inherit: bool = False,
        prefix: Any = None,
        latest: Any = False,
        package: Any = None,
        owner: Any = None,
        type: Any = None,
        **unused: Any,
    ) -> list[Row]:
        """Newest first; latest -- only that many of each package."""
        tag_info = records.get_tag(tag, strict=True)
        assert tag_info is not None
        tags = list(records.tag_and_ancestors(tag_info["id"])) if inherit else [tag_info["id"]]
        rows = []
        for tag_id in tags:
            rows += context.db.rows(
                "SELECT build_id, tag_id, tag.name AS tag_name, create_event FROM tag_listing"
                " JOIN tag ON tag.id = tag_id WHERE tag_id = %(tag)s ORDER BY create_event DESC",
                tag=tag_id,
            )
        builds, count = [], dict[str, int]()
        for row in rows:
            build = required(row["build_id"])
            count[build["name"]] = count.get(build["name"], 0) + 1
            if latest and count[build["name"]] > int(latest):
                continue
            if package not in (None, build["name"]):
                continue
            if type is not None and type not in self.getBuildType(build["id"]):
                continue
            for unlisted in ("extra", "source", "cg_id", "cg_name"):
                del build[unlisted]
            builds.append({**build, **row})
        return builds

    def getLatestBuilds(
        self, tag: Any, event: Any = None, package: Any = None, type: Any = None, draft: Any = None
    ) -> list[Row]:
        return self.listTagged(tag, event, inherit=True, latest=1, package=package, type=type)

    def listTags(self, build: Any = None, package: Any = None, **unused: Any) -> list[Any]:
        if build is not None:
            ids = context.db.values(
                "SELECT tag_id FROM tag_listing WHERE build_id = %(id)s", id=required(build)["id"]
            )
        else:
            ids = context.db.values("SELECT id FROM tag ORDER BY id")
        tags = [records.get_tag(one, strict=True) for one in ids]
        for tag in tags:
            assert tag is not None
            del tag["extra"]
        return tags

    def tagBuildBypass(
        self, tag: Any, build: Any, force: bool = False, notify: bool = False
    ) -> None:
        context.session.assertPerm("tag")
        tag_info = records.get_tag(tag, strict=True)
        assert tag_info is not None
        _put_into_tag(tag_info, required(build))

    def tagBuild(self, tag: Any, build: Any, force: bool = False, fromtag: Any = None) -> int:
        """A task does it."""
        context.session.assertLogin()
        tag_info, build_info = records.get_tag(tag, strict=True), required(build)
        assert tag_info is not None
        return tasks.make_task(
            "tagBuild", [tag_info["id"], build_info["id"], force, None], priority=10
        )

    def untagBuild(self, tag: Any, build: Any, strict: bool = True, force: bool = False) -> None:
        context.session.assertPerm("tag")
        tag_info = records.get_tag(tag, strict=True)
        assert tag_info is not None
        context.db.rows(
            "DELETE FROM tag_listing WHERE build_id = %(build)s AND tag_id = %(tag)s",
            build=required(build)["id"],
            tag=tag_info["id"],
        )

    def cancelBuild(self, buildID: int, strict: bool = False) -> bool:
        context.session.assertLogin()
        build = get_build(buildID, strict)
        if build is None:
            return False
        session = context.session
        if build["owner_id"] != session.user_id and not session.hasPerm("admin"):
            raise koji.ActionNotAllowed("Cannot cancel build, not owner")
        if build["state"] != BUILDING:
            return False
        end_build(build["id"], CANCELED)
        if build["task_id"] is not None:
            tasks.Task(build["task_id"]).cancel()
        return True

    def deleteBuild(self, build: Any, strict: bool = True, min_ref_age: int = 0) -> bool:
        """Its files are removed, the record stays."""
        context.session.assertPerm("admin")
        info = required(build)
        _change(info["id"], {"state": DELETED})
        shutil.rmtree(koji.pathinfo.build(info), ignore_errors=True)
        return True

    # Archives and rpms

    def listArchives(self, buildID: Any = None, **filters: Any) -> list[Row]:
        unknown = set(filters) - set(_FILTERS)
        if unknown:
            raise koji.ParameterError(f"the stand-in does not filter archives by {unknown}")
        return list_archives(buildID, **filters)

    def getArchive(self, archive_id: int, strict: bool = False) -> Any:
        return get_archive(archive_id, strict)

    def getArchiveTypes(self) -> list[Row]:
        rows: list[Row] = context.db.rows("SELECT * FROM archivetypes ORDER BY id")
        return rows

    def getArchiveType(
        self, filename: Any = None, type_name: Any = None, type_id: Any = None, strict: bool = False
    ) -> Any:
        if filename is not None:
            return records.found(
                type_of(filename), strict, f"unsupported file extension: {filename}"
            )
        for one in self.getArchiveTypes():
            if type_id == one["id"] or type_name == one["name"]:
                return one
        return records.found(None, strict, f"Invalid archive type: {type_name or type_id}")

    def listRPMs(
        self,
        buildID: Any = None,
        buildrootID: Any = None,
        imageID: Any = None,
        arches: Any = None,
        **unused: Any,
    ) -> list[Row]:
        sql = (
            "SELECT rpminfo.*, external_repo.name AS external_repo_name,"
            " rpminfo.name || '-' || version || '-' || release AS nvr FROM rpminfo"
            " LEFT JOIN external_repo ON external_repo.id = external_repo_id WHERE TRUE"
        )
        sql += "" if buildID is None else " AND build_id = %(build)s"
        sql += "" if buildrootID is None else " AND buildroot_id = %(buildroot)s"
        if imageID is not None:
            sql += " AND rpminfo.id IN (SELECT rpm_id FROM archive_rpm_components"
            sql += " WHERE archive_id = %(image)s)"
        rows: list[Row] = context.db.rows(
            f"{sql} ORDER BY rpminfo.id", build=buildID, buildroot=buildrootID, image=imageID
        )
        return [row for row in rows if arches is None or row["arch"] in arches]

    def buildReferences(self, build: int, limit: Any = None, lazy: bool = False) -> dict[str, Any]:
        info = required(build)
        return {
            "tags": context.db.rows(
                "SELECT tag_id, name FROM tag_listing JOIN tag ON tag.id = tag_id"
                " WHERE build_id = %(id)s",
                id=info["id"],
            ),
            "rpms": [],
            "component_of": context.db.values(
                "SELECT DISTINCT archive_id FROM archive_components JOIN archiveinfo"
                " ON archiveinfo.id = component_id WHERE build_id = %(id)s",
                id=info["id"],
            ),
            "archives": [],
            "last_used": None,
            "images": [],
        }

    def listBuildroots(self, **filters: Any) -> list[Row]:
        """This builder makes none; content generators' are not listed by host."""
        return []

    # Content generators

    def CGInitBuild(self, cg: str, data: Row) -> Row:
        cg_id = _generator(cg)
        build_id = new_build(data, owner=context.session.user_id, cg_id=cg_id)
        token = secrets.token_hex(32)
        context.db.insert("build_reservations", build_id=build_id, token=token)
        return {"build_id": build_id, "token": token}

    def CGImport(self, metadata: Any, directory: str, token: str | None = None) -> Row:
        if isinstance(metadata, str):
            path = Path(koji.pathinfo.work()) / directory / metadata
            metadata = json.loads(path.read_text())
        return _import_of_generator(metadata, directory, token)
