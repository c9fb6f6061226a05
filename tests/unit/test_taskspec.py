"""The task spec: what it accepts, and what it says about what it does not."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koji_indirection.errors import BuilderFault, UsageError
from koji_indirection.sources import Reference
from koji_indirection.spec import BuildSpec
from koji_indirection.taskspec import (
    PROVENANCE_SCHEMA,
    SCHEMA,
    TaskSpec,
    _validator,
    check_provenance,
)

UPLOAD = "cli-indirection/1695124012.341.QwErTyUi"
SCM = "git+https://example.com/templates.git?live#origin/main"


def wire(**changes: Any) -> dict[str, Any]:
    """A task spec as a client sends it; a field that is changed to None is left out."""
    data = {
        "target": "images",
        "name": "live",
        "version": "41",
        "arches": ["x86_64", "aarch64"],
        "input_image": "debian-input-12-1",
        "utility_image": "latest:debian-utility@images-candidate",
        "template": "live.tdl",
        "template_upload": UPLOAD,
        **changes,
    }
    return {key: value for key, value in data.items() if value is not None}


def refused(**changes: Any) -> str:
    with pytest.raises(UsageError) as caught:
        TaskSpec.from_dict(wire(**changes))
    assert caught.value.hint
    return str(caught.value)


def test_what_is_left_out_has_its_default() -> None:
    spec = TaskSpec.from_dict(wire())
    assert spec.release is None
    assert (spec.can_fail, spec.scratch, spec.skip_tag, spec.accel) == ((), False, False, "auto")
    assert spec.build == BuildSpec()
    assert spec.build_for("aarch64") is spec.build


def test_a_spec_survives_the_wire_and_has_no_null_on_it() -> None:
    spec = TaskSpec.from_dict(
        wire(
            release="1.fc41",
            can_fail=["aarch64"],
            input_archive="*.qcow2",
            template="live/boot.tdl",
            template_upload=None,
            template_scm=SCM,
            scratch=True,
            accel="kvm",
            build={"cpus": 2, "results": ["/results/*.iso"]},
            arch_build={"aarch64": {"results": ["/results/a.iso"], "memory_bytes": 2**32}},
        )
    )
    out = spec.to_dict()
    text = json.dumps(out)
    assert "null" not in text
    again = TaskSpec.from_dict(json.loads(text))
    assert again == spec
    assert hash(again) == hash(spec)
    jsonschema.Draft7Validator(SCHEMA).validate(json.loads(text))


def test_the_schema_is_a_valid_draft_7_schema_with_every_field_described() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    for name, field in SCHEMA["properties"].items():
        assert field["title"], name
        assert field["description"].endswith("."), name


def test_the_schema_and_the_dataclass_have_the_same_fields() -> None:
    fields = dataclasses.fields(TaskSpec)
    assert {one.name for one in fields} == SCHEMA["properties"].keys()
    required = [
        one.name
        for one in fields
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]
    assert required == SCHEMA["required"]


def test_the_schema_bounds_every_string_number_and_array() -> None:
    def check(name: str, field: dict[str, Any]) -> None:
        types = field["type"] if isinstance(field["type"], list) else [field["type"]]
        if "string" in types and "enum" not in field:
            assert {"maxLength", "pattern"} <= field.keys(), name
        if "array" in types:
            assert {"maxItems", "uniqueItems"} <= field.keys(), name
            check(f"{name}[]", field["items"])
        if "object" in types:
            assert field["additionalProperties"] is False or "maxProperties" in field, name

    check("task spec", SCHEMA)
    for name, field in SCHEMA["properties"].items():
        check(name, field)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": ""}, "target"),
        ({"target": "a b"}, "target"),
        ({"target": 5}, "target is 5, which is not a string"),
        ({"name": "-live"}, "name"),
        ({"name": "li/ve"}, "name"),
        ({"name": "x" * 129}, "name"),
        ({"version": "4-1"}, "no dash"),
        ({"version": "41\n"}, "version has a line break"),
        ({"version": 41}, "version"),
        ({"release": "1-1"}, "release"),
        ({"release": ""}, "release"),
        ({"arches": []}, "arches is empty"),
        ({"arches": ["x86_64", "x86_64"]}, "arches has 'x86_64' twice"),
        ({"arches": [f"a{n}" for n in range(21)]}, "arches has 21 entries"),
        ({"arches": "x86_64"}, "arches"),
        ({"arches": ["X86 64"]}, "arches has 'X86 64' in it"),
        ({"can_fail": ["s390x"]}, "can_fail has 's390x', which is not in arches"),
        ({"input_image": "5"}, "input_image"),
        ({"input_image": "build:0"}, "input_image"),
        ({"input_image": "task:4294967296"}, "ids are from 1"),
        ({"utility_image": "latest:thing"}, "utility_image"),
        ({"input_archive": "../disk.qcow2"}, "input_archive"),
        ({"utility_archive": ""}, "utility_archive"),
        ({"template": "/etc/passwd", "template_upload": None, "template_scm": SCM}, "template"),
        ({"template": "a/../b", "template_upload": None, "template_scm": SCM}, "without '..'"),
        ({"template": "a//b", "template_upload": None, "template_scm": SCM}, "template"),
        ({"template": ".."}, "template"),
        ({"template": "a/b.tdl"}, "an upload is one file"),
        ({"template_upload": None}, "both missing"),
        ({"template_scm": SCM}, "both given"),
        ({"template_upload": "tasks/1/1"}, "cli-indirection/"),
        ({"template_upload": "cli-indirection/../x"}, "template_upload"),
        ({"template_upload": "cli-indirection/.."}, "template_upload"),
        ({"template_upload": None, "template_scm": "git://h/p"}, "URL#REF"),
        ({"template_upload": None, "template_scm": "git://h/p#--upload-pack=x"}, "URL#REF"),
        # koji.daemon.SCM gives git what stands behind origin/.
        ({"template_upload": None, "template_scm": "git://h/p#origin/--upload-pack=x"}, "URL#REF"),
        (
            {"template_upload": None, "template_scm": "git://h/p?a/../../etc#main"},
            "which leads out of its checkout",
        ),
        ({"scratch": "false"}, "scratch is 'false', which is not true or false"),
        ({"skip_tag": 1}, "skip_tag"),
        ({"accel": "xen"}, "one of auto, kvm, tcg"),
        ({"build": []}, "build spec"),
        ({"build": {"cpus": 0}}, "cpus"),
        ({"build": {"cpu": 2}}, "did you mean 'cpus'"),
        ({"arch_build": {"s390x": {}}}, "arch_build has 's390x', which is not in arches"),
        ({"arch_build": {"x86_64": {"cpus": 1000}}}, "arch_build, x86_64: build spec: cpus"),
        ({"arch_build": {"x86_64": {"cpus": None}}}, "leave the field out"),
        ({"arch_build": {"x86_64": 5}}, "arch_build"),
        ({"arch_build": ["x86_64"]}, "arch_build"),
        ({"utility_imag": "a-1-1"}, "did you mean 'utility_image'"),
        ({"cpus": 2}, "put it into build"),
        ({"network": "default"}, "there is no field 'network'"),
        ({"tag_repo": True}, "tag_repo is set, but the guest for x86_64 has no network"),
        (
            {
                "arches": ["x86_64", "aarch64"],
                "build": {"network": "user"},
                "arch_build": {"aarch64": {"network": "none"}},
                "tag_repo": True,
            },
            "the guest for aarch64 has no network to reach the repository (set network to user",
        ),
        ({"name": None}, "name is missing"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_field_and_a_hint(
    changes: dict[str, Any], words: str
) -> None:
    assert words in refused(**changes)


@pytest.mark.parametrize("data", [None, "x", [], 5])
def test_what_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(UsageError, match="a task spec is an object"):
        TaskSpec.from_dict(data)


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.just("x86_64") | st.just("cpus"), inner, max_size=3
        )
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(SCHEMA["properties"])), _ANYTHING, max_size=4))
def test_whatever_comes_over_the_wire_is_a_spec_or_a_usage_error(changes: dict[str, Any]) -> None:
    try:
        spec = TaskSpec.from_dict({**wire(), **changes})
    except UsageError as error:
        assert error.one_line()
    else:
        assert TaskSpec.from_dict(spec.to_dict()) == spec


@settings(max_examples=200, deadline=None)
@given(_ANYTHING, _ANYTHING)
def test_whatever_a_builder_records_is_checked_or_a_usage_error(inputs: Any, extra: Any) -> None:
    with pytest.raises(UsageError):
        check_provenance(TaskSpec.from_dict(wire()), inputs, extra)
    with pytest.raises(UsageError):
        check_provenance(TaskSpec.from_dict(wire()), [{**made_from()[0], "nvr": inputs}], [extra])


def test_it_says_which_networks_its_arches_ask_for() -> None:
    def networks(**changes: Any) -> tuple[str, ...]:
        return TaskSpec.from_dict(wire(arches=["x86_64", "aarch64"], **changes)).networks

    assert networks() == ("none",)
    assert networks(build={"network": "user"}) == ("user",)
    assert networks(arch_build={"aarch64": {"network": "br0"}}) == ("none", "br0")
    own = {"aarch64": {"network": "none"}}
    assert networks(build={"network": "user"}, arch_build=own) == ("user", "none")


REFERENCES = [
    "a-1-1",
    "a-b-1-1",
    "a b-1-1",
    "a-1",
    "-a-1-1",
    "a/b-1-1",
    "build:1",
    "build:x",
    "build:0",
    "build:2147483647",
    "build:2147483648",
    "build:99999999999",
    "task:12",
    "task:",
    "latest:a@b",
    "latest:a-b@c:d",
    "latest:a",
    "latest:a@b@c",
    "other:a-1-1",
    "a-1-1\n",
    "a-1-1\x85",
]


@pytest.mark.parametrize("text", REFERENCES)
def test_a_reference_is_right_here_exactly_when_sources_can_read_it(text: str) -> None:
    def readable() -> bool:
        try:
            return Reference.parse(text).text == text
        except UsageError:
            return False

    def accepted() -> bool:
        try:
            TaskSpec.from_dict(wire(input_image=text))
        except UsageError:
            return False
        return True

    assert accepted() == readable()


def test_an_arch_overrides_only_what_it_names() -> None:
    spec = TaskSpec.from_dict(
        wire(build={"cpus": 2, "memory_bytes": 2**32}, arch_build={"aarch64": {"cpus": 8}})
    )
    assert spec.build_for("x86_64").cpus == 2
    assert spec.build_for("aarch64") == BuildSpec(cpus=8, memory_bytes=2**32)


def test_an_arch_can_have_the_input_image_as_a_device_where_others_have_a_file() -> None:
    spec = TaskSpec.from_dict(
        wire(
            build={"input_filename": "/in.raw"},
            arch_build={"aarch64": {"input_device": "vdb", "workspace_device": "vdc"}},
        )
    )
    assert spec.build_for("x86_64").input_filename == "/in.raw"
    assert spec.build_for("aarch64").input_filename is None
    assert spec.build_for("aarch64").input_device == "vdb"


def test_an_arch_can_have_the_input_image_as_a_file_where_others_have_a_device() -> None:
    spec = TaskSpec.from_dict(
        wire(
            build={"input_device": "vdb", "workspace_device": "vdc", "input_writable": True},
            arch_build={"aarch64": {"input_filename": "/in.raw"}},
        )
    )
    assert spec.build_for("aarch64") == BuildSpec(input_filename="/in.raw")


def test_a_spec_cannot_change_after_it_was_checked() -> None:
    partial = {"cpus": 8}
    spec = TaskSpec.from_dict(wire(arch_build={"aarch64": partial}))
    partial["cpus"] = 10**6
    assert spec.build_for("aarch64").cpus == 8
    with pytest.raises(TypeError):
        spec.arch_build["aarch64"]["cpus"] = 5  # type: ignore[index]


def test_a_build_spec_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="build is"):
        TaskSpec(**{**wire(), "build": {}})


# --- what a build was made from ---------------------------------------------------------------


def made_from(**changes: Any) -> list[dict[str, Any]]:
    """Both inputs of x86_64 as sources.Source has them; changes are made to the first."""
    common = {"arch": "x86_64", "checksum": "ab" * 32, "checksum_type": 2}
    utility = {
        **common,
        "role": "utility image",
        "reference": "latest:debian-utility@images-candidate",
        "filename": "u.qcow2",
        "nvr": "debian-utility-12-1",
        "archive_id": 7,
        "task_id": None,
    }
    image = {
        **common,
        "role": "input image",
        "reference": "debian-input-12-1",
        "filename": "i.qcow2",
        "archive_id": 8,
    }
    return [{**utility, **changes}, image]


def test_the_provenance_schema_is_a_valid_draft_7_schema() -> None:
    jsonschema.Draft7Validator.check_schema(PROVENANCE_SCHEMA)


def test_a_provenance_with_and_without_a_commit_is_accepted() -> None:
    spec = TaskSpec.from_dict(wire())
    check_provenance(spec, made_from(), {})
    extra = {"template_commit": "5f1d0a9c", "template_sha256": "ab" * 32}
    check_provenance(spec, made_from(archive_id=None, task_id=5), extra)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "s390x"}, "inputs[0] is for s390x, which the task does not build"),
        ({"role": "input image", "reference": "debian-input-12-1"}, "a second input image"),
        ({"reference": "build:5"}, "but the task's utility image is"),
        ({"task_id": 5}, "give one of archive_id and task_id"),
        ({"archive_id": None}, "give one of archive_id and task_id"),
        ({"archive_id": True}, "provenance: inputs[0].archive_id"),
        ({"archive_id": 0}, "provenance: inputs[0].archive_id"),
        ({"checksum": "xyz"}, "provenance: inputs[0].checksum"),
        ({"checksum_type": 3}, "provenance: inputs[0].checksum_type"),
        ({"filename": "x" * 501}, "provenance: inputs[0].filename"),
        ({"size": 5}, "size"),
    ],
)
def test_a_provenance_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_provenance(TaskSpec.from_dict(wire()), made_from(**changes), {})
    assert words in str(caught.value)


@pytest.mark.parametrize("inputs", [None, [], {}, "x", [5]])
def test_inputs_that_are_no_list_of_objects_are_refused(inputs: Any) -> None:
    with pytest.raises(UsageError, match="provenance: inputs"):
        check_provenance(TaskSpec.from_dict(wire()), inputs, {})


@pytest.mark.parametrize("extra", [None, [], {"other": 1}, {"template_sha256": "ab"}])
def test_an_extra_that_nobody_knows_is_refused(extra: Any) -> None:
    with pytest.raises(UsageError, match="provenance: extra"):
        check_provenance(TaskSpec.from_dict(wire()), made_from(), extra)


def test_without_jsonschema_it_imports_and_checking_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = (
        "import sys; sys.modules['jsonschema'] = None; import koji_indirection.taskspec; "
        "print(sorted({'koji', 'libvirt', 'guestfs', 'requests'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (out.returncode, out.stdout.strip()) == (0, "[]"), out.stderr
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    _validator.cache_clear()
    with pytest.raises(BuilderFault, match="install python3-jsonschema"):
        TaskSpec.from_dict(wire())
