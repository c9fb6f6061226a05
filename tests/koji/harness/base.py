"""What every Koji for tests has in common: what a test may do with it, and how it ends.

    with running(SomeKoji) as koji:
        task = koji.user_session("alice").indirectionBuild(...)
        assert koji.wait_task(task)["state"] == CLOSED

Everything that it makes is below one temporary directory and gone after the block.
It knows nothing of our plugins but their file names.
"""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import koji

from .processes import Processes, StartFailed, kept, marked, stop

REPOSITORY = Path(__file__).resolve().parents[3]
PLUGIN = "indirection"

PASSWORD = "secret"
ADMIN = "kojiadmin"
HOST = "builder.test"
CONTENT_GENERATOR = "harness"
CHANNEL = "image"
TARGET = "images"
BUILD_TAG = "images-build"
DEST_TAG = "images-candidate"
PACKAGES = ("tiny", "debian-utility", "debian-input", "live")
ARCHES = "x86_64 i686 aarch64"

HUB_SETTINGS = {
    "DisableNotifications": "True",
    "CheckClientIP": "False",
    "LoginCreatesUser": "False",
    "KojiTraceback": "normal",
    "LogLevel": "INFO",
    "RunInterval": "1",  # of the scheduler; by default a task waits a minute
}
BUILDER_SETTINGS = {
    "sleeptime": "1",
    "retry_interval": "1",
    "offline_retry_interval": "1",
    "minspace": "0",
    "log_level": "INFO",
    # allowed_scms separates with colons, so a port has to hide behind the asterisk.
    "allowed_scms": "127.0.0.1*:*:no",
}
ENDED = tuple(koji.TASK_STATES[name] for name in ("CLOSED", "CANCELED", "FAILED"))

Session = koji.ClientSession


@dataclass(frozen=True)
class ImageFile:
    """A file of an image build; its name in Koji is that of the path unless one is given."""

    path: Path
    arch: str = "x86_64"
    name: str = ""


