"""What a user types for `koji indirection-build`, or writes into a file -> a task spec.

The plugin in cli/ talks to Koji, and everything else is here: options, config files,
and what a dry run prints. Nothing here may talk to a hub before the whole request is
known to make sense, or take a value for what its type does not allow. It imports on a
plain client, without koji.
"""

from __future__ import annotations

import configparser
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BuildFailed, IndirectionError, UsageError
from .guestlog import printable
from .localrun import Here, Hub, LocalOrder, inputs_of, read_template, require_target, template_in
from .options import (
    BUILD_FIELDS,
    GROUPS,
    NAMES,
    REPLACES,
    Layer,
    read,
    read_command_line,
    suggestion,
)
from .sources import HubSession, Reference, Source, resolve
from .taskspec import TaskSpec
from .template import load
from .units import format_duration, format_size

if TYPE_CHECKING:
    from .config import Settings
    from .taskinputs import Inputs

COMMAND = "indirection-build"
SECTIONS = (COMMAND, "image-build-indirection")
# What an old file may hold for other commands of Koji, which have no interest in ours either.
_FOREIGN_SECTIONS = ("image-build", "factory-parameters", "ova-options")

# Below PRIO_DEFAULT of Koji; what all its commands mean by --background.
BACKGROUND_PRIORITY = 5

_BUILD_NAMES = tuple(name for name, (one, _) in NAMES.items() if one.field in BUILD_FIELDS)
_FILE_NAMES = tuple(name for name in NAMES if name != "config")

# --- config files -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """What a config file says: for all arches, and for single ones."""

    layer: Layer
    arches: Mapping[str, Layer]


class _Parser(configparser.ConfigParser):
    """As the parser of Koji's other commands: %(name)s stands for another key's value."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr.lower().replace("-", "_")


def _read_file(path: Path) -> _File:
    """Raises UsageError naming file, section and key."""
    parser = _Parser()
    try:
        with path.open(encoding="utf-8") as file:
            parser.read_file(file)
    except configparser.Error as error:
        raise UsageError(
            f"{path} is not an ini file: {' '.join(str(error).split())}",
            f"write [{COMMAND}] and KEY = VALUE lines below it",
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text", "save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check the path") from None

    for section in parser.sections():
        if section in (*SECTIONS, *_FOREIGN_SECTIONS) or section.startswith(f"{COMMAND}:"):
            continue
        raise UsageError(
            f"{path}: there is no section [{section}]",
            suggestion(section, [f"{COMMAND}:ARCH"] if ":" in section else SECTIONS),
        )
    found = [section for section in SECTIONS if parser.has_section(section)]
    if len(found) != 1:
        raise UsageError(
            f"{path} has {'both' if found else 'neither'} a section [{SECTIONS[0]}]"
            f" {'and' if found else 'nor'} one [{SECTIONS[1]}]",
            f"put all options into [{SECTIONS[0]}]",
        )
    arches: dict[str, Layer] = {}
    for section in parser.sections():
        name, colon, arch = section.partition(":")
        if name == COMMAND and colon:
            arches[arch] = _section(parser, section, _BUILD_NAMES, path)
    return _File(_section(parser, found[0], _FILE_NAMES, path), arches)


def _section(
    parser: configparser.ConfigParser, section: str, known: Sequence[str], path: Path
) -> Layer:
    def shown(name: str) -> str:
        return f"{path}: [{section}] {name}"

    given = []
    defaults = parser.defaults()
    for key in parser.options(section):
        if key in defaults and parser.get(section, key, raw=True) == defaults[key]:
            # [DEFAULT] may have values that only other keys refer to; and it is no arch's own.
            if key not in known or section not in SECTIONS:
                continue
        elif key not in known:
            if key in NAMES and section not in SECTIONS:
                raise UsageError(
                    f"{shown(key)} cannot differ between arches", f"move it to [{SECTIONS[0]}]"
                )
            raise UsageError(
                f"{path}: [{section}] has no key {key!r}", suggestion(key, list(known))
            )
        try:
            given.append((key, parser.get(section, key) or ""))
        except configparser.InterpolationError as error:
            raise UsageError(
                f"{shown(key)}: {' '.join(str(error).split())}",
                "%(NAME)s stands for another key's value; write %% for a percent sign",
            ) from None
    return read(given, NAMES, shown)


# --- the command line -------------------------------------------------------------------------


def _read_options(arguments: Sequence[str]) -> Layer:
    layer, positional = read_command_line(
        COMMAND,
        arguments,
        GROUPS,
        usages=("[options] TARGET NAME VERSION", "--config FILE [options]"),
        description="Boot a throw-away copy of the utility image on a builder, hand it the input"
        " image, run the template's commands in it, and make an image build of the results.",
        epilog="An empty value means the default. The exit status is that of the task: 0 when it"
        " has succeeded. Usage errors exit with 2.",
    )
    if len(positional) not in (0, 3):
        raise UsageError(
            f"{len(positional)} of three arguments are given"
            if len(positional) < 3
            else f"there are {len(positional)} arguments",
            "give TARGET NAME VERSION, or none and a --config FILE that has them",
        )
    for name, text in zip(("target", "name", "version"), positional):
        if name in layer:
            raise UsageError(f"--{name} and the argument {text!r} are both given", "give one")
        layer[name] = text
    return layer


# --- the request ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What one `koji indirection-build` is to do.

    template_file -- to be uploaded as spec.template into spec.template_upload; or None.
    priority -- relative to the default; None is the default.
    wait -- None where the user has not said.
    here -- set for a build on this machine, of the spec's only arch; no task is made.
    """

    spec: TaskSpec
    template_file: Path | None = None
    priority: int | None = None
    wait: bool | None = None
    dry_run: bool = False
    here: Here | None = None
    noprogress: bool = False
    quiet: bool = False
    json: bool = False


