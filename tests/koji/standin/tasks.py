"""Tasks: made, scheduled, held by a host, waited for, ended."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import koji
import koji.plugin
import koji.xmlrpcplus
from koji.context import context

from . import builds, policies, records
from .database import Row, with_times

FREE, OPEN, CLOSED, CANCELED, ASSIGNED, FAILED = (
    koji.TASK_STATES[name] for name in ("FREE", "OPEN", "CLOSED", "CANCELED", "ASSIGNED", "FAILED")
)
ENDED = (CLOSED, CANCELED, FAILED)
SOFT_REFUSAL_SECONDS = 900

_COLUMNS = (
    "arch, awaited, channel_id, completion_time, create_time, host_id, id, label, method, owner,"
    " parent, priority, start_time, state, waiting, weight"
)


class Task:
    """One task; the names are those of kojihub's class."""

    def __init__(self, id: Any) -> None:
        self.id: int = records.convert_value(id, cast=int)

    def getInfo(self, strict: bool = True, request: bool = False) -> Any:
        row = context.db.row(f"SELECT {_COLUMNS} FROM task WHERE id = %(id)s", id=self.id)
        if row is None:
            if strict:
                raise koji.GenericError(f"No such task: {self.id}")
            return None
        with_times(row, "create", "start", "completion")
        return {**row, "request": self.getRequest()} if request else row

    def getRequest(self) -> Any:
        text = context.db.value("SELECT request FROM task WHERE id = %(id)s", id=self.id)
        return koji.xmlrpcplus.loads(text)[0]

    def getResult(self, raise_fault: bool = True) -> Any:
        row = context.db.row("SELECT state, result FROM task WHERE id = %(id)s", id=self.id)
        if row is None:
            raise koji.GenericError("No such task")
        if row["state"] == CANCELED:
            raise koji.GenericError(f"Task {self.id} is canceled")
        if row["state"] not in ENDED:
            raise koji.GenericError(f"Task {self.id} is not finished")
        try:
            return koji.xmlrpcplus.loads(row["result"])[0][0]
        except koji.xmlrpcplus.Fault as fault:
            if raise_fault:
                raise
            return {"faultCode": fault.faultCode, "faultString": fault.faultString}

    def getOwner(self) -> int:
        return int(self.getInfo()["owner"])

    def getChildren(self, request: bool = False) -> list[Any]:
        ids = context.db.values("SELECT id FROM task WHERE parent = %(id)s ORDER BY id", id=self.id)
        return [Task(one).getInfo(request=request) for one in ids]

    def isCanceled(self) -> bool:
        return bool(self.getInfo()["state"] == CANCELED)

    def verifyHost(self, host_id: int) -> bool:
        info = self.getInfo()
        return bool(info["state"] == OPEN and info["host_id"] == host_id)

    def assertHost(self, host_id: int) -> None:
        if not self.verifyHost(host_id):
            raise koji.ActionNotAllowed(f"host {host_id} does not own task {self.id}")

    def open(self, host_id: int) -> Any:
        """The task with its request as text; None for one that is not to be had."""
        info = self.getInfo()
        assigned = info["state"] == ASSIGNED and info["host_id"] == host_id
        if info["state"] != FREE and not assigned:
            return None
        self.change(state=OPEN, host_id=host_id, start_time=time.time())
        text = context.db.value("SELECT request FROM task WHERE id = %(id)s", id=self.id)
        return {**self.getInfo(), "request": text}

    def free(self) -> None:
        info = self.getInfo()
        if info["state"] in ENDED:
            state = koji.TASK_STATES[info["state"]]
            raise koji.GenericError(f"Cannot free task {self.id}, state is {state}")
        self.change(state=FREE, host_id=None)

    def end(self, state: int, result: str | None = None) -> None:
        self.change(state=state, result=result, completion_time=time.time())

    def cancel(self, recurse: bool = True) -> bool:
        """With its build, if that is BUILDING, and its subtasks; False if it has ended."""
        state = self.getInfo()["state"]
        if state in (CLOSED, FAILED):
            return False
        if state != CANCELED:
            self.change(state=CANCELED, completion_time=time.time())
            builds.cancel_builds_of(self.id)
            if recurse:
                self.cancelChildren()
        return True

    def cancelChildren(self) -> None:
        for child in self.getChildren():
            Task(child["id"]).cancel()

    def change(self, **columns: Any) -> None:
        """And tell the plugins of another state."""
        old = self.getInfo()
        self._tell("pre", old, columns)
        places = ", ".join(f"{name} = %({name})s" for name in columns)
        context.db.rows(f"UPDATE task SET {places} WHERE id = %(id)s", {**columns, "id": self.id})
        self._tell("post", old, columns)

    def _tell(self, when: str, old: Row, columns: Mapping[str, Any]) -> None:
        if "state" in columns:
            koji.plugin.run_callbacks(
                f"{when}TaskStateChange",
                attribute="state",
                old=koji.TASK_STATES[old["state"]],
                new=koji.TASK_STATES[columns["state"]],
                info=self.getInfo(request=True),
            )


