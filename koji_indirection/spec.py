"""The build spec: everything a user asks for, validated; one object in CLI, hub and builder.

SCHEMA says what a spec looks like on the wire, BuildSpec what it is in Python;
a BuildSpec that exists is valid, however it was made. Nothing here may need
more than a plain client has; jsonschema is imported where it is used.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from . import schema
from .address import MAX_ADDRESS_LENGTH, has_credentials, repository_problem
from .errors import UsageError
from .schema import shown
from .units import DAY_SECONDS, GIB, HOUR_SECONDS, MIB, TIB, format_duration, format_size

DEFAULT_RESULT = "/results/images/boot.iso"
DEFAULT_INPUT_FILENAME = "/input_image.raw"
DEFAULT_WORKSPACE_DEVICE = "vdb"
DEFAULT_WORKSPACE_SIZE_BYTES = 30 * GIB
DEFAULT_WORKSPACE_FS = "ext4"
DEFAULT_MEMORY_BYTES = 2 * GIB
# livemedia-creator takes under an hour with KVM; four leave room for a slow
# builder or TCG, and still end a build that hangs within the same working day.
DEFAULT_JOB_TIMEOUT_SECONDS = 4 * HOUR_SECONDS

NO_NETWORK = "none"
USER_NETWORK = "user"

# The largest disk whose one partition an MBR can describe.
MAX_WORKSPACE_SIZE_BYTES = 2 * TIB - MIB
MAX_TIMEOUT_SECONDS = 7 * DAY_SECONDS


def _path_list(title: str, description: str, *, min_items: int) -> dict[str, Any]:
    return {
        "title": title,
        "description": description,
        "type": "array",
        "minItems": min_items,
        "maxItems": 50,
        "uniqueItems": True,
        "items": {
            "type": "string",
            "minLength": 2,
            "maxLength": 500,
            # The rest (no '..', nothing empty between slashes) is checked by _check_path.
            "pattern": r"^/[^\x00-\x1f\x7f]+$",
        },
    }


def _timeout(title: str, description: str) -> dict[str, Any]:
    return {
        "title": title,
        "description": description,
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": MAX_TIMEOUT_SECONDS,
        "default": None,
    }


SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "Build spec",
    "description": "What one indirection build is asked to do. A field that is left out, "
    "or null where null is allowed, has its default.",
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "results": {
            **_path_list(
                "Results",
                "Paths or globs inside the workspace that are collected after shutdown. "
                "Each must match a regular file that is not empty.",
                min_items=1,
            ),
            "default": [DEFAULT_RESULT],
        },
        "collect_logs": {
            **_path_list(
                "Log files to collect",
                "Paths or globs, in the workspace or in the guest's root, that are kept "
                "with the logs, after failures too.",
                min_items=0,
            ),
            "default": [],
        },
        "input_filename": {
            "title": "Input image's file name",
            "description": "Where in the workspace the input image lies, as true raw. "
            f"The default is {DEFAULT_INPUT_FILENAME}; not together with input_device.",
            "type": ["string", "null"],
            "minLength": 2,
            "maxLength": 200,
            "pattern": r"^(/[A-Za-z0-9._-]+)+$",
            "default": None,
        },
        "input_device": {
            "title": "Input image's device",
            "description": "The input image is a disk of its own with this name, "
            "and no file exists in the workspace.",
            "type": ["string", "null"],
            "maxLength": 3,
            "pattern": "^vd[b-z]$",
            "default": None,
        },
        "input_writable": {
            "title": "Input device writable",
            "description": "The input device can be written to; what is written is thrown away. "
            "Only with input_device.",
            "type": "boolean",
            "default": False,
        },
        "workspace_device": {
            "title": "Workspace's device",
            "description": "The disk with the workspace on its first partition.",
            "type": "string",
            "maxLength": 3,
            "pattern": "^vd[b-z]$",
            "default": DEFAULT_WORKSPACE_DEVICE,
        },
        "workspace_size_bytes": {
            "title": "Workspace's size",
            "description": "The size of the workspace disk in bytes. It is sparse: "
            "only what is written takes space on the builder.",
            "type": "integer",
            "minimum": 64 * MIB,
            "maximum": MAX_WORKSPACE_SIZE_BYTES,
            "default": DEFAULT_WORKSPACE_SIZE_BYTES,
        },
        "workspace_fs": {
            "title": "Workspace's file system",
            "description": "The file system on the workspace's partition.",
            "type": "string",
            "enum": ["ext4", "ext2", "xfs"],
            "default": DEFAULT_WORKSPACE_FS,
        },
        "firmware": {
            "title": "Firmware",
            "description": "What the guest boots by. auto: a BIOS where the utility image has "
            "a boot loader for one, else UEFI; and what arches without a BIOS have.",
            "type": "string",
            "enum": ["auto", "bios", "uefi"],
            "default": "auto",
        },
        "secure_boot": {
            "title": "Secure Boot",
            "description": "Boot by UEFI, which starts only what is signed with the usual keys.",
            "type": "boolean",
            "default": False,
        },
        "disk_bus": {
            "title": "Disk bus",
            "description": "What the guest's disks are attached to. auto: virtio, unless no "
            "kernel of the utility image has a driver for it. sata and ide: x86_64 only.",
            "type": "string",
            "enum": ["auto", "virtio", "sata", "ide"],
            "default": "auto",
        },
        "cpus": {
            "title": "CPUs",
            "description": "CPUs of the guest. The default is all of the builder's, up to 4.",
            "type": ["integer", "null"],
            "minimum": 1,
            "maximum": 256,
            "default": None,
        },
        "memory_bytes": {
            "title": "Memory",
            "description": "Memory of the guest in bytes.",
            "type": "integer",
            "minimum": 128 * MIB,
            "maximum": TIB,
            "default": DEFAULT_MEMORY_BYTES,
        },
        "boot_timeout_seconds": _timeout(
            "Boot timeout",
            "How long the guest may take until it reports that the job has started. "
            "The default depends on the accelerator.",
        ),
        "job_timeout_seconds": {
            **_timeout("Job timeout", "How long all commands together may take."),
            "type": "integer",
            "default": DEFAULT_JOB_TIMEOUT_SECONDS,
        },
        "command_timeout_seconds": _timeout(
            "Command timeout",
            "How long any one command may take. The default is no limit but the job's.",
        ),
        "shutdown_timeout_seconds": _timeout(
            "Shutdown timeout",
            "How long the guest may take to power off after the job has ended. "
            "The default is the builder's.",
        ),
        "network": {
            "title": "Network",
            "description": "The guest's network, if this machine's settings allow it: user "
            "(user-mode NAT) or the name of a libvirt network. The default, null or none, "
            "is no network at all.",
            "type": ["string", "null"],
            "maxLength": 50,
            "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]*$",
            "default": None,
        },
        "repos": {
            "title": "Repositories",
            "description": "Addresses of package repositories that the guest has besides the "
            "template's, for the time of the job. They need a network.",
            "type": "array",
            "minItems": 0,
            "maxItems": 50,
            "uniqueItems": True,
            "items": {
                "type": "string",
                "minLength": 1,
                "maxLength": MAX_ADDRESS_LENGTH,
                # The rest is checked by _check_network.
                "pattern": r"^[Hh][Tt][Tt][Pp][Ss]?://",
            },
            "default": [],
        },
    },
}


class GuestDisk(NamedTuple):
    """One disk of the guest; role is 'utility', 'workspace' or 'input'."""

    device: str
    role: str


@dataclass(frozen=True)
class BuildSpec:
    """What one build is asked to do; SCHEMA describes each field.

    Raises UsageError, naming the field, when made with values that make no sense.
    After that input_filename is None exactly when input_device is not.
    """

    results: tuple[str, ...] = (DEFAULT_RESULT,)
    collect_logs: tuple[str, ...] = ()
    input_filename: str | None = None
    input_device: str | None = None
    input_writable: bool = False
    workspace_device: str = DEFAULT_WORKSPACE_DEVICE
    workspace_size_bytes: int = DEFAULT_WORKSPACE_SIZE_BYTES
    workspace_fs: str = DEFAULT_WORKSPACE_FS
    firmware: str = "auto"
    secure_boot: bool = False
    disk_bus: str = "auto"
    cpus: int | None = None
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    boot_timeout_seconds: int | None = None
    job_timeout_seconds: int = DEFAULT_JOB_TIMEOUT_SECONDS
    command_timeout_seconds: int | None = None
    shutdown_timeout_seconds: int | None = None
    network: str | None = None
    repos: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_fields({field.name: getattr(self, field.name) for field in fields(self)})
        # Lists from a caller or from JSON; a frozen object holds tuples.
        object.__setattr__(self, "results", tuple(self.results))
        object.__setattr__(self, "collect_logs", tuple(self.collect_logs))
        object.__setattr__(self, "repos", tuple(self.repos))
        if self.network == NO_NETWORK:
            object.__setattr__(self, "network", None)
        _check_paths(self)
        _check_network(self)
        _check_input(self)
        _check_devices(self)
        _check_machine(self)
        if self.input_device is None and self.input_filename is None:
            object.__setattr__(self, "input_filename", DEFAULT_INPUT_FILENAME)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BuildSpec:
        """Make a spec from what JSON, XML-RPC or a config file gave.

        Raises UsageError naming the field that is unknown or wrong.
        """
        if not isinstance(data, Mapping):
            raise UsageError(
                f"a build spec is an object with fields, not {shown(data)}",
                "see the schema in the documentation",
            )
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                # "workspace_size" means the field with its unit, not "workspace_fs".
                close = [name for name in known if name.startswith(f"{key}_")]
                close = close or difflib.get_close_matches(str(key), known, n=1)
                raise UsageError(
                    f"build spec: there is no field {shown(key)}",
                    f"did you mean {close[0]!r}?" if close else f"fields are {', '.join(known)}",
                )
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON has it; fields that are None are left out (XML-RPC has no null)."""
        out: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    def guest_disks(self) -> tuple[GuestDisk, ...]:
        """The guest's disks in the order in which they must be attached to get their names."""
        disks = [GuestDisk("vda", "utility"), GuestDisk(self.workspace_device, "workspace")]
        if self.input_device is not None:
            disks.append(GuestDisk(self.input_device, "input"))
        return tuple(sorted(disks))

    @property
    def workspace_partition(self) -> str:
        """Where the guest finds the workspace's file system."""
        return f"/dev/{self.workspace_device}1"


