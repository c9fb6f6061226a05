"""What a user types for `koji indirection-build`, or writes into a file -> a task spec.

The plugin in cli/ talks to Koji, and everything else is here: options, config files,
and what a dry run prints. Nothing here may talk to a hub before the whole request is
known to make sense, or take a value for what its type does not allow. It imports on a
plain client, without koji.
"""

from __future__ import annotations

import configparser
import dataclasses
import difflib
import json
import optparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .config import yes_or_no
from .errors import BuildFailed, IndirectionError, UsageError
from .sources import HubSession, Reference, Source, resolve
from .spec import DEFAULT_INPUT_FILENAME, DEFAULT_RESULT, BuildSpec
from .taskspec import ACCELERATORS, TaskSpec
from .template import load
from .units import format_duration, format_size, parse_duration, parse_size

COMMAND = "indirection-build"
SECTIONS = (COMMAND, "image-build-indirection")
# What an old file may hold for other commands of Koji, which have no interest in ours either.
_FOREIGN_SECTIONS = ("image-build", "factory-parameters", "ova-options")

# Below PRIO_DEFAULT of Koji; what all its commands mean by --background.
BACKGROUND_PRIORITY = 5

# --- how a value is read ----------------------------------------------------------------------


def _whole_number(text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,9}", text, re.ASCII):
        raise UsageError(f"{text[:80]!r} is not a whole number", "write digits only")
    return int(text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[\s,]+", text) if word)


def _lines(text: str) -> tuple[str, ...]:
    """One path a line: a path may have spaces and commas in it."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _reference(text: str) -> str:
    return Reference.parse(text).text


def _old_build(text: str) -> str:
    """An NVR or the ID of a build."""
    return _reference(f"build:{text}" if text.isdigit() else text)


def _old_task(text: str) -> str:
    return _reference(text if text.startswith("task:") else f"task:{text}")


def _old_results(text: str) -> tuple[str, ...]:
    """One path; it always was below the workspace's root, with or without a slash."""
    return (f"/{text.lstrip('/')}",)


# --- the options ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option of the command line, and by the same name a key in a config file.

    flag, metavar, help -- as --help shows them; without a metavar it is yes or no.
    field -- of the task spec, the build spec or the request.
    read -- the text's meaning; raises UsageError. Of a tuple several may be given.
    opposite -- the flag that says no.
    """

    flag: str
    metavar: str
    help: str
    field: str
    read: Callable[[str], Any] = str
    opposite: str = ""

    @property
    def repeatable(self) -> bool:
        return self.read in (_words, _lines)


def _flag(flag: str, help_: str, *, opposite: str = "") -> Option:
    name = flag[2:]
    field = name.replace("-", "_")
    return Option(flag, "", help_, field, yes_or_no, opposite or f"--no-{name}")


_BUILD = BuildSpec()

GROUPS: Mapping[str, Sequence[Option]] = {
    "What to build": (
        Option("--config", "FILE", "take options from an ini file; others given override it",
               "config"),
        Option("--target", "TARGET", "build target, as the first argument", "target"),
        Option("--name", "NAME", "name of the image build, as the second", "name"),
        Option("--version", "VERSION", "its version, as the third", "version"),
        Option("--release", "RELEASE", "its release (default: the next one)", "release"),
        Option("--arch", "ARCH", "arch to build for; repeatable", "arches", _words),
        Option("--can-fail", "ARCH,...", "arches that may fail without failing the build",
               "can_fail", _words),
        _flag("--scratch", "make no build, keep the results for a while only"),
        _flag("--skip-tag", "do not tag the build"),
    ),
    "Images": (
        Option("--input-image", "REF", "image that is worked on: NVR, build:ID, task:ID or"
               " latest:PACKAGE@TAG (inherited)", "input_image", _reference),
        Option("--input-archive", "GLOB", "its file, where the build has several disks for an"
               " arch", "input_archive"),
        Option("--utility-image", "REF", "image that is booted, with the tools (default: the"
               " input image)", "utility_image", _reference),
        Option("--utility-archive", "GLOB", "its file", "utility_archive"),
    ),
    "Template": (
        Option("--template", "FILE", "partial TDL document with the commands: a local file, which"
               " is uploaded (many hubs take one for scratch builds only), or with"
               " --template-scm a path in the checkout", "template"),
        Option("--template-scm", "URL#REF", "where the builder checks the template out from",
               "template_scm"),
    ),
    "What is collected": (
        Option("--results", "PATH_OR_GLOB", "a result in the workspace; repeatable (default:"
               f" {DEFAULT_RESULT})", "results", _lines),
        Option("--collect-log", "PATH", "a log in the workspace or the guest's root, fetched after"
               " failures too; repeatable", "collect_logs", _lines),
    ),
    "The guest": (
        Option("--input-filename", "PATH", "the input image's file in the workspace (default:"
               f" {DEFAULT_INPUT_FILENAME})", "input_filename"),
        Option("--input-device", "DEVICE", "hand over the input image as a read-only disk (vdc),"
               " not as a file", "input_device"),
        _flag("--input-writable", "with --input-device: make it a throw-away writable copy"),
        Option("--workspace-device", "DEVICE", "the workspace's disk (default:"
               f" {_BUILD.workspace_device})", "workspace_device"),
        Option("--workspace-size", "SIZE", "such as 30G (default:"
               f" {format_size(_BUILD.workspace_size_bytes)})", "workspace_size_bytes",
               parse_size),
        Option("--workspace-fs", "TYPE", f"ext4, ext2 or xfs (default: {_BUILD.workspace_fs})",
               "workspace_fs"),
        Option("--cpus", "N", "(default: all of the builder's, up to 4)", "cpus", _whole_number),
        Option("--memory", "SIZE", f"such as 4G (default: {format_size(_BUILD.memory_bytes)})",
               "memory_bytes", parse_size),
        Option("--network", "NAME", "user (NAT) or a libvirt network, if the builder allows it"
               " (default: none)", "network"),
        Option("--repo", "URL", "package repository that the guest has for the time of the job;"
               " repeatable", "repos", _lines),
        _flag("--tag-repo", "the guest has the build tag's repository too, for that time"),
        Option("--accel", "|".join(ACCELERATORS), "what it runs on (default: auto: KVM where it"
               " works)", "accel"),
    ),
    "Deadlines, such as 90s, 15m or 4h": (
        Option("--timeout", "TIME", "all commands together (default:"
               f" {format_duration(_BUILD.job_timeout_seconds)})", "job_timeout_seconds",
               parse_duration),
        Option("--command-timeout", "TIME", "each command (default: as long as the job may take)",
               "command_timeout_seconds", parse_duration),
        Option("--boot-timeout", "TIME", "until the job starts", "boot_timeout_seconds",
               parse_duration),
        Option("--shutdown-timeout", "TIME", "from the job's end", "shutdown_timeout_seconds",
               parse_duration),
    ),
    "The task": (
        _flag("--background", "run the task at a lower priority"),
        Option("--priority", "N", "the task's priority, relative to the default: lower ones are"
               " run sooner, and negative ones are for administrators", "priority", _whole_number),
        _flag("--wait", "wait for the task's end (default: unless this runs in the background)",
              opposite="--nowait"),
        _flag("--dry-run", "print the spec and the images it would use, and make no task"),
    ),
    "What is shown": (
        _flag("--noprogress", "no progress of the upload", opposite="--progress"),
        _flag("--quiet", "errors only, and with --nowait the task's id"),
        _flag("--json", "print the task's id and its build as JSON; the rest goes to standard"
              " error"),
    ),
    "Names from image-build-indirection": (
        Option("--base-image-build", "NVR_OR_ID", "see --input-image", "input_image", _old_build),
        Option("--base-image-task", "ID", "see --input-image", "input_image", _old_task),
        Option("--utility-image-build", "NVR_OR_ID", "see --utility-image", "utility_image",
               _old_build),
        Option("--utility-image-task", "ID", "see --utility-image", "utility_image", _old_task),
        Option("--indirection-template", "FILE", "see --template", "old_template"),
        Option("--indirection-template-url", "URL#REF", "see --template-scm", "template_scm"),
        Option("--results-loc", "PATH", "see --results", "results", _old_results),
    ),
}  # fmt: skip

OPTIONS = tuple(option for group in GROUPS.values() for option in group)

# An option's name, in a file as `collect_log` or `collect-log` -> the option, and whether it
# says no.
_NAMES: dict[str, tuple[Option, bool]] = {
    flag[2:].replace("-", "_"): (option, no)
    for option in OPTIONS
    for flag, no in ((option.flag, False), (option.opposite, True))
    if flag
}
_BUILD_FIELDS = tuple(field.name for field in dataclasses.fields(BuildSpec))
_BUILD_NAMES = tuple(name for name, (one, _) in _NAMES.items() if one.field in _BUILD_FIELDS)
_FILE_NAMES = tuple(name for name in _NAMES if name != "config")

# Who gives the first on the command line does not want the others from the file.
_REPLACES: Mapping[str, tuple[str, ...]] = {
    "input_filename": ("input_device", "input_writable", "workspace_device"),
    "input_device": ("input_filename",),
    "template": ("old_template",),
    "old_template": ("template",),
    "background": ("priority",),
    "priority": ("background",),
}

# Field -> value; None where somebody has asked for the default with an empty value.
_Layer = dict[str, Any]


def _read(given: Iterable[tuple[str, str]], shown: Callable[[str], str]) -> _Layer:
    """Fields from options' names and texts.

    shown -- how a name is called in messages.
    Raises UsageError for a text of the wrong type, and for two names of one field.
    """
    layer: _Layer = {}
    names: dict[str, str] = {}
    for name, text in given:
        option, no = _NAMES[name]
        field = option.field
        if not text.strip():
            if names.get(field) == name:
                layer[field] = None  # taken back
            layer.setdefault(field, None)
            continue
        if names.setdefault(field, name) != name and option.metavar:
            raise UsageError(
                f"{shown(names[field])} and {shown(name)} are both given, and mean the same",
                "leave one of them out",
            )
        try:
            value = option.read(text.strip())
        except UsageError as error:
            raise UsageError(f"{shown(name)}: {error.message}", error.hint) from None
        if no:
            value = not value
        if option.repeatable:
            value = (layer.get(field) or ()) + value
        layer[field] = value
    for one, other in (("template", "old_template"), ("background", "priority")):
        if layer.get(one) and layer.get(other) is not None:
            raise UsageError(
                f"{shown(names[one])} and {shown(names[other])} are both given",
                "leave one of them out",
            )
    return layer


def _suggestion(name: str, known: Sequence[str]) -> str:
    # "workspace" means a key with more to it.
    close = [one for one in known if one.startswith(name)] if len(name) > 2 else []
    close = close or difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {' or '.join(repr(one) for one in close)}?"
    return f"there are: {', '.join(known)}"


# --- config files -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """What a config file says: for all arches, and for single ones."""

    layer: _Layer
    arches: Mapping[str, _Layer]


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
            _suggestion(section, [*SECTIONS, f"{COMMAND}:ARCH"]),
        )
    found = [section for section in SECTIONS if parser.has_section(section)]
    if len(found) != 1:
        raise UsageError(
            f"{path} has {'both' if found else 'neither'} a section [{SECTIONS[0]}]"
            f" {'and' if found else 'nor'} one [{SECTIONS[1]}]",
            f"put all options into [{SECTIONS[0]}]",
        )
    arches: dict[str, _Layer] = {}
    for section in parser.sections():
        name, colon, arch = section.partition(":")
        if name == COMMAND and colon:
            arches[arch] = _section(parser, section, _BUILD_NAMES, path)
    return _File(_section(parser, found[0], _FILE_NAMES, path), arches)


def _section(
    parser: configparser.ConfigParser, section: str, known: Sequence[str], path: Path
) -> _Layer:
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
            if key in _NAMES and section not in SECTIONS:
                raise UsageError(
                    f"{shown(key)} cannot differ between arches", f"move it to [{SECTIONS[0]}]"
                )
            raise UsageError(
                f"{path}: [{section}] has no key {key!r}", _suggestion(key, list(known))
            )
        try:
            given.append((key, parser.get(section, key) or ""))
        except configparser.InterpolationError as error:
            raise UsageError(
                f"{shown(key)}: {' '.join(str(error).split())}",
                "%(NAME)s stands for another key's value; write %% for a percent sign",
            ) from None
    return _read(given, shown)


# --- the command line -------------------------------------------------------------------------


class _OptionParser(optparse.OptionParser):
    def error(self, msg: str) -> NoReturn:
        match = re.fullmatch(r"no such option: (--\S+)", msg)
        flags = [flag for one in OPTIONS for flag in (one.flag, one.opposite) if flag]
        close = difflib.get_close_matches(match.group(1), flags, n=1) if match else []
        hint = f"did you mean {close[0]}?" if close else f"see koji {COMMAND} --help"
        raise UsageError(msg, hint)


def _option_parser() -> _OptionParser:
    """A parser that leaves all values as they were typed in values.given."""
    parser = _OptionParser(
        usage=f"%prog {COMMAND} [options] TARGET NAME VERSION\n"
        f"       %prog {COMMAND} --config FILE [options]\n"
        "(Specify the --help global option for a list of other help options)",
        description="Boot a throw-away copy of the utility image on a builder, hand it the input"
        " image, run the template's commands in it, and make an image build of the results.",
        epilog="An empty value means the default. The exit status is that of the task: 0 when it"
        " has succeeded. Usage errors exit with 2.",
    )
    parser.set_defaults(given=None)
    for title, options in GROUPS.items():
        group = parser.add_option_group(title)
        for option in options:
            kind: dict[str, Any] = {"action": "callback", "help": option.help}
            if option.metavar:
                kind.update(type="string", metavar=option.metavar, callback=_take_value)
                group.add_option(option.flag, **kind)
            else:
                group.add_option(option.flag, option.opposite, callback=_take_flag, **kind)
    return parser


def _take(parser: Any, flag: str, text: str) -> None:
    parser.values.given = [*(parser.values.given or ()), (flag[2:].replace("-", "_"), text)]


def _take_value(_option: Any, flag: str, text: str, parser: Any) -> None:
    _take(parser, flag, text)


def _take_flag(_option: Any, flag: str, _text: None, parser: Any) -> None:
    _take(parser, flag, "true")


def _read_options(arguments: Sequence[str]) -> _Layer:
    values, positional = _option_parser().parse_args(list(arguments))
    layer = _read(values.given or (), lambda name: "--" + name.replace("_", "-"))
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
    """

    spec: TaskSpec
    template_file: Path | None = None
    priority: int | None = None
    wait: bool | None = None
    dry_run: bool = False
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
    overridden = set(options) | {name for one in options for name in _REPLACES.get(one, ())}
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
    build = {name: values.pop(name) for name in _BUILD_FIELDS if name in values}
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
        load(template_file).require_network(spec.build.network)
    return Request(spec=spec, template_file=template_file, **asked)


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
                owner = f"build:{source.build_id}" if source.build_id else f"task:{source.task_id}"
                lines += [
                    f"  {source.role}: {source} ({owner})",
                    f"    {format_size(source.size_bytes)},"
                    f" {source.checksum_name} {source.checksum}",
                ]
    return "\n".join([*lines, "No task was made."])


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