def make_task(method: str, arglist: Sequence[Any], **opts: Any) -> int:
    """opts -- parent, label, owner, channel, arch, priority, assign."""
    session = context.session
    parent = None
    if opts.get("parent") is not None:
        parent = Task(opts["parent"]).getInfo(strict=False)
        if parent is None:
            raise koji.GenericError(f"Invalid parent task: {opts['parent']}")
        if parent["state"] != OPEN:
            raise koji.GenericError(f"Parent task (id {parent['id']}) is not open")
    if opts.get("owner") is None and parent is None and not session.logged_in:
        raise koji.GenericError("task must have an owner")
    inherited = parent or {"owner": session.user_id, "arch": "noarch"}
    task = {
        "method": method,
        "owner": opts.get("owner") or inherited["owner"],
        "arch": opts.get("arch") or inherited["arch"],
        "priority": opts.get("priority", parent["priority"] - 1 if parent else koji.PRIO_DEFAULT),
        "parent": parent and parent["id"],
        "label": opts.get("label") if parent else None,
    }
    data = {**task, "user_id": task["owner"], **policies.task_policy_data(method, arglist)}
    task["channel_id"] = _channel(data, opts.get("channel"), parent)
    task["priority"] = _priority(data, task["priority"])
    if opts.get("assign") is not None:
        host = records.get_host(opts["assign"], strict=True)
        assert host is not None
        task["host_id"] = host["id"]
    new: int = context.db.insert(
        "task",
        **task,
        state=ASSIGNED if "host_id" in task else FREE,
        create_time=time.time(),
        request=koji.xmlrpcplus.dumps(tuple(arglist), methodname=method),
    )
    koji.plugin.run_callbacks(
        "postTaskStateChange",
        attribute="state",
        old=None,
        new="FREE",
        info=Task(new).getInfo(request=True),
    )
    return new


def _channel(data: Row, wanted: Any, parent: Row | None) -> int:
    if wanted is not None:
        data = {**data, "req_channel": wanted}
        _usable_channel(wanted)
    rule = (context.policy["channel"].apply(data) or "use default").split()
    if rule[0] == "use":
        return _usable_channel(rule[1])
    if rule[0] == "parent" and parent is not None:
        return int(parent["channel_id"])
    if rule[0] == "req" and wanted is not None:
        return _usable_channel(wanted)
    raise koji.GenericError("the policy for channels names no channel")


def _usable_channel(which: Any) -> int:
    channel = records.get_channel(which, strict=True)
    assert channel is not None
    if not channel["enabled"]:
        raise koji.GenericError(f"Channel {which} is disabled.")
    return int(channel["id"])


def _priority(data: Row, priority: int) -> int:
    rule = (context.policy["priority"].apply(data) or "stay").split()
    if rule[0] == "set":
        return int(rule[1])
    return priority + int(rule[1]) if rule[0] == "adjust" else priority


# The scheduler


def schedule() -> None:
    """Give each free task to the least loaded host that may have it; not too often."""
    db, now = context.db, time.time()
    last = db.value("SELECT data FROM scheduler_sys_data WHERE name = 'last_run_ts'")
    if last is not None and now - last < float(context.opts.get("runinterval", 60)):
        return
    db.rows(
        "INSERT OR REPLACE INTO scheduler_sys_data (name, data) VALUES ('last_run_ts', %(now)s)",
        now=now,
    )
    for task in db.rows(f"SELECT {_COLUMNS} FROM task WHERE state = {FREE} ORDER BY priority, id"):
        hosts = [host for host in _ready_hosts() if _may_have(host, task)]
        if hosts:
            host = min(hosts, key=lambda one: float(one["load"]))
            note(f"Assigning task to host {host['name']}", task["id"], host["id"])
            note("Assigning task", task["id"], host["id"])
            Task(task["id"]).change(state=ASSIGNED, host_id=host["id"])