def request_from(arguments: Sequence[str], *, upload_dir: str) -> Request:
    """Read the command line, and the config file that it may name.

    upload_dir -- below taskspec.UPLOAD_PREFIX, for a template that is to be uploaded.
    Prints the help and exits for --help. Raises UsageError for what makes no sense and
    BuildFailed for a local template that a builder would refuse.
    """
    options = _read_options(arguments)
    config = options.pop("config", None)
    file = _read_file(Path(config)) if config else _File({}, {})
    overridden = set(options) | {name for one in options for name in REPLACES.get(one, ())}
    layer = {**{k: v for k, v in file.layer.items() if k not in overridden}, **options}
    values = {key: value for key, value in layer.items() if value is not None}

    file_arches = file.layer.get("arches") or ()
    if "arches" in options and "can_fail" not in options and "can_fail" in values:
        # Of the file's arches only some are wanted this time.
        values["can_fail"] = _still_wanted(values, file_arches, values["can_fail"])
    for arch in file.arches:
        if arch not in (*values.get("arches", ()), *file_arches):
            raise UsageError(
                f"{config}: [{COMMAND}:{arch}] is for an arch that is not built",
                f"arches are {', '.join(values.get('arches', ()) or ['missing'])}",
            )
    arch_build = {
        arch: {key: value for key, value in file.arches[arch].items() if key not in overridden}
        for arch in _still_wanted(values, file_arches, file.arches)
    }

    if "utility_image" not in values and "input_image" in values:
        values["utility_image"] = values["input_image"]
        if "input_archive" in values:
            values.setdefault("utility_archive", values["input_archive"])
    template_file = _template(values, upload_dir)
    _require(values)
    here = _here(values, options)
    build = {name: values.pop(name) for name in BUILD_FIELDS if name in values}
    asked = {
        field.name: values.pop(field.name)
        for field in dataclasses.fields(Request)
        if field.name in values
    }
    if values.pop("background", False):
        asked["priority"] = BACKGROUND_PRIORITY
    spec = TaskSpec.from_dict(
        {
            **values,
            "build": build,
            "arch_build": {
                arch: {key: value for key, value in partial.items() if value is not None}
                for arch, partial in arch_build.items()
                if partial
            },
        }
    )
    if template_file is not None:
        template = load(template_file)
        for arch in spec.arches:
            template.require_network(spec.build_for(arch).network)
    return Request(spec=spec, template_file=template_file, here=here, **asked)


