"""A call that may block for ever, in a thread of its own, so that its caller may give it up.

Ctrl-C reaches the caller, too, wherever the call is. What is given up goes on in its thread,
which no end of the process waits for: it must do no harm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class GivenUp(Exception):
    """The call has not come back in time."""


class Call(Generic[Value]):
    """Begins at once."""

    def __init__(self, function: Callable[..., Value], *arguments: Any) -> None:
        self._values: list[Value] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Value], arguments: tuple[Any, ...]) -> None:
        try:
            self._values.append(function(*arguments))
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
            self._error = error

    def value(self, timeout_seconds: float) -> Value:
        """What the call returns, or the exception that it raises; GivenUp when it takes longer."""
        self.settle(timeout_seconds)
        if self._error is not None:
            raise self._error
        if not self._values:
            raise GivenUp
        return self._values[0]

    def settle(self, seconds: float) -> None:
        """Wait until the call has come back, at most so long."""
        self._thread.join(max(0.0, seconds))
