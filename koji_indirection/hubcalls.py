"""Calls of the hub that are made again when it stumbles over something that passes.

koji's own client repeats what got no answer. An answer is final to it, also when all it says
is that PostgreSQL took this transaction as the victim of a deadlock. Must never repeat a
call that may have done half of its work.
"""

from __future__ import annotations

import logging
import time
from typing import Any

log = logging.getLogger(__name__)

# Before the second, third, ... attempt; the hub's scheduler runs every few seconds.
WAITS_SECONDS = (0.5, 1, 2, 4, 8)

# What the hub has rolled back as a whole when it reports one of these: nothing was done.
_PASSING = ("deadlock detected", "could not serialize access", "due to lock timeout")
_DATABASE_CODES = (1, 1000)  # any exception but Koji's own, and koji.GenericError
_LOCK_ERROR = 1001  # checkUpload: another process still has the file open for writing

# Calls that only read, or only change the database, in one transaction. Not here, on purpose:
# completeImageBuild and moveImageBuildToScratch, which move files before they fail and find
# them in their way the next time, and uploads, which koji's client repeats piece by piece.
SAFE_TO_REPEAT = frozenset(
    (
        # Read.
        "checkUpload",
        "downloadTaskOutput",
        "getArchiveType",
        "getBuild",
        "getBuildConfig",
        "getBuildTarget",
        "getChannel",
        "getLatestBuilds",
        "getNextRelease",
        "getPackageConfig",
        "getRepo",
        "getTaskChildren",
        "getTaskInfo",
        "getTaskResult",
        "listArchives",
        "listBuilds",
        "listRPMs",
        "listTaskOutput",
        "host.taskWaitResults",
        # Set flags to what they shall be, whatever they were; take row locks that the
        # scheduler takes too, which is where deadlocks have been seen.
        "host.taskSetWait",
        "host.taskWait",
        "cancelTaskChildren",
        # Give the child that has this label already, if the first attempt has made it.
        "host.subtask",
        # Insert rows of one build. Had the first attempt made them, its NVR would be taken and
        # the second one be told so, with another fault than those above.
        "host.initImageBuild",
        "host.failBuild",
        # Ours, and written to be called again.
        "host.recordIndirectionInputs",
    )
)


class PatientSession:
    """A koji.ClientSession whose calls that are SAFE_TO_REPEAT are made again; the rest is its."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._session, name)
        return _Method(value, name) if name == "host" or name in SAFE_TO_REPEAT else value


class _Method:
    """A call of the hub, or what comes before the dot in one."""

    def __init__(self, method: Any, name: str) -> None:
        self._method = method
        self._name = name

    def __getattr__(self, part: str) -> _Method:
        return _Method(getattr(self._method, part), f"{self._name}.{part}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._name in SAFE_TO_REPEAT:
            for seconds in WAITS_SECONDS:
                try:
                    return self._method(*args, **kwargs)
                except Exception as error:
                    if not passes(error):
                        raise
                    log.info("%s will be repeated: %s", self._name, _last_line(error))
                time.sleep(seconds)
        return self._method(*args, **kwargs)


def passes(error: Exception) -> bool:
    """Whether this is trouble of the hub's that passes, after a call that has done nothing."""
    code = getattr(error, "faultCode", None)
    if code == _LOCK_ERROR:
        return True
    return code in _DATABASE_CODES and any(phrase in str(error) for phrase in _PASSING)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if any(p in line for p in _PASSING)]
    return lines[-1].strip() if lines else f"{error}"