# --- checks -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _validator() -> Any:
    return schema.validator(SCHEMA, what="build spec")


def _check_fields(values: dict[str, Any]) -> None:
    for error in _validator().iter_errors(values):
        raise _explain(str(error.absolute_path[0]), error)


def _explain(field: str, error: Any) -> UsageError:
    wanted = _WANTED.get(field, _WANTED_PATH)
    wrong = schema.wrong_value("build spec", field, error)
    if error.validator in ("minimum", "maximum"):
        which = "least" if error.validator == "minimum" else "most"
        limit = _with_unit(field, error.validator_value)
        return UsageError(wrong, f"it must be at {which} {limit}")
    if error.validator == "maxLength" and wanted is _WANTED_DEVICE:
        return UsageError(wrong, wanted)
    member, members = ("address", "addresses") if field == "repos" else ("path", "paths")
    return schema.explain("build spec", field, error, wanted=wanted, member=member, members=members)


_WANTED_PATH = "give an absolute path or glob, such as /results/*.iso, on one line"
_WANTED_DEVICE = "give the name alone: vdb or vdc"
_WANTED = {
    "input_filename": "give an absolute path with only letters, digits, '.', '_' and '-' "
    "between its slashes",
    "input_device": _WANTED_DEVICE,
    "workspace_device": _WANTED_DEVICE,
    "network": "write user, the name of a libvirt network, or none",
    "repos": "write http://host/path or https://host/path",
}


