"""The parameters of Image Factory's IndirectionCloud, read from a JSON file.

Each becomes a field of the build spec, the utility image or the template. Whoever has a
file that was written for Image Factory can use it as it is; options override it. A name that
IndirectionCloud does not know is refused: it would have been ignored there.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import template
from .errors import UsageError
from .schema import shown
from .spec import BuildSpec
from .template import Template

# A template may have 1 MiB; escaped for JSON it is longer.
MAX_BYTES = 8 * 1024 * 1024

UTILITY_IMAGE = "utility_image"
CUSTOMIZATIONS = "utility_customizations"
# IndirectionCloud's code knows the first name of the input's file, its documentation the second.
_FIELDS = {
    "input_image_filename": "input_filename",
    "input_image_file": "input_filename",
    "input_image_device": "input_device",
    "working_space_device": "workspace_device",
    "utility_cpus": "cpus",
    "results_location": "results",
}
_INPUT = {"input_filename", "input_device"}
NAMES = (UTILITY_IMAGE, CUSTOMIZATIONS, *_FIELDS)

_FACTORY_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_ENCODING = re.compile(r"""\A(<\?xml[^>]*?)\s+encoding\s*=\s*("[^"]*"|'[^']*')""")


@dataclass(frozen=True)
class Parameters:
    """What a file of parameters asks for.

    where -- the file, for messages; values -- those that are not null, by their names there.
    """

    where: str
    values: Mapping[str, Any]

    def build_spec(self, options: Mapping[str, Any]) -> BuildSpec:
        """The build spec, with fields from options instead of the file's.

        Raises UsageError when they make no sense, by the name that the file has for a value.
        """
        overridden = set(options)
        if overridden & _INPUT:  # who asks for a device does not ask for the file's name, too
            overridden |= _INPUT
        names = {
            field: name
            for name, field in _FIELDS.items()
            if name in self.values and field not in overridden
        }
        fields = {field: _field_value(name, self.values[name]) for field, name in names.items()}
        try:
            return BuildSpec.from_dict({**fields, **options})
        except UsageError as error:
            message, ours = error.message, False
            for field, name in names.items():
                message, count = re.subn(rf"\b{field}\b", name, message)
                ours = ours or count > 0
            if ours:
                for name, field in _FIELDS.items():
                    if field not in overridden:  # nor given in the file, and yet talked of
                        message = re.sub(rf"\b{field}\b", name, message)
                message = message.replace("build spec: ", f"{self.where}: ", 1)
            raise UsageError(message, error.hint) from None

    def utility_image(self) -> Path | None:
        """The file of the utility image; None when nothing is said of it.

        Raises UsageError for an ID, which only Image Factory can look up.
        """
        value = self.values.get(UTILITY_IMAGE)
        if value is not None and _FACTORY_ID.fullmatch(value):
            raise UsageError(
                f"{self.where}: utility_image {value} is the ID of an image in Image Factory's"
                " store, not a file",
                f"give its file, {value}.body in Image Factory's storage directory,"
                " with --utility-image",
            )
        return None if value is None else Path(value)

    def template(self) -> Template | None:
        """The template that utility_customizations holds; None when there is none.

        Raises BuildFailed, with the line in that text, when it is no template.
        """
        text = self.values.get(CUSTOMIZATIONS)
        if text is None:
            return None
        try:
            # JSON has decoded it already, whatever encoding the document says it has.
            data = _ENCODING.sub(r"\1", text).encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{self.where}: utility_customizations has half a surrogate pair in it",
                "write the character out, or both of its halves",
            ) from None
        return template.parse(data, source=f"{self.where}: utility_customizations")


NONE = Parameters("no parameters", {})


def load(path: Path) -> Parameters:
    """Read a JSON file of parameters.

    Raises UsageError when it cannot be read, is no object, or has a name or a type of
    value that IndirectionCloud does not know.
    """
    where = f"parameters {path.name}"
    try:
        if path.exists() and not path.is_file():  # a pipe that nobody writes to would be waited for
            raise UsageError(f"parameters {path} is not a regular file", "check the path")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"parameters {path} do not exist", "check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"parameters {str(path)!r} cannot be read: {reason}", "check the path"
        ) from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{where} is larger than {MAX_BYTES} bytes", "give the file of parameters")
    values = _object(data, where)
    for name, value in values.items():
        _check(name, value, where)
    _check_together(values, where)
    return Parameters(where, values)


def _object(data: bytes, where: str) -> dict[str, Any]:
    """The names and values of the file, those that are null left out."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"{where} has {shown(twice)} twice", "leave one of them out")
        return found

    try:
        values = json.loads(data.decode("utf-8-sig"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        what = (
            f"line {error.lineno}: {error.msg}"
            if isinstance(error, json.JSONDecodeError)
            else "not UTF-8 text"
            if isinstance(error, UnicodeDecodeError)
            else str(error)
        )
        raise UsageError(f"{where} is not JSON: {what}", "write one JSON object") from None
    if not isinstance(values, dict):
        raise UsageError(f"{where} holds {shown(values)}, not an object", 'write {"NAME": VALUE}')
    return {name: value for name, value in values.items() if value is not None}


def _check(name: str, value: Any, where: str) -> None:
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        raise UsageError(
            f"{where}: there is no parameter {shown(name)}",
            f"did you mean {close[0]!r}?"
            if close
            else f"there are {', '.join(NAMES)}; all else is an option",
        )
    if name == "utility_cpus":
        if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}", str(value), re.ASCII):
            raise UsageError(
                f"{where}: utility_cpus is {shown(value)}", "it must be a whole number above 0"
            )
    elif not isinstance(value, str) or not value:
        raise UsageError(
            f"{where}: {name} is {shown(value)}",
            "it must be the text of a template" if name == CUSTOMIZATIONS else "it must be a text",
        )
    if name == CUSTOMIZATIONS and not value.lstrip("\ufeff \t\r\n").startswith("<"):
        raise UsageError(
            f"{where}: utility_customizations is {shown(value)}, not the text of a template",
            "put the whole document there, or name its file with --template",
        )


def _check_together(values: Mapping[str, Any], where: str) -> None:
    code, documented = (values.get(name) for name in ("input_image_filename", "input_image_file"))
    if code is not None and documented is not None and code != documented:
        raise UsageError(
            f"{where}: input_image_filename is {shown(code)} and input_image_file is"
            f" {shown(documented)}, which both name the input image's file",
            "leave one of them out",
        )
    if (code or documented) and values.get("input_image_device") is not None:
        name = "input_image_filename" if code else "input_image_file"
        raise UsageError(
            f"{where}: {name} and input_image_device are both given, but the input image is"
            " either a file in the workspace or a disk of its own",
            "leave one of them out",
        )


def _field_value(name: str, value: Any) -> Any:
    if name == "utility_cpus":
        return int(value)  # Image Factory takes "4" as well as 4
    return [value] if name == "results_location" else value