class AnyKoji:
    """One Koji, running. Sessions are not thread-safe: one for each thread of a test."""

    name: str  # as a test's id has it

    def __init__(self, work: Path, logs: Path) -> None:
        self.work = work
        self.logs = logs
        self.keep_logs = False
        self.topdir = work / "topdir"
        self._etc = work / "etc"
        self._processes = Processes(work, logs)
        self.reap = self._processes.reap
        self._hub: subprocess.Popen[bytes] | None = None
        self._builder: subprocess.Popen[bytes] | None = None
        self._hub_port = _free_port()
        self._topurl_port = _free_port()
        self.server = f"http://127.0.0.1:{self._hub_port}/kojihub"
        self.topurl = f"http://127.0.0.1:{self._topurl_port}"

    # What each kind of Koji has of its own

    def start(self) -> None:
        """Hub, topurl and builder, with what _furnish() puts into the hub."""
        raise NotImplementedError

    def hub_start(
        self,
        *,
        policy: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        plugin_conf: str = "",
    ) -> None:
        """policy, settings -- of hub.conf, beside what the harness needs.
        plugin_conf -- the text of /etc/koji-hub/plugins/indirection.conf.
        """
        raise NotImplementedError

    def builder_start(
        self, *, settings: Mapping[str, str] | None = None, plugin_conf: str = ""
    ) -> None:
        """Start the builder, and return when it has checked in and is ready for tasks.

        settings -- of kojid.conf. Its topdir does not exist, so that files come from
        topurl, unless topdir is given: str(koji.topdir).
        plugin_conf -- the text of /etc/kojid/plugins/indirection.conf.
        """
        raise NotImplementedError

    def sql(self, script: str, **values: str) -> None:
        """Run it behind the hub's back; :'name' in it is the value of that name, quoted."""
        raise NotImplementedError

    def _cli_program(self) -> Path:
        raise NotImplementedError

    def _python_path(self) -> str:
        """PYTHONPATH of the hub, the builder and the command line."""
        raise NotImplementedError

    # Start and end

    def _make_directories(self) -> None:
        for directory in ("home", "builder/mock", "builder/work"):
            (self.work / directory).mkdir(parents=True)
        for directory in ("packages", "work", "scratch", "repos"):
            (self.topdir / directory).mkdir(parents=True)
        for side in ("hub", "builder"):
            self._extra_plugins(side).mkdir(parents=True)

    def _make_admin(self) -> None:
        """The only one that the API cannot make."""
        kind, status = koji.USERTYPES["NORMAL"], koji.USER_STATUS["NORMAL"]
        self.sql(
            f"""
            INSERT INTO users (name, password, usertype, status)
                VALUES (:'name', :'password', {kind}, {status});
            INSERT INTO user_perms (user_id, perm_id, creator_id)
                SELECT users.id, permissions.id, users.id FROM users, permissions
                WHERE users.name = :'name' AND permissions.name = 'admin';
            """,
            name=ADMIN,
            password=PASSWORD,
        )

    def _set_password(self, user: str) -> None:
        self.sql(
            "UPDATE users SET password = :'password' WHERE name = :'name';",
            name=user,
            password=PASSWORD,
        )

    def _start_topurl(self) -> None:
        argv = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1"]
        argv += ["--directory", str(self.topdir), str(self._topurl_port)]
        server = self._processes.start("topurl", argv)
        self._processes.wait_until("topurl", server, lambda: listens(self._topurl_port), 20)

    def _furnish(self) -> None:
        """What an administrator makes before the first image build."""
        admin = self._admin
        admin.addHost(HOST, ARCHES.split())
        self._set_password(HOST)
        admin.editHost(HOST, capacity=20.0)
        admin.addHostToChannel(HOST, CHANNEL, create=True)
        admin.createTag(DEST_TAG)
        admin.createTag(BUILD_TAG, parent=DEST_TAG, arches=ARCHES)
        admin.createBuildTarget(TARGET, BUILD_TAG, DEST_TAG)
        for package in PACKAGES:
            self.add_package(package)
        admin.grantCGAccess(ADMIN, CONTENT_GENERATOR, create=True)

    # Sessions

    @cached_property
    def _admin(self) -> Session:
        return self.admin_session()

    def admin_session(self) -> Session:
        return self._session(ADMIN)

    def user_session(self, name: str, perms: Sequence[str] = ("image",)) -> Session:
        """Logged in as the user, who is made and given these permissions if need be."""
        admin = self._admin
        if admin.getUser(name) is None:
            admin.createUser(name)
        for permission in set(perms) - set(admin.getUserPerms(name)):
            admin.grantPermission(name, permission)
        self._set_password(name)
        return self._session(name)

    def anonymous_session(self) -> Session:
        return Session(self.server, {"retry_interval": 1, "offline_retry": False})

    def _session(self, user: str) -> Session:
        options = {"user": user, "password": PASSWORD, "retry_interval": 1, "max_retries": 30}
        session = Session(self.server, options)
        session.login()
        return session

    # The hub

    def _hub_configuration(
        self, settings: Mapping[str, object], policy: Mapping[str, str] | None
    ) -> str:
        paths, plugins = self._plugins("hub")
        hub = {
            "KojiDir": self.topdir,
            "PluginPath": ":".join(paths),
            "Plugins": " ".join(plugins),
            **HUB_SETTINGS,
            **settings,
        }
        return _ini("hub", hub) + (_ini("policy", policy) if policy else "")

    def _check_hub(self) -> None:
        try:
            self.anonymous_session().getAPIVersion()
        except koji.ServerOffline as error:
            tail = self._processes.log_tail("hub")
            raise StartFailed(f"the hub says: {error}; its log ends:\n{tail}") from error

    def hub_stop(self) -> None:
        """Until hub_start() connections are refused."""
        if self._hub is not None:
            stop(self._hub, signal.SIGTERM, 15)
            self._hub = None

    def hub_restart(self, **options: Any) -> None:
        """With the options of hub_start(); without any, with the harness' own settings again."""
        self.hub_stop()
        self.hub_start(**options)

    # The builder

    def _builder_configuration(self, settings: Mapping[str, str] | None) -> str:
        paths, plugins = self._plugins("builder")
        builder = {
            "server": self.server,
            "topurl": self.topurl,
            "topdir": self.work / "not-mounted",
            "user": HOST,
            "password": PASSWORD,
            "workdir": self.work / "builder" / "work",
            "mockdir": self.work / "builder" / "mock",
            "pluginpath": ":".join(paths),
            "plugin": " ".join(plugins),
            **BUILDER_SETTINGS,
            **(settings or {}),
        }
        return _ini("kojid", builder)

    def _wait_for_builder(self, started: float) -> None:
        """started -- a time before it was, since the epoch."""

        def checked_in() -> bool:
            host = self._admin.getHost(HOST, strict=True)
            return host["ready"] and (host["update_ts"] or 0) > started

        assert self._builder is not None
        self._processes.wait_until("builder", self._builder, checked_in, 60)

    def builder_stop(self) -> None:
        """As a service is stopped: kojid ends its tasks' processes and frees the tasks."""
        if self._builder is not None:
            stop(self._builder, signal.SIGTERM, 60)
            self._builder = None

    def builder_kill(self) -> None:
        """As a crash: only kojid itself is gone, its tasks' processes go on as orphans."""
        if self._builder is not None:
            self._builder.kill()
            self._builder.wait()
            self._builder = None

    def builder_restart(self, **options: Any) -> None:
        """With the options of builder_start()."""
        self.builder_stop()
        self.builder_start(**options)

    def builder_pids(self) -> list[int]:
        """kojid, what runs its tasks, and all that these have started: orphans included."""
        return marked(self.work, "builder")

    # Plugins

    @contextmanager
    def plugins(self, *, name: str, hub: str = "", builder: str = "") -> Iterator[None]:
        """Plugins beside ours, given as their source; the hub and kojid restart with them."""
        added = []
        for side, source in (("hub", hub), ("builder", builder)):
            if source:
                path = self._extra_plugins(side) / f"{name}.py"
                path.write_text(source)
                added.append(path)
        try:
            self._restart(hub, builder)
            yield
        finally:
            for path in added:
                path.unlink()
            self._restart(hub, builder)

    def _restart(self, hub: object, builder: object) -> None:
        if hub:
            self.hub_restart()
        if builder:
            self.builder_restart()

    def _extra_plugins(self, side: str) -> Path:
        return self.work / "plugins" / side

    def _plugins(self, side: str) -> tuple[list[str], list[str]]:
        """Where a side finds plugins, and the names of those that are there."""
        extra, ours = self._extra_plugins(side), REPOSITORY / side
        names = sorted(path.stem for path in extra.glob("*.py"))
        if (ours / f"{PLUGIN}.py").exists():
            names.insert(0, PLUGIN)
        return [str(ours), str(extra)], names

    # The command line

    def _write_cli_configuration(self) -> None:
        settings = {
            "server": self.server,
            "topurl": self.topurl,
            "topdir": self.work / "not-mounted",
            "weburl": f"{self.topurl}/web",
            "poll_interval": 1,
            "retry_interval": 1,
        }
        (self.work / "koji.conf").write_text(_ini("koji", settings))

    def cli_argv(self, *args: object, user: str = ADMIN) -> list[str]:
        """A `koji` command; run it with env=koji.cli_environment()."""
        options = [f"--config={self.work / 'koji.conf'}", "--profile=koji"]
        # koji ignores these three in its configuration file.
        options += ["--authtype=password", f"--user={user}", f"--password={PASSWORD}"]
        if (REPOSITORY / "cli").is_dir():
            options.append(f"--plugin-paths={REPOSITORY / 'cli'}")
        return [sys.executable, str(self._cli_program()), *options, *(str(arg) for arg in args)]

    def cli_environment(self) -> dict[str, str]:
        return self._processes.environment(
            "cli", {"PYTHONPATH": self._python_path(), "PYTHONUNBUFFERED": "1", "LC_ALL": "C.UTF-8"}
        )

    def cli(
        self, *args: object, user: str = ADMIN, timeout_seconds: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a `koji` command to its end; a user other than the admin must have been made."""
        return subprocess.run(
            self.cli_argv(*args, user=user),
            env=self.cli_environment(),
            timeout=timeout_seconds,
            capture_output=True,
            text=True,
            **options,
        )

    # What is in Koji

    def add_package(self, name: str, tag: str = DEST_TAG) -> None:
        self._admin.packageListAdd(tag, name, ADMIN)

    def git_repository(self, name: str, files: Mapping[str, bytes]) -> str:
        """Make a git repository of these files, served without a git server; returns URL#REF."""
        work = self.work / name
        work.mkdir()
        for file_name, content in files.items():
            (work / file_name).write_bytes(content)
        bare = self.topdir / "scm" / f"{name}.git"
        git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.com"]
        for argv in (
            [*git, "init", "-q", "-b", "main"],
            [*git, "add", "."],
            [*git, "commit", "-q", "-m", "A template"],
            [*git, "clone", "-q", "--bare", str(work), str(bare)],
            [*git, "-C", str(bare), "update-server-info"],
        ):
            subprocess.run(argv, cwd=work, check=True)
        return f"git+{self.topurl}/scm/{name}.git#main"

    def import_image_build(
        self,
        nvr: str,
        files: Sequence[Path | ImageFile],
        *,
        tag: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make a COMPLETE image build of these files, as a content generator does.

        tag -- the build is put there, and its package listed if it is not.
        Returns the build. Names in Koji must differ, whatever their arch.
        """
        images = [file if isinstance(file, ImageFile) else ImageFile(file) for file in files]
        session = self.admin_session()
        directory = f"harness/{nvr}"
        outputs = []
        for image in images:
            name = image.name or image.path.name
            with warnings.catch_warnings():
                # The library leaves the file to the garbage collector.
                warnings.simplefilter("ignore", ResourceWarning)
                session.uploadWrapper(str(image.path), directory, name)
            outputs.append(_output(image, name))
        build = session.CGImport(_metadata(nvr, outputs, extra or {}), directory)
        if tag is not None:
            self.add_package(build["name"], tag)
            session.tagBuildBypass(tag, nvr)
        session.logout()
        return build

    # Tasks

    def wait_task(self, task_id: int, timeout_seconds: float = 120) -> Any:
        """The task's info, once it is closed, cancelled or failed."""
        deadline = time.monotonic() + timeout_seconds
        while (info := self.task(task_id))["state"] not in ENDED:
            if time.monotonic() > deadline:
                state = koji.TASK_STATES[info["state"]]
                tree = self._admin.getTaskDescendents(task_id)
                raise TimeoutError(
                    f"task {task_id} is still {state} after {timeout_seconds:g} s: {tree}"
                )
            time.sleep(0.2)
        return info

    def wait_task_state(self, task_id: int, state: str, timeout_seconds: float = 60) -> None:
        """Until the task is in this state, such as "OPEN"."""
        deadline = time.monotonic() + timeout_seconds
        while (now := koji.TASK_STATES[self.task(task_id)["state"]]) != state:
            if time.monotonic() > deadline:
                raise TimeoutError(f"task {task_id} is {now}, not {state}")
            time.sleep(0.1)

    def task(self, task_id: int) -> Any:
        return self._admin.getTaskInfo(task_id, strict=True, request=True)

    def task_files(self, task_id: int) -> list[str]:
        files: list[str] = self._admin.listTaskOutput(task_id)
        return sorted(files)

    def task_log(self, task_id: int, name: str) -> str:
        content: bytes = self._admin.downloadTaskOutput(task_id, name)
        return content.decode(errors="replace")

    def scheduler_log(self, task_id: int) -> list[str]:
        """What the hub's scheduler has done with the task."""
        messages = self._admin.scheduler.getLogMessages([["task_id", task_id]])
        return [message["msg"] for message in messages]

    def refusals(self, task_id: int) -> list[Any]:
        """By hosts that would not take the task: soft, by_host, and msg, their reason."""
        fields = ["host_name", "soft", "by_host", "msg"]
        clauses = [["task_id", task_id]]
        refusals: list[Any] = self._admin.scheduler.getTaskRefusals(clauses, fields)
        return refusals

    def keep_task_logs(self) -> None:
        """Copy what tasks have uploaded to the other logs, for whoever reads them later."""
        for log in (self.topdir / "work" / "tasks").rglob("*.log"):
            shutil.copy(log, self.logs / f"task-{log.parent.name}-{log.name}")

    def _write_etc(self, name: str, text: str) -> None:
        path = self._etc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _ini(section: str, settings: Mapping[str, object]) -> str:
    """Values of several lines (policies) are indented."""
    lines = [
        f"{name} = {str(value).strip()}".replace("\n", "\n    ") for name, value in settings.items()
    ]
    return "\n".join([f"[{section}]", *lines, ""])


def _output(image: ImageFile, name: str) -> dict[str, Any]:
    digest = sha256()
    with image.path.open("rb") as content:
        while block := content.read(1024 * 1024):
            digest.update(block)
    return {
        "buildroot_id": 1,
        "filename": name,
        "filesize": image.path.stat().st_size,
        "arch": image.arch,
        "checksum_type": "sha256",
        "checksum": digest.hexdigest(),
        "type": "image",
        "extra": {"image": {"arch": image.arch}},
    }


def _metadata(
    nvr: str, outputs: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]
) -> dict[str, Any]:
    name, version, release = nvr.rsplit("-", 2)
    now = int(time.time())
    return {
        "metadata_version": 0,
        "build": {
            "name": name,
            "version": version,
            "release": release,
            "source": "the test harness",
            "start_time": now,
            "end_time": now,
            "owner": ADMIN,
            "extra": {**extra, "typeinfo": {"image": {}}},
        },
        "buildroots": [
            {
                "id": 1,
                "host": {"os": "test", "arch": "x86_64"},
                "content_generator": {"name": CONTENT_GENERATOR, "version": "1"},
                "container": {"type": "none", "arch": "x86_64"},
                "components": [],
                "tools": [],
            }
        ],
        "output": list(outputs),
    }


def _free_port() -> int:
    """Below those that the kernel hands out, so it stays free while its server restarts."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as attempt:
            try:
                attempt.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise StartFailed("no port is free on loopback")


def listens(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


Some = TypeVar("Some", bound=AnyKoji)


@contextmanager
def running(make: Callable[[Path, Path], Some]) -> Iterator[Some]:
    """A Koji of one's own, which make(work, logs) gives.

    The logs stay if the block is left by an exception or keep_logs has been set; the
    message says where they are.
    """
    work = Path(tempfile.mkdtemp(prefix="koji-"))
    work.chmod(0o755)  # for the database's user, and libvirt's
    one = make(work, Path(tempfile.mkdtemp(prefix="koji-logs-")))
    try:
        with kept(work):
            try:
                one.start()
                yield one
            except BaseException:
                one.keep_logs = True
                raise
            finally:
                if one.keep_logs:
                    one.keep_task_logs()
    finally:
        one.reap()
        if one.keep_logs:
            print(f"the logs of the test Koji are in {one.logs}", file=sys.stderr)
        else:
            shutil.rmtree(one.logs)