_HERE_FIELDS = tuple(field.name for field in dataclasses.fields(Here))


def _here(values: dict[str, Any], options: Layer) -> Here | None:
    """Take what --local means out of the values; None for a build by a builder."""
    own = {name: values.pop(name) for name in _HERE_FIELDS if name in values}
    if not values.pop("local", False):
        for name in _HERE_FIELDS:
            if options.get(name):
                raise UsageError(
                    f"--{name.replace('_', '-')} is given without --local",
                    "it is for builds on this machine",
                )
        return None
    if values.get("dry_run"):
        raise UsageError("--dry-run and --local are both given", "leave one of them out")
    if "output" not in own:
        raise UsageError("--local is given without --output", "name a new directory with it")
    arches = values["arches"]
    if len(arches) > 1:
        raise UsageError(
            f"--local builds for one arch, not for {' and '.join(arches)}", "choose one with --arch"
        )
    return Here(**own)


def _still_wanted(
    values: Mapping[str, Any], file_arches: Sequence[str], found: Iterable[str]
) -> tuple[str, ...]:
    """Without those that the file has and the command line left out; a typing error stays."""
    arches = values.get("arches", ())
    return tuple(arch for arch in found if arch in arches or arch not in file_arches)


def _template(values: dict[str, Any], upload_dir: str) -> Path | None:
    """Put the template's place into the values; the file that is to be uploaded, if one is."""
    old = values.pop("old_template", None)
    if "template_scm" in values:
        if old is not None:
            values["template"] = Path(old).name  # its directory was never looked at
        return None
    if old is not None:
        values["template"] = old
    if "template" not in values:
        return None
    path = Path(values["template"])
    values["template"] = path.name
    values["template_upload"] = upload_dir
    return path


_REQUIRED = {
    "target": "TARGET",
    "name": "NAME",
    "version": "VERSION",
    "arches": "--arch",
    "input_image": "--input-image",
    "template": "--template",
}


def _require(values: Mapping[str, Any]) -> None:
    missing = [shown for field, shown in _REQUIRED.items() if field not in values]
    if missing:
        raise UsageError(
            f"{' and '.join([', '.join(missing[:-1]), missing[-1]] if missing[1:] else missing)}"
            f" {'are' if missing[1:] else 'is'} missing",
            f"give {'them' if missing[1:] else 'it'} on the command line, or in a --config FILE",
        )


# --- dry runs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArchInputs:
    """What the images of a request are for one arch; problem is set where they are not."""

    arch: str
    input_image: Source | None = None
    utility_image: Source | None = None
    problem: str = ""


def resolve_inputs(session: HubSession, spec: TaskSpec) -> tuple[ArchInputs, ...]:
    """Find the images as the builders will.

    Raises what sources.resolve() raises for an arch that must not fail, and BuildFailed
    if no arch is left.
    """
    found = []
    for arch in spec.arches:
        try:
            found.append(
                ArchInputs(
                    arch,
                    _resolve(session, spec.input_image, spec.input_archive, arch, "input image"),
                    _resolve(
                        session, spec.utility_image, spec.utility_archive, arch, "utility image"
                    ),
                )
            )
        except IndirectionError as error:
            if arch not in spec.can_fail:
                raise
            found.append(ArchInputs(arch, problem=str(error)))
    if all(one.problem for one in found):
        raise BuildFailed(f"no arch has its images; {found[0].arch}: {found[0].problem}")
    return tuple(found)