def _ready_hosts() -> list[Row]:
    """With their load and how many tasks each has: open ones that do not wait, and assigned."""
    hosts: list[Row] = context.db.rows("SELECT * FROM host WHERE enabled AND ready")
    for host in hosts:
        tasks = context.db.rows(
            "SELECT weight, waiting FROM task WHERE host_id = %(id)s AND state IN %(states)s",
            id=host["id"],
            states=(OPEN, ASSIGNED),
        )
        host["load"] = sum(task["weight"] for task in tasks if not task["waiting"])
        host["jobs"] = len(tasks)
    return hosts


def _may_have(host: Row, task: Row) -> bool:
    data = host["data"] or {}
    arches = [*host["arches"].split(), "noarch"]
    return (
        task["channel_id"]
        in context.db.values(
            "SELECT channel_id FROM host_channels WHERE host_id = %(id)s", id=host["id"]
        )
        and task["arch"] in arches
        and task["method"] in data.get("methods", [task["method"]])
        and host["load"] < host["capacity"]
        and host["jobs"] < data.get("maxjobs", 15)
        and not _refuses(host["id"], task["id"])
    )


def _refuses(host_id: int, task_id: int) -> bool:
    return bool(
        context.db.rows(
            "SELECT id FROM scheduler_task_refusals WHERE task_id = %(task)s AND host_id = %(host)s"
            " AND (NOT soft OR time > %(since)s)",
            task=task_id,
            host=host_id,
            since=time.time() - SOFT_REFUSAL_SECONDS,
        )
    )


def note(text: str, task_id: int, host_id: int | None = None) -> None:
    """In the scheduler's log."""
    context.db.insert(
        "scheduler_log_messages", task_id=task_id, host_id=host_id, msg=text, msg_time=time.time()
    )


# Hosts and their tasks


class Host:
    """The host that calls."""

    def __init__(self) -> None:
        session = context.session
        if not session.logged_in:
            raise koji.AuthError("Not logged-in")
        if session.host_id is None:
            raise koji.AuthError(f"User {session.user_id} is not a host")
        self.id: int = session.host_id

    def verify(self) -> None:
        if not context.session.exclusive:
            raise koji.AuthError("only a host with an exclusive session may call this")


def calling_host() -> int:
    """Its id; it holds the lock."""
    host = Host()
    host.verify()
    return host.id


def own_task(task_id: Any) -> Task:
    """A task that is open on the host that calls."""
    host = calling_host()
    task = Task(task_id)
    task.assertHost(host)
    return task


class TaskHostCalls:
    """host.*, the builder's calls for tasks."""

    def getID(self) -> int:
        return calling_host()

    def getHost(self) -> Any:
        return records.get_host(calling_host())

    def updateHost(self, task_load: float, ready: bool, data: Any = None) -> None:
        context.db.rows(
            "UPDATE host SET task_load = %(load)s, ready = %(ready)s, update_time = %(now)s,"
            " data = coalesce(%(data)s, data) WHERE id = %(id)s",
            load=float(task_load),
            ready=bool(ready),
            now=time.time(),
            data=None if data is None else json.dumps(data),
            id=calling_host(),
        )

    def getTasks(self) -> list[Row]:
        host = calling_host()
        if not _assigned(host):
            schedule()
        return _assigned(host)

    def getHostTasks(self) -> list[Row]:
        tasks: list[Row] = context.db.rows(
            "SELECT id, waiting, weight FROM task WHERE host_id = %(id)s AND state = %(open)s",
            id=calling_host(),
            open=OPEN,
        )
        for task in tasks:
            if task["waiting"] and _awaited(task["id"])[0]:
                task["alert"] = True
        return tasks

    def openTask(self, task_id: int) -> Any:
        return Task(task_id).open(calling_host())

    def closeTask(self, task_id: int, response: str) -> None:
        own_task(task_id).end(CLOSED, response)

    def failTask(self, task_id: int, response: str) -> None:
        own_task(task_id).end(FAILED, response)

    def freeTasks(self, tasks: Sequence[int]) -> None:
        host = calling_host()
        for task in map(Task, tasks):
            if task.verifyHost(host):
                task.free()

    def refuseTask(self, task_id: int, soft: bool = True, msg: str = "") -> None:
        host, task = calling_host(), Task(task_id)
        if task.getInfo()["host_id"] != host:
            return
        context.db.rows(
            "DELETE FROM scheduler_task_refusals WHERE task_id = %(task)s AND host_id = %(host)s",
            task=task.id,
            host=host,
        )
        context.db.insert(
            "scheduler_task_refusals",
            task_id=task.id,
            host_id=host,
            by_host=True,
            soft=bool(soft),
            msg=msg,
            time=time.time(),
        )
        note(f"Host refused task: {msg}", task.id, host)
        task.free()

    def setTaskWeight(self, task_id: int, weight: float) -> None:
        own_task(task_id).change(weight=float(weight))

    def subtask(self, method: str, arglist: Any, parent: int, **opts: Any) -> int:
        """A label that the parent has given already is that subtask again."""
        own_task(parent)
        if "owner" in opts:
            raise koji.ActionNotAllowed("The owner option is not allowed here")
        if opts.get("label") is not None:
            known = context.db.value(
                "SELECT id FROM task WHERE parent = %(parent)s AND label = %(label)s",
                parent=parent,
                label=opts["label"],
            )
            if known is not None:
                return int(known)
        if "kwargs" in opts:
            arglist = koji.encode_args(*arglist, **opts.pop("kwargs"))
        return make_task(method, arglist, parent=parent, **opts)

    def taskSetWait(self, parent: int, tasks: Any) -> None:
        calling_host()
        Task(parent).change(waiting=True)
        for child in Task(parent).getChildren():
            if tasks is None or child["id"] in tasks:
                Task(child["id"]).change(awaited=True)
            elif child["awaited"]:
                Task(child["id"]).change(awaited=False)

    def taskWait(self, parent: int) -> list[list[int]]:
        calling_host()
        finished, unfinished = _awaited(parent)
        for task_id in finished:
            Task(task_id).change(awaited=False)
        return [finished, unfinished]

    def taskWaitResults(self, parent: int, tasks: Any, canfail: Any = None) -> list[Any]:
        calling_host()
        Task(parent).change(waiting=False)
        children = Task(parent).getChildren()
        for child in children:
            Task(child["id"]).change(awaited=False)
        if tasks is None:
            tasks = [child["id"] for child in children if child["state"] in ENDED]
        return [[one, _result(Task(one), one in (canfail or ()))] for one in tasks]


