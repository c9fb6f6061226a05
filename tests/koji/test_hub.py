"""The hub plugin on any hub of the tests: who may ask for what, and what is recorded of a build."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from koji_indirection import taskspec

if TYPE_CHECKING:
    from harness.base import AnyKoji

UPLOAD = "cli-indirection/1695124012.341.QwErTyUi"
SCM = "git://127.0.0.1/templates.git#main"
COMMIT = "5f1d0a9c3b7e2d4856a0c1e2f3b4a5968778695a"


def wire(**changes: Any) -> dict[str, Any]:
    """A spec as a client sends it; a field that is changed to None is left out."""
    data = {
        "target": "images",
        "name": "live",
        "version": "41",
        "arches": ["x86_64"],
        "input_image": "debian-input-12-1",
        "utility_image": "latest:debian-utility@images-candidate",
        "template": "live.tdl",
        "template_scm": SCM,
        **changes,
    }
    return {key: value for key, value in data.items() if value is not None}


SCRATCH: dict[str, Any] = {"scratch": True, "template_scm": None, "template_upload": UPLOAD}


@pytest.fixture(scope="module")
def hub(any_koji: AnyKoji) -> Iterator[AnyKoji]:
    """Without a builder: these tasks are nobody's, or those of a test that plays the builder."""
    any_koji.builder_stop()
    try:
        yield any_koji
    finally:
        any_koji.builder_start()


@pytest.fixture
def user(hub: AnyKoji) -> Iterator[Any]:
    """alice may build images; her tasks are cancelled in the end."""
    session = hub.user_session("alice")
    yield session
    admin = hub.admin_session()
    for task in admin.listTasks({"state": [0, 1, 4], "method": "indirectionBuild"}):
        admin.cancelTask(task["id"])


@contextmanager
def hub_with(koji: AnyKoji, **options: Any) -> Iterator[None]:
    try:
        koji.hub_restart(**options)
        yield
    finally:
        koji.hub_restart()


# --- the task ---------------------------------------------------------------------------------


def test_a_user_with_the_image_permission_gets_a_task_in_the_channel_image(
    hub: AnyKoji, user: Any
) -> None:
    import koji

    from koji_indirection.taskspec import TaskSpec

    asked = wire(release="3", build={"memory_bytes": 2**33})
    task = hub.task(user.indirectionBuild(asked))
    assert task["method"] == "indirectionBuild"
    assert task["arch"] == "x86_64"
    assert task["priority"] == koji.PRIO_DEFAULT
    assert task["parent"] is None
    assert task["owner"] == user.getLoggedInUser()["id"]
    assert user.getChannel(task["channel_id"])["name"] == "image"
    spec, *for_policies = task["request"]
    assert TaskSpec.from_dict(spec) == TaskSpec.from_dict(asked)
    assert for_policies == ["images", {"scratch": False}]


def test_a_task_of_several_arches_is_noarch(hub: AnyKoji, user: Any) -> None:
    task = hub.task(user.indirectionBuild(wire(arches=["x86_64", "aarch64"])))
    assert task["arch"] == "noarch"


def test_without_the_image_permission_nothing_is_even_looked_at(hub: AnyKoji) -> None:
    import koji

    with pytest.raises(koji.ActionNotAllowed, match="image permission required"):
        hub.user_session("mallory", perms=[]).indirectionBuild({"no": "spec"})
    with pytest.raises(koji.ActionNotAllowed):
        hub.anonymous_session().indirectionBuild(wire())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (wire(version="4-1"), "task spec: version is '4-1'"),
        (wire(utility_imag="x-1-1"), "did you mean 'utility_image'"),
        (wire(name=None), "task spec: name is missing"),
        (wire(arches=[]), "arches is empty"),
        (wire(can_fail=["aarch64"]), "can_fail has 'aarch64'"),
        (wire(accel="xen"), "accel is 'xen'"),
        (wire(build={"memory_bytes": 1}), "build spec: memory_bytes is 1"),
        (wire(build={"memory_bytes": 2**60}), "build spec: memory_bytes"),
        (wire(build={"cpus": 10**6}), "build spec: cpus"),
        (wire(build={"results": ["x" * 501]}), "build spec: results"),
        (wire(arch_build={"x86_64": {"cpus": 0}}), "arch_build, x86_64: build spec: cpus is 0"),
        (wire(template="../x"), "template is '../x'"),
        (wire(template_upload=UPLOAD), "both given"),
        (wire(**{**SCRATCH, "template_upload": "tasks/1/1"}), "template_upload"),
        ([], "a task spec is an object"),
        ("live", "a task spec is an object"),
        (None, "a task spec is an object"),
    ],
)
def test_a_spec_out_of_bounds_is_a_parameter_error_that_names_the_field(
    user: Any, spec: Any, words: str
) -> None:
    import koji

    with pytest.raises(koji.ParameterError) as caught:
        user.indirectionBuild(spec)
    assert words in str(caught.value)


