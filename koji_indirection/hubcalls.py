"""Calls of the hub: deadlines, which are made again when it stumbles, what its numbers mean.

koji's own client repeats what got no answer. An answer is final to it, also when all it says
is that PostgreSQL took this transaction as the victim of a deadlock, or that the hub has had
this very call before, whose answer was lost on the way. Must never repeat a call that may have
done half of its work.
"""

from __future__ import annotations

import contextlib
import logging
import time
import xml.parsers.expat
import xmlrpc.client
from collections.abc import Iterator
from typing import Any

from .errors import BuilderFault, on_one_line

log = logging.getLogger(__name__)

# Before the second, third, ... attempt; the hub's scheduler runs every few seconds.
WAITS_SECONDS = (0.5, 1, 2, 4, 8)

# What the hub has rolled back as a whole when it reports one of these: nothing was done.
_PASSING = ("deadlock detected", "could not serialize access", "due to lock timeout")
_DATABASE_CODES = (1, 1000)  # any exception but Koji's own, and koji.GenericError
_LOCK_ERROR = 1001  # checkUpload: another process still has the file open for writing
_SEQUENCE_ERROR = 1008  # the hub has had a call with a higher number, and has not done this one
# More than one session makes of calls.
_NUMBERS_AHEAD = 1_000_000
RETRY_ERROR = 1009  # the hub has done this very call before, and will not do it again
# AuthError, ActionNotAllowed, AuthLockError, AuthExpired: the hub says that a task is not ours any
# more; koji's client has renewed by then what can be renewed.
LOST = (1002, 1004, 1006, 1007)

# Of koji.BUILD_STATES.
BUILDING = 0
COMPLETE = 1

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
        "host.getID",
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

# Also after the hub has said that it did it: all but the one that would be refused then.
_SAFE_TO_REPEAT_WHEN_DONE = SAFE_TO_REPEAT - {"host.initImageBuild"}

# For these the hub reads, or copies, whole images before it answers.
_SLOW = frozenset(
    (
        "checkUpload",
        "host.completeImageBuild",
        "host.moveImageBuildToScratch",
    )
)

# Not calls, but made of some; repeated by koji's client, and by handover.upload_verified().
_UPLOADS = frozenset(("rawUpload", "uploadWrapper"))


class PatientSession:
    """A koji.ClientSession whose calls that are SAFE_TO_REPEAT are made again; the rest is its.

    timeout_seconds, slow_timeout_seconds -- until a hub that is silent counts as one that is
    away, for most calls and for those that take it long; koji's client would wait for hours.
    No answer at all, after all that koji's client tries, is a BuilderFault.
    """

    def __init__(
        self,
        session: Any,
        timeout_seconds: float = 300,
        slow_timeout_seconds: float = 4 * 3600,
    ) -> None:
        self._session = session
        own = session.opts.get("timeout")
        session.opts["timeout"] = min(own or timeout_seconds, timeout_seconds)
        self._slow_timeout_seconds = slow_timeout_seconds

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._session, name)
        if name == "host" or name in SAFE_TO_REPEAT or name in _UPLOADS:
            return _Method(self, value, name)
        return value

    @contextlib.contextmanager
    def _deadline(self, name: str) -> Iterator[None]:
        options = self._session.opts
        usual = options["timeout"]
        try:
            if name in _SLOW:
                options["timeout"] = max(usual, self._slow_timeout_seconds)
            yield
        finally:
            options["timeout"] = usual


class _Method:
    """A call of the hub, or what comes before the dot in one."""

    def __init__(self, patient: PatientSession, method: Any, name: str) -> None:
        self._patient = patient
        self._method = method
        self._name = name

    def __getattr__(self, part: str) -> _Method:
        return _Method(self._patient, getattr(self._method, part), f"{self._name}.{part}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._name in SAFE_TO_REPEAT:
            for seconds in WAITS_SECONDS:
                try:
                    return self._call(*args, **kwargs)
                except Exception as error:
                    if not passes(error, self._name):
                        raise
                    log.info("%s will be repeated: %s", self._name, _last_line(error))
                time.sleep(seconds)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        with self._patient._deadline(self._name):
            try:
                try:
                    return self._method(*args, **kwargs)
                except Exception as error:
                    if getattr(error, "faultCode", None) != _SEQUENCE_ERROR:
                        raise
                    # koji's client has renewed an expired session, and counts from zero again.
                    self._patient._session.callnum += _NUMBERS_AHEAD
                return self._method(*args, **kwargs)
            except Exception as error:
                if not is_no_answer(error):
                    raise
                raise BuilderFault(
                    f"the Koji hub did not answer {self._name}: {one_line(error)}",
                    "see whether the hub is well, and can be reached from this builder",
                ) from error


def passes(error: Exception, name: str = "") -> bool:
    """Whether this is trouble of the hub's that passes, after a call that can be repeated."""
    code = getattr(error, "faultCode", None)
    if code == _LOCK_ERROR or (code == RETRY_ERROR and name in _SAFE_TO_REPEAT_WHEN_DONE):
        return True
    return code in _DATABASE_CODES and any(phrase in str(error) for phrase in _PASSING)


def is_no_answer(error: BaseException) -> bool:
    """Whether what koji's client raises says that no answer of a hub came: none, or nonsense."""
    import requests  # type: ignore[import-untyped,import-not-found,unused-ignore]

    nonsense = (xmlrpc.client.ResponseError, xml.parsers.expat.ExpatError)
    return isinstance(error, (requests.exceptions.RequestException, *nonsense))


def one_line(error: BaseException) -> str:
    """An error's words for a message: on one line, and printable."""
    return on_one_line(str(error))[:300] or type(error).__name__


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if any(p in line for p in _PASSING)]
    return lines[-1].strip() if lines else f"{error}"