def _assigned(host_id: int) -> list[Row]:
    rows: list[Row] = context.db.rows(
        "SELECT arch, channel_id, create_time AS create_ts, host_id, id, method, priority, state"
        " FROM task WHERE host_id = %(id)s AND state = %(state)s ORDER BY priority, create_time",
        id=host_id,
        state=ASSIGNED,
    )
    return rows


def _awaited(parent: int) -> tuple[list[int], list[int]]:
    """Finished ones, and others."""
    children = [one for one in Task(parent).getChildren() if one["awaited"]]
    finished = [one["id"] for one in children if one["state"] in ENDED]
    return finished, [one["id"] for one in children if one["id"] not in finished]


def _result(task: Task, may_fail: bool) -> Any:
    try:
        return task.getResult(raise_fault=not may_fail)
    except koji.GenericError as error:
        if may_fail and task.isCanceled():
            return {"faultCode": error.faultCode, "faultString": str(error)}
        raise


class SchedulerCalls:
    """scheduler.*, what the scheduler tells an administrator."""

    def getLogMessages(self, clauses: Any = None, fields: Any = None) -> list[Row]:
        return _filtered(
            "SELECT id, task_id, host_id, msg, msg_time AS msg_ts FROM scheduler_log_messages",
            clauses,
            fields,
        )

    def getTaskRefusals(self, clauses: Any = None, fields: Any = None) -> list[Row]:
        return _filtered(
            "SELECT refusal.*, refusal.time AS ts, host.name AS host_name"
            " FROM scheduler_task_refusals AS refusal JOIN host ON host.id = host_id",
            clauses,
            fields or ["id", "task_id", "host_id", "by_host", "soft", "msg", "ts"],
        )


def _filtered(sql: str, clauses: Any, fields: Any) -> list[Row]:
    rows = context.db.rows(sql)
    kept = [row for row in rows if all(row[name] == value for name, value in clauses or ())]
    return [{name: row[name] for name in fields or row} for row in kept]


