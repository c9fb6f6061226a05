"""The task spec: what one `koji indirection-build` sends to the hub, and the hub to a builder.

It holds the build spec, and beside it what only Koji needs to know: target, NVR,
arches, where inputs and template come from. A TaskSpec that exists is valid. It must
not need more than a plain client or a hub has; jsonschema is imported where it is used.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from . import schema
from . import spec as _spec
from .address import has_secret
from .errors import UsageError
from .schema import shown
from .spec import BuildSpec

# The clients' directory below the hub's work/; each upload has its own below it.
UPLOAD_PREFIX = "cli-indirection"
ACCELERATORS = ("auto", "kvm", "tcg")
MAX_ARCHES = 20
MAX_ID = 2**31 - 1  # ids are 32 bits wide in the hub's database; more is an SQL error there

_ARCH = "^[a-z0-9_]+$"
_REFERENCE = (
    r"^((build|task):[0-9]{1,10}"
    r"|latest:[^\s/:@]+@[^\s/@]+"
    r"|[^\s/:@-][^\s/:@]*-[^\s/:@-]+-[^\s/:@-]+)$"
)


def _string(title: str, description: str, pattern: str, longest: int) -> dict[str, Any]:
    return {
        "title": title,
        "description": description,
        "type": "string",
        "minLength": 1,
        "maxLength": longest,
        "pattern": pattern,
    }


def _optional(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "type": ["string", "null"], "default": None}


def _reference(title: str, description: str) -> dict[str, Any]:
    return _string(
        title, f"{description} NVR, build:ID, task:ID or latest:PACKAGE@TAG.", _REFERENCE, 500
    )


def _archive(title: str, of_what: str) -> dict[str, Any]:
    return _optional(
        _string(
            title,
            f"A glob that picks the file by its name where {of_what} has several for an arch.",
            r"^[^/\x00-\x1f\x7f]+$",
            200,
        )
    )


def _arches(title: str, description: str, *, min_items: int) -> dict[str, Any]:
    return {
        "title": title,
        "description": description,
        "type": "array",
        "minItems": min_items,
        "maxItems": MAX_ARCHES,
        "uniqueItems": True,
        "items": {"type": "string", "minLength": 1, "maxLength": 32, "pattern": _ARCH},
    }


def _flag(title: str, description: str) -> dict[str, Any]:
    return {"title": title, "description": description, "type": "boolean", "default": False}


_BUILD = {key: value for key, value in _spec.SCHEMA.items() if key != "$schema"}

SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "Task spec",
    "description": "What one indirection build is asked to do, and where in Koji its inputs "
    "come from and its results go. A field that is left out, or null where null is "
    "allowed, has its default.",
    "type": "object",
    "additionalProperties": False,
    "required": ["target", "name", "version", "arches", "input_image", "utility_image", "template"],
    "properties": {
        "target": _string("Build target", "The build target's name.", r"^[^\s/]+$", 256),
        "name": _string(
            "Name",
            "The name of the image build: a package.",
            r"^[A-Za-z0-9_][A-Za-z0-9._+~^-]*$",
            128,
        ),
        "version": _string(
            "Version", "The version of the image build.", r"^[A-Za-z0-9_][A-Za-z0-9._+~^]*$", 128
        ),
        "release": _optional(
            _string(
                "Release",
                "The release of the image build. The default is the next one that is free.",
                r"^[A-Za-z0-9_][A-Za-z0-9._+~^]*$",
                128,
            )
        ),
        "arches": _arches("Arches", "The arches that are built, one image each.", min_items=1),
        "can_fail": {
            **_arches(
                "Arches that can fail",
                "Those of the arches without which the build is still good.",
                min_items=0,
            ),
            "default": [],
        },
        "input_image": _reference("Input image", "The image that is worked on:"),
        "input_archive": _archive("Input image's file", "the input image's build"),
        "utility_image": _reference("Utility image", "The image that is booted:"),
        "utility_archive": _archive("Utility image's file", "the utility image's build"),
        "template": _string(
            "Template",
            "The template's path inside the checkout, or the name of the uploaded file.",
            r"^[^/\x00-\x1f\x7f][^\x00-\x1f\x7f]*$",
            500,
        ),
        "template_scm": _optional(
            _string(
                "Template's source control",
                "Where the template is checked out from, as Koji writes it: URL#REF.",
                r"^[a-z][a-z+]*://[^\s#]+#(?!origin/-)[A-Za-z0-9_][^\s#]*$",
                1000,
            )
        ),
        "template_upload": _optional(
            _string(
                "Template's upload directory",
                "The directory below the hub's work directory into which the client has "
                "uploaded the template.",
                f"^{UPLOAD_PREFIX}/[A-Za-z0-9_][A-Za-z0-9._-]*$",
                200,
            )
        ),
        "scratch": _flag("Scratch build", "The results are kept for a while, as no build."),
        "skip_tag": _flag("Do not tag", "The build is not tagged into the target's destination."),
        "tag_repo": _flag(
            "Build tag's repository",
            "The guest has the repository of the target's build tag, besides those of the build "
            "spec, for the time of the job. It needs a network.",
        ),
        "accel": {
            "title": "Accelerator",
            "description": "What the guest runs on: kvm, tcg (slow), or kvm where it works.",
            "type": "string",
            "enum": list(ACCELERATORS),
            "default": "auto",
        },
        "build": {**_BUILD, "default": {}},
        "arch_build": {
            "title": "Build specs of arches",
            "description": "For an arch the fields of the build spec that differ from build's.",
            "type": "object",
            "maxProperties": MAX_ARCHES,
            "propertyNames": {"maxLength": 32, "pattern": _ARCH},
            "additionalProperties": _BUILD,
            "default": {},
        },
    },
}

# What a builder tells the hub about a finished build: the two parameters of the hub's
# recordIndirectionInputs after task and build. An input is what sources.Source says of it.
INPUT_ROLES = ("utility image", "input image")
_TEXT = {"type": "string", "minLength": 1, "maxLength": 500, "pattern": r"^[^\x00-\x1f\x7f]+$"}
_ID = {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_ID}
_HEX = {"type": "string", "maxLength": 128, "pattern": "^[0-9a-f]+$"}
PROVENANCE_SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "Provenance",
    "description": "What an image build was made from.",
    "type": "object",
    "additionalProperties": False,
    "required": ["inputs", "extra"],
    "properties": {
        "inputs": {
            "description": "Both images of each arch. An archive of a build has archive_id, "
            "the output of a task has task_id.",
            "type": "array",
            "minItems": 1,
            "maxItems": 2 * MAX_ARCHES,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["arch", "role", "reference", "filename", "checksum", "checksum_type"],
                "properties": {
                    "arch": {"type": "string", "maxLength": 32, "pattern": _ARCH},
                    "role": {"type": "string", "enum": list(INPUT_ROLES)},
                    "reference": _TEXT,
                    "filename": _TEXT,
                    "checksum": _HEX,
                    "checksum_type": {"type": "integer", "minimum": 0, "maximum": 2},
                    "nvr": {**_TEXT, "type": ["string", "null"]},
                    "archive_id": _ID,
                    "task_id": _ID,
                },
            },
        },
        "extra": {
            "description": "The commit that the template was taken from, and the sha256 "
            "of its text.",
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "template_commit": {**_TEXT, "maxLength": 128},
                "template_sha256": {**_HEX, "minLength": 64, "maxLength": 64},
            },
        },
    },
}


@dataclass(frozen=True)
class TaskSpec:
    """What one task is asked to do; SCHEMA describes each field.

    Raises UsageError, naming the field, when made with values that make no sense.
    """

    target: str
    name: str
    version: str
    arches: tuple[str, ...]
    input_image: str
    utility_image: str
    template: str
    release: str | None = None
    can_fail: tuple[str, ...] = ()
    input_archive: str | None = None
    utility_archive: str | None = None
    template_scm: str | None = None
    template_upload: str | None = None
    scratch: bool = False
    skip_tag: bool = False
    tag_repo: bool = False
    accel: str = "auto"
    build: BuildSpec = field(default_factory=BuildSpec)
    arch_build: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.build, BuildSpec):
            raise UsageError(
                f"task spec: build is {shown(self.build)}, which is not a build spec",
                "give an object with the build spec's fields",
            )
        _check_fields({name: getattr(self, name) for name in _OWN_FIELDS})
        # Lists and dicts from a caller or from JSON; a frozen object holds what cannot change.
        object.__setattr__(self, "arches", tuple(self.arches))
        object.__setattr__(self, "can_fail", tuple(self.can_fail))
        object.__setattr__(self, "arch_build", _frozen(self.arch_build))
        _check_arches(self)
        _check_strings(self)
        _check_template(self)
        for arch in self.arches:
            build = self.build_for(arch)
            if self.tag_repo and build.network is None:
                raise UsageError(
                    f"task spec: tag_repo is set, but the guest for {arch} has no network to"
                    " reach the repository",
                    "set network to user, or to the name of a libvirt network",
                )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskSpec:
        """Make a spec from what JSON or XML-RPC gave.

        Raises UsageError naming the field that is unknown, missing or wrong.
        """
        if not isinstance(data, Mapping):
            raise UsageError(
                f"a task spec is an object with fields, not {shown(data)}",
                "see the schema in the documentation",
            )
        known = [one.name for one in fields(cls)]
        for key in data:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                raise UsageError(
                    f"task spec: there is no field {shown(key)}", _unknown_hint(key, close)
                )
        for key in SCHEMA["required"]:
            if key not in data:
                raise UsageError(f"task spec: {key} is missing", _WANTED.get(key, f"give {key}"))
        values = dict(data)
        if "build" in values:
            values["build"] = BuildSpec.from_dict(values["build"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The spec as it goes over the wire; fields that are None are left out."""
        out: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None:
                out[one.name] = list(value) if isinstance(value, tuple) else value
        out["build"] = self.build.to_dict()
        out["arch_build"] = {
            arch: {key: list(v) if isinstance(v, tuple) else v for key, v in partial.items()}
            for arch, partial in self.arch_build.items()
        }
        return out

    @property
    def networks(self) -> tuple[str, ...]:
        """What the arches ask for, each once, in their order; NO_NETWORK for no network."""
        asked = (self.build_for(arch).network or _spec.NO_NETWORK for arch in self.arches)
        return tuple(dict.fromkeys(asked))

    def build_for(self, arch: str) -> BuildSpec:
        """The build spec of one arch: build, and what arch_build says otherwise."""
        partial = self.arch_build.get(arch)
        if not partial:
            return self.build
        base = self.build.to_dict()
        # The input image is a file or a device: who names one of them drops the other.
        if "input_device" in partial:
            base.pop("input_filename", None)
        elif "input_filename" in partial:
            for name in ("input_device", "input_writable", "workspace_device"):
                base.pop(name, None)
        try:
            return BuildSpec.from_dict({**base, **partial})
        except UsageError as error:
            raise UsageError(
                f"task spec: arch_build, {arch}: {error.message}", error.hint
            ) from None