FAR_TOO_LONG = "x" * 200_000
ODD_TEXT = ("", "a\nb", "a\tb", "a\u202eb", "a\u200bb", "a\u0085b", "a\u2028b", FAR_TOO_LONG)


def wrong_values(schema: dict[str, Any], *, of_list: bool = False) -> Iterator[Any]:
    """What must be refused wherever a schema stands: other types, and values out of bounds."""
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    other = {"string": "x", "integer": 7, "boolean": True, "array": ["x"], "object": {"x": 1}}
    for kind, value in other.items():
        if kind not in types:
            yield value
    yield 1.5
    if "string" in types:
        yield from ODD_TEXT
        yield "x" * (schema.get("maxLength", 32) + 1)
    if "integer" in types:
        yield from (schema["minimum"] - 1, schema["maximum"] + 1, -(2**62), 2**62)
    if "array" in types:
        one = "http://h/" if schema["items"].get("pattern", "").startswith("^[Hh]") else "/r/"
        yield [f"{one}{number}" for number in range(schema["maxItems"] + 1)]
        yield [f"{one}x", f"{one}x"]
        yield [[]] if of_list else [["/r/x"]]
        for value in wrong_values(schema["items"], of_list=True):
            yield [value]
        if schema["minItems"]:
            yield []


def test_every_field_is_bounded_in_type_and_size(hub: AnyKoji, user: Any) -> None:
    """None of these makes a task, and what is said of it is short and names the field."""
    own = {name: one for name, one in taskspec.SCHEMA["properties"].items() if name != "build"}
    build = taskspec.SCHEMA["properties"]["build"]["properties"]
    asked = [(name, {name: value}) for name in own for value in wrong_values(own[name])]
    for name, schema in build.items():
        for number, value in enumerate(wrong_values(schema)):
            asked.append((name, {"build": {name: value}}))
            if number < 3:  # the same checks
                asked.append((name, {"arch_build": {"x86_64": {name: value}}}))
    asked += [("build", {"build": value}) for value in ("x", 7, ["x"], True)]
    asked += [("field", {key: "x"}) for key in ("x", "a\nb", FAR_TOO_LONG, "__class__")]
    asked += [("field", {"build": {key: "x"}}) for key in ("x", FAR_TOO_LONG)]
    assert len(asked) > 400
    before = task_count(hub)
    taken = [changes for name, changes in asked if not is_refused(user, changes, name)]
    assert [repr(changes)[:200] for changes in taken] == []
    assert task_count(hub) == before


def is_refused(user: Any, changes: dict[str, Any], field: str) -> bool:
    import koji

    spec = {**wire(), **changes}
    try:
        user.indirectionBuild(spec)
    except koji.ParameterError as error:
        assert field in str(error), (field, str(error)[:500])
        assert len(str(error)) < 2000, field
        return True
    return False


def task_count(hub: AnyKoji) -> int:
    return len(hub.admin_session().listTasks({"method": "indirectionBuild"}))


def test_a_template_url_with_a_password_is_refused_and_not_repeated(
    hub: AnyKoji, user: Any
) -> None:
    import koji

    before = task_count(hub)
    for url in (
        "git+https://me:hunter2@example.com/x.git#main",
        "git+https://hunter2@example.com/x.git#main",
        "git+ssh://me:hunter2@example.com/x.git#main",
        "svn+http://me:hunter2@example.com/x#main",
    ):
        with pytest.raises(koji.ParameterError, match="everybody can read a task") as caught:
            user.indirectionBuild(wire(template_scm=url))
        assert "hunter2" not in str(caught.value)
    assert task_count(hub) == before
    assert user.indirectionBuild(wire(template_scm="git+ssh://me@example.com/x.git#main"))


def test_a_target_that_does_not_exist_is_named(user: Any) -> None:
    import koji

    with pytest.raises(koji.ParameterError, match="there is no build target 'nowhere'"):
        user.indirectionBuild(wire(target="nowhere"))


def test_an_arch_that_the_build_tag_does_not_have_is_refused_with_those_it_has(user: Any) -> None:
    import koji

    with pytest.raises(koji.ParameterError, match=r"'s390x'.*images-build.*x86_64, i686, aarch64"):
        user.indirectionBuild(wire(arches=["x86_64", "s390x"]))