def _check_paths(spec: BuildSpec) -> None:
    for field in ("results", "collect_logs"):
        for path in getattr(spec, field):
            _check_path(field, path, _WANTED_PATH)
    if spec.input_filename is None:
        return
    path, wanted = spec.input_filename, _WANTED["input_filename"]
    _check_path("input_filename", path, wanted)
    if any(part.startswith("-") for part in path.split("/")):
        raise UsageError(
            f"build spec: input_filename is {shown(path)}, part of which starts with a dash",
            "a command in the template would take it for an option",
        )


def _check_path(field: str, path: str, wanted: str) -> None:
    what = f"build spec: {field} has {shown(path)}"
    # More than the schema's pattern can say: Python's $ lets a final line break through,
    # and half a surrogate pair could never be written to a log.
    if not path.isprintable():
        raise UsageError(f"{what}, which has a line break or a control character in it", wanted)
    for part in path[1:].split("/"):
        if part in (".", ".."):
            raise UsageError(f"{what}, which has {part!r} in it", "write the path without it")
        if not part:
            raise UsageError(
                f"{what}, which has nothing after one of its slashes", "name files, one / apart"
            )


def _check_network(spec: BuildSpec) -> None:
    # Python's $ in the schema's pattern lets a final line break through.
    if spec.network is not None and not spec.network.isprintable():
        raise UsageError(f"build spec: network is {shown(spec.network)}", _WANTED["network"])
    for address in spec.repos:
        problem = repository_problem(address)
        if problem is not None:
            raise UsageError(f"build spec: repos {problem[0]}", problem[1])
        if has_credentials(address):
            # A spec is kept in manifests and, by Koji, for everybody to read.
            raise UsageError(
                "build spec: repos has an address with a user name or password in it",
                "everybody can read a build spec: use a repository that needs none",
            )
    if spec.repos and spec.network is None:
        raise UsageError(
            "build spec: repos are given, but the guest has no network to reach them",
            "set network to user, or to the name of a libvirt network",
        )


