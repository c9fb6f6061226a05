"""Parts of a task of Koji's, and a stand-in for its hub: what tests of its rooms share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koji_indirection import sources, taskrun, template
from koji_indirection.taskinputs import Inputs
from koji_indirection.taskspec import TaskSpec

# As the hub has them: a file's longest end wins.
EXTENSIONS = ("iso", "qcow2", "raw raw.xz", "tar.gz tgz", "json", "vmlinuz", "xml")


class Hub:
    """Answers from attributes; calls are kept."""

    host: Any

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            answer = self.answers[name]
            return answer(*args, **kwargs) if callable(answer) else answer

        return call

    def getArchiveType(self, filename: str) -> dict[str, str] | None:
        parts = filename.lower().split(".")
        for start in range(len(parts)):
            for extensions in EXTENSIONS:
                if ".".join(parts[start:]) in extensions.split():
                    return {"extensions": extensions}
        return None


def spec(**fields: Any) -> TaskSpec:
    values = {
        "target": "images",
        "name": "live",
        "version": "1",
        "arches": ["x86_64"],
        "input_image": "in-1-1",
        "utility_image": "latest:tools@f40",
        "template": "live.tdl",
        "template_scm": "git+https://example.com/t.git#main",
        **fields,
    }
    return TaskSpec.from_dict(values)


def source(role: str = "input image", **fields: Any) -> sources.Source:
    values = {
        "reference": "in-1-1" if role == "input image" else "latest:tools@f40",
        "role": role,
        "nvr": "in-1-1",
        "build_id": 7,
        "archive_id": 70,
        "task_id": None,
        "filename": "in.qcow2",
        "size_bytes": 1000,
        "checksum": "0" * 64,
        "checksum_type": 2,
        "arch": "x86_64",
        "relpath": "packages/in/1/1/images/in.qcow2",
        **fields,
    }
    return sources.Source(**values)


def inputs(**fields: Any) -> Inputs:
    text = b"<template><commands><command name='a'>true</command></commands></template>"
    values = {
        "template": template.parse(text, source="live.tdl"),
        "template_text": text,
        "template_source": "git+https://example.com/t.git#0123abc",
        "input_image": source(),
        "utility_image": source("utility image", archive_id=None, nvr=None, task_id=9),
        **fields,
    }
    return Inputs(**values)


BUILD = {"id": 3, "name": "n", "version": "1", "release": "2"}


class Refused(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.faultCode = code


DAEMON = taskrun.Daemon(
    session=Hub(),
    task_id=5,
    topurl=None,
    topdir=None,
    work_dir=Path("/nowhere"),
    checkout=lambda url, directory: (directory, url),
    upload=lambda path, name: None,
    append=lambda file, name: None,
)