def test_arches_are_compared_as_koji_does(hub: AnyKoji, user: Any) -> None:
    task = hub.task(user.indirectionBuild(wire(arches=["i386"])))
    assert task["arch"] == "i386"


def test_a_build_tag_without_arches_is_told(hub: AnyKoji, user: Any) -> None:
    import koji

    admin = hub.admin_session()
    if admin.getTag("bare-build") is None:
        admin.createTag("bare-build")
        admin.createBuildTarget("bare", "bare-build", "images-candidate")
    with pytest.raises(koji.ParameterError, match=r"bare-build of target bare .*arches: none"):
        user.indirectionBuild(wire(target="bare"))


def test_a_package_that_the_destination_does_not_list_is_refused_unless_it_is_not_tagged(
    user: Any,
) -> None:
    import koji

    with pytest.raises(koji.BuildError, match="package nobody is not in the list of tag images-c"):
        user.indirectionBuild(wire(name="nobody"))
    assert user.indirectionBuild(wire(name="nobody", skip_tag=True))
    assert user.indirectionBuild(wire(name="nobody", scratch=True))


def test_a_package_that_is_blocked_in_the_destination_is_refused(hub: AnyKoji, user: Any) -> None:
    import koji

    hub.add_package("outcast")
    hub.admin_session().packageListBlock("images-candidate", "outcast")
    with pytest.raises(koji.BuildError, match="package outcast is blocked"):
        user.indirectionBuild(wire(name="outcast"))


def test_an_uploaded_template_is_for_scratch_builds_only(user: Any) -> None:
    import koji

    assert user.indirectionBuild(wire(**SCRATCH))
    for changes in ({"scratch": False}, {"scratch": None}, {"scratch": False, "skip_tag": True}):
        with pytest.raises(koji.ActionNotAllowed, match="template from source control"):
            user.indirectionBuild(wire(**{**SCRATCH, **changes}))


def test_a_negative_priority_is_for_admins_and_all_are_relative(hub: AnyKoji, user: Any) -> None:
    import koji

    assert hub.task(user.indirectionBuild(wire(), 5))["priority"] == koji.PRIO_DEFAULT + 5
    assert hub.task(user.indirectionBuild(wire(), priority=0))["priority"] == koji.PRIO_DEFAULT
    with pytest.raises(koji.ActionNotAllowed, match="below 0 needs the permission admin"):
        user.indirectionBuild(wire(), priority=-1)
    admin = hub.admin_session()
    assert hub.task(admin.indirectionBuild(wire(), priority=-5))["priority"] == (
        koji.PRIO_DEFAULT - 5
    )


@pytest.mark.parametrize("priority", ["5", 1.5, True, [5], 10**6])
def test_a_priority_that_is_none_is_a_parameter_error(user: Any, priority: Any) -> None:
    import koji

    with pytest.raises(koji.ParameterError, match="priority is"):
        user.indirectionBuild(wire(), priority=priority)


# --- policy and settings ----------------------------------------------------------------------


def allowed(session: Any, **changes: Any) -> bool:
    import koji

    try:
        session.indirectionBuild(wire(**changes))
    except koji.ActionNotAllowed as error:
        assert "policy violation (indirection)" in str(error)
        return False
    return True


def test_the_policy_that_is_called_indirection_decides_for_admins_too(
    hub: AnyKoji, user: Any
) -> None:
    import koji

    with hub_with(hub, policy={"indirection": "user alice :: allow\nall :: deny ask alice first"}):
        assert allowed(user)
        with pytest.raises(koji.ActionNotAllowed, match="ask alice first"):
            hub.admin_session().indirectionBuild(wire())


def test_the_policy_sees_all_that_the_documentation_promises(hub: AnyKoji, user: Any) -> None:
    if user.getTag("other-build") is None:
        admin = hub.admin_session()
        admin.createTag("other-build", arches="x86_64")
        admin.createBuildTarget("other", "other-build", "images-candidate")
    policy = """
        source */forbidden.git* :: deny
        target other && buildtag other-build :: deny
        bool scratch && match template_source upload :: deny
        match accel tcg && match channel image :: deny
        package debian-* && tag images-candidate :: deny
        skip_tag :: deny
        version 99 && release 1 :: deny
        match utility_image task:* && match input_image debian-* :: deny
        method indirectionBuild && buildtype image :: allow
        all :: deny nothing matched
    """
    with hub_with(hub, policy={"indirection": policy}):
        assert allowed(user)
        assert not allowed(user, target="other")
        assert allowed(user, scratch=True)
        assert not allowed(user, **SCRATCH)
        assert not allowed(user, accel="tcg")
        assert not allowed(user, name="debian-input")
        assert allowed(user, name="debian-input", scratch=True), "it is not tagged"
        assert not allowed(user, skip_tag=True)
        assert allowed(user, version="99")
        assert not allowed(user, version="99", release="1")
        assert not allowed(user, template_scm="git://host/forbidden.git#main")
        assert not allowed(user, utility_image="task:5")