def check_provenance(spec: TaskSpec, inputs: Any, extra: Any) -> None:
    """Whether this can be what a build by this spec was made from; UsageError if not."""
    _check_provenance_fields(inputs, extra)
    seen = set()
    for number, one in enumerate(inputs):
        what = f"provenance: inputs[{number}]"
        if one["arch"] not in spec.arches:
            raise UsageError(f"{what} is for {one['arch']}, which the task does not build")
        if (one["arch"], one["role"]) in seen:
            raise UsageError(f"{what} is a second {one['role']} for {one['arch']}")
        seen.add((one["arch"], one["role"]))
        asked = spec.utility_image if one["role"] == INPUT_ROLES[0] else spec.input_image
        if one["reference"] != asked:
            raise UsageError(
                f"{what} is {shown(one['reference'])}, but the task's {one['role']} is {asked!r}"
            )
        if (one.get("archive_id") is None) == (one.get("task_id") is None):
            raise UsageError(
                f"{what} comes from an archive or from a task",
                "give one of archive_id and task_id",
            )


# --- checks -----------------------------------------------------------------------------------

# build checks itself, and so does, once it is merged with build, each arch's part of it.
_OWN_FIELDS = [one.name for one in fields(TaskSpec) if one.name not in ("build", "arch_build")]


