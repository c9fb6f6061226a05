"""Configuration files of plugins, which have fixed names below /etc, taken from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import koji


@contextmanager
def covered(etc: Path, *readers: tuple[Any, str]) -> Iterator[None]:
    """In this process koji.read_config_files() finds /etc/NAME as etc/NAME.

    readers -- and so does what else is told a file's name by its first argument: its owner and
        its name there.
    """

    def elsewhere(name: Any) -> Any:
        if isinstance(name, (list, tuple)):
            return [elsewhere(one) for one in name]
        path = Path(name)
        return type(name)(etc / path.relative_to("/etc")) if path.is_relative_to("/etc") else name

    def reading(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda name, *args, **options: real(elsewhere(name), *args, **options)

    with ExitStack() as stack:
        for owner, name in ((koji, "read_config_files"), *readers):
            stack.enter_context(patch.object(owner, name, reading(getattr(owner, name))))
        yield