def _resolve(session: HubSession, reference: str, glob: str | None, arch: str, role: str) -> Source:
    return resolve(session, Reference.parse(reference), arch, archive_glob=glob, role=role)


def dry_run_text(request: Request, inputs: Sequence[ArchInputs]) -> str:
    """The spec, a field a line, and the images, for people."""
    spec = request.spec.to_dict()
    build, arch_build = spec.pop("build"), spec.pop("arch_build")
    blocks = [("Task spec", spec), ("Build spec", build)]
    blocks += [(f"Build spec for {arch}", partial) for arch, partial in arch_build.items()]
    lines = []
    for title, values in blocks:
        lines.append(f"{title}:")
        lines += [f"  {name}: {_plain(name, value)}" for name, value in values.items()]
    if request.template_file is not None:
        lines.append(f"The template is {request.template_file}; it was not uploaded.")
    for one in inputs:
        lines.append(f"Images for {one.arch}:")
        if one.problem:
            lines.append(f"  this arch will fail, as it may: {one.problem}")
        for source in (one.input_image, one.utility_image):
            if source is not None:
                owner = f"task:{source.task_id}"
                if source.build_id is not None:
                    owner = f"build:{source.build_id}, archive {source.archive_id}"
                lines += [
                    f"  {source.role}: {source} ({owner})",
                    f"    {format_size(source.size_bytes)},"
                    f" {source.checksum_name} {source.checksum}",
                ]
    text = "\n".join([*lines, "No task was made."])
    return printable(text, len(text))  # names come from a hub


def _plain(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if name.endswith("_bytes"):
        return f"{value} ({format_size(value)})"
    if name.endswith("_seconds"):
        return f"{value} ({format_duration(value)})"
    return str(value)


def dry_run_json(request: Request, inputs: Sequence[ArchInputs]) -> str:
    """The same for programs."""
    record = {
        "spec": request.spec.to_dict(),
        "inputs": {one.arch: _inputs_record(one) for one in inputs},
    }
    return json.dumps(record, indent=2)


def _inputs_record(inputs: ArchInputs) -> dict[str, Any]:
    if inputs.problem:
        return {"problem": inputs.problem}
    record = {}
    for name in ("input_image", "utility_image"):
        source = getattr(inputs, name)
        record[name] = {**dataclasses.asdict(source), "checksum_type": source.checksum_name}
    return record


# --- builds on this machine -------------------------------------------------------------------


def local_order(hub: Hub, request: Request) -> LocalOrder:
    """What the request's task would build, to be built here."""
    spec = request.spec
    (arch,) = spec.arches
    require_target(hub.session, spec)

    def find_inputs(_settings: Settings, directory: Path) -> Inputs:
        if request.template_file is not None:
            text, source = read_template(request.template_file), str(request.template_file)
        else:
            assert spec.template_scm is not None
            text, source = template_in(spec.template_scm, spec.template, directory)
        (found,) = resolve_inputs(hub.session, dataclasses.replace(spec, can_fail=()))
        images = [one for one in (found.input_image, found.utility_image) if one is not None]
        return inputs_of(hub, spec, text, source, images, tag_repo=spec.tag_repo)

    return LocalOrder(spec, arch, spec.build_for(arch), find_inputs)


# --- how it ended -----------------------------------------------------------------------------


def result_json(task_id: int, state: str | None, build: Mapping[str, Any] | None) -> str:
    """What --json prints.

    state -- of the task, as Koji names it; None where nobody waited for its end.
    build -- the hub's record of the task's build, with its state's name; None: there is none.
    """
    keys = ("id", "nvr", "name", "version", "release", "state")
    record = {
        "task_id": task_id,
        "state": state,
        "build": None if build is None else {key: build[key] for key in keys},
    }
    return json.dumps(record, indent=2)