@functools.lru_cache(maxsize=1)
def _validator() -> Any:
    own = {"properties": {name: SCHEMA["properties"][name] for name in _OWN_FIELDS}}
    return schema.validator(own, what="task spec")


def _check_fields(values: dict[str, Any]) -> None:
    for error in _validator().iter_errors(values):
        raise _explain(str(error.absolute_path[0]), error)


def _explain(name: str, error: Any) -> UsageError:
    return schema.explain(
        "task spec", name, error, wanted=_WANTED.get(name, ""), member="arch", members="entries"
    )


_WANTED_ARCH = "name arches as Koji does: x86_64, aarch64"
_WANTED_REFERENCE = "write an NVR, build:ID, task:ID or latest:PACKAGE@TAG"
_WANTED_VERSION = "use letters, digits, '.', '_', '+', '~' and '^'; no dash"
_WANTED_GLOB = "give the name of a file, or a glob for it, without slashes"
_WANTED = {
    "target": "give the name of a build target",
    "name": "use letters, digits, '.', '_', '+', '~', '^' and '-'; the first a letter or a digit",
    "version": _WANTED_VERSION,
    "release": _WANTED_VERSION,
    "arches": _WANTED_ARCH,
    "can_fail": _WANTED_ARCH,
    "input_image": _WANTED_REFERENCE,
    "input_archive": _WANTED_GLOB,
    "utility_image": _WANTED_REFERENCE,
    "utility_archive": _WANTED_GLOB,
    "template": "give a relative path without '..'",
    "template_scm": "write URL#REF, such as git+https://example.com/templates.git#main",
    "template_upload": f"give a directory named {UPLOAD_PREFIX}/ and one name",
}


