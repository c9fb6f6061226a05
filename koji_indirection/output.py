"""The directory that a build fills: results, logs/, manifest.json.

Made before anything else happens, so that a directory that cannot be used is
said at once. Must never remove a file that an earlier build did not write.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from .errors import UsageError
from .manifest import FILE_NAME

LOGS = "logs"
_PLAIN_NAME = re.compile(r"[^/\0.][^/\0]*")


def prepare(output: Path, *, force: bool) -> Path:
    """Make the output directory and its logs/; returns it as an absolute path.

    force -- take a directory that has files in it: what an earlier build wrote
        there (logs/, manifest.json and the outputs it names) is removed first.
    Raises UsageError when the directory is not empty and force was not given,
    or when it cannot be written.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow links
    try:
        if output.is_dir() and any(output.iterdir()):
            if not force:
                raise UsageError(
                    f"the output directory {output} is not empty",
                    "name a new directory, or use --force to replace an earlier build in it",
                )
            _remove_earlier_build(output)
        (output / LOGS).mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UsageError(
            f"the output directory {output} cannot be used: {error.strerror}",
            "name a directory that you can write",
        ) from error
    return output


def _remove_earlier_build(output: Path) -> None:
    try:
        earlier = json.loads((output / FILE_NAME).read_text(encoding="utf-8"))
        names = [entry["name"] for entry in earlier["outputs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not ours to remove; what has a name of ours is overwritten
    for name in [*names, FILE_NAME]:
        if isinstance(name, str) and _PLAIN_NAME.fullmatch(name):
            (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / LOGS, ignore_errors=True)