class TaskCalls:
    """Everybody's calls for tasks."""

    def getTaskInfo(self, task_id: Any, request: bool = False, strict: bool = False) -> Any:
        if isinstance(task_id, list):
            return [Task(one).getInfo(strict, request) for one in task_id]
        return Task(task_id).getInfo(strict, request)

    def getTaskRequest(self, taskId: int) -> Any:
        return Task(taskId).getRequest()

    def getTaskResult(self, taskId: int, raise_fault: bool = True) -> Any:
        return Task(taskId).getResult(raise_fault)

    def getTaskChildren(
        self, task_id: int, request: bool = False, strict: bool = False
    ) -> list[Any]:
        task = Task(task_id)
        if strict:
            task.getInfo(strict=True)
        return task.getChildren(request)

    def getTaskDescendents(self, task_id: int, request: bool = False) -> dict[str, list[Any]]:
        tree: dict[str, list[Any]] = {}
        waiting = [task_id]
        for one in waiting:
            tree[str(one)] = Task(one).getChildren(request)
            waiting.extend(child["id"] for child in tree[str(one)])
        return tree

    def listTasks(self, opts: Any = None, queryOpts: Any = None) -> Any:
        """opts -- state, method, owner, channel_id, parent, arch, decode; one value or a list."""
        given = dict(opts or {})
        decode = given.pop("decode", False)
        clauses = "".join(f" AND task.{name} IN %({name})s" for name in given)
        columns = ", ".join(f"task.{name.strip()}" for name in _COLUMNS.split(","))
        order = (queryOpts or {}).get("order", "id").split(",")
        terms = [
            f"task.{name.lstrip('-')}" + (" DESC" if name.startswith("-") else "") for name in order
        ]
        rows = context.db.rows(
            f"SELECT {columns}, request, result, users.name AS owner_name,"
            " usertype AS owner_type FROM task JOIN users ON users.id = owner"
            f" WHERE TRUE{clauses} ORDER BY {', '.join(terms)}",
            {name: one if isinstance(one, list) else [one] for name, one in given.items()},
        )
        if (queryOpts or {}).get("countOnly"):
            return len(rows)
        limit = (queryOpts or {}).get("limit")
        tasks = rows if limit is None else rows[:limit]
        return [_listed(task, decode) for task in tasks]

    def makeTask(self, *args: Any, **opts: Any) -> int:
        context.session.assertPerm("admin")
        return make_task(*args, **opts)

    def assignTask(
        self, task_id: int, host: Any, force: bool = False, override: bool = False
    ) -> bool:
        context.session.assertPerm("admin")
        task, host_info = Task(task_id), records.get_host(host, strict=True)
        assert host_info is not None
        if task.getInfo()["state"] not in (FREE, ASSIGNED) and not force:
            return False
        task.change(state=ASSIGNED, host_id=host_info["id"])
        return True

    def freeTask(self, task_id: int) -> None:
        context.session.assertPerm("admin")
        Task(task_id).free()

    def setTaskPriority(self, task_id: int, priority: int, recurse: bool = True) -> None:
        context.session.assertPerm("admin")
        Task(task_id).change(priority=int(priority))

    def cancelTask(self, task_id: int, recurse: bool = True) -> None:
        """Its owner may, the host that has it, and admins."""
        _that_may_be_cancelled(task_id).cancel(recurse)

    def cancelTaskFull(self, task_id: int, strict: bool = True) -> None:
        context.session.assertPerm("admin")
        parent = Task(task_id).getInfo()["parent"]
        if parent is not None:
            if strict:
                raise koji.GenericError(f"Task {task_id} is not top-level (parent={parent})")
            self.cancelTaskFull(parent, strict=False)
        else:
            Task(task_id).cancel()

    def cancelTaskChildren(self, task_id: int) -> None:
        _that_may_be_cancelled(task_id).cancelChildren()

    def resubmitTask(self, taskID: int) -> int:
        """A new one with the same request, for the owner or an admin."""
        session = context.session
        session.assertLogin()
        info = Task(taskID).getInfo(request=True)
        if info["state"] not in (CANCELED, FAILED):
            state = koji.TASK_STATES[info["state"]].lower()
            raise koji.GenericError(f"Can only resubmit canceled or failed tasks, not {state}")
        if info["parent"] is not None:
            raise koji.GenericError("Can not resubmit child tasks")
        if session.user_id != info["owner"] and not session.hasPerm("admin"):
            raise koji.GenericError("Only the task owner or an admin may resubmit it")
        return make_task(
            info["method"],
            info["request"],
            arch=info["arch"],
            channel=info["channel_id"],
            priority=info["priority"],
        )


def _that_may_be_cancelled(task_id: int) -> Task:
    task, session = Task(task_id), context.session
    on_host = session.host_id is not None and task.verifyHost(session.host_id)
    if session.user_id != task.getOwner() and not on_host and not session.hasPerm("admin"):
        raise koji.ActionNotAllowed("Cannot cancel task, not owner")
    return task


def _listed(task: Row, decode: bool) -> Row:
    if decode:
        task["request"] = koji.xmlrpcplus.loads(task["request"])[0]
        task["result"] = None if task["result"] is None else _decoded(task["result"])
    return with_times(task, "create", "start", "completion")


def _decoded(result: str) -> Any:
    try:
        return koji.xmlrpcplus.loads(result)[0][0]
    except koji.xmlrpcplus.Fault as fault:
        return {"faultCode": fault.faultCode, "faultString": fault.faultString}
