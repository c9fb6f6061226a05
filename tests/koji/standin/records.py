"""What an administrator makes: users, hosts, channels, tags, targets, lists of packages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import koji
from koji.context import context

from . import policies
from .database import Row
from .sessions import permissions_of


def convert_value(
    value: Any,
    cast: type | None = None,
    message: str | None = None,
    exc_type: type[Exception] = koji.ParameterError,
    none_allowed: bool = False,
    check_only: bool = False,
) -> Any:
    """The value as this type, or that exception; kojihub's name for it."""
    if value is None and none_allowed:
        return None
    try:
        converted = cast(value) if cast is not None else value
    except (TypeError, ValueError):
        converted = None
    if converted is None or (check_only and not isinstance(value, cast or object)):
        raise exc_type(message or f"Invalid type for value {value!r}: expected {cast}")
    return value if check_only else converted


def found(row: Row | None, strict: bool, what: str) -> Row | None:
    """The row; an error, if strict, where there is none."""
    if row is None and strict:
        raise koji.GenericError(what)
    return row


def _by_name_or_id(table: str, which: Any, columns: str = "*") -> Row | None:
    """which -- an id, a name, or a map with one of them."""
    if isinstance(which, dict):
        which = which.get("id", which.get("name"))
    key = "id" if isinstance(which, int) else "name"
    row: Row | None = context.db.row(
        f"SELECT {columns} FROM {table} WHERE {key} = %(which)s", which=which
    )
    return row


# Users


def get_user(userInfo: Any = None, strict: bool = False, krb_princs: bool = True) -> Row | None:
    if userInfo is None:
        userInfo = context.session.user_id
    user = _by_name_or_id("users", userInfo, "id, name, status, usertype")
    if user is not None and krb_princs:
        user["krb_principals"] = []
    return found(user, strict, f"No such user: {userInfo!r}")


def _make_user(name: str, usertype: str) -> int:
    if _by_name_or_id("users", name) is not None:
        raise koji.GenericError(f"user already exists: {name}")
    new: int = context.db.insert(
        "users", name=name, usertype=koji.USERTYPES[usertype], status=koji.USER_STATUS["NORMAL"]
    )
    return new


# Hosts and channels


def get_host(hostInfo: Any, strict: bool = False) -> Row | None:
    host = _by_name_or_id("host", hostInfo)
    if host is not None:
        host["update_ts"] = host.pop("update_time")
        del host["data"]
    return found(host, strict, f"Invalid hostInfo: {hostInfo}")


def get_channel(channelInfo: Any, strict: bool = False) -> Row | None:
    channel = _by_name_or_id("channels", channelInfo)
    return found(channel, strict, f"No such channel: {channelInfo}")


# Tags, targets, packages

_TAG = "id, name, arches, perm_id, locked, maven_support, maven_include_all, extra"


def get_tag(tagInfo: Any, strict: bool = False, **_unused: Any) -> Row | None:
    tag = _by_name_or_id("tag", tagInfo, _TAG)
    if tag is not None:
        tag["perm"] = None
    return found(tag, strict, f"No such tagInfo: {tagInfo!r}")


def tag_and_ancestors(tag_id: int) -> Iterator[int]:
    """Nearest first."""
    yield tag_id
    for parent in context.db.values(
        "SELECT parent_id FROM tag_inheritance WHERE tag_id = %(tag)s ORDER BY priority", tag=tag_id
    ):
        yield from tag_and_ancestors(parent)


def get_build_target(info: Any, event: Any = None, strict: bool = False) -> Row | None:
    target = _by_name_or_id("build_target", info)
    if target is not None:
        for side in ("build_tag", "dest_tag"):
            target[f"{side}_name"] = get_tag(target[side], strict=True)["name"]  # type: ignore[index]
    return found(target, strict, f"No matching build target found: {info}")


def package_id(name: str) -> int:
    """Of the package, which is made if there is none yet."""
    known = context.db.value("SELECT id FROM package WHERE name = %(name)s", name=name)
    return known or context.db.insert("package", name=name)


def package_in_tag(tag: Any, package: Any) -> Row | None:
    """Its entry in the list of the tag or of the nearest ancestor that has one."""
    tag_info, package_info = get_tag(tag), _by_name_or_id("package", package)
    if tag_info is None or package_info is None:
        return None
    for tag_id in tag_and_ancestors(tag_info["id"]):
        entry: Row | None = context.db.row(
            "SELECT tag_id, tag.name AS tag_name, package_id, owner AS owner_id,"
            " users.name AS owner_name, blocked, extra_arches FROM tag_packages"
            " JOIN tag ON tag.id = tag_id JOIN users ON users.id = owner"
            " WHERE tag_id = %(tag)s AND package_id = %(package)s",
            tag=tag_id,
            package=package_info["id"],
        )
        if entry is not None:
            return {**entry, "package_name": package_info["name"]}
    return None