def networks(**per_arch: str) -> dict[str, Any]:
    """For x86_64 and aarch64, one of which may have none."""
    arch_build: dict[str, Any] = {arch: {"network": network} for arch, network in per_arch.items()}
    return {"arches": ["x86_64", "aarch64"], "arch_build": arch_build}


def test_the_policy_sees_what_network_the_guest_is_to_have(hub: AnyKoji, user: Any) -> None:
    with hub_with(hub, policy={"indirection": "match network none :: allow\nall :: deny"}):
        assert allowed(user)
        assert allowed(user, build={"network": "none"})
        assert not allowed(user, build={"network": "user"})
        assert not allowed(user, **networks(x86_64="user"))
    with hub_with(hub, policy={"indirection": "match network user :: deny\nall :: allow"}):
        assert not allowed(user, **networks(x86_64="user"))
        assert allowed(user, **networks(x86_64="br0"))
    policy = """
        match network *lab* :: deny
        bool tag_repo && match network br0 :: deny
        match network user br0?user :: allow
        all :: deny
    """
    with hub_with(hub, policy={"indirection": policy}):
        assert not allowed(user, **networks(x86_64="user", aarch64="lab"))
        assert not allowed(user, **networks(x86_64="br0"))
        assert allowed(user, **networks(x86_64="user", aarch64="br0"))
        assert allowed(user, build={"network": "user"}, tag_repo=True)
        assert not allowed(user, build={"network": "br0"}, tag_repo=True)


def test_the_policy_has_lists_for_the_tests_that_koji_has_since_1_35(
    hub: AnyKoji, user: Any
) -> None:
    version = user.getKojiVersion()
    if [int(part) for part in version.split(".")[:2]] < [1, 35]:
        pytest.skip(f"Koji {version} has no match_any")
    policy = """
        match_any networks lab :: deny
        match_any repos *elsewhere* :: deny
        match_any arches i686 :: deny
        match_all networks none user :: allow
        all :: deny
    """
    with hub_with(hub, policy={"indirection": policy}):
        assert allowed(user, **networks(x86_64="user"))
        assert not allowed(user, **networks(x86_64="lab"))
        assert not allowed(user, **networks(x86_64="br0"))
        asked = networks(x86_64="user")
        assert not allowed(user, **{**asked, "arches": [*asked["arches"], "i686"]})
        asked["arch_build"]["x86_64"]["repos"] = ["http://h/here"]
        assert allowed(user, **asked)
        asked["arch_build"]["x86_64"]["repos"] += ["http://h/elsewhere/1"]
        assert not allowed(user, **asked)


def test_a_policy_may_allow_an_uploaded_template_for_a_build(hub: AnyKoji, user: Any) -> None:
    import koji

    upload = {**SCRATCH, "scratch": False}
    policy = {
        "indirection_template_upload": """
            target images && match network none :: allow
            all :: deny only without a network
        """
    }
    with hub_with(hub, policy=policy):
        task = hub.task(user.indirectionBuild(wire(**upload)))
        assert task["request"][0]["template_upload"] == UPLOAD
        with pytest.raises(koji.ActionNotAllowed, match=r"from source control.*only without a net"):
            user.indirectionBuild(wire(**upload, build={"network": "user"}))
        assert user.indirectionBuild(wire(**SCRATCH, build={"network": "user"}))
    with hub_with(hub, policy={**policy, "indirection": "all :: deny"}):
        assert not allowed(user, **upload)
    with (
        hub_with(hub, policy={"indirection_template_upload": "target nowhere :: allow"}),
        pytest.raises(koji.ActionNotAllowed, match="template from source control"),
    ):
        user.indirectionBuild(wire(**upload))


