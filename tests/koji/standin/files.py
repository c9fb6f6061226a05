"""Files below topdir: uploads, what a task has left, and moving it to where it stays."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import koji
import koji.util
from koji.context import context

from . import tasks

CHECKSUMS = {"adler32": koji.util.adler32_constructor, "md5": hashlib.md5, "sha256": hashlib.sha256}
BLOCK_BYTES = 65536


def upload_path(directory: str, name: str, *, write: bool = False) -> Path:
    """Below work/. That of a task is its host's to write, another one its first user's."""
    if Path(name).name != name or name.startswith("."):
        raise koji.GenericError(f"Invalid upload filename: {name}")
    relative = os.path.normpath(directory)
    if not directory or relative.startswith(("..", "/")):
        raise koji.GenericError(f"Invalid upload directory: {directory}")
    path = Path(koji.pathinfo.work()) / relative
    if write:
        parts = relative.split("/")
        if parts[0] == "tasks":
            if len(parts) < 3 or not parts[2].isdigit():
                raise koji.GenericError(f"Invalid task upload directory: {directory}")
            tasks.own_task(int(parts[2]))
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.mkdir(parents=True, exist_ok=True)
            _claim(path / ".user", directory)
    return path / name


def _claim(owner: Path, directory: str) -> None:
    user = str(context.session.user_id)
    if not owner.exists():
        owner.write_text(user)
    elif owner.read_text() != user:
        raise koji.GenericError(f"Invalid upload directory, not owner: {directory}")


def upload(query: Mapping[str, str], content: Any, length: int) -> dict[str, Any]:
    """Write length bytes at an offset; what was behind it is gone if overwrite is asked for."""
    if not context.session.logged_in:
        raise koji.ActionNotAllowed("you must be logged-in to upload a file")
    offset, overwrite = int(query.get("offset", "0")), bool(query.get("overwrite"))
    path = upload_path(query.get("filepath", ""), query["filename"], write=True)
    if path.is_symlink():
        raise koji.GenericError(f"destination is a symlink: {path}")
    if path.exists() and offset == 0 and not overwrite:
        raise koji.GenericError(f"upload path exists: {path}")
    verify = query.get("fileverify", "")
    checksum = _checksum(verify)
    path.touch()
    with path.open("r+b") as file:
        offset = file.seek(0, os.SEEK_END) if offset == -1 else file.seek(offset)
        if overwrite:
            file.truncate()
        left = length
        while left:
            block = content.read(min(left, BLOCK_BYTES))
            if not block:
                raise koji.GenericError("the upload ended early")
            left -= len(block)
            checksum.update(block)
            file.write(block)
        end = file.seek(0, os.SEEK_END)
    if end != offset + length:
        raise koji.GenericError(
            f"Incorrect upload length for {path} - Expected {offset + length}, actual {end}"
        )
    answer = {"size": length, "fileverify": verify, "offset": offset}
    return {**answer, "hexdigest": checksum.hexdigest()} if verify else answer


def _checksum(kind: str | None) -> Any:
    if kind and kind not in CHECKSUMS:
        raise koji.GenericError(f"Unsupported verify type: {kind}")
    return CHECKSUMS[kind or "adler32"]()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1024 * 1024):
            digest.update(block)
    return digest.hexdigest()


def move(source: Path, target: Path) -> None:
    """And leave a link, so that what a task has left is still found there."""
    if target.exists():
        raise koji.GenericError(f"Error moving {source}: {target} already exists")
    if source.is_symlink() or not source.is_file():
        raise koji.GenericError(f"Error moving {source}: it is not a regular file")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)  # a hub's volumes may be file systems of their own
    source.symlink_to(os.path.relpath(target, source.parent))


def task_directory(task_id: int) -> Path:
    return Path(koji.pathinfo.task(task_id))


class FileCalls:
    """What is asked about files over the wire."""

    def checkUpload(
        self, path: str, name: str, verify: Any = None, tail: Any = None, volume: Any = None
    ) -> Any:
        file = upload_path(path, name)
        if not file.is_file():
            return None
        status = file.stat()
        answer = {"size": status.st_size, "mtime": status.st_mtime}
        if verify:
            checksum, length = _checksum(verify), 0
            with file.open("rb") as content:
                content.seek(0 if tail is None else max(status.st_size - tail, 0))
                while block := content.read(BLOCK_BYTES):
                    checksum.update(block)
                    length += len(block)
            answer.update(sumlength=length, hexdigest=checksum.hexdigest())
        return answer

    def uploadFile(
        self, path: str, name: str, size: Any, md5sum: Any, offset: Any, data: str, **unused: Any
    ) -> bool:
        """One piece, as clients upload that do not stream; False if it has come damaged."""
        content = base64.b64decode(data)
        kind, digest = ("md5", md5sum) if isinstance(md5sum, str) else md5sum
        checksum = _checksum(kind)
        checksum.update(content)
        if checksum.hexdigest() != digest or int(size) != len(content):
            return False
        query = {"filename": name, "filepath": path, "offset": offset, "overwrite": "1"}
        upload(query, io.BytesIO(content), len(content))
        return True

    def listTaskOutput(
        self, taskID: int, stat: bool = False, all_volumes: bool = False, strict: bool = False
    ) -> Any:
        if strict:
            tasks.Task(taskID).getInfo(strict=True)
        directory = task_directory(taskID)
        files = sorted(path for path in directory.rglob("*") if path.is_file() or path.is_symlink())
        found: dict[str, Any] = {str(path.relative_to(directory)): path for path in files}
        if not stat and not all_volumes:
            return list(found)
        if not stat:
            return {name: ["DEFAULT"] for name in found}
        status = {name: _status(path) for name, path in found.items()}
        return {name: {"DEFAULT": one} for name, one in status.items()} if all_volumes else status

    def downloadTaskOutput(
        self, taskID: int, fileName: str, offset: int = 0, size: int = -1, volume: Any = None
    ) -> str:
        path = task_directory(taskID) / fileName
        if ".." in fileName:
            raise koji.GenericError(f"Invalid file name: {fileName}")
        if not path.is_file():
            raise koji.GenericError(f'no file "{fileName}" output by task {taskID}')
        with path.open("rb") as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            return base64.b64encode(file.read(int(size))).decode()


def _status(path: Path) -> dict[str, Any]:
    status = path.stat()
    times = {name: getattr(status, name) for name in ("st_atime", "st_ctime", "st_mtime")}
    return {**times, "st_size": str(status.st_size)}
