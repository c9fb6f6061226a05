"""Validate a template, parameters or an image without running anything."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import filefetch, imagefile, parameters, template
from .config import Settings
from .errors import IndirectionError, on_one_line
from .jobdir import job_directory
from .template import Template
from .units import format_size


@dataclass(frozen=True)
class Finding:
    """What became of one file; exit_status is 0 when it can be used."""

    path: str
    kind: str
    message: str
    hint: str = ""
    exit_status: int = 0

    def line(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        verdict = "WRONG" if self.exit_status else "ok"
        return f"{verdict:6}" + on_one_line(f"{self.path}: {self.message}{hint}")

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.exit_status == 0, **asdict(self)}


def examine(path: Path, settings: Settings) -> Finding:
    """Validate one file.

    What starts like XML is taken for a template, *.json for parameters of Image
    Factory's, all else for an image.
    """
    kind = _kind(path)
    try:
        if kind == "template":
            message = _template(template.load(path), settings)
        elif kind == "parameters":
            message = _parameters(path, settings)
        else:
            message = _image(path, settings)
        return Finding(str(path), kind, message)
    except IndirectionError as error:
        return Finding(str(path), kind, error.message, error.hint, error.exit_status)


def _kind(path: Path) -> str:
    if path.suffix == ".json":
        return "parameters"
    head = b""
    with contextlib.suppress(OSError, ValueError):  # which is told below
        if path.is_file():  # a pipe that nobody writes to would be waited for
            with path.open("rb") as file:
                head = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")
    is_xml = head.startswith((b"<", b"\xff\xfe<\0", b"\xfe\xff\0<"))  # the last two: UTF-16
    return "template" if is_xml or path.suffix in (".tdl", ".xml") else "image"


def _template(parsed: Template, settings: Settings) -> str:
    for file in parsed.url_files:
        filefetch.require_allowed(file.name, file.content, settings)
    names = ", ".join(
        command.name + (f" (on {command.arch} only)" if command.arch else "")
        for command in parsed.commands
    )
    said = [f"template with {_counted(len(parsed.commands), 'command')}: {names}"]
    others = {
        ("repository", "repositories"): len(parsed.repositories),
        ("package", "packages"): len(parsed.packages),
        ("file", "files"): len(parsed.files),
    }
    brought = [_counted(count, *words) for words, count in others.items() if count]
    if brought:
        said.append(f"brings {', '.join(brought)}")
    if parsed.repositories:
        said.append("needs a network")
    known = [name for name in parsed.ignored if name not in parsed.mistaken]
    if known:
        said.append(f"ignored: {', '.join(known)}")
    if parsed.mistaken:
        said.append(f"WARNING: unknown, and without effect: {', '.join(parsed.mistaken)}")
    return "; ".join(said)


def _counted(count: int, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or f'{one}s'}"


def _parameters(path: Path, settings: Settings) -> str:
    given = parameters.load(path)
    given.build_spec({})
    given.utility_image()
    parsed = given.template()
    said = f"parameters: {', '.join(given.values) or 'none'}"
    return said if parsed is None else f"{said}; {_template(parsed, settings)}"


def _image(path: Path, settings: Settings) -> str:
    with job_directory(settings.work_dir) as job:
        image = imagefile.vet(
            path,
            max_virtual_size_bytes=settings.max_image_bytes,
            work_dir=job.path,
            role="image",
        )
    return f"{image.format} image, {format_size(image.virtual_size_bytes)} virtual"