def test_the_channel_can_be_set_and_the_policies_for_channels_see_the_request(
    hub: AnyKoji, user: Any
) -> None:
    admin = hub.admin_session()
    if admin.getChannel("image-kvm") is None:
        admin.addHostToChannel("builder.test", "image-kvm", create=True)
    conf = "[indirection]\nchannel = image-kvm\n"
    with hub_with(hub, plugin_conf=conf):
        task = hub.task(user.indirectionBuild(wire()))
        assert user.getChannel(task["channel_id"])["name"] == "image-kvm"
    policy = {
        "channel": """
            method indirectionBuild && target images && bool scratch :: use createrepo
            buildtag images-build && match arch x86_64 :: use default
            all :: use maven
        """
    }
    with hub_with(hub, policy=policy):
        for scratch, channel in ((True, "createrepo"), (False, "default")):
            task = hub.task(user.indirectionBuild(wire(scratch=scratch)))
            assert user.getChannel(task["channel_id"])["name"] == channel


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ("[indirection]\nchanel = x\n", "there is no setting chanel"),
        ("[indirektion]\nchannel = x\n", "no setting channel in .indirektion."),
        ("channel = x\n", "cannot be read"),
        ("[indirection]\nchannel = nowhere\n", "No such channel: nowhere"),
    ],
)
def test_a_broken_configuration_breaks_this_call_and_not_the_hub(
    hub: AnyKoji, user: Any, conf: str, words: str
) -> None:
    import koji

    with hub_with(hub, plugin_conf=conf):
        assert user.getAPIVersion() == 1
        with pytest.raises(koji.GenericError, match=words):
            user.indirectionBuild(wire())


def test_the_sample_configuration_is_valid_and_changes_nothing(hub: AnyKoji, user: Any) -> None:
    sample = Path(__file__).parents[2] / "hub" / "indirection.conf"
    with hub_with(hub, plugin_conf=sample.read_text()):
        task = hub.task(user.indirectionBuild(wire()))
        assert user.getChannel(task["channel_id"])["name"] == "image"


BROKEN_LIBRARY = """
import sys
sys.modules[{module!r}] = None
"""


@pytest.mark.parametrize("module", ["koji_indirection", "jsonschema"])
def test_a_hub_without_the_library_answers_all_other_calls(
    hub: AnyKoji, user: Any, module: str
) -> None:
    import koji

    with hub.plugins(name="a_module_is_missing", hub=BROKEN_LIBRARY.format(module=module)):
        assert user.getAPIVersion() == 1
        assert user.listTags()
        with pytest.raises(koji.GenericError, match=f"cannot take indirection builds.*{module}"):
            user.indirectionBuild(wire())
        with pytest.raises(koji.ActionNotAllowed):
            hub.user_session("mallory", perms=[]).indirectionBuild(wire())


# --- what a build was made from ---------------------------------------------------------------


class Host:
    """The test in the builder's place: it opens a task, and completes its build."""

    def __init__(self, koji: AnyKoji, user: Any, name: str = "") -> None:
        from harness.base import HOST

        self.koji = koji
        self.user = user
        self.session = koji._session(name or HOST)
        self.session.exclusiveSession(force=True)

    def open(self, **changes: Any) -> int:
        task_id: int = self.user.indirectionBuild(wire(**changes))
        assert self.session.host.openTask(task_id)
        return task_id

    def begin(self, task_id: int, name: str = "live") -> Any:
        info = {"name": name, "version": "41", "release": str(task_id), "epoch": 0}
        return self.session.host.initImageBuild(task_id, info)

    def complete(self, task_id: int, build: Any, *arches: str) -> None:
        import warnings

        import koji

        results = {}
        for arch in arches:
            file = self.koji.work / f"live-41-{task_id}.{arch}.iso"
            file.write_bytes(os.urandom(1000))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                relpath = koji.pathinfo.taskrelpath(task_id)
                self.session.uploadWrapper(str(file), relpath, file.name)
            results[arch] = {
                "task_id": task_id,
                "files": [file.name],
                "arch": arch,
                "rpmlist": [],
                "logs": [],
            }
        self.session.host.completeImageBuild(task_id, build["id"], results)

    def build(self, *arches: str, **changes: Any) -> tuple[int, Any]:
        task_id = self.open(arches=list(arches), **changes)
        build = self.begin(task_id)
        self.complete(task_id, build, *arches)
        return task_id, build


@pytest.fixture
def host(hub: AnyKoji, user: Any) -> Iterator[Host]:
    host = Host(hub, user)
    yield host
    host.session.logout()