class RecordCalls:
    """What of this is called over the wire; who changes something needs a permission."""

    def getUser(self, userInfo: Any = None, strict: bool = False, krb_princs: bool = True) -> Any:
        return get_user(userInfo, strict, krb_princs)

    def createUser(self, username: str, status: Any = None, krb_principal: Any = None) -> int:
        context.session.assertPerm("admin")
        return _make_user(username, "NORMAL")

    def getUserPerms(self, userID: Any = None, with_groups: bool = True) -> list[str]:
        user = get_user(userID, strict=True)
        assert user is not None
        return permissions_of(user["id"])

    def grantPermission(
        self, userinfo: Any, permission: str, create: bool = False, description: Any = None
    ) -> None:
        context.session.assertPerm("admin")
        user = get_user(userinfo, strict=True)
        assert user is not None
        if permission in permissions_of(user["id"]):
            raise koji.GenericError(f"user {userinfo} already has permission: {permission}")
        known = _by_name_or_id("permissions", permission)
        if known is None and not create:
            raise koji.GenericError(f"No such entry in table permissions: {permission}")
        context.db.insert(
            "user_perms",
            user_id=user["id"],
            perm_id=known["id"] if known else context.db.insert("permissions", name=permission),
            creator_id=context.session.user_id,
        )

    def revokePermission(self, userinfo: Any, permission: str) -> None:
        context.session.assertPerm("admin")
        context.db.rows(
            "DELETE FROM user_perms WHERE user_id = %(user)s AND perm_id ="
            " (SELECT id FROM permissions WHERE name = %(name)s)",
            user=(get_user(userinfo, strict=True) or {})["id"],
            name=permission,
        )

    # Hosts and channels

    def getHost(self, hostInfo: Any, strict: bool = False, event: Any = None) -> Any:
        return get_host(hostInfo, strict)

    def addHost(
        self, hostname: str, arches: Sequence[str], krb_principal: Any = None, force: bool = False
    ) -> int:
        context.session.assertPerm("host")
        if get_host(hostname) is not None:
            raise koji.GenericError(f"host already exists: {hostname}")
        new: int = context.db.insert(
            "host", user_id=_make_user(hostname, "HOST"), name=hostname, arches=" ".join(arches)
        )
        self.addHostToChannel(hostname, "default")
        return new

    def editHost(self, hostInfo: Any, **changes: Any) -> bool:
        context.session.assertPerm("host")
        host = get_host(hostInfo, strict=True)
        assert host is not None
        changed = {name: value for name, value in changes.items() if host[name] != value}
        for name, value in changed.items():
            context.db.rows(
                f"UPDATE host SET {name} = %(value)s WHERE id = %(id)s", value=value, id=host["id"]
            )
        return bool(changed)

    def enableHost(self, hostname: str) -> None:
        self.editHost(hostname, enabled=True)

    def disableHost(self, hostname: str) -> None:
        self.editHost(hostname, enabled=False)

    def listHosts(self, **filters: Any) -> list[Any]:
        hosts = [get_host(one) for one in context.db.values("SELECT id FROM host ORDER BY id")]
        wanted = {"enabled", "ready"} & set(filters)
        return [one for one in hosts if one and all(one[key] == filters[key] for key in wanted)]

    def getChannel(self, channelInfo: Any, strict: bool = False) -> Any:
        return get_channel(channelInfo, strict)

    def listChannels(self, hostID: Any = None, event: Any = None, enabled: Any = None) -> list[Row]:
        rows: list[Row] = context.db.rows("SELECT * FROM channels ORDER BY id")
        if hostID is not None:
            host = get_host(hostID, strict=True)
            assert host is not None
            of_host = context.db.values(
                "SELECT channel_id FROM host_channels WHERE host_id = %(id)s", id=host["id"]
            )
            rows = [row for row in rows if row["id"] in of_host]
        return rows

    def addHostToChannel(
        self, hostname: str, channel_name: str, create: bool = False, force: bool = False
    ) -> None:
        context.session.assertPerm("host")
        host = get_host(hostname, strict=True)
        channel = get_channel(channel_name, strict=not create)
        assert host is not None
        channel_id = channel["id"] if channel else context.db.insert("channels", name=channel_name)
        if channel_id in [one["id"] for one in self.listChannels(host["id"])]:
            raise koji.GenericError(f"host {hostname} is already in the channel {channel_name}")
        context.db.insert("host_channels", host_id=host["id"], channel_id=channel_id)

    # Tags and targets

    def getTag(
        self, tagInfo: Any, strict: bool = False, event: Any = None, blocked: bool = False
    ) -> Any:
        return get_tag(tagInfo, strict)

    def createTag(self, name: str, parent: Any = None, arches: Any = None, **unused: Any) -> int:
        context.session.assertPerm("tag")
        if get_tag(name) is not None:
            raise koji.GenericError(f"A tag with the name {name!r} already exists")
        new: int = context.db.insert("tag", name=name, arches=arches or "")
        if parent is not None:
            up = get_tag(parent, strict=True)
            assert up is not None
            context.db.insert("tag_inheritance", tag_id=new, parent_id=up["id"])
        return new

    def getBuildConfig(self, tag: Any, event: Any = None) -> Row:
        config = get_tag(tag, strict=True)
        assert config is not None
        config["config_inheritance"] = {"extra": {}, "arches": None}
        return config

    def getRepo(self, tag: Any, **unused: Any) -> None:
        """There are none: nothing here makes repositories."""
        get_tag(tag, strict=True)

    def getFullInheritance(self, tag: Any, **unused: Any) -> list[Row]:
        start = get_tag(tag, strict=True)
        assert start is not None
        ancestors = list(tag_and_ancestors(start["id"]))[1:]
        return [{"parent_id": one, "name": (get_tag(one) or {})["name"]} for one in ancestors]

    def getBuildTarget(self, info: Any, event: Any = None, strict: bool = False) -> Any:
        return get_build_target(info, event, strict)

    def getBuildTargets(self, info: Any = None, **unused: Any) -> list[Any]:
        ids = context.db.values("SELECT id FROM build_target ORDER BY id")
        targets = [get_build_target(one) for one in ids]
        return [one for one in targets if one and info in (None, one["id"], one["name"])]

    def createBuildTarget(self, name: str, build_tag: Any, dest_tag: Any) -> None:
        context.session.assertPerm("target")
        if get_build_target(name) is not None:
            raise koji.GenericError(f"A build target with the name {name!r} already exists")
        tags = [get_tag(one, strict=True) for one in (build_tag, dest_tag)]
        context.db.insert(
            "build_target",
            name=name,
            build_tag=tags[0]["id"],
            dest_tag=tags[1]["id"],  # type: ignore[index]
        )

    # Packages

    def getPackageConfig(self, tag: Any, pkg: Any, event: Any = None) -> Any:
        return package_in_tag(tag, pkg)

    def packageListAdd(
        self,
        taginfo: Any,
        pkginfo: str,
        owner: Any = None,
        block: Any = None,
        extra_arches: Any = None,
        force: bool = False,
        update: bool = False,
    ) -> None:
        tag = get_tag(taginfo, strict=True)
        owner_info = get_user(owner, strict=True)
        assert tag is not None
        assert owner_info is not None
        data = {"tag": tag["name"], "package": pkginfo, "user_id": context.session.user_id}
        policies.assert_policy("package_list", {**data, "action": "add"}, force=force)
        context.db.rows(
            "INSERT OR REPLACE INTO tag_packages (tag_id, package_id, owner, blocked, extra_arches)"
            " VALUES (%(tag)s, %(package)s, %(owner)s, %(blocked)s, %(extra)s)",
            tag=tag["id"],
            package=package_id(pkginfo),
            owner=owner_info["id"],
            blocked=bool(block),
            extra=extra_arches,
        )

    def packageListBlock(self, taginfo: Any, pkginfo: str, force: bool = False) -> None:
        self.packageListAdd(taginfo, pkginfo, block=True)

    def packageListUnblock(self, taginfo: Any, pkginfo: str, force: bool = False) -> None:
        self.packageListAdd(taginfo, pkginfo, block=False)

    def createExternalRepo(self, name: str, url: str) -> Row:
        context.session.assertPerm("admin")
        if _by_name_or_id("external_repo", name) is not None:
            raise koji.GenericError(f'An external repo named "{name}" already exists')
        return {
            "id": context.db.insert("external_repo", name=name, url=url),
            "name": name,
            "url": url,
        }

    def grantCGAccess(self, user: Any, cg: str, create: bool = False) -> None:
        context.session.assertPerm("admin")
        user_info = get_user(user, strict=True)
        assert user_info is not None
        known = _by_name_or_id("content_generator", cg)
        if known is None and not create:
            raise koji.GenericError(f"No such content generator: {cg}")
        cg_id = known["id"] if known else context.db.insert("content_generator", name=cg)
        if user_info["id"] in context.db.values(
            "SELECT user_id FROM cg_users WHERE cg_id = %(cg)s", cg=cg_id
        ):
            raise koji.GenericError("User already has access to this content generator")
        context.db.insert("cg_users", cg_id=cg_id, user_id=user_info["id"])
