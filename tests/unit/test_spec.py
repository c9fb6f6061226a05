"""The build spec: what it accepts, and what it says about what it does not."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koji_indirection.errors import BuilderFault, UsageError
from koji_indirection.spec import SCHEMA, BuildSpec, GuestDisk, _validator
from koji_indirection.units import GIB, MIB, TIB


def test_the_defaults_are_the_guest_contract() -> None:
    spec = BuildSpec()
    assert spec.results == ("/results/images/boot.iso",)
    assert spec.input_filename == "/input_image.raw"
    assert spec.input_device is None
    assert spec.workspace_partition == "/dev/vdb1"
    assert spec.workspace_size_bytes == 30 * GIB
    assert spec.workspace_fs == "ext4"
    assert spec.memory_bytes == 2 * GIB
    assert spec.cpus is None
    assert spec.job_timeout_seconds == 4 * 3600


def test_the_schema_is_a_valid_draft_7_schema_with_every_field_described() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    for name, field in SCHEMA["properties"].items():
        assert field["title"], name
        assert field["description"].endswith("."), name


def test_the_schema_and_the_dataclass_have_the_same_fields_and_defaults() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(BuildSpec)}
    schema = {name: field["default"] for name, field in SCHEMA["properties"].items()}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()} == schema


def test_the_schema_bounds_every_string_number_and_array() -> None:
    def check(name: str, field: dict[str, Any]) -> None:
        types = field["type"] if isinstance(field["type"], list) else [field["type"]]
        if "string" in types and "enum" not in field:
            assert "maxLength" in field, name
        if "integer" in types:
            assert {"minimum", "maximum"} <= field.keys(), name
        if "array" in types:
            assert "maxItems" in field, name
            check(f"{name}[]", field["items"])

    assert SCHEMA["additionalProperties"] is False
    for name, field in SCHEMA["properties"].items():
        check(name, field)


def test_an_input_device_replaces_the_input_file() -> None:
    spec = BuildSpec(input_device="vdc", input_writable=True)
    assert spec.input_filename is None
    assert "input_filename" not in spec.to_dict()


def test_disks_are_listed_in_the_order_of_their_names() -> None:
    assert BuildSpec().guest_disks() == (
        GuestDisk("vda", "utility"),
        GuestDisk("vdb", "workspace"),
    )
    spec = BuildSpec(workspace_device="vdc", input_device="vdb")
    assert spec.guest_disks() == (
        GuestDisk("vda", "utility"),
        GuestDisk("vdb", "input"),
        GuestDisk("vdc", "workspace"),
    )
    assert spec.workspace_partition == "/dev/vdc1"


def test_null_means_the_default_where_null_is_allowed() -> None:
    assert BuildSpec.from_dict({"cpus": None, "input_filename": None}) == BuildSpec()


def test_lists_become_tuples_and_lists_again() -> None:
    spec = BuildSpec.from_dict({"results": ["/a.iso", "/b/*.qcow2"]})
    assert spec.results == ("/a.iso", "/b/*.qcow2")
    assert spec.to_dict()["results"] == ["/a.iso", "/b/*.qcow2"]


def test_a_guest_has_no_network_unless_the_spec_names_one() -> None:
    assert BuildSpec().network is None
    assert BuildSpec(network="none") == BuildSpec()
    assert "network" not in BuildSpec(network="none").to_dict()
    assert BuildSpec(network="user").to_dict()["network"] == "user"


def test_repositories_may_be_what_each_package_manager_takes() -> None:
    addresses = (
        "https://h.example.com/repo/$basearch/",
        "http://10.0.2.2:8000",
        "http://h/debian bookworm main non-free-firmware",
        "http://h/debian ./",
    )
    assert BuildSpec(network="user", repos=addresses).repos == addresses


BAD = [
    ({"cpu": 2}, "there is no field 'cpu' (did you mean 'cpus'?)"),
    ({"workspace_size": "30G"}, "did you mean 'workspace_size_bytes'?"),
    ({"zzz": 1}, "there is no field 'zzz' (fields are results, "),
    ({7: 1}, "there is no field 7"),
    ({"cpus": True}, "cpus is True, which is not a whole number or null"),
    ({"cpus": 2.0}, "cpus is 2.0, which is not a whole number or null"),
    ({"cpus": "2"}, "cpus is '2', which is not a whole number or null"),
    ({"cpus": 0}, "cpus is 0 (it must be at least 1)"),
    ({"cpus": 257}, "cpus is 257 (it must be at most 256)"),
    ({"memory_bytes": 1024}, "memory_bytes is 1024 (it must be at least 134217728 (128 MiB))"),
    ({"memory_bytes": 2 * TIB}, "it must be at most 1099511627776 (1 TiB)"),
    ({"memory_bytes": None}, "memory_bytes is None, which is not a whole number"),
    ({"workspace_size_bytes": MIB}, "it must be at least 67108864 (64 MiB)"),
    ({"workspace_size_bytes": 2 * TIB}, "workspace_size_bytes is 2199023255552"),
    ({"workspace_fs": "btrfs"}, "workspace_fs is 'btrfs' (it must be one of ext4, ext2, xfs)"),
    ({"job_timeout_seconds": 0}, "job_timeout_seconds is 0 (it must be at least 1 (1 s))"),
    ({"job_timeout_seconds": None}, "job_timeout_seconds is None, which is not a whole number"),
    ({"boot_timeout_seconds": 604801}, "it must be at most 604800 (7 d)"),
    ({"command_timeout_seconds": -1}, "command_timeout_seconds is -1"),
    ({"shutdown_timeout_seconds": 10**30}, "shutdown_timeout_seconds is 1000000"),
    ({"input_writable": "yes"}, "input_writable is 'yes', which is not true or false"),
    ({"input_writable": 1}, "input_writable is 1, which is not true or false"),
    ({"input_writable": True}, "input_writable is given without input_device"),
    (
        {"input_filename": "/i.raw", "input_device": "vdc"},
        "input_filename and input_device are both given",
    ),
    ({"input_device": "/dev/vdc"}, "input_device is '/dev/vdc' (give the name alone: vdb or vdc)"),
    ({"input_device": "vda"}, "input_device is 'vda'"),
    ({"input_device": "vdd"}, "workspace_device is 'vdb' and input_device is 'vdd'"),
    ({"input_device": "vdb"}, "must be vdb and vdc, one each"),
    ({"workspace_device": "vdc"}, "workspace_device is 'vdc' and there is no input_device"),
    ({"workspace_device": "sdb"}, "workspace_device is 'sdb' (give the name alone"),
    ({"input_filename": "input.raw"}, "input_filename is 'input.raw' (give an absolute path"),
    ({"input_filename": ""}, "input_filename is '' (give an absolute path"),
    ({"input_filename": "/a b"}, "input_filename is '/a b' (give an absolute path"),
    ({"input_filename": "/$(reboot)"}, "only letters, digits, '.', '_' and '-'"),
    ({"input_filename": "/a//b"}, "input_filename is '/a//b'"),
    ({"input_filename": "/a/"}, "input_filename is '/a/'"),
    ({"input_filename": "/a\n"}, "has a line break or a control character"),
    ({"input_filename": "/a/../b"}, "'/a/../b', which has '..' in it"),
    ({"input_filename": "/./b"}, "'/./b', which has '.' in it"),
    ({"input_filename": "/a/-rf"}, "'/a/-rf', part of which starts with a dash"),
    ({"input_filename": "/lost+found"}, "input_filename is '/lost+found'"),
    ({"input_filename": "/" + "a" * 200}, "201 characters long (at most 200 are allowed)"),
    ({"results": []}, "results is empty (name at least one path)"),
    ({"results": "/a.iso"}, "results is '/a.iso', which is not a list"),
    ({"results": None}, "results is None, which is not a list"),
    ({"results": [1]}, "results has 1 in it, which is not a string"),
    ({"results": ["a.iso"]}, "results has 'a.iso' in it (give an absolute path or glob"),
    ({"results": ["/"]}, "results has '/' in it"),
    ({"results": ["/a\nb"]}, "on one line"),
    ({"results": ["/a\n"]}, "on one line"),
    ({"results": ["/a\0b"]}, "on one line"),
    ({"results": ["/a\ud800"]}, "has a line break or a control character"),
    ({"results": ["/a/../etc/passwd"]}, "'/a/../etc/passwd', which has '..' in it"),
    ({"results": ["/a/"]}, "which has nothing after one of its slashes"),
    ({"results": ["/a//b"]}, "which has nothing after one of its slashes"),
    ({"results": ["/a", "/b", "/a"]}, "results has '/a' twice"),
    ({"results": ["/" + "a" * 500]}, "501 characters long (at most 500 are allowed)"),
    ({"results": [f"/{n}" for n in range(51)]}, "results has 51 paths (at most 50 are allowed)"),
    ({"collect_logs": ["program.log"]}, "collect_logs has 'program.log' in it"),
    ({"network": "br 0"}, "network is 'br 0' (write user, the name of a libvirt network, or none)"),
    ({"network": ""}, "network is '' (write user"),
    ({"network": "user\n"}, "network is 'user\\n' (write user"),
    ({"network": True}, "network is True, which is not a string or null"),
    ({"network": "n" * 51}, "51 characters long (at most 50 are allowed)"),
    ({"network": "user", "repos": "http://h/"}, "repos is 'http://h/', which is not a list"),
    ({"network": "user", "repos": ["file:///srv"]}, "repos has 'file:///srv' in it (write http:"),
    ({"network": "user", "repos": ["http://h/a\nb"]}, "repos has 'http://h/a\\nb' for a URL"),
    ({"network": "user", "repos": ["http://h/a main ["]}, "repos has 'http://h/a main [' for a"),
    ({"network": "user", "repos": ["http://h/'"]}, "for a URL (write http://host/path"),
    ({"network": "user", "repos": ["http://127.0.0.1/r"]}, "repos is at '127.0.0.1', which in the"),
    ({"network": "user", "repos": ["https://me:pw@h/r"]}, "with a user name or password in it"),
    ({"network": "user", "repos": ["http://h/", "http://h/"]}, "repos has 'http://h/' twice"),
    ({"repos": ["http://h/"]}, "repos are given, but the guest has no network"),
]


@pytest.mark.parametrize(("data", "message"), BAD, ids=[f"{bad[0]}"[:50] for bad in BAD])
def test_a_wrong_field_is_named_with_what_it_should_be(data: dict[Any, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        BuildSpec.from_dict(data)
    assert message in str(caught.value)
    assert caught.value.hint


def test_a_spec_that_is_no_object_is_refused() -> None:
    with pytest.raises(UsageError, match="an object with fields, not 'x'"):
        BuildSpec.from_dict("x")  # type: ignore[arg-type]


def test_a_spec_made_in_python_is_checked_as_well() -> None:
    with pytest.raises(UsageError, match="cpus is 0"):
        BuildSpec(cpus=0)
    with pytest.raises(UsageError, match="workspace_device is 'vdc'"):
        dataclasses.replace(BuildSpec(), workspace_device="vdc")


def test_a_missing_jsonschema_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    _validator.cache_clear()
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(BuilderFault, match=r"jsonschema is missing .install python3-jsonschema"):
        BuildSpec()


_paths = st.from_regex(r"/[A-Za-z0-9_*?]{1,20}(/[a-z]{1,9}\.iso)?", fullmatch=True)
_timeouts = st.none() | st.integers(1, 604800)
_specs = st.fixed_dictionaries(
    {},
    optional={
        "results": st.lists(_paths, min_size=1, max_size=50, unique=True),
        "collect_logs": st.lists(_paths, max_size=50, unique=True),
        "workspace_size_bytes": st.integers(64 * MIB, 2 * TIB - MIB),
        "workspace_fs": st.sampled_from(["ext4", "ext2", "xfs"]),
        "cpus": st.none() | st.integers(1, 256),
        "memory_bytes": st.integers(128 * MIB, TIB),
        "boot_timeout_seconds": _timeouts,
        "job_timeout_seconds": st.integers(1, 604800),
        "command_timeout_seconds": _timeouts,
        "shutdown_timeout_seconds": _timeouts,
        "network": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,49}", fullmatch=True).filter(
            lambda name: name != "none"
        ),
    },
)
_inputs = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {
            "input_filename": st.from_regex(
                r"(/[A-Za-z0-9_][A-Za-z0-9._-]{0,20}){1,4}", fullmatch=True
            )
        }
    ),
    st.fixed_dictionaries(
        {"input_device": st.just("vdc"), "input_writable": st.booleans()},
        optional={"workspace_device": st.just("vdb")},
    ),
    st.just({"input_device": "vdb", "workspace_device": "vdc"}),
)


@settings(deadline=None)
@given(_specs, _inputs)
def test_a_spec_survives_json(data: dict[str, Any], where: dict[str, Any]) -> None:
    spec = BuildSpec.from_dict({**data, **where})
    wire = spec.to_dict()
    jsonschema.Draft7Validator(SCHEMA).validate(wire)
    assert BuildSpec.from_dict(json.loads(json.dumps(wire))) == spec
    assert {**spec.to_dict(), **{k: v for k, v in data.items() if v is not None}} == wire


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(SCHEMA["properties"])) | st.text(), _json))
def test_any_object_makes_a_spec_or_a_usage_error(data: dict[str, Any]) -> None:
    try:
        BuildSpec.from_dict(data)
    except UsageError as error:
        assert error.message.startswith("build spec: ")
