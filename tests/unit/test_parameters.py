"""Parameters of IndirectionCloud: what each becomes, and what is said of those that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from koji_indirection import parameters
from koji_indirection.errors import BuildFailed, UsageError
from koji_indirection.parameters import Parameters
from koji_indirection.spec import BuildSpec

TDL = (
    "<template><commands><command name='mount'>mount /dev/vdb1 /mnt</command></commands></template>"
)
FACTORY_ID = "f216b47f-0444-4392-b1a4-a17f36746f7b"


def load(directory: Path, **values: Any) -> Parameters:
    path = directory / "p.json"
    path.write_text(json.dumps(values))
    return parameters.load(path)


def refused(directory: Path, content: str | bytes) -> str:
    path = directory / "p.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError) as caught:
        parameters.load(path)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "fields"),
    [
        ("input_image_filename", "/root.img", {"input_filename": "/root.img"}),
        ("input_image_file", "/root.img", {"input_filename": "/root.img"}),
        ("input_image_device", "vdc", {"input_device": "vdc"}),
        ("working_space_device", "vdb", {"workspace_device": "vdb"}),
        ("utility_cpus", 6, {"cpus": 6}),
        ("utility_cpus", "6", {"cpus": 6}),
        ("results_location", "/out/live.iso", {"results": ["/out/live.iso"]}),
    ],
)
def test_each_parameter_becomes_a_field_of_the_build_spec(
    tmp_path: Path, name: str, value: Any, fields: dict[str, Any]
) -> None:
    assert load(tmp_path, **{name: value}).build_spec({}) == BuildSpec.from_dict(fields)


def test_without_any_parameter_all_is_as_without_the_file(tmp_path: Path) -> None:
    empty = load(tmp_path, input_image_device=None)
    assert empty.build_spec({}) == BuildSpec()
    assert empty.utility_image() is None
    assert empty.template() is None


def test_the_devices_can_be_swapped(tmp_path: Path) -> None:
    swapped = load(tmp_path, input_image_device="vdb", working_space_device="vdc")
    assert swapped.build_spec({}).guest_disks() == (
        ("vda", "utility"),
        ("vdb", "input"),
        ("vdc", "workspace"),
    )


@pytest.mark.parametrize(
    ("given", "options", "expected"),
    [
        ({"utility_cpus": 2}, {"cpus": 3}, {"cpus": 3}),
        ({"results_location": "/a"}, {"results": ["/b", "/c"]}, {"results": ["/b", "/c"]}),
        (
            {"input_image_file": "/a.raw"},
            {"input_device": "vdc"},
            {"input_device": "vdc"},
        ),
        (
            {"input_image_device": "vdc"},
            {"input_filename": "/a.raw"},
            {"input_filename": "/a.raw"},
        ),
        (
            {"working_space_device": "vdc"},
            {"input_device": "vdb"},
            {"input_device": "vdb", "workspace_device": "vdc"},
        ),
        (
            {"input_image_device": "vdc"},
            {"input_writable": True},
            {"input_device": "vdc", "input_writable": True},
        ),
    ],
)
def test_options_override_the_file(
    tmp_path: Path, given: dict[str, Any], options: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert load(tmp_path, **given).build_spec(options) == BuildSpec.from_dict(expected)


def test_the_template_is_read_from_the_text(tmp_path: Path) -> None:
    declared = f"<?xml version='1.0' encoding='ISO-8859-1'?>\n{TDL.replace('/mnt', '/mnt/é')}"
    for text, wanted in ((TDL, "/mnt"), (declared, "/mnt/é")):
        found = load(tmp_path, utility_customizations=text).template()
        assert found is not None
        assert [(one.name, one.text) for one in found.commands] == [
            ("mount", f"mount /dev/vdb1 {wanted}")
        ]


def test_a_template_that_is_wrong_is_said_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"p\.json: utility_customizations.*2"):
        load(tmp_path, utility_customizations="<template>\n<commands>").template()


def test_the_utility_image_is_a_file(tmp_path: Path) -> None:
    assert load(tmp_path, utility_image="u.qcow2").utility_image() == Path("u.qcow2")


def test_an_id_of_image_factory_is_told_from_a_file(tmp_path: Path) -> None:
    found = load(tmp_path, utility_image=FACTORY_ID, utility_customizations=TDL)
    with pytest.raises(UsageError) as caught:
        found.utility_image()
    assert f"utility_image {FACTORY_ID} is the ID of an image in Image Factory" in str(caught.value)
    assert "--utility-image" in caught.value.hint
    assert found.template() is not None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"utility_cpu": 2}, "no parameter 'utility_cpu' (did you mean 'utility_cpus'?)"),
        ({"input_image": "x"}, "did you mean 'input_image_file'?"),
        ({"memory_bytes": 2}, "there are utility_image, utility_customizations, input_image"),
        ({"utility_cpus": 0.5}, "utility_cpus is 0.5 (it must be a whole number above 0)"),
        ({"utility_cpus": True}, "utility_cpus is True"),
        ({"utility_cpus": "two"}, "utility_cpus is 'two'"),
        ({"utility_cpus": [2]}, "utility_cpus is [2]"),
        ({"results_location": ["/a"]}, "results_location is ['/a'] (it must be a text)"),
        ({"utility_image": ""}, "utility_image is '' (it must be a text)"),
        ({"utility_customizations": {}}, "it must be the text of a template"),
        ({"utility_customizations": "tasks.tdl"}, "name its file with --template"),
        (
            {"input_image_file": "/a", "input_image_device": "vdc"},
            "input_image_file and input_image_device are both given",
        ),
        (
            {"input_image_file": "/a", "input_image_filename": "/b"},
            "input_image_filename is '/b' and input_image_file is '/a'",
        ),
    ],
)
def test_a_wrong_parameter_is_refused_in_one_sentence(
    tmp_path: Path, values: dict[str, Any], sentence: str
) -> None:
    message = refused(tmp_path, json.dumps(values))
    assert message.startswith("parameters p.json: ")
    assert sentence in message


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"utility_cpus": 0}, "p.json: utility_cpus is 0 (it must be at least 1)"),
        ({"input_image_device": "sdb"}, "p.json: input_image_device is 'sdb'"),
        (
            {"working_space_device": "vdc"},
            "working_space_device is 'vdc' and there is no input_image_",
        ),
        ({"results_location": "boot.iso"}, "p.json: results_location"),
        ({"input_image_filename": "in.raw"}, "p.json: input_image_filename is 'in.raw'"),
        ({"input_image_file": "/../in.raw"}, "p.json: input_image_file"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_as_in_the_file(
    tmp_path: Path, values: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, **values).build_spec({})
    assert sentence in str(caught.value)


def test_a_wrong_option_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^build spec: cpus is 1000"):
        load(tmp_path, utility_cpus=2, results_location="/a").build_spec({"cpus": 1000})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "p.json is not JSON: line 1"),
        ('{"utility_cpus": 2,\n}', "p.json is not JSON: line 2"),
        (b"\xff\xfe", "p.json is not JSON: not UTF-8 text"),
        ("[" * 100_000, "p.json is not JSON"),
        ("[1]", "p.json holds [1], not an object"),
        ('{"utility_cpus": 1, "utility_cpus": 2}', "p.json has 'utility_cpus' twice"),
        (b" " * (parameters.MAX_BYTES + 1), "p.json is larger than"),
    ],
)
def test_a_file_that_is_no_object_of_parameters_is_refused(
    tmp_path: Path, content: str | bytes, sentence: str
) -> None:
    assert sentence in refused(tmp_path, content)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    found = load(tmp_path, utility_customizations=TDL.replace("mount", "\ud800", 1))
    with pytest.raises(UsageError, match="surrogate"):
        found.template()


@pytest.mark.parametrize("path", ["none.json", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError, match="parameters "):
        parameters.load(tmp_path / path)
