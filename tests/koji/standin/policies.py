"""Policies, on koji.policy: the tests that a hub adds to it, and asking one by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import koji
import koji.policy
import koji.tasks
import koji.util
from koji.context import context

from . import builds, records
from .sessions import permissions_of

DEFAULTS = {
    "build_from_scm": "has_perm admin :: allow\nall :: deny only an admin may",
    "package_list": "has_perm admin tag :: allow\nall :: deny only an admin may",
    "channel": "has req_channel :: req\nis_child_task :: parent\nall :: use default",
    "priority": "all :: stay",
}

Data = dict[str, Any]


class UserTest(koji.policy.MatchTest):
    name = "user"
    field = "_user"

    def run(self, data: Data) -> Any:
        return super().run({**data, self.field: _user(data)["name"]})


class PermissionOfUser(koji.policy.BaseSimpleTest):
    name = "has_perm"

    def run(self, data: Data) -> bool:
        patterns = self.str.split()[1:]
        return any(
            koji.util.multi_fnmatch(name, patterns) for name in permissions_of(_user(data)["id"])
        )


class MethodTest(koji.policy.MatchTest):
    name = "method"
    field = "method"


class ChildTaskTest(koji.policy.BoolTest):
    name = "is_child_task"
    field = "parent"


class SkipTagTest(koji.policy.BoolTest):
    name = "skip_tag"
    field = "skip_tag"


class TagTest(koji.policy.MatchTest):
    name = "tag"
    field = "_tag"

    def run(self, data: Data) -> Any:
        tag = records.get_tag(data["tag"]) if data.get("tag") is not None else None
        return tag is not None and super().run({**data, self.field: tag["name"]})


class BuildTagTest(koji.policy.MatchTest):
    name = "buildtag"
    field = "_buildtag"

    def run(self, data: Data) -> Any:
        tag = data.get("build_tag")
        if tag is None and data.get("target") is not None:
            target = records.get_build_target(data["target"])
            tag = target and target["build_tag"]
        if tag is None:
            return False
        return super().run({**data, self.field: records.get_tag(tag, strict=True)["name"]})


class _OfBuild(koji.policy.MatchTest):
    """Of the data itself, or else of the build in it."""

    key = ""

    def run(self, data: Data) -> Any:
        if self.key in data:
            return super().run({**data, self.field: data[self.key]})
        if "build" not in data:
            raise koji.GenericError(f"policy requires {self.key} data")
        return super().run({**data, self.field: builds.required(data["build"])[self.key]})


class PackageTest(_OfBuild):
    name = "package"
    field = "_package"
    key = "package"

    def run(self, data: Data) -> Any:
        if "package" not in data and "build" in data:
            data = {**data, "package": builds.required(data["build"])["name"]}
        return super().run(data)


class VersionTest(_OfBuild):
    name = "version"
    field = "_version"
    key = "version"


class ReleaseTest(_OfBuild):
    name = "release"
    field = "_release"
    key = "release"


class SourceTest(_OfBuild):
    name = "source"
    field = "_source"
    key = "source"

    def run(self, data: Data) -> Any:
        return ("source" in data or "build" in data) and super().run(data)


class TypeOfBuild(koji.policy.BaseSimpleTest):
    name = "buildtype"

    def run(self, data: Data) -> bool:
        patterns = self.str.split()[1:]
        return any(koji.util.multi_fnmatch(one, patterns) for one in data.get("btypes", ()))


def _user(data: Data) -> Any:
    return records.get_user(data.get("user_id", context.session.user_id), strict=True)


def rule_sets(policies: Mapping[str, str]) -> dict[str, koji.policy.SimpleRuleSet]:
    """Of the text of each; those that a hub has anyway are among them."""
    tests = koji.policy.findSimpleTests([vars(koji.policy), globals()])
    return {
        name: koji.policy.SimpleRuleSet(
            [line for line in map(str.strip, text.splitlines()) if not line.startswith("#")], tests
        )
        for name, text in {**DEFAULTS, **policies}.items()
    }


def check_policy(
    name: str, data: Data, default: str = "deny", strict: bool = False, force: bool = False
) -> tuple[bool, str]:
    """Whether it allows, and its reason; a policy that nobody has written allows."""
    rules = context.policy.get(name)
    if rules is None:
        return True, "missing policy"
    said = rules.apply(data)
    action, _, reason = (f"{default} not covered by policy" if said is None else said).partition(
        " "
    )
    if action.lower() == "allow":
        return True, reason
    if action.lower() != "deny":
        reason = "error in policy"
    if force and "admin" in permissions_of(_user(data)["id"]):
        return True, "overriden by force"
    if strict:
        raise koji.ActionNotAllowed(
            f"policy violation ({name})" + (f": {reason}" if reason else "")
        )
    return False, reason


def assert_policy(name: str, data: Data, default: str = "deny", force: bool = False) -> None:
    check_policy(name, data, default, strict=True, force=force)


def eval_policy(name: str, data: Data) -> str | None:
    """The action of its first rule that matches, with all that follows the action."""
    rules = context.policy.get(name)
    if rules is None:
        raise koji.GenericError(f"there is no policy {name}")
    said: str | None = rules.apply(data)
    return said


def task_policy_data(method: str, arglist: Any) -> Data:
    """What the parameters of a task tell a policy, if they can be named at all."""
    try:
        parameters = koji.tasks.parse_task_params(method, arglist)
    except (koji.ParameterError, TypeError):
        return {}
    data: Data = {}
    for name in ("target", "build_target", "target_info"):
        target = parameters.get(name)
        if isinstance(target, dict):
            target = target.get("name")
        if target is not None and records.get_build_target(target) is not None:
            data["target"] = target
    scratch = (parameters.get("opts") or {}).get("scratch")
    return data if scratch is None else {**data, "scratch": scratch}
