"""A guest's root file system as guestfs shows it: a few files and links in a dictionary."""

from __future__ import annotations

import fnmatch
import posixpath
from pathlib import Path
from typing import Any

from koji_indirection.appliance import ApplianceError


class FakeGuest:
    """The guestfs calls that look at a guest, and the few that change it.

    files -- path -> text; a text that begins with "-> " is a symbolic link.
    """

    def __init__(self, files: dict[str, str], devices: dict[str, str] | None = None) -> None:
        self.files = files
        self.devices = devices if devices is not None else {"/dev/sda1": "ext4"}
        self.calls: list[tuple[Any, ...]] = []
        self.archive = b""
        self.is_mounted = False

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((method, *args))
        return getattr(self, method)(*args, **kwargs)

    def list_filesystems(self) -> dict[str, str]:
        return self.devices

    def mount(self, device: str, _directory: str) -> None:
        if "broken" in device:
            raise ApplianceError("mount", "wrong fs type")
        self.is_mounted = device == "/dev/sda1"

    def umount_all(self) -> None:
        self.is_mounted = False

    def _resolved(self, path: str) -> str:
        """The path with every link on its way followed."""
        done = "/"
        for part in path.strip("/").split("/"):
            done = posixpath.join(done, part)
            text = self.files.get(done, "")
            if text.startswith("-> "):
                done = self._resolved(posixpath.normpath(posixpath.join(done, "..", text[3:])))
        return done

    def _is_directory(self, path: str) -> bool:
        return any(name.startswith(path + "/") for name in self.files)

    def exists(self, path: str) -> bool:
        path = self._resolved(path)
        return self.is_mounted and (path in self.files or self._is_directory(path))

    def is_symlink(self, path: str) -> bool:
        return self.is_mounted and self.files.get(path, "").startswith("-> ")

    def is_file(self, path: str, followsymlinks: bool = False) -> bool:
        if not followsymlinks and self.is_symlink(path):
            return False
        return self.is_mounted and self._resolved(path) in self.files

    def is_dir(self, path: str, followsymlinks: bool = False) -> bool:
        if not followsymlinks and self.is_symlink(path):
            return False
        return self.is_mounted and self._is_directory(self._resolved(path))

    def realpath(self, path: str) -> str:
        assert self.exists(path)
        return self._resolved(path)

    def readlink(self, path: str) -> str:
        assert self.is_symlink(path)
        return self.files[path][3:]

    def ls(self, directory: str) -> list[str]:
        assert self.is_dir(directory)
        inside = [name for name in self.files if name.startswith(directory + "/")]
        return sorted({name[len(directory) + 1 :].partition("/")[0] for name in inside})

    def pread(self, path: str, count: int, offset: int) -> str:
        return self.files[self._resolved(path)][offset : offset + count]

    def glob_expand(self, pattern: str) -> list[str]:
        return [name for name in self.files if fnmatch.fnmatch(name, pattern)]

    def grep(self, pattern: str, path: str) -> list[str]:
        return [line for line in self.files[path].splitlines() if pattern in line]

    def file_architecture(self, path: str) -> str:
        text = self.files[path]
        if not text.startswith("ELF "):
            raise ApplianceError("file_architecture", f"unknown architecture: {path}")
        return text[4:]

    def lgetxattr(self, path: str, name: str) -> str:
        raise ApplianceError("lgetxattr", f"{path}: {name}: No data available")

    def inspect_os(self) -> list[str]:
        return []

    def mv(self, source: str, target: str) -> None:
        self.files[target] = self.files.pop(source)

    def rm(self, path: str) -> None:
        del self.files[path]

    def tar_in(self, path: str, directory: str) -> None:
        assert directory == "/"
        assert self.is_mounted
        self.archive = Path(path).read_bytes()
