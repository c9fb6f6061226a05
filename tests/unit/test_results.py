"""Results and logs out of a file system that a guest has written.

The appliance is a fake whose file system is a real directory tree: each
libguestfs call is made with real system calls, links resolved as in a chroot.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import logging
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from koji_indirection import results
from koji_indirection.appliance import ApplianceError, OutOfTime
from koji_indirection.errors import BuilderFault, BuildFailed, IndirectionError
from koji_indirection.results import Result, ResultLimits

MIB = 1024**2
LIMITS = ResultLimits(number=10, total_bytes=64 * MIB)


class FakeAppliance:
    """Does what libguestfs does with a mounted file system, below a directory of the host."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.size_lies: dict[str, int] = {}  # what the file system states, against the truth
        self.refuse_download = ""
        self.mounted: list[str] = []

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self, "_" + method)(*args, **kwargs)
        except OSError as error:
            raise ApplianceError(method, f"{method}: {error.strerror}") from error

    def download(self, source: str, target: Path, *, limit_bytes: int) -> None:
        if self.refuse_download:
            target.write_bytes(b"half")
            raise ApplianceError("download", f"write: {target}: {self.refuse_download}")
        content = self._host(source).read_bytes()
        target.write_bytes(content[:limit_bytes])  # as RLIMIT_FSIZE cuts it
        if len(content) > limit_bytes:
            raise ApplianceError("download", f"write: {target}: {os.strerror(errno.EFBIG)}")

    def _host(self, path: str, *, follow_last: bool = True) -> Path:
        """Where a guest's path leads, links resolved as below a chroot."""
        pending, here, links = path.strip("/").split("/"), [], 0
        while pending:
            part = pending.pop(0)
            if part in ("", "."):
                continue
            if part == "..":
                here = here[:-1]
                continue
            real = self.top.joinpath(*here, part)
            if real.is_symlink() and (pending or follow_last):
                links += 1
                if links > 40:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                target = str(real.readlink())
                here = [] if target.startswith("/") else here
                pending = target.split("/") + pending
                continue
            here = [*here, part]
        return self.top.joinpath(*here)

    def _lstatns(self, path: str) -> dict[str, int]:
        status = self._host(path, follow_last=False).lstat()
        return {
            "st_mode": status.st_mode,
            "st_size": self.size_lies.get(path, status.st_size),
        }

    def _is_symlink(self, path: str) -> bool:
        return self._host(path, follow_last=False).is_symlink()

    def _readlink(self, path: str) -> str:
        return str(self._host(path, follow_last=False).readlink())

    def _exists(self, path: str) -> bool:
        try:
            return self._host(path).exists()
        except OSError:
            return False

    def names(self, path: str) -> tuple[list[str], bool]:
        names = self.call("ls", path)
        return names[:1000], len(names) <= 1000

    def _ls(self, path: str) -> list[str]:
        return sorted(entry.name for entry in self._host(path).iterdir())

    def _glob_expand(self, pattern: str, directoryslash: bool = True) -> list[str]:
        assert not directoryslash
        found = [""]
        for part in pattern.strip("/").split("/"):
            found = [
                f"{directory}/{name}"
                for directory in found
                if self._host(directory or "/").is_dir()
                for name in self._ls(directory or "/")
                if fnmatch.fnmatchcase(name, part) and not (name[0] == "." and part[0] != ".")
            ]
        return found

    def _download_offset(self, path: str, target: str, offset: int, size: int) -> None:
        with self._host(path).open("rb") as file:
            file.seek(offset)
            Path(target).write_bytes(file.read(size))

    def _mount_ro(self, device: str, directory: str) -> None:
        assert directory == "/"
        if device == "/dev/broken":
            raise OSError(errno.EUCLEAN, "mount exited with status 32: \x1b[31mbad superblock")
        self.mounted.append(device)

    def _umount_all(self) -> None:
        self.mounted.clear()


