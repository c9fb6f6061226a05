"""JSON schema as both specs use it: strict about types, and its errors as sentences.

jsonschema is imported where it is used: a client or hub without it must still load us.
"""

from __future__ import annotations

from typing import Any

from .errors import BuilderFault, UsageError

_TYPE_NAMES = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "string": "a string",
}


def validator(schema: dict[str, Any], *, what: str) -> Any:
    """A draft-07 validator of this schema.

    what -- "build spec": what is checked, for the BuilderFault when jsonschema is missing.
    """
    try:
        import jsonschema
    except ImportError as error:
        raise BuilderFault(
            f"{what}s cannot be checked: the Python module jsonschema is missing",
            "install python3-jsonschema",
        ) from error
    # JSON schema takes 2.0 for an integer; we do not, nor a tuple for anything but an array.
    types = jsonschema.Draft7Validator.TYPE_CHECKER.redefine_many(
        {
            "integer": lambda _, value: isinstance(value, int) and not isinstance(value, bool),
            "array": lambda _, value: isinstance(value, (list, tuple)),
        }
    )
    return jsonschema.validators.extend(jsonschema.Draft7Validator, type_checker=types)(schema)


def shown(value: object) -> str:
    """A value as a message quotes it, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def wrong_value(what: str, field: str, error: Any) -> str:
    """The sentence about a value that one of jsonschema's errors found wrong."""
    has = "has {} in it" if len(error.absolute_path) > 1 else "is {}"
    return f"{what}: {field} {has.format(shown(error.instance))}"


def explain(
    what: str, field: str, error: Any, *, wanted: str, member: str, members: str
) -> UsageError:
    """One of jsonschema's errors as a sentence and a hint.

    wanted -- the hint for a pattern or whatever else has no sentence of its own here.
    member, members -- what a list of this spec has in it: "arch", "entries".
    """
    limit, value = error.validator_value, error.instance
    wrong = wrong_value(what, field, error)
    if error.validator == "type":
        names = [limit] if isinstance(limit, str) else list(limit)
        kind = " or ".join(_TYPE_NAMES[name] for name in names)
        return UsageError(f"{wrong}, which is not {kind}", f"give {kind}")
    if error.validator == "enum":
        return UsageError(wrong, f"it must be one of {', '.join(limit)}")
    if error.validator == "uniqueItems":
        twice = next((one for n, one in enumerate(value) if one in value[:n]), value)
        return UsageError(f"{what}: {field} has {shown(twice)} twice", "name it once")
    if error.validator == "minItems":
        return UsageError(f"{what}: {field} is empty", f"name at least one {member}")
    if error.validator == "maxItems":
        return UsageError(
            f"{what}: {field} has {len(value)} {members}", f"at most {limit} are allowed"
        )
    if error.validator == "maxLength":
        return UsageError(
            f"{wrong}, which is {len(value)} characters long", f"at most {limit} are allowed"
        )
    return UsageError(wrong, wanted)