@pytest.fixture(scope="module")
def images(hub: AnyKoji, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Archives of a utility and an input image, by role and arch."""
    from harness.base import ImageFile

    admin = hub.admin_session()
    out = {}
    for role, nvr in (
        ("utility image", "debian-utility-12-1"),
        ("input image", "debian-input-12-1"),
    ):
        if admin.getBuild(nvr) is None:
            files = []
            for arch in ("x86_64", "aarch64"):
                path = tmp_path_factory.mktemp("images") / f"{nvr}.{arch}.qcow2"
                path.write_bytes(os.urandom(2000))
                files.append(ImageFile(path, arch))
            hub.import_image_build(nvr, files, tag="images-candidate")
        for archive in admin.listArchives(buildID=admin.getBuild(nvr)["id"], type="image"):
            out[role, archive["arch"]] = archive
    return out


def record_of(role: str, archive: Any, /, **changes: Any) -> dict[str, Any]:
    spec = wire()
    return {
        "arch": archive["arch"],
        "role": role,
        "reference": spec["utility_image" if role == "utility image" else "input_image"],
        "filename": archive["filename"],
        "checksum": archive["checksum"],
        "checksum_type": archive["checksum_type"],
        "archive_id": archive["id"],
        "task_id": None,
        **changes,
    }


def inputs_of(images: dict[str, Any], *arches: str) -> list[dict[str, Any]]:
    return [record_of(role, images[role, arch]) for arch in arches for role in ROLES]


ROLES = ("utility image", "input image")


def test_what_a_build_was_made_from_is_seen_from_both_sides(
    hub: AnyKoji, host: Host, images: dict[str, Any]
) -> None:
    arches = ("x86_64", "aarch64")
    task_id, build = host.build(*arches)
    extra = {"template_commit": COMMIT, "template_sha256": "ab" * 32}
    host.session.host.recordIndirectionInputs(
        task_id, build["id"], inputs_of(images, *arches), extra
    )
    anyone = hub.anonymous_session()
    made = anyone.listArchives(buildID=build["id"], type="image")
    assert len(made) == 2
    for archive in made:
        used = anyone.listArchives(imageID=archive["id"])
        assert {one["id"] for one in used} == {
            images[role, archive["arch"]]["id"] for role in ROLES
        }
    for role in ROLES:
        used_for = anyone.buildReferences(images[role, "x86_64"]["build_id"])["component_of"]
        assert {archive["id"] for archive in made} <= set(used_for)
    recorded = anyone.getBuild(build["id"])["extra"]["indirection"]
    assert recorded["template_commit"] == COMMIT
    assert (recorded["template_scm"], recorded["template"]) == (SCM, "live.tdl")
    assert recorded["utility_image"] == "latest:debian-utility@images-candidate"
    assert len(recorded["inputs"]) == 4
    assert "task_id" not in recorded["inputs"][0]


def test_it_can_be_recorded_again_and_leaves_the_rest_of_extra_alone(
    hub: AnyKoji, host: Host, images: dict[str, Any]
) -> None:
    task_id = host.open()
    info = {"name": "live", "version": "41", "release": str(task_id), "epoch": 0}
    build = host.session.host.initImageBuild(task_id, {**info, "extra": {"mine": 1}})
    host.complete(task_id, build, "x86_64")
    record = host.session.host.recordIndirectionInputs
    first = record(task_id, build["id"], inputs_of(images, "x86_64"))
    assert record(task_id, build["id"], inputs_of(images, "x86_64"), {}) == first
    extra = hub.anonymous_session().getBuild(build["id"])["extra"]
    assert extra == {"mine": 1, "indirection": first}
    (archive,) = host.user.listArchives(buildID=build["id"], type="image")
    assert len(host.user.listArchives(imageID=archive["id"])) == 2


def test_the_output_of_a_task_is_in_extra_and_is_no_component(
    host: Host, images: dict[str, Any]
) -> None:
    task_id, build = host.build("x86_64", input_image="task:5")
    utility, image = inputs_of(images, "x86_64")
    image.update(reference="task:5", archive_id=None, task_id=5)
    record = host.session.host.recordIndirectionInputs(task_id, build["id"], [utility, image])
    assert record["inputs"][1]["task_id"] == 5
    (archive,) = host.user.listArchives(buildID=build["id"], type="image")
    (component,) = host.user.listArchives(imageID=archive["id"])
    assert component["id"] == utility["archive_id"]


def test_inputs_of_an_arch_that_could_fail_and_did_are_no_error(
    host: Host, images: dict[str, Any]
) -> None:
    task_id = host.open(arches=["x86_64", "aarch64"], can_fail=["aarch64"])
    build = host.begin(task_id)
    host.complete(task_id, build, "x86_64")
    both = inputs_of(images, "x86_64", "aarch64")
    host.session.host.recordIndirectionInputs(task_id, build["id"], both)
    (archive,) = host.user.listArchives(buildID=build["id"], type="image")
    used = host.user.listArchives(imageID=archive["id"])
    assert {one["id"] for one in used} == {images[role, "x86_64"]["id"] for role in ROLES}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"archive_id": 2**30}, "No such archive"),
        ({"archive_id": "1"}, "inputs[0].archive_id"),
        ({"archive_id": 2**31}, "inputs[0].archive_id"),
        ({"archive_id": None}, "give one of archive_id and task_id"),
        ({"task_id": 5}, "give one of archive_id and task_id"),
        ({"checksum": "00" * 32}, "has checksum"),
        ({"filename": "other.qcow2"}, "has filename"),
        ({"arch": "s390x"}, "which the task does not build"),
        ({"arch": "aarch64"}, "has no archive for aarch64"),
        ({"role": "workspace"}, "inputs[0].role"),
        ({"role": "input image"}, "but the task's input image is"),
        ({"reference": "build:5"}, "but the task's utility image is"),
        ({"relpath": "x"}, "relpath"),
    ],
)
def test_an_input_that_cannot_be_is_refused_and_nothing_is_recorded(
    host: Host, images: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    import koji

    task_id = host.open(arches=["x86_64", "aarch64"])
    build = host.begin(task_id)
    host.complete(task_id, build, "x86_64")
    wrong = record_of("utility image", images["utility image", "x86_64"], **changes)
    right = record_of("input image", images["input image", "x86_64"])
    with pytest.raises(koji.GenericError) as caught:
        host.session.host.recordIndirectionInputs(task_id, build["id"], [wrong, right])
    assert words in str(caught.value)
    assert not host.user.getBuild(build["id"])["extra"]
    (archive,) = host.user.listArchives(buildID=build["id"], type="image")
    assert host.user.listArchives(imageID=archive["id"]) == []


@pytest.mark.parametrize(
    ("inputs", "extra", "words"),
    [
        ([], {}, "provenance: inputs"),
        ("x", {}, "provenance: inputs"),
        (None, {"other": 1}, "provenance: extra"),
        (None, {"template_commit": ""}, "provenance: extra.template_commit"),
        (None, {"template_sha256": "ab"}, "provenance: extra.template_sha256"),
        (None, [], "provenance: extra"),
    ],
)
def test_parameters_that_are_none_are_refused(
    host: Host, images: dict[str, Any], inputs: Any, extra: Any, words: str
) -> None:
    import koji

    task_id, build = host.build("x86_64")
    inputs = inputs_of(images, "x86_64") if inputs is None else inputs
    with pytest.raises(koji.ParameterError) as caught:
        host.session.host.recordIndirectionInputs(task_id, build["id"], inputs, extra)
    assert words in str(caught.value)


def test_an_archive_of_the_build_itself_is_no_input_of_it(host: Host) -> None:
    import koji

    task_id, build = host.build("x86_64")
    (own,) = host.user.listArchives(buildID=build["id"], type="image")
    with pytest.raises(koji.GenericError, match="itself"):
        host.session.host.recordIndirectionInputs(
            task_id, build["id"], [record_of("utility image", own)]
        )


def test_an_image_is_not_recorded_twice_for_an_arch(host: Host, images: dict[str, Any]) -> None:
    import koji

    task_id, build = host.build("x86_64")
    one = record_of("utility image", images["utility image", "x86_64"])
    with pytest.raises(koji.ParameterError, match="a second utility image for x86_64"):
        host.session.host.recordIndirectionInputs(task_id, build["id"], [one, one])


def test_only_the_host_of_the_open_task_records_and_only_on_the_tasks_own_build(
    hub: AnyKoji, host: Host, images: dict[str, Any]
) -> None:
    import koji

    task_id, build = host.build("x86_64")
    inputs = inputs_of(images, "x86_64")
    with pytest.raises(koji.AuthError):
        host.user.host.recordIndirectionInputs(task_id, build["id"], inputs)
    with pytest.raises(koji.AuthError):
        hub.admin_session().host.recordIndirectionInputs(task_id, build["id"], inputs)
    record = host.session.host.recordIndirectionInputs
    with pytest.raises(koji.ActionNotAllowed, match="does not belong to task"):
        record(task_id, images["input image", "x86_64"]["build_id"], inputs)
    other = host.open()
    with pytest.raises(koji.ActionNotAllowed, match="does not belong to task"):
        record(other, build["id"], inputs)
    unfinished = host.begin(other)
    with pytest.raises(koji.GenericError, match="is not complete"):
        record(other, unfinished["id"], inputs)
    waiting = host.user.indirectionBuild(wire())
    with pytest.raises(koji.ActionNotAllowed, match="does not own task"):
        record(waiting, build["id"], inputs)
    host.session.host.closeTask(task_id, koji.xmlrpcplus.dumps(("done",), methodresponse=1))
    with pytest.raises(koji.ActionNotAllowed, match="does not own task"):
        record(task_id, build["id"], inputs)
    for wrong in ("x", None, [1]):
        with pytest.raises(koji.GenericError):
            record(other, wrong, inputs)


def test_a_task_of_another_kind_has_nothing_to_record(
    hub: AnyKoji, host: Host, images: dict[str, Any]
) -> None:
    import koji

    task_id = hub.admin_session().makeTask("sleep", [1], channel="image")
    assert host.session.host.openTask(task_id)
    with pytest.raises(koji.GenericError, match="is not an indirectionBuild task"):
        host.session.host.recordIndirectionInputs(task_id, 1, inputs_of(images, "x86_64"))
    hub.admin_session().cancelTask(task_id)


OTHER_HOST = "other.test"


@pytest.fixture
def other_host(hub: AnyKoji, user: Any) -> Iterator[Host]:
    """Another builder, with no tasks."""
    admin = hub.admin_session()
    if admin.getHost(OTHER_HOST) is None:
        admin.addHost(OTHER_HOST, ["x86_64"])
        admin.addHostToChannel(OTHER_HOST, "image")
        hub._set_password(OTHER_HOST)
    other = Host(hub, user, OTHER_HOST)
    yield other
    other.session.logout()


def exported_calls() -> set[str]:
    """The calls that our plugin adds to a hub, with their prefix."""
    source = Path(__file__).parents[2] / "hub" / "indirection.py"
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Name) and decorator.id == "export":
                    found.add(node.name)
                if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == (
                    "export_in"
                ):
                    (prefix,) = (ast.literal_eval(one) for one in decorator.args)
                    found.add(f"{prefix}.{node.name}")
    return found


def test_each_call_is_refused_to_whoever_has_no_right_to_it(
    hub: AnyKoji, host: Host, other_host: Host, images: dict[str, Any]
) -> None:
    import koji

    task_id, build = host.build("x86_64")
    busy = other_host.open(arches=["x86_64"])
    record = (task_id, build["id"], inputs_of(images, "x86_64"), {})
    nobody, mallory = hub.anonymous_session(), hub.user_session("mallory", perms=[])
    admin = hub.admin_session()
    refused_to: dict[str, list[tuple[Any, tuple[Any, ...]]]] = {
        "indirectionBuild": [
            (session, (wire(),)) for session in (nobody, mallory, host.session, other_host.session)
        ],
        "host.recordIndirectionInputs": [
            *((session, record) for session in (nobody, mallory, host.user, admin)),
            (other_host.session, record),
            (other_host.session, (busy, *record[1:])),
        ],
    }
    assert set(refused_to) == exported_calls(), "each call is in this table"
    before = task_count(hub)
    for name, attempts in refused_to.items():
        for number, (session, arguments) in enumerate(attempts):
            with pytest.raises((koji.ActionNotAllowed, koji.AuthError)) as caught:
                session.callMethod(name, *arguments)
            assert str(caught.value), (name, number)
    assert task_count(hub) == before
    assert not host.user.getBuild(build["id"])["extra"]
    host.session.host.recordIndirectionInputs(*record)
    assert host.user.getBuild(build["id"])["extra"]["indirection"]
    admin.cancelTask(busy)


def test_every_field_of_what_a_host_records_is_bounded(host: Host, images: dict[str, Any]) -> None:
    import koji

    task_id, build = host.build("x86_64")
    good = inputs_of(images, "x86_64")
    fields = taskspec.PROVENANCE_SCHEMA["properties"]["inputs"]["items"]["properties"]
    asked: list[tuple[Any, Any]] = []
    for name, schema in fields.items():
        values = (
            ("x", "", 7, FAR_TOO_LONG)
            if "enum" in schema
            else wrong_values({"minimum": 0, "maximum": 2, **schema})
        )
        asked += [([{**good[0], name: value}, good[1]], {}) for value in values]
    for name, value in (
        ("template_commit", FAR_TOO_LONG),
        ("template_commit", "a\nb"),
        ("template_commit", 7),
        ("template_sha256", "x" * 64),
        (FAR_TOO_LONG, "x"),
    ):
        asked.append((good, {name: value}))
    asked += [(good * 50, {}), ("x", {}), ({}, {}), (good, "x"), (good, [])]
    for inputs, extra in asked:
        with pytest.raises(koji.GenericError) as caught:
            host.session.host.recordIndirectionInputs(task_id, build["id"], inputs, extra)
        assert len(str(caught.value)) < 2000
    assert not host.user.getBuild(build["id"])["extra"]