class Build:
    """A workspace to fill, and an output directory to collect into."""

    def __init__(self, directory: Path) -> None:
        self.workspace = directory / "workspace"
        self.output = directory / "output"
        self.logs = self.output / "logs"
        self.images = self.workspace / "results" / "images"
        self.images.mkdir(parents=True)
        self.logs.mkdir(parents=True)
        (directory / "secret").write_text("of the host")
        self.appliance = FakeAppliance(self.workspace)

    def collect(self, *patterns: str, limits: ResultLimits = LIMITS) -> list[Result]:
        return results.collect(
            self.appliance,  # type: ignore[arg-type]
            patterns,
            output=self.output,
            limits=limits,
        )

    def failure(self, *patterns: str, limits: ResultLimits = LIMITS) -> IndirectionError:
        """Why nothing was collected; nothing is left behind then."""
        with pytest.raises(IndirectionError) as caught:
            self.collect(*patterns, limits=limits)
        assert [path.name for path in self.output.iterdir()] == ["logs"]
        assert "\x1b" not in caught.value.one_line(), "an escape sequence reaches the terminal"
        return caught.value

    def collect_logs(self, *patterns: str, limit_bytes: int = MIB) -> set[str]:
        return results.collect_logs(
            self.appliance,  # type: ignore[arg-type]
            patterns,
            where="workspace",
            output=self.logs,
            limit_bytes=limit_bytes,
        )

    def log_names(self) -> list[str]:
        return sorted(path.name for path in self.logs.iterdir())


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build(tmp_path)


# What is collected


def test_a_result_is_copied_with_its_size_and_checksum(build: Build) -> None:
    content = os.urandom(100_000)
    (build.images / "boot.iso").write_bytes(content)
    (result,) = build.collect("/results/images/boot.iso")
    assert result.path == build.output / "boot.iso"
    assert result.path.read_bytes() == content
    assert result.guest_path == "/results/images/boot.iso"
    assert result.size_bytes == 100_000
    assert result.sha256 == hashlib.sha256(content).hexdigest()


def test_globs_and_paths_may_name_the_same_file_which_is_collected_once(build: Build) -> None:
    for name in ("a.iso", "b.iso", "c.txt", ".hidden.iso"):
        (build.images / name).write_text(name)
    collected = build.collect("/results/images/*.iso", "/results/images/a.iso", "/results/*/?.iso")
    assert [one.path.name for one in collected] == ["a.iso", "b.iso"]
    assert sorted(path.name for path in build.output.iterdir()) == ["a.iso", "b.iso", "logs"]


def test_a_relative_link_inside_the_workspace_is_followed(build: Build) -> None:
    (build.workspace / "elsewhere").mkdir()
    (build.workspace / "elsewhere" / "real.iso").write_text("content")
    (build.images / "boot.iso").symlink_to("../../elsewhere/./next")
    (build.workspace / "elsewhere" / "next").symlink_to("real.iso")
    (result,) = build.collect("/results/images/boot.iso")
    assert result.path.name == "boot.iso"
    assert not result.path.is_symlink()
    assert result.path.read_text() == "content"


def test_a_directory_on_the_way_may_be_a_link_inside(build: Build) -> None:
    (build.workspace / "out").symlink_to("results/images")
    (build.images / "boot.iso").write_text("content")
    (result,) = build.collect("/out/boot.iso")
    assert result.path.read_text() == "content"


# What is refused


def test_a_missing_result_lists_what_is_there_instead(build: Build) -> None:
    (build.images / "boot.iso.part").write_text("x")
    (build.images / "evil\x1b[2Jname").write_text("x")
    error = build.failure("/results/images/boot.iso")
    assert isinstance(error, BuildFailed)
    assert error.message == (
        "the result /results/images/boot.iso is missing;"
        " /results/images holds boot.iso.part, evilname"
    )
    assert "--collect-log" in error.hint


