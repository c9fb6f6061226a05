"""manifest.json and the schema that describes it for others: held together here.

docs/manifest.schema.json repeats the build spec's schema. After a change of
that, write it anew and read the difference:

    KOJI_INDIRECTION_WRITE_GOLDEN=1 .venv/bin/pytest tests/unit/test_manifest.py
    git diff docs/manifest.schema.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from koji_indirection import spec
from koji_indirection.manifest import (
    ImageRecord,
    KojiRecord,
    Manifest,
    OutputRecord,
    Timeline,
)
from koji_indirection.spec import BuildSpec
from koji_indirection.watch import CommandRecord, SetupRecord

SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "manifest.schema.json"
SCHEMA: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
PROPERTIES = SCHEMA["properties"]
DIGEST = "0123456789abcdef" * 4


def validate(document: dict[str, Any]) -> None:
    jsonschema.validate(document, SCHEMA, cls=jsonschema.Draft7Validator)


def as_read(manifest: Manifest, directory: Path) -> dict[str, Any]:
    manifest.write(directory)
    document: dict[str, Any] = json.loads((directory / "manifest.json").read_text("utf-8"))
    return document


def minimal() -> Manifest:
    """A build that failed before anything was known."""
    return Manifest(
        spec=BuildSpec().to_dict(),
        template={"name": "t.tdl", "sha256": DIGEST, "source": None, "ignored": []},
        reason="no space left",
    )


def filled() -> Manifest:
    """Every field, as a whole build fills it."""
    full_spec = BuildSpec(
        results=("/results/*",),
        collect_logs=("/program.log",),
        input_device="vdc",
        input_writable=True,
        firmware="uefi",
        secure_boot=True,
        disk_bus="sata",
        cpus=2,
        boot_timeout_seconds=1,
        command_timeout_seconds=2,
        shutdown_timeout_seconds=3,
        network="user",
        repos=("http://h/repo",),
    )
    archive = KojiRecord(
        reference="build:7",
        role="utility image",
        nvr="tools-1-1",
        build_id=7,
        archive_id=70,
        task_id=None,
        filename="ü.qcow2",
        arch="x86_64",
        checksum=DIGEST,
        checksum_type="sha256",
    )
    image = ImageRecord("/srv/ü.qcow2", "qcow2", 300, 10**12, DIGEST, archive)
    return Manifest(
        spec=full_spec.to_dict(),
        template={
            "name": "t.tdl",
            "sha256": DIGEST,
            "source": "git+https://example.com/t.git#0123abc",
            "ignored": ["os", "packages"],
        },
        outcome="built",
        versions={"koji-indirection": "1.0", "python": "3.9.1", "libvirt": "9.0.0"},
        host={
            "arch": "x86_64",
            "cpus": 2,
            "memory_bytes": 2**34,
            "libvirt_uri": "qemu:///system",
        },
        accelerator={"kind": "kvm", "reason": "a probe ran in 3 ms"},
        utility_image=image,
        input_image=dataclasses.replace(image, format="raw", sha256=None, koji=None),
        guest={
            "os_id": "debian",
            "version_id": "12",
            "init": "systemd",
            "arch": "x86_64",
            "firmware": "uefi",
            "disk_bus": "sata",
            "selinux_made_permissive": False,
            "cpus": 2,
            "memory_bytes": 2**31,
            "cpu_model": "host",
            "kernel": "6.1.0",
            "shell": "/bin/bash",
            "selinux": "none",
            "peaks": {"memory_bytes": 1, "root_bytes": 2, "workspace_bytes": 3},
        },
        timeline=[
            {"phase": phase, "seconds": 1.25}
            for phase in ("vet", "prepare", "inject", "boot", "job", "shutdown", "collect")
        ],
        setup=[
            dataclasses.asdict(SetupRecord("network", 0, 1.5)),
            dataclasses.asdict(SetupRecord("packages", 1, 2.5, "no repository has 'x'")),
        ],
        commands=[
            dataclasses.asdict(CommandRecord("mount", 0, 0.5)),
            dataclasses.asdict(CommandRecord("hang")),
        ],
        outputs=[OutputRecord("boot.iso", "/results/images/boot.iso", 5, DIGEST)],
        logs=["build.log", "console.log", "job.log"],
    )


def test_the_schema_is_a_schema() -> None:
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"
    jsonschema.Draft7Validator.check_schema(SCHEMA)


def test_a_filled_manifest_is_valid(tmp_path: Path) -> None:
    validate(as_read(filled(), tmp_path))


def test_a_manifest_of_a_build_that_failed_at_once_is_valid(tmp_path: Path) -> None:
    validate(as_read(minimal(), tmp_path))


def test_the_filled_manifest_above_leaves_no_field_of_the_schema_out() -> None:
    document = filled().to_dict()
    assert set(document) == set(PROPERTIES)
    for name in ("host", "accelerator", "guest", "template"):
        assert set(document[name]) == set(PROPERTIES[name]["properties"])
    assert set(document["guest"]["peaks"]) == set(
        PROPERTIES["guest"]["properties"]["peaks"]["properties"]
    )


def test_every_field_is_in_the_schema_and_the_other_way_round() -> None:
    def names(kind: Any) -> list[str]:
        return [field.name for field in dataclasses.fields(kind)]

    assert {"manifest_version", *names(Manifest)} == set(PROPERTIES) == set(SCHEMA["required"])
    for kind, described in (
        (ImageRecord, SCHEMA["definitions"]["image"]),
        (KojiRecord, SCHEMA["definitions"]["koji_image"]),
        (OutputRecord, PROPERTIES["outputs"]["items"]),
        (CommandRecord, PROPERTIES["commands"]["items"]),
        (SetupRecord, PROPERTIES["setup"]["items"]),
    ):
        assert names(kind) == list(described["properties"]) == described["required"]


def test_the_spec_is_described_as_it_is_validated() -> None:
    expected = json.loads(json.dumps(spec.SCHEMA["properties"]))
    if os.environ.get("KOJI_INDIRECTION_WRITE_GOLDEN"):
        PROPERTIES["spec"]["properties"] = expected
        SCHEMA_FILE.write_text(json.dumps(SCHEMA, indent=2) + "\n", encoding="utf-8")
    assert PROPERTIES["spec"]["properties"] == expected


def objects(schema: Any, where: str = "manifest") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if "properties" in schema and "type" in schema:
            yield where, schema
        for key, value in schema.items():
            yield from objects(value, f"{where}/{key}")


def test_every_object_is_closed_and_every_field_described_with_its_unit() -> None:
    for where, schema in objects(SCHEMA):
        assert schema["additionalProperties"] is False, where
        for name, field in schema["properties"].items():
            assert field.get("description"), f"{where}/{name}"
            if match := re.search("_(bytes|seconds)$|^(seconds)$", name):
                unit = match.group(1) or match.group(2)
                if "/spec/" not in where and not where.endswith("/spec"):
                    assert unit in field["description"], f"{where}/{name}"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("extra",), 1),
        (("manifest_version",), 2),
        (("outcome",), "fine"),
        (("started_at",), "yesterday"),
        (("spec", "extra"), 1),
        (("host", "extra"), 1),
        (("guest", "peaks", "extra"), 1),
        (("guest", "cpus"), 0),
        (("accelerator", "kind"), "xen"),
        (("utility_image", "sha256"), "abc"),
        (("utility_image", "koji", "checksum_type"), 2),
        (("utility_image", "koji", "archive_id"), 0),
        (("input_image",), {}),
        (("timeline", 0, "seconds"), None),
        (("timeline", 0, "phase"), "lunch"),
        (("commands", 0, "status"), 256),
        (("setup", 0, "name"), "reboot"),
        (("outputs", 0, "name"), "../evil"),
        (("outputs", 0, "size_bytes"), 0),
    ],
)
def test_the_schema_refuses_what_no_build_writes(path: tuple[Any, ...], value: Any) -> None:
    document = filled().to_dict()
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(document)


def test_a_manifest_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    filled().write(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    broken = minimal()
    broken.reason = object()  # type: ignore[assignment]
    with pytest.raises(TypeError):
        broken.write(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_manifest_that_cannot_be_put_in_place_leaves_no_piece(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(OSError, match=r"manifest\.json"):
        minimal().write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_phases_follow_each_other_and_each_has_its_seconds() -> None:
    seen: list[str] = []
    timeline = Timeline(on_phase=seen.append)
    timeline.end()  # before anything began: nothing to end
    timeline.enter("vet")
    assert timeline.phases == [{"phase": "vet", "seconds": None}]
    timeline.enter("boot")
    timeline.end()
    seconds = [phase["seconds"] for phase in timeline.phases]
    timeline.end()
    assert seen == ["vet", "boot"]
    assert all(0 <= one < 1 for one in seconds)
    assert [phase["seconds"] for phase in timeline.phases] == seconds
