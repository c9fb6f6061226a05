"""Configuration files of plugins, which have fixed names below /etc, taken from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import koji


@contextmanager
def covered(etc: Path) -> Iterator[None]:
    """In this process koji.read_config_files() finds /etc/NAME as etc/NAME."""
    real = koji.read_config_files

    def elsewhere(name: Any) -> Any:
        if isinstance(name, (list, tuple)):
            return [elsewhere(one) for one in name]
        path = Path(name)
        return str(etc / path.relative_to("/etc")) if path.is_relative_to("/etc") else name

    def read(config_files: Any, *args: Any, **options: Any) -> Any:
        return real(elsewhere(config_files), *args, **options)

    koji.read_config_files = read
    try:
        yield
    finally:
        koji.read_config_files = real