def test_a_missing_directory_lists_the_nearest_one_that_exists(build: Build) -> None:
    shutil.rmtree(build.images)
    error = build.failure("/results/images/deep/boot.iso")
    assert error.message.endswith("is missing; /results holds nothing")


def test_a_glob_that_matches_nothing_lists_its_directory(build: Build) -> None:
    (build.images / "boot.img").write_text("x")
    error = build.failure("/results/images/*.iso")
    assert error.message == (
        "the result /results/images/*.iso is missing; /results/images holds boot.img"
    )


def test_a_long_list_is_cut(build: Build) -> None:
    for number in range(25):
        (build.images / f"file-{number:02}").write_text("x")
    error = build.failure("/results/images/boot.iso")
    assert error.message.endswith("file-18, file-19 and 5 more")


def test_one_missing_result_among_several_leaves_none(build: Build) -> None:
    (build.images / "a.iso").write_text("x")
    assert "b.iso is missing" in build.failure("/results/images/a.iso", "/results/b.iso").message


def test_an_empty_result_is_a_failure(build: Build) -> None:
    (build.images / "boot.iso").touch()
    error = build.failure("/results/images/boot.iso")
    assert isinstance(error, BuildFailed)
    assert error.message == "the result /results/images/boot.iso is empty"


def test_a_guests_escape_sequences_are_in_no_message(build: Build) -> None:
    (build.images / "evil\x1b]0;title\x07.iso").touch()
    assert build.failure("/results/images/*.iso").message.endswith("is empty")


@pytest.mark.parametrize("what", ["too large", "same name", "truncated"])
def test_nor_are_those_in_a_directorys_name(build: Build, what: str) -> None:
    evil, limits = build.images / "evil\x1b[2J", LIMITS
    evil.mkdir()
    (evil / "boot.iso").write_text("content")
    if what == "too large":
        limits = ResultLimits(10, 1)
    elif what == "same name":
        (build.images / "other").mkdir()
        (build.images / "other" / "boot.iso").write_text("content")
    else:
        (evil / "boot.iso").write_bytes(iso_with_blocks(1000))
    assert "/evil/boot.iso" in build.failure("/results/images/*/boot.iso", limits=limits).message