def _check_input(spec: BuildSpec) -> None:
    if spec.input_filename is not None and spec.input_device is not None:
        raise UsageError(
            "build spec: input_filename and input_device are both given, but the input image "
            "is either a file in the workspace or a disk of its own",
            "leave one of them out",
        )
    if spec.input_writable and spec.input_device is None:
        raise UsageError(
            "build spec: input_writable is given without input_device",
            "a file in the workspace can always be written to: leave input_writable out, "
            "or set input_device",
        )


def _check_devices(spec: BuildSpec) -> None:
    """The kernel names virtio disks in the order in which it finds them, whatever libvirt says."""
    why = (
        "disks are named in order and without a gap, and vda is the utility image: "
        "the workspace and the input device must be vdb and vdc, one each, "
        "and a workspace alone is vdb"
    )
    if spec.input_device is None:
        if spec.workspace_device != "vdb":
            raise UsageError(
                f"build spec: workspace_device is {spec.workspace_device!r} "
                "and there is no input_device",
                why,
            )
    elif {spec.workspace_device, spec.input_device} != {"vdb", "vdc"}:
        raise UsageError(
            f"build spec: workspace_device is {spec.workspace_device!r} "
            f"and input_device is {spec.input_device!r}",
            why,
        )


def _check_machine(spec: BuildSpec) -> None:
    if spec.secure_boot and spec.firmware == "bios":
        raise UsageError(
            "build spec: secure_boot is given and firmware is 'bios', which has no Secure Boot",
            "leave one of them out",
        )
    if spec.secure_boot and spec.disk_bus == "ide":
        raise UsageError(
            "build spec: secure_boot is given and disk_bus is 'ide', but the machine with an IDE"
            " bus has no Secure Boot",
            "leave one of them out",
        )


def _with_unit(field: str, limit: int) -> str:
    if field.endswith("_bytes"):
        return f"{limit} ({format_size(limit)})"
    if field.endswith("_seconds"):
        return f"{limit} ({format_duration(limit)})"
    return str(limit)
