"""Who calls: sessions, their locks and the numbers of their calls."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any

import koji
from koji.context import context

# Calls that may be made twice with one number: they only say again what is so.
REPEATABLE = ("host.taskWait", "host.taskSetWait", "host.updateHost")
# What one must be able to do while another session has the lock.
LOCK_IS_NO_MATTER = ("exclusiveSession", "login", "logout")


class Session:
    """Of one request; what a hub plugin finds as context.session."""

    def __init__(self, headers: Mapping[str, Any], method: str | None) -> None:
        self.id: int | None = None
        self.user_id: int | None = None
        self.user_data: dict[str, Any] = {}
        self.master: int | None = None
        self.callnum: int | None = None
        self.exclusive = False
        self.logged_in = False
        if headers.get("Koji-Session-Id") is not None:
            self._resume(headers, method)

    def _resume(self, headers: Mapping[str, Any], method: str | None) -> None:
        db = context.db
        self.id = int(headers["Koji-Session-Id"])
        found = db.row(
            "SELECT * FROM sessions WHERE id = %(id)s AND key = %(key)s AND NOT closed",
            id=self.id,
            key=headers.get("Koji-Session-Key"),
        )
        if found is None:
            raise koji.AuthError("Invalid session or bad credentials")
        if found["expired"]:
            if method != "login":
                raise koji.AuthExpired(f'session "{self.id}" has expired')
            return  # to be renewed; until then it is nobody's
        number = headers.get("Koji-Session-Callnum")
        if number is not None:
            self.callnum = int(number)
            self._check_number(found["callnum"], method)
        self.user_id = found["user_id"]
        self.user_data = db.row("SELECT * FROM users WHERE id = %(id)s", id=self.user_id)
        self.master = found["master"]
        self.logged_in = True
        self._check_lock(method)

    def _check_number(self, last: int | None, method: str | None) -> None:
        """The last number is kept with what its call has changed, so both are there or none."""
        if last is None or self.callnum is None:
            return
        if last > self.callnum:
            raise koji.SequenceError(f"{last} > {self.callnum} (session {self.id})")
        if last == self.callnum and method not in REPEATABLE:
            raise koji.RetryError(
                f"unable to retry call {self.callnum} (method {method}) for session {self.id}"
            )

    def _check_lock(self, method: str | None) -> None:
        owner = context.db.value(
            "SELECT id FROM sessions WHERE user_id = %(user)s AND exclusive AND NOT closed",
            user=self.user_id,
        )
        self.exclusive = owner is not None and owner in (self.id, self.master)
        if owner is not None and not self.exclusive and method not in LOCK_IS_NO_MATTER:
            raise koji.AuthLockError("User locked by another session")

    def keep_number(self) -> None:
        context.db.rows(
            "UPDATE sessions SET callnum = %(callnum)s WHERE id = %(id)s",
            callnum=self.callnum,
            id=self.id,
        )

    # What a user may do

    def getPerms(self) -> list[str]:
        return permissions_of(self.user_id)

    def hasPerm(self, name: str) -> bool:
        """Admins have all."""
        return self.logged_in and not {"admin", name}.isdisjoint(self.getPerms())

    def assertPerm(self, name: str) -> None:
        if not self.hasPerm(name):
            raise koji.ActionNotAllowed(f"{name} permission required")

    def assertLogin(self) -> None:
        if not self.logged_in:
            raise koji.ActionNotAllowed("log in first")

    def getHostId(self) -> int | None:
        found: int | None = context.db.value(
            "SELECT id FROM host WHERE user_id = %(user)s", user=self.user_id
        )
        return found

    @property
    def host_id(self) -> int | None:
        return self.getHostId()


def permissions_of(user_id: int | None) -> list[str]:
    names: list[str] = context.db.values(
        "SELECT name FROM permissions JOIN user_perms ON perm_id = permissions.id"
        " WHERE user_id = %(user)s ORDER BY name",
        user=user_id,
    )
    return names


def _create(user_id: int | None, master: int | None = None) -> dict[str, Any]:
    key = f"{user_id}-{secrets.token_hex(16)}"
    new = context.db.insert(
        "sessions",
        user_id=user_id,
        key=key,
        master=master,
        authtype=koji.AUTHTYPES["NORMAL"],
        start_time=time.time(),
    )
    return {"session-id": new, "session-key": key, "header-auth": True}


def _renew(session_id: int, user_id: int) -> dict[str, Any]:
    """The same session with another key; its lock and its master are what they were."""
    key = f"{user_id}-{secrets.token_hex(16)}"
    context.db.rows(
        "UPDATE sessions SET key = %(key)s, expired = FALSE WHERE id = %(id)s",
        key=key,
        id=session_id,
    )
    return {"session-id": session_id, "session-key": key, "header-auth": True}


class SessionCalls:
    """login, and what a session does to itself and its like."""

    def login(
        self,
        user: str,
        password: str,
        opts: Any = None,
        renew: bool = False,
        exclusive: bool = False,
    ) -> dict[str, Any]:
        if context.session.logged_in:
            raise koji.AuthError("Already logged in")
        found = context.db.row(
            "SELECT id FROM users WHERE name = %(user)s AND password = %(password)s",
            user=user,
            password=password,
        )
        if not password or found is None:
            raise koji.AuthError("invalid username or password")
        if renew and context.session.id is not None:
            return _renew(context.session.id, found["id"])
        return _create(found["id"])

    def subsession(self) -> dict[str, Any]:
        session = context.session
        if not session.logged_in:
            raise koji.AuthError("Not logged in")
        return _create(session.user_id, session.master or session.id)

    def logout(self, session_id: int | None = None) -> None:
        session = context.session
        if not session.logged_in:
            raise koji.AuthError("Not logged in")
        own = context.db.values(
            "SELECT id FROM sessions WHERE user_id = %(user)s", user=session.user_id
        )
        if session_id is not None and session_id not in own and not session.hasPerm("admin"):
            raise koji.ActionNotAllowed("only admins or owner may logout other session")
        context.db.rows(
            "UPDATE sessions SET closed = TRUE, exclusive = FALSE"
            " WHERE id = %(id)s OR master = %(id)s",
            id=session.id if session_id is None else session_id,
        )

    def logoutChild(self, session_id: int) -> None:
        context.session.assertLogin()
        context.db.rows(
            "UPDATE sessions SET closed = TRUE, exclusive = FALSE"
            " WHERE id = %(id)s AND master = %(master)s",
            id=session_id,
            master=context.session.id,
        )

    def exclusiveSession(self, force: bool = False) -> None:
        session, db = context.session, context.db
        session.assertLogin()
        if session.master is not None:
            raise koji.GenericError("this is a subsession: only its parent can be exclusive")
        if session.exclusive:
            raise koji.GenericError("this session is the exclusive one already")
        owner = db.value(
            "SELECT id FROM sessions WHERE user_id = %(user)s AND exclusive AND NOT closed",
            user=session.user_id,
        )
        if owner is not None:
            if not force:
                raise koji.AuthLockError("another session of this user is the exclusive one")
            # Its subsessions stay, and are told that they are locked out.
            db.rows(
                "UPDATE sessions SET closed = TRUE, exclusive = FALSE WHERE id = %(id)s", id=owner
            )
        db.rows("UPDATE sessions SET exclusive = TRUE WHERE id = %(id)s", id=session.id)

    def sharedSession(self) -> None:
        context.session.assertLogin()
        context.db.rows(
            "UPDATE sessions SET exclusive = FALSE WHERE id = %(id)s", id=context.session.id
        )

    def getSessionInfo(self, details: bool = False, user_id: int | None = None) -> Any:
        session = context.session
        if not session.logged_in:
            return None
        found = context.db.row("SELECT * FROM sessions WHERE id = %(id)s", id=session.id)
        found["start_ts"] = found["start_time"]
        return {name: value for name, value in found.items() if name != "key"}

    def getLoggedInUser(self) -> Any:
        session = context.session
        if not session.logged_in:
            return None
        user = {name: session.user_data[name] for name in ("id", "name", "status", "usertype")}
        authtype = koji.AUTHTYPES["NORMAL"]
        return {**user, "krb_principals": [], "authtype": authtype}

    def getPerms(self) -> list[str]:
        return list(context.session.getPerms())