def test_nor_in_the_log(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    (build.images / "evil\x1b[2J").write_text("x")
    build.collect_logs("/results/images/*")
    build.failure("/results/images/*")
    assert "\x1b" not in caplog.text


def test_a_directory_is_no_result(build: Build) -> None:
    (build.images / "boot.iso").mkdir()
    error = build.failure("/results/images/boot.iso")
    assert error.message == (
        "the result /results/images/boot.iso is a directory, not a regular file"
    )


def test_a_pipe_is_no_result(build: Build) -> None:
    os.mkfifo(build.images / "boot.iso")
    error = build.failure("/results/images/boot.iso")
    assert "is a pipe or socket, not a regular file" in error.message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")
def test_a_device_is_no_result(build: Build) -> None:
    try:
        os.mknod(build.images / "boot.iso", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this container makes no device nodes")
    assert "is a device, not a regular file" in build.failure("/results/images/boot.iso").message


@pytest.mark.parametrize(
    "target",
    ["/etc/passwd", "../../../secret", "../../../../../../../../etc/passwd", "/results/other"],
)
def test_a_link_out_of_the_workspace_is_not_followed(build: Build, target: str) -> None:
    (build.workspace / "results" / "other").write_text("x")
    (build.images / "boot.iso").symlink_to(target)
    error = build.failure("/results/images/boot.iso")
    assert isinstance(error, BuildFailed)
    assert "is a symbolic link out of the workspace" in error.message
    assert "which is not followed" in error.message


def test_a_directory_that_links_out_is_not_followed(build: Build) -> None:
    (build.workspace / "etc").mkdir()
    (build.workspace / "etc" / "passwd").write_text("x")
    (build.workspace / "out").symlink_to("/etc")
    assert "out of the workspace (to /etc)" in build.failure("/out/passwd").message


def test_a_link_that_leads_nowhere_is_said(build: Build) -> None:
    (build.images / "boot.iso").symlink_to("not-there")
    error = build.failure("/results/images/boot.iso")
    assert "is a symbolic link to a file that does not exist in the workspace" in error.message


def test_links_in_a_circle_end(build: Build) -> None:
    (build.images / "a").symlink_to("b")
    (build.images / "b").symlink_to("a")
    assert "which is not followed" in build.failure("/results/images/a").message


@pytest.mark.parametrize(
    "name",
    [
        "two\nlines",
        "-rf",
        ".hidden",
        "sp ace",
        "ünïcode.iso",
        "a;b",
        "x" * 201,
        "back\\slash",
        "..x",
        "\u202eosi.toob",
        "boot\u200b.iso",
        "ｂoot.iso",
        "boot.iso ",
        "~",
        "$(id)",
        "\x1b[2J",
    ],
)
def test_an_odd_name_is_refused(build: Build, name: str) -> None:
    (build.images / name).write_text("x")
    pattern = "/results/images/.*" if name.startswith(".") else "/results/images/*"
    error = build.failure(pattern)
    assert isinstance(error, BuildFailed)
    assert "has a name that cannot be used" in error.message


@pytest.mark.parametrize("name", ["manifest.json", "logs"])
def test_a_name_that_the_output_directory_needs_is_refused(build: Build, name: str) -> None:
    (build.images / name).write_text("x")
    assert "has a name that cannot be used" in build.failure("/results/images/*").message


def test_two_results_of_one_name_are_refused(build: Build) -> None:
    (build.workspace / "boot.iso").write_text("x")
    (build.images / "boot.iso").write_text("y")
    error = build.failure("/boot.iso", "/results/images/boot.iso")
    assert error.message == (
        "two results are called boot.iso: /boot.iso and /results/images/boot.iso"
    )


def test_more_results_than_the_limit_are_refused(build: Build) -> None:
    for number in range(4):
        (build.images / f"{number}.iso").write_text("x")
    assert len(build.collect("/results/images/*", limits=ResultLimits(4, MIB))) == 4
    for path in build.output.glob("*.iso"):
        path.unlink()
    error = build.failure("/results/images/*", limits=ResultLimits(3, MIB))
    assert error.message == "there are more results than the limit of 3"
    assert "--max-results" in error.hint


def test_results_larger_than_the_limit_together_are_refused(build: Build) -> None:
    (build.images / "a.iso").write_bytes(b"x" * 600)
    (build.images / "b.iso").write_bytes(b"x" * 401)
    error = build.failure("/results/images/*", limits=ResultLimits(10, 1000))
    assert error.message == (
        "the results are larger than the limit of 1000 bytes: /results/images/b.iso has 401"
    )
    assert len(build.collect("/results/images/*", limits=ResultLimits(10, 1001))) == 2


def test_a_file_that_is_longer_than_its_file_system_states_is_cut_off(build: Build) -> None:
    (build.images / "a.iso").write_bytes(b"good")
    (build.images / "boot.iso").write_bytes(b"x" * 100_000)
    build.appliance.size_lies["/results/images/boot.iso"] = 10
    build.failure("/results/images/*")


def test_a_file_that_is_shorter_than_its_file_system_states_is_a_failure(build: Build) -> None:
    (build.images / "boot.iso").write_bytes(b"x" * 10)
    build.appliance.size_lies["/results/images/boot.iso"] = 1000
    error = build.failure("/results/images/boot.iso")
    assert error.message == (
        "the result /results/images/boot.iso has 10 bytes, not the 1000 that its file system states"
    )


def test_a_full_output_disk_is_a_builder_fault(build: Build) -> None:
    (build.images / "boot.iso").write_bytes(b"x" * 10)
    build.appliance.refuse_download = os.strerror(errno.ENOSPC)
    error = build.failure("/results/images/boot.iso")
    assert isinstance(error, BuilderFault)
    assert error.message == (f"no space left in {build.output} for the result boot.iso of 10 bytes")


def test_an_interrupt_leaves_nothing_in_the_output(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    (build.images / "a.iso").write_text("x")

    def interrupt(_path: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build.collect("/results/images/a.iso")
    assert [path.name for path in build.output.iterdir()] == ["logs"]


# ISO images


def iso_with_blocks(blocks: int) -> bytes:
    """The least that has a primary volume descriptor (ECMA-119 8.4) of so many blocks."""
    descriptor = bytearray(2048)
    descriptor[:7] = b"\x01CD001\x01"
    descriptor[80:88] = blocks.to_bytes(4, "little") + blocks.to_bytes(4, "big")
    descriptor[128:132] = (2048).to_bytes(2, "little") + (2048).to_bytes(2, "big")
    return bytes(16 * 2048) + bytes(descriptor) + bytes(3 * 2048)


@pytest.fixture
def iso(tmp_path: Path) -> bytes:
    """A real ISO where xorriso is there."""
    if shutil.which("xorriso") is None:
        return iso_with_blocks(20)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(os.urandom(300_000))
    path = tmp_path / "made.iso"
    subprocess.run(
        ["xorriso", "-as", "mkisofs", "-quiet", "-o", path, tree], check=True, capture_output=True
    )
    return path.read_bytes()


def test_a_whole_iso_passes(build: Build, iso: bytes) -> None:
    (build.images / "boot.iso").write_bytes(iso)
    (result,) = build.collect("/results/images/boot.iso")
    assert result.path.read_bytes() == iso


def test_an_iso_with_something_behind_it_passes(build: Build, iso: bytes) -> None:
    (build.images / "boot.iso").write_bytes(iso + bytes(1_000_000))
    build.collect("/results/images/boot.iso")


def test_a_truncated_iso_with_valid_magic_is_a_failure(build: Build, iso: bytes) -> None:
    (build.images / "boot.iso").write_bytes(iso[: len(iso) * 3 // 4])
    error = build.failure("/results/images/boot.iso")
    assert isinstance(error, BuildFailed)
    assert error.message.startswith(
        "the result /results/images/boot.iso is truncated: its ISO volume has "
    )
    assert "--workspace-size" in error.hint


def test_a_file_that_is_no_iso_is_not_looked_at_as_one(build: Build) -> None:
    (build.images / "disk.raw").write_bytes(iso_with_blocks(1000).replace(b"CD001", b"CD002"))
    (build.images / "tiny").write_bytes(b"x")
    assert len(build.collect("/results/images/*")) == 2


# Logs


def test_logs_are_collected_and_those_that_are_not_there_are_no_failure(build: Build) -> None:
    (build.workspace / "program.log").write_text("the real error\n")
    assert build.collect_logs("/program.log", "/virt-install.log") == {"/program.log"}
    assert build.log_names() == ["program.log"]
    assert (build.logs / "program.log").read_text() == "the real error\n"


def test_an_empty_log_is_a_log(build: Build) -> None:
    (build.workspace / "program.log").touch()
    assert build.collect_logs("/program.log") == {"/program.log"}
    assert (build.logs / "program.log").read_bytes() == b""


def test_logs_never_replace_each_other_or_the_builds_own(build: Build) -> None:
    (build.logs / "job.log").write_text("ours")
    for directory in ("a", "b"):
        (build.workspace / directory).mkdir()
        (build.workspace / directory / "job.log").write_text(directory)
    assert build.collect_logs("/?/job.log") == {"/?/job.log"}
    assert build.log_names() == ["job-2.log", "job-3.log", "job.log"]
    assert (build.logs / "job.log").read_text() == "ours"
    assert (build.logs / "job-2.log").read_text() == "a"


@pytest.mark.parametrize(
    ("name", "kept_as"),
    [
        ("anaconda", "anaconda.log"),
        ("screenshot.png", "screenshot.png.log"),
        ("two\nlines.log", "two_lines.log"),
        ("-rf", "rf.log"),
        ("...", "unnamed.log"),
        ("größe.log", "gr__e.log"),
        ("x" * 250, "x" * 150 + ".log"),
    ],
)
def test_a_log_gets_a_safe_name(build: Build, name: str, kept_as: str) -> None:
    (build.images / name).write_text("x")
    build.collect_logs(f"/results/images/{name}")
    assert build.log_names() == [kept_as]


def test_of_a_long_log_head_and_tail_are_kept(build: Build) -> None:
    (build.workspace / "long.log").write_bytes(b"H" * 500 + b"m" * 9_000 + b"T" * 500)
    assert build.collect_logs("/long.log", limit_bytes=1000) == {"/long.log"}
    content = (build.logs / "long.log").read_bytes()
    assert content.startswith(
        b"H" * 500 + b"\n[... 9000 bytes left out here: the log is limited to 1000 "
    )
    assert content.endswith(b" ...]\n" + b"T" * 500)
    assert build.log_names() == ["long.log"], "no piece is left behind"


def test_a_log_of_just_the_limit_is_whole(build: Build) -> None:
    (build.workspace / "long.log").write_bytes(b"x" * 1000)
    build.collect_logs("/long.log", limit_bytes=1000)
    assert (build.logs / "long.log").read_bytes() == b"x" * 1000


@pytest.mark.parametrize("kind", ["directory", "pipe", "link out", "link to nowhere"])
def test_what_is_no_log_is_a_warning_and_no_failure(
    build: Build, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = build.workspace / "program.log"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/etc/passwd" if kind == "link out" else "nowhere")
    (build.workspace / "good.log").write_text("x")
    assert build.collect_logs("/program.log", "/good.log") == {"/good.log"}
    assert build.log_names() == ["good.log"]
    assert "log /program.log in the workspace cannot be collected: " in caplog.text


def test_one_bad_log_among_those_of_a_glob_does_not_hide_the_others(build: Build) -> None:
    (build.workspace / "a.log").mkdir()
    (build.workspace / "b.log").write_text("the real error")
    build.collect_logs("/*.log")
    assert build.log_names() == ["b.log"]


def test_files_that_are_no_logs_count_too_however_many_a_glob_matches(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(300):
        (build.workspace / f"{number:03}.log").mkdir()
    build.collect_logs("/*.log")
    assert "the rest is left out, because at most 200 files and 1 GiB of logs" in caplog.text
    assert len(caplog.records) == 201


def test_no_log_is_waited_for_when_there_is_no_time_left(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_time(*_arguments: object, **_options: object) -> None:
        raise OutOfTime("collecting took longer than 9 s")

    for number in range(3):
        (build.workspace / f"{number}.log").write_text("x")
    for method in ("call", "download"):
        with monkeypatch.context() as patch:
            patch.setattr(build.appliance, method, out_of_time)
            with pytest.raises(OutOfTime):
                build.collect_logs("/0.log", "/*.log")


# Mounting


def test_a_file_system_is_mounted_for_the_block_only(build: Build) -> None:
    with results.mounted(build.appliance, "/dev/sdb1", what="workspace"):  # type: ignore[arg-type]
        assert build.appliance.mounted == ["/dev/sdb1"]
    assert build.appliance.mounted == []


def test_a_file_system_that_the_guest_has_wrecked_is_its_failure(build: Build) -> None:
    with (
        pytest.raises(BuildFailed) as caught,
        results.mounted(build.appliance, "/dev/broken", what="workspace"),  # type: ignore[arg-type]
    ):
        pass
    assert caught.value.message.startswith("the guest left the workspace unreadable: ")
    assert "bad superblock" in caught.value.message
    assert "\x1b" not in caught.value.message
