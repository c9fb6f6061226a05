"""The options of our `koji` commands: one table, from which command lines and files are read.

An option's text is never taken for what its type does not allow, and nothing here asks
a hub for anything. It imports on a plain client, without koji.
"""

from __future__ import annotations

import dataclasses
import difflib
import optparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .config import default_cache_dir, default_work_dir, yes_or_no
from .errors import UsageError
from .sources import Reference
from .spec import DEFAULT_INPUT_FILENAME, DEFAULT_RESULT, BuildSpec
from .taskspec import ACCELERATORS
from .units import format_duration, format_size, parse_duration, parse_size

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


# What a guest is like and what is taken from it: of both commands.
BUILD_GROUPS: Mapping[str, Sequence[Option]] = {
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
               f" {BuildSpec.workspace_device})", "workspace_device"),
        Option("--workspace-size", "SIZE", "such as 30G (default:"
               f" {format_size(BuildSpec.workspace_size_bytes)})", "workspace_size_bytes",
               parse_size),
        Option("--workspace-fs", "TYPE", f"ext4, ext2 or xfs (default: {BuildSpec.workspace_fs})",
               "workspace_fs"),
        Option("--firmware", "KIND", "auto, bios or uefi (default: auto: BIOS if the utility image"
               " boots by one, else UEFI)", "firmware"),
        _flag("--secure-boot", "boot by UEFI with Secure Boot enforced"),
        Option("--disk-bus", "BUS", "auto, virtio, sata or ide (default: auto: virtio if the"
               " utility image has a driver for it)", "disk_bus"),
        Option("--cpus", "N", "(default: all of the builder's, up to 4)", "cpus", _whole_number),
        Option("--memory", "SIZE", f"such as 4G (default: {format_size(BuildSpec.memory_bytes)})",
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
               f" {format_duration(BuildSpec.job_timeout_seconds)})", "job_timeout_seconds",
               parse_duration),
        Option("--command-timeout", "TIME", "each command (default: as long as the job may take)",
               "command_timeout_seconds", parse_duration),
        Option("--boot-timeout", "TIME", "until the job starts", "boot_timeout_seconds",
               parse_duration),
        Option("--shutdown-timeout", "TIME", "from the job's end", "shutdown_timeout_seconds",
               parse_duration),
    ),
}  # fmt: skip