def _check_provenance_fields(inputs: Any, extra: Any) -> None:
    validator = schema.validator(PROVENANCE_SCHEMA, what="task spec")
    for error in validator.iter_errors({"inputs": inputs, "extra": extra}):
        path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path)
        raise UsageError(f"provenance: {path[1:]}: {error.message[:300]}")
    for number, one in enumerate((*inputs, extra)):
        for name, value in one.items():
            # It is shown to whoever looks at the build.
            if isinstance(value, str) and not value.isprintable():
                where = f"inputs[{number}]" if one is not extra else "extra"
                raise UsageError(
                    f"provenance: {where}.{name} has a line break or a control character in it:"
                    f" {shown(value)}"
                )


def _frozen(arch_build: Any) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(arch_build, Mapping):
        raise UsageError(
            f"task spec: arch_build is {shown(arch_build)}, which is not an object",
            "give an object of build spec fields for each arch",
        )
    out = {}
    for arch, partial in arch_build.items():
        if not isinstance(partial, Mapping):
            raise UsageError(
                f"task spec: arch_build has {shown(partial)} for {shown(arch)}",
                "give an object with fields of the build spec",
            )
        for key, value in partial.items():
            if value is None:
                raise UsageError(
                    f"task spec: arch_build has null for {shown(key)} of {shown(arch)}",
                    "leave the field out",
                )
        out[arch] = MappingProxyType(
            {key: tuple(v) if isinstance(v, list) else v for key, v in partial.items()}
        )
    return MappingProxyType(out)


def _check_arches(spec: TaskSpec) -> None:
    for name in ("can_fail", "arch_build"):
        for arch in getattr(spec, name):
            if arch not in spec.arches:
                raise UsageError(
                    f"task spec: {name} has {shown(arch)}, which is not in arches",
                    f"arches are {', '.join(spec.arches)}",
                )


def _check_strings(spec: TaskSpec) -> None:
    for name in _OWN_FIELDS:
        value = getattr(spec, name)
        # More than the schema's patterns can say: Python's $ lets a final line break through,
        # and half a surrogate pair could never be written to a log.
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not text.isprintable():
                raise UsageError(
                    f"task spec: {name} has a line break or a control character in it: "
                    f"{shown(text)}",
                    _WANTED[name],
                )
    for name in ("input_image", "utility_image"):
        kind, _, number = getattr(spec, name).partition(":")
        if kind in ("build", "task") and not 0 < int(number) <= MAX_ID:
            raise UsageError(
                f"task spec: {name} is {shown(getattr(spec, name))}, which is no id in Koji",
                f"ids are from 1 to {MAX_ID}",
            )


def _check_template(spec: TaskSpec) -> None:
    if (spec.template_scm is None) == (spec.template_upload is None):
        both = "both given" if spec.template_scm is not None else "both missing"
        raise UsageError(
            f"task spec: template_scm and template_upload are {both}",
            "the template comes from source control or is uploaded: give one of them",
        )
    if spec.template_scm is not None and has_secret(spec.template_scm):
        raise UsageError(
            "task spec: template_scm has a password, or a user name that may be a token, in it",
            "everybody can read a task: use a repository that needs none, or SSH with the"
            " builders' own key",
        )
    # Koji takes what is between ? and # for a directory in the checkout.
    _, _, module = (spec.template_scm or "").partition("#")[0].partition("?")
    if ".." in module.split("/"):
        raise UsageError(
            f"task spec: template_scm is {shown(spec.template_scm)}, "
            "which leads out of its checkout",
            "name a directory of the repository after the ?",
        )
    parts = spec.template.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise UsageError(
            f"task spec: template is {shown(spec.template)}, which is no plain path",
            _WANTED["template"],
        )
    if spec.template_upload is not None and len(parts) > 1:
        raise UsageError(
            f"task spec: template is {shown(spec.template)}, but an upload is one file",
            "give the file's name alone",
        )


def _unknown_hint(key: object, close: list[str]) -> str:
    if close:
        return f"did you mean {close[0]!r}?"
    if key in SCHEMA["properties"]["build"]["properties"]:
        return "it is a field of the build spec: put it into build"
    return f"fields are {', '.join(one.name for one in fields(TaskSpec))}"