# How a build runs on this machine; localrun.Here has the same fields.
HERE_OPTIONS: Sequence[Option] = (
    Option("--output", "DIR", "new directory for results, logs/ and manifest.json", "output",
           Path),
    _flag("--force", "take an output directory that has files in it; what an earlier build wrote"
          " there is removed first"),
    Option("--settings", "FILE", "ini file with this machine's settings, as koji-indirection takes"
           " it with --config", "settings", Path),
    Option("--work-dir", "DIR", f"for disks while they are in use (default: {default_work_dir()})",
           "work_dir", Path),
    Option("--cache-dir", "DIR", "for fetched images, and what later builds need not find out"
           f" again (default: {default_cache_dir()})", "cache_dir", Path),
    Option("--connect", "URI", "libvirt connection (default: the first that works)", "connect"),
    _flag("--verbose", "show the commands' output as it comes"),
)  # fmt: skip

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
    **BUILD_GROUPS,
    "The task": (
        _flag("--background", "run the task at a lower priority"),
        Option("--priority", "N", "the task's priority, relative to the default: lower ones are"
               " run sooner, and negative ones are for administrators", "priority", _whole_number),
        _flag("--wait", "wait for the task's end (default: unless this runs in the background)",
              opposite="--nowait"),
        _flag("--dry-run", "print the spec and the images it would use, and make no task"),
    ),
    "On this machine, without a task": (
        _flag("--local", "build here, for the one --arch that is given, and write to --output:"
              " to try out a template"),
        *HERE_OPTIONS,
    ),
    "What is shown": (
        _flag("--noprogress", "no progress of the upload", opposite="--progress"),
        _flag("--quiet", "errors only, and with --nowait the task's id"),
        _flag("--json", "print the task's id and its build, or with --local the manifest, as"
              " JSON; the rest goes to standard error"),
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

REPLAY_GROUPS: Mapping[str, Sequence[Option]] = {
    "What is built": (
        Option("--arch", "ARCH", "for which of the task's arches", "arch"),
        Option("--template", "FILE", "a local template instead of the task's: to try a correction",
               "template"),
    ),
    **BUILD_GROUPS,
    "This machine": HERE_OPTIONS,
    "What is shown": (
        _flag("--quiet", "errors only"),
        _flag("--json", "print the manifest as JSON; the rest goes to standard error"),
    ),
}  # fmt: skip

# An option's name, in a file as `collect_log` or `collect-log` -> the option, and whether it
# says no.
Names = Mapping[str, tuple[Option, bool]]


def names_of(groups: Mapping[str, Sequence[Option]]) -> Names:
    return {
        flag[2:].replace("-", "_"): (option, no)
        for group in groups.values()
        for option in group
        for flag, no in ((option.flag, False), (option.opposite, True))
        if flag
    }


NAMES = names_of(GROUPS)
BUILD_FIELDS = tuple(field.name for field in dataclasses.fields(BuildSpec))

# Who gives the first on the command line does not want the others from the file.
REPLACES: Mapping[str, tuple[str, ...]] = {
    "input_filename": ("input_device", "input_writable", "workspace_device"),
    "input_device": ("input_filename",),
    "template": ("old_template",),
    "old_template": ("template",),
    "background": ("priority",),
    "priority": ("background",),
}

# Field -> value; None where somebody has asked for the default with an empty value.
Layer = dict[str, Any]


def read(given: Iterable[tuple[str, str]], known: Names, shown: Callable[[str], str]) -> Layer:
    """Fields from options' names and texts.

    known -- has all the names.
    shown -- how a name is called in messages.
    Raises UsageError for a text of the wrong type, and for two names of one field.
    """
    layer: Layer = {}
    names: dict[str, str] = {}
    for name, text in given:
        option, no = known[name]
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


def suggestion(name: str, known: Sequence[str]) -> str:
    # "workspace" means a key with more to it.
    close = [one for one in known if one.startswith(name)] if len(name) > 2 else []
    close = close or difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {' or '.join(repr(one) for one in close)}?"
    return f"there are: {', '.join(known)}"


# --- the command line -------------------------------------------------------------------------


class _OptionParser(optparse.OptionParser):
    """Leaves all values as they were typed in values.given."""

    def __init__(self, command: str, groups: Mapping[str, Sequence[Option]], **texts: Any) -> None:
        super().__init__(**texts)
        self._command = command
        self._flags: list[str] = []
        self.set_defaults(given=None)
        for title, options in groups.items():
            group = self.add_option_group(title)
            for option in options:
                self._flags += [flag for flag in (option.flag, option.opposite) if flag]
                kind: dict[str, Any] = {"action": "callback", "help": option.help}
                if option.metavar:
                    kind.update(type="string", metavar=option.metavar, callback=_take_value)
                    group.add_option(option.flag, **kind)
                else:
                    group.add_option(option.flag, option.opposite, callback=_take_flag, **kind)

    def error(self, msg: str) -> NoReturn:
        match = re.fullmatch(r"no such option: (--\S+)", msg)
        close = difflib.get_close_matches(match.group(1), self._flags, n=1) if match else []
        hint = f"did you mean {close[0]}?" if close else f"see koji {self._command} --help"
        raise UsageError(msg, hint)


def _take(parser: Any, flag: str, text: str) -> None:
    parser.values.given = [*(parser.values.given or ()), (flag[2:].replace("-", "_"), text)]


def _take_value(_option: Any, flag: str, text: str, parser: Any) -> None:
    _take(parser, flag, text)


def _take_flag(_option: Any, flag: str, _text: None, parser: Any) -> None:
    _take(parser, flag, "true")


def read_command_line(
    command: str,
    arguments: Sequence[str],
    groups: Mapping[str, Sequence[Option]],
    *,
    usages: Sequence[str],
    description: str,
    epilog: str,
) -> tuple[Layer, list[str]]:
    """What the options say, and the arguments that are none.

    usages -- what follows the command's name, one for each way to use it.
    Prints the help and exits for --help; raises UsageError.
    """
    lines = [f"%prog {command} {usage}" for usage in usages]
    parser = _OptionParser(
        command,
        groups,
        usage="\n       ".join(lines)
        + "\n(Specify the --help global option for a list of other help options)",
        description=description,
        epilog=epilog,
    )
    values, positional = parser.parse_args(list(arguments))
    layer = read(values.given or (), names_of(groups), lambda name: "--" + name.replace("_", "-"))
    return layer, positional
