"""From a Koji reference to an image file: resolved, fetched whatever the server does, cached."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import logging
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import xmlrpc.client
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from koji_indirection import cache as cache_module
from koji_indirection import sources
from koji_indirection.cache import Cache
from koji_indirection.config import Download, Settings
from koji_indirection.errors import BuilderFault, BuildFailed, UsageError
from koji_indirection.sources import Reference, Source, fetch, resolve
from koji_indirection.units import GIB

koji = pytest.importorskip("koji", reason="Koji's client library is not installed")
pytest.importorskip("requests", reason="requests is not installed")

ARCH = "x86_64"
UTILITY, INPUT = "utility image", "input image"
DATA = random.Random(3).randbytes(700_000)
FAST = Download(
    connect_timeout_seconds=10,
    read_timeout_seconds=10,
    total_timeout_seconds=60,
    retries=3,
    retry_wait_seconds=0.01,
)


# --- references -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tools-image-1.0-2", {"nvr": "tools-image-1.0-2"}),
        ("tools-1.0^git1~rc-2.fc40+3", {"nvr": "tools-1.0^git1~rc-2.fc40+3"}),
        ("tools-1.0-2,draft_7", {"nvr": "tools-1.0-2,draft_7"}),
        (" build:12 ", {"build_id": 12}),
        ("task:99", {"task_id": 99}),
        ("latest:tools@f40-images", {"package": "tools", "tag": "f40-images"}),
        ("latest:tools@module:1", {"package": "tools", "tag": "module:1"}),
    ],
)
def test_a_reference_is_read(text: str, expected: dict[str, Any]) -> None:
    assert Reference.parse(text) == Reference(text.strip(), **expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tools",
        "tools-1.0",
        "build:",
        "build:0",
        "build:-1",
        "build:x",
        "build:99999999999",
        "task: 1",
        "task:1/../2",
        "latest:tools",
        "latest:@tag",
        "latest:tools@",
        "latest:a/b@tag",
        "newest:tools@tag",
        "./disk-1-1.qcow2/x",
        "../../etc-1-1",
        "a b-1-1",
        "--force-1-1",
        "tools-1-1\n",
        "tools-1-1\0",
        "١-1-1:",
        "x" * 600 + "-1-1",
    ],
)
def test_anything_else_is_a_usage_error_that_says_what_to_write(text: str) -> None:
    if text == "tools-1-1\n":  # blanks around it are forgiven
        assert Reference.parse(text).nvr == "tools-1-1"
        return
    with pytest.raises(UsageError, match=r"refers to no image in Koji .*build:ID"):
        Reference.parse(text)


def test_a_bare_number_is_ambiguous() -> None:
    with pytest.raises(UsageError, match="write build:123 or task:123"):
        Reference.parse("123")


def test_the_module_imports_where_neither_koji_nor_requests_is() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['koji', 'requests', 'urllib3']));"
        "from koji_indirection.sources import *;"
        "print(Reference.parse('a-1-1').nvr)"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert output.stdout == b"a-1-1\n"


# --- a hub ------------------------------------------------------------------------------------


def build_record(build_id: int, nvr: str, **changes: Any) -> dict[str, Any]:
    """What getBuild answers; keys and types as recorded from a real hub."""
    name, version, release = nvr.rsplit("-", 2)
    record = {
        "build_id": build_id,
        "cg_id": None,
        "completion_time": "2026-11-23 04:47:07.996924+00:00",
        "completion_ts": 1795409227.996924,
        "creation_event_id": 13,
        "creation_time": "2026-11-23 04:47:03.808184+00:00",
        "creation_ts": 1795409223.808184,
        "draft": False,
        "epoch": 0,
        "extra": None,
        "id": build_id,
        "name": name,
        "nvr": nvr,
        "owner_id": 2,
        "owner_name": "alice",
        "package_id": 2,
        "package_name": name,
        "promoter_id": None,
        "promoter_name": None,
        "promotion_time": None,
        "promotion_ts": None,
        "release": release,
        "source": None,
        "start_time": "2026-11-23 04:47:03.804792+00:00",
        "start_ts": 1795409223.804792,
        "state": 1,
        "task_id": 5,
        "version": version,
        "volume_id": 0,
        "volume_name": "DEFAULT",
        "cg_name": None,
    }
    return {**record, **changes}


def archive_record(archive_id: int, filename: str, **changes: Any) -> dict[str, Any]:
    """What listArchives(type="image") answers, one of it."""
    record = {
        "arch": ARCH,
        "btype": "image",
        "btype_id": 4,
        "build_id": 16,
        "buildroot_id": None,
        "checksum": hashlib.sha256(DATA).hexdigest(),
        "checksum_type": 2,
        "compression_type": None,
        "extra": None,
        "filename": filename,
        "id": archive_id,
        "metadata_only": False,
        "size": len(DATA),
        "type_description": "QCOW2 image",
        "type_extensions": "qcow2",
        "type_id": 21,
        "type_name": "qcow2",
    }
    return {**record, **changes}


def task_record(task_id: int, **changes: Any) -> dict[str, Any]:
    """What getTaskInfo answers."""
    record = {
        "arch": "noarch",
        "awaited": None,
        "channel_id": 7,
        "completion_time": "2026-11-23 04:47:09.282084+00:00",
        "completion_ts": 1795409229.282084,
        "create_time": "2026-11-23 04:47:02.282084+00:00",
        "create_ts": 1795409222.282084,
        "host_id": 1,
        "id": task_id,
        "label": None,
        "method": "image",
        "owner": 2,
        "parent": None,
        "priority": 20,
        "start_time": "2026-11-23 04:47:03.282084+00:00",
        "start_ts": 1795409223.282084,
        "state": 2,
        "waiting": False,
        "weight": 1.0,
    }
    return {**record, **changes}


class Hub:
    """Answers as kojihub does: None for what is not there, GenericError for a tag that is not."""

    def __init__(self) -> None:
        self.builds: list[dict[str, Any]] = []
        self.archives: dict[int, list[dict[str, Any]]] = {}
        self.tags: dict[str, list[int]] = {}
        self.tasks: list[dict[str, Any]] = []
        self.outputs: dict[int, dict[str, list[str]]] = {}
        self.uploads: dict[tuple[str, str, str], bytes] = {}
        self.checked: list[tuple[str, str, str]] = []
        self.error: Exception | None = None

    def add_build(self, nvr: str, *archives: dict[str, Any], **changes: Any) -> int:
        build = build_record(len(self.builds) + 1, nvr, **changes)
        self.builds.append(build)
        self.archives[build["id"]] = [{**one, "build_id": build["id"]} for one in archives]
        return int(build["id"])

    def add_task(self, task_id: int, *names: str, volume: str = "DEFAULT", **changes: Any) -> None:
        self.tasks.append(task_record(task_id, **changes))
        self.outputs[task_id] = {name: [volume] for name in names}
        for name in names:
            folder, _, base = f"tasks/{task_id % 10000}/{task_id}/{name}".rpartition("/")
            self.uploads[folder, base, volume] = DATA

    def getBuild(self, buildInfo: int | str, /) -> Any:
        if self.error:
            raise self.error
        return next((one for one in self.builds if buildInfo in (one["id"], one["nvr"])), None)

    def getLatestBuilds(self, tag: str, /, *, package: str, type: str) -> Any:
        assert type == "image"
        if tag not in self.tags:
            raise koji.GenericError(f"No such tagInfo: {tag!r}")
        found = [one for one in self.builds if one["id"] in self.tags[tag]]
        # readTaggedBuilds has fewer columns
        return [
            {key: value for key, value in one.items() if key not in ("extra", "source", "cg_id")}
            for one in found
            if one["name"] == package
        ]

    def listArchives(self, /, *, buildID: int, type: str) -> Any:
        assert type == "image"
        return self.archives[buildID]

    def getTaskInfo(self, task_id: int, /) -> Any:
        return next((one for one in self.tasks if one["id"] == task_id), None)

    def getTaskChildren(self, task_id: int, /) -> Any:
        return [one for one in self.tasks if one["parent"] == task_id]

    def listTaskOutput(self, taskID: int, /, *, all_volumes: bool) -> Any:
        assert all_volumes
        return self.outputs[taskID]

    def checkUpload(self, path: str, name: str, /, *, verify: str, volume: str) -> Any:
        assert verify == "sha256"
        if "/" in name or name.startswith("."):
            raise koji.GenericError(f"Invalid upload filename: {name}")
        self.checked.append((path, name, volume))
        data = self.uploads.get((path, name, volume))
        if data is None:
            return None
        return {
            "size": len(data),
            "mtime": 1795409225.9048023,
            "sumlength": len(data),
            "hexdigest": hashlib.sha256(data).hexdigest(),
        }


@pytest.fixture
def hub() -> Hub:
    return Hub()


def look_up(hub: Hub, text: str, arch: str = ARCH, glob: str | None = None) -> Source:
    return resolve(hub, Reference.parse(text), arch, archive_glob=glob, role=UTILITY)


# --- resolving builds -------------------------------------------------------------------------


def test_a_build_by_nvr_or_id_or_tag_is_its_one_disk_of_the_arch(hub: Hub) -> None:
    hub.add_build(
        "tools-1-1",
        archive_record(7, "tools-1-1.x86_64.qcow2"),
        archive_record(8, "tools-1-1.aarch64.qcow2", arch="aarch64"),
        archive_record(9, "tools-1-1.x86_64.iso", type_name="iso"),
        archive_record(10, "tools-1-1.x86_64.ks"),
        archive_record(11, "initrd-x86_64.img"),
        archive_record(12, "vmlinuz"),
    )
    hub.tags["f40"] = [1]
    for text in ("tools-1-1", "build:1", "latest:tools@f40"):
        source = look_up(hub, text)
        assert source == Source(
            reference=text,
            role=UTILITY,
            nvr="tools-1-1",
            build_id=1,
            archive_id=7,
            task_id=None,
            filename="tools-1-1.x86_64.qcow2",
            size_bytes=len(DATA),
            checksum=hashlib.sha256(DATA).hexdigest(),
            checksum_type=2,
            arch=ARCH,
            relpath="packages/tools/1/1/images/tools-1-1.x86_64.qcow2",
        )
    assert look_up(hub, "build:1", "aarch64").archive_id == 8


@pytest.mark.parametrize(
    "extension",
    ["qcow2", "raw", "img", "raw.xz", "raw.gz", "raw.zst", "qcow2.xz", "qcow2.gz", "QCOW2"],
)
def test_disks_are_known_by_their_extension(hub: Hub, extension: str) -> None:
    hub.add_build("a-1-1", archive_record(1, "a-1-1.iso"), archive_record(2, f"a.{extension}"))
    assert look_up(hub, "a-1-1").archive_id == 2


@pytest.mark.parametrize("volume", ["DEFAULT", "fast"])
def test_paths_are_those_of_koji_itself(hub: Hub, volume: str) -> None:
    hub.add_build("t+x-1~2-3", archive_record(1, "t+x 1#.raw"), volume_name=volume)
    source = look_up(hub, "build:1")
    where = koji.PathInfo(topdir="/mnt/koji").imagebuild(hub.builds[0])
    assert str(source.file(Path("/mnt/koji"))) == f"{where}/t+x 1#.raw"
    url = source.url("http://koji/kojifiles/")
    assert url.endswith("/packages/t%2Bx/1~2/3/images/t%2Bx%201%23.raw")
    assert "//" not in url[7:]

    hub.add_task(30012, "x/y/z.x86_64.raw", volume=volume)
    source = look_up(hub, "task:30012")
    where = koji.PathInfo(topdir="/mnt/koji").task(30012, volume=volume)
    assert str(source.file(Path("/mnt/koji"))) == f"{where}/x/y/z.x86_64.raw"


def test_arches_are_compared_as_koji_does(hub: Hub) -> None:
    hub.add_build(
        "a-1-1",
        archive_record(1, "a.i386.raw", arch="i386"),
        archive_record(2, "a.x86_64.raw"),
    )
    assert look_up(hub, "a-1-1", "i686").archive_id == 1
    hub.add_build(
        "b-1-1",
        archive_record(3, "b.i386.raw", arch="i386"),
        archive_record(4, "b.i686.raw", arch="i686"),
    )
    assert look_up(hub, "b-1-1", "i686").archive_id == 4, "its very name comes first"


def test_several_disks_are_listed_and_the_option_that_picks_one_is_named(hub: Hub) -> None:
    hub.add_build("a-1-1", archive_record(1, "a.qcow2"), archive_record(2, "a.raw.xz"))
    with pytest.raises(UsageError, match=r"2 disk images for x86_64: a.qcow2, a.raw.xz") as caught:
        look_up(hub, "a-1-1")
    assert "--utility-archive GLOB" in caught.value.hint
    with pytest.raises(UsageError, match="--input-archive GLOB"):
        resolve(hub, Reference.parse("a-1-1"), ARCH, role=INPUT)
    assert look_up(hub, "a-1-1", glob="*.xz").archive_id == 2
    with pytest.raises(UsageError, match=r"nothing matches --utility-archive \*.vmdk .*a.qcow2"):
        look_up(hub, "a-1-1", glob="*.vmdk")


def test_a_glob_also_picks_a_file_that_has_no_disks_name(hub: Hub) -> None:
    hub.add_build("a-1-1", archive_record(1, "a.disk"), archive_record(2, "a.disk.raw"))
    assert look_up(hub, "a-1-1", glob="a.disk").archive_id == 1
    assert look_up(hub, "a-1-1", glob="a*").archive_id == 2, "disks come first"


def test_an_iso_is_an_input_where_there_is_no_other_disk(hub: Hub) -> None:
    def find(text: str, role: str) -> Source:
        return resolve(hub, Reference.parse(text), ARCH, role=role)

    hub.add_build("live-1-1", archive_record(1, "live.iso"), archive_record(2, "live.ks"))
    assert find("live-1-1", INPUT).filename == "live.iso"
    with pytest.raises(BuildFailed, match=r"no disk image \(qcow2, raw or img\) among live.iso"):
        find("live-1-1", UTILITY)  # it cannot be booted as one that is written to
    hub.add_build("kiwi-1-1", archive_record(3, "k.install.iso"), archive_record(4, "k.raw.xz"))
    assert find("kiwi-1-1", INPUT).filename == "k.raw.xz"
    hub.add_task(10, "live.x86_64.iso", "live.log", arch=ARCH)
    assert find("task:10", INPUT).filename == "live.x86_64.iso"


def test_an_archive_of_no_arch_has_that_of_its_name(hub: Hub) -> None:
    hub.add_build(
        "a-1-1",
        archive_record(1, "a.x86_64.raw", arch="noarch"),
        archive_record(2, "a.aarch64.raw", arch="noarch"),
    )
    assert look_up(hub, "a-1-1", "aarch64").archive_id == 2
    hub.add_build("b-1-1", archive_record(3, "b.raw", arch="noarch"))
    assert look_up(hub, "b-1-1").arch == ARCH


def test_a_long_list_of_candidates_is_cut(hub: Hub) -> None:
    hub.add_build("a-1-1", *(archive_record(n, f"d{n:02}.raw") for n in range(40)))
    with pytest.raises(UsageError, match=r"d09.raw and 30 more \(pick"):
        look_up(hub, "a-1-1")


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (0, "is still being built .wait"),
        (2, "was deleted"),
        (3, "failed .name a build"),
        (4, "was canceled"),
        (9, "is in state 9"),
    ],
)
def test_a_build_that_is_not_complete_is_refused(hub: Hub, state: int, sentence: str) -> None:
    hub.add_build("a-1-1", archive_record(1, "a.raw"), state=state)
    with pytest.raises(BuildFailed, match=f"^utility image build:1: the build a-1-1 {sentence}"):
        look_up(hub, "build:1")


def test_what_does_not_exist_is_a_usage_error(hub: Hub) -> None:
    hub.tags["f40"] = []
    for text, sentence in {
        "a-1-1": "utility image a-1-1: there is no such build",
        "build:5": "there is no such build",
        "task:5": "there is no such task",
        "latest:a@f41": "No such tagInfo: 'f41'",
        "latest:a@f40": "no image build of a is tagged into f40 or what it inherits from",
    }.items():
        with pytest.raises(UsageError, match=sentence):
            look_up(hub, text)


def test_a_build_without_a_usable_image_is_refused_with_what_it_has(hub: Hub) -> None:
    hub.add_build("rpms-1-1")
    hub.add_build("iso-1-1", archive_record(1, "a.iso"), archive_record(2, "initrd.img"))
    hub.add_build("arm-1-1", archive_record(3, "a.raw", arch="aarch64"))
    hub.add_build("meta-1-1", archive_record(4, "a.raw", metadata_only=True))
    hub.add_build("void-1-1", archive_record(5, "a.raw", size=0))
    for nvr, sentence in {
        "rpms-1-1": "has no image archives",
        "iso-1-1": r"no disk image \(qcow2, raw or img\) among a.iso, initrd.img",
        "arm-1-1": "there is no image for x86_64, only for aarch64",
        "meta-1-1": "does not keep the file",
        "void-1-1": "a.raw is empty",
    }.items():
        with pytest.raises(BuildFailed, match=sentence):
            look_up(hub, nvr)


@pytest.mark.parametrize(
    "name", ["../../x.raw", "a/b.raw", "a\0.raw", "a\n.raw", "x" * 300 + ".raw"]
)
def test_a_name_that_would_leave_its_directory_is_refused(hub: Hub, name: str) -> None:
    hub.add_build("a-1-1", archive_record(1, name))
    with pytest.raises(BuilderFault, match="is none for a file or directory") as caught:
        look_up(hub, "a-1-1")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["name", "version", "release", "volume_name"])
@pytest.mark.parametrize("value", ["..", "a/..", ""])
def test_so_is_a_build_whose_directory_is_elsewhere(hub: Hub, key: str, value: str) -> None:
    hub.add_build("a-1-1", archive_record(1, "a.raw"), **{key: value})
    with pytest.raises(BuilderFault, match="is none for a file or directory"):
        look_up(hub, "build:1")


@pytest.mark.parametrize(
    "changes",
    [
        {"size": -1},
        {"size": None},
        {"checksum": "../../etc/passwd"},
        {"checksum": ""},
        {"checksum": None},
        {"checksum_type": 9},
        {"checksum_type": 0},
    ],
)
def test_a_size_or_checksum_that_is_none_is_refused(hub: Hub, changes: dict[str, Any]) -> None:
    hub.add_build("a-1-1", archive_record(1, "a.raw", **changes))
    with pytest.raises(BuilderFault, match=r"the hub gives .* as a (size|checksum)"):
        look_up(hub, "a-1-1")


def test_a_hub_that_does_not_answer_is_a_fault_in_one_sentence(hub: Hub) -> None:
    import requests

    for error, sentence in [
        (requests.exceptions.ConnectionError("no\nroute"), "did not answer getBuild: no route"),
        (xmlrpc.client.Fault(1, "<class 'X'>: boom"), "did not answer getBuild: .*boom"),
        (koji.ServerOffline("database outage"), "hub is offline: database outage"),
        (koji.AuthExpired("session expired"), "refused getBuild: session expired"),
        (koji.GenericError("odd"), "refused getBuild: odd"),
    ]:
        hub.error = error
        with pytest.raises(BuilderFault, match=sentence) as caught:
            look_up(hub, "a-1-1")
        assert "\n" not in str(caught.value)


# --- resolving tasks --------------------------------------------------------------------------


def test_the_output_of_a_task_gets_its_checksum_from_the_hub(hub: Hub) -> None:
    hub.add_task(20007, "build.log", "t-1-1.x86_64.qcow2", ".user.raw", arch=ARCH)
    source = look_up(hub, "task:20007")
    assert (source.task_id, source.build_id, source.nvr) == (20007, None, None)
    assert source.relpath == "work/tasks/7/20007/t-1-1.x86_64.qcow2"
    assert source.size_bytes == len(DATA)
    assert (source.checksum, source.checksum_type) == (hashlib.sha256(DATA).hexdigest(), 2)
    assert hub.checked == [("tasks/7/20007", "t-1-1.x86_64.qcow2", "DEFAULT")]


def test_a_task_of_several_arches_has_its_images_with_its_children(hub: Hub) -> None:
    hub.add_task(10, "image.log")
    hub.add_task(11, "disk.qcow2", parent=10, arch="x86_64", method="createImage")
    hub.add_task(12, "disk.qcow2", parent=10, arch="aarch64", method="createImage")
    hub.add_task(13, "disk.s390x.qcow2", parent=10, arch="s390x", state=5)
    assert look_up(hub, "task:10").task_id == 11
    assert look_up(hub, "task:10", "aarch64").task_id == 12
    with pytest.raises(BuildFailed, match="no image for s390x, only for aarch64, x86_64"):
        look_up(hub, "task:10", "s390x")


def test_the_arch_in_a_files_name_counts_more_than_where_the_task_ran(hub: Hub) -> None:
    hub.add_task(10, "a.aarch64.raw", "a.x86_64.raw", arch="x86_64", method="runroot")
    assert look_up(hub, "task:10", "aarch64").filename == "a.aarch64.raw"
    hub.add_task(20, "a.raw")
    assert look_up(hub, "task:20", "s390x").arch == "s390x", "nothing says that it is not"


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (0, "is waiting for a builder"),
        (1, "is still running"),
        (3, "was canceled"),
        (4, "is waiting for a builder"),
        (5, "failed .name a task that succeeded"),
    ],
)
def test_a_task_that_is_not_closed_is_refused(hub: Hub, state: int, sentence: str) -> None:
    hub.add_task(10, "a.raw", state=state)
    with pytest.raises(BuildFailed, match=rf"task:10: the task \(image\) {sentence}"):
        look_up(hub, "task:10")


def test_output_that_has_expired_is_said_to_have(hub: Hub) -> None:
    hub.add_task(10)
    with pytest.raises(
        BuildFailed, match=r"has no output, or its output was deleted .*run the task"
    ):
        look_up(hub, "task:10")
    hub.add_task(11, "a.raw")
    hub.uploads.clear()  # a link is left in the task's directory, the scratch file is gone
    with pytest.raises(BuildFailed, match=r"a.raw of task 11 was deleted or has expired"):
        look_up(hub, "task:11")


def test_a_task_whose_images_are_in_its_build_alone_is_told(hub: Hub) -> None:
    hub.add_task(10, "compose-status.json", "x86_64.log", method="osbuildImage")
    with pytest.raises(BuildFailed, match=r"no disk image .*if the task made a build, name that"):
        look_up(hub, "task:10")


def test_output_whose_name_leaves_the_task_is_refused(hub: Hub) -> None:
    hub.add_task(10, "../../11/11/a.raw")
    with pytest.raises(BuilderFault, match="is none for a file or directory"):
        look_up(hub, "task:10")


# --- a server that can do everything wrong ------------------------------------------------------

Behaviour = Callable[["Handler", bytes, int], None]


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; each request is answered by the next of `plan`, well when there is none."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.plan: list[Behaviour] = []
        self.seen: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.release = threading.Event()
        self.reached = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/kojifiles"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients go away in the middle: that is what is tested


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = urllib.parse.unquote(self.path).partition("/kojifiles/")[2]
        with self.server.lock:
            self.server.seen.append({key.lower(): value for key, value in self.headers.items()})
            behaviour = self.server.plan.pop(0) if self.server.plan else well
        if name not in self.server.files and behaviour is well:
            self.send_error(404)
            return
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        behaviour(self, self.server.files.get(name, b""), start)

    def head(self, data: bytes, start: int, **headers: str) -> None:
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def well(handler: Handler, data: bytes, start: int) -> None:
    handler.head(data, start)
    handler.wfile.write(data[start:])


def cut_at(end: int) -> Behaviour:
    def behaviour(handler: Handler, data: bytes, start: int) -> None:
        handler.head(data, start)
        handler.wfile.write(data[start:end])
        handler.hang_up()

    return behaviour


def ignoring_range(behaviour: Behaviour) -> Behaviour:
    def ignoring(handler: Handler, data: bytes, start: int) -> None:
        del handler.headers["Range"]
        behaviour(handler, data, 0)

    return ignoring


def serving(other: bytes) -> Behaviour:
    return lambda handler, data, start: well(handler, other, start)


def without_length(other: bytes) -> Behaviour:
    def behaviour(handler: Handler, data: bytes, start: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(other)
        handler.hang_up()

    return behaviour


def endless(handler: Handler, data: bytes, start: int) -> None:
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(bytes(65536))


def hanging_at(end: int) -> Behaviour:
    def behaviour(handler: Handler, data: bytes, start: int) -> None:
        handler.head(data, start)
        handler.wfile.write(data[start:end])
        handler.wfile.flush()
        handler.server.reached.set()
        handler.server.release.wait(10)
        with contextlib.suppress(OSError):
            handler.wfile.write(data[max(start, end) :])

    return behaviour


def never_answering(handler: Handler, data: bytes, start: int) -> None:
    handler.server.release.wait(10)
    handler.hang_up()


def status(code: int) -> Behaviour:
    return lambda handler, data, start: handler.send_error(code)


def redirecting(location: str) -> Behaviour:
    def behaviour(handler: Handler, data: bytes, start: int) -> None:
        handler.send_response(302)
        handler.send_header("Location", location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return behaviour


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.release.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache" / "images", max_bytes=10_000_000, keep_free_bytes=0)


def make_source(server: Server, name: str = "a.raw", data: bytes = DATA, **changes: Any) -> Source:
    """A source whose file the server has."""
    relpath = f"packages/a/1/1/images/{name}"
    server.files[relpath] = data
    source = Source(
        reference="a-1-1",
        role=INPUT,
        nvr="a-1-1",
        build_id=1,
        archive_id=1,
        task_id=None,
        filename=name,
        size_bytes=len(data),
        checksum=hashlib.sha256(data).hexdigest(),
        checksum_type=2,
        arch=ARCH,
        relpath=relpath,
    )
    return replace(source, **changes)


def get(server: Server, source: Source, cache: Cache, **options: Any) -> bytes:
    """The content that fetch() gives."""
    options = {"topdir": None, "download": FAST, **options}
    with fetch(source, topurl=server.url, cache=cache, **options) as path:
        return path.read_bytes()


def refused(source: Source, topurl: str | None, cache: Cache, **options: Any) -> BuilderFault:
    """The fault with which fetch() refuses."""
    with (
        pytest.raises(BuilderFault) as caught,
        fetch(source, topurl=topurl, topdir=None, cache=cache, **options),
    ):
        pass
    return caught.value


def left(cache: Cache) -> list[str]:
    """What is in the cache but locks."""
    return sorted(path.name for path in cache.directory.iterdir() if "lock" not in path.name)


def ranges(server: Server) -> list[str | None]:
    return [headers.get("range") for headers in server.seen]


# --- fetching ---------------------------------------------------------------------------------


def test_an_image_is_fetched_once_and_then_comes_from_the_cache(
    server: Server, cache: Cache
) -> None:
    source = make_source(server)
    seen: list[tuple[int, int]] = []
    assert get(server, source, cache, progress=lambda *now: seen.append(now)) == DATA
    assert seen[-1] == (len(DATA), len(DATA))
    assert get(server, source, cache) == DATA
    assert len(server.seen) == 1
    assert server.seen[0]["accept-encoding"] == "identity"
    assert left(cache) == [f"sha256-{source.checksum}"]
    mode = (cache.directory / left(cache)[0]).stat().st_mode
    assert mode & 0o777 == 0o444, "qemu's user can read it, nobody writes to it"


@pytest.mark.parametrize("end", [0, 1, 65536, 262144, 262145, len(DATA) - 1])
def test_a_cut_is_resumed_where_it_happened(server: Server, cache: Cache, end: int) -> None:
    server.plan = [cut_at(end)]
    assert get(server, make_source(server), cache) == DATA
    first, second = ranges(server)
    assert first is None
    assert second in (None, f"bytes={end}-") or int(second[6:-1]) <= end


def test_cuts_do_not_count_while_they_bring_something_new(server: Server, cache: Cache) -> None:
    server.plan = [cut_at(end) for end in range(50_000, 700_000, 50_000)]
    assert get(server, make_source(server), cache, download=replace(FAST, retries=1)) == DATA


def test_a_server_that_ignores_ranges_is_read_from_the_start_again(
    server: Server, cache: Cache
) -> None:
    server.plan = [cut_at(300_000), ignoring_range(well)]
    assert get(server, make_source(server), cache) == DATA
    assert ranges(server)[1] is not None


def test_a_server_that_ignores_ranges_and_always_cuts_is_given_up(
    server: Server, cache: Cache
) -> None:
    # What comes a second time is nothing new, even if less came in between.
    server.plan = [ignoring_range(cut_at(end)) for end in (300_000, 200_000) * 25]
    with pytest.raises(BuilderFault, match=r"a.raw of a-1-1 cannot be fetched from http"):
        get(server, make_source(server), cache)
    # A connection that is cut may lose the end of what was sent, which then is new once more.
    assert 2 + FAST.retries <= len(server.seen) < 25
    assert left(cache) == []


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(server: Server, cache: Cache, code: int) -> None:
    server.plan = [status(code), cut_at(1000), status(code)]
    assert get(server, make_source(server), cache) == DATA


def test_a_server_that_hangs_is_left_and_asked_again(server: Server, cache: Cache) -> None:
    server.plan = [never_answering, hanging_at(300_000)]
    options = replace(FAST, read_timeout_seconds=0.3)
    assert get(server, make_source(server), cache, download=options) == DATA
    assert len(server.seen) >= 3


def test_a_server_that_only_hangs_is_given_up(server: Server, cache: Cache) -> None:
    server.plan = [hanging_at(1000)] * 9
    options = replace(FAST, retries=1, read_timeout_seconds=0.1)
    with pytest.raises(BuilderFault, match=r"cannot be fetched .*timed out"):
        get(server, make_source(server), cache, download=options)
    assert left(cache) == []


def test_the_time_for_an_image_is_limited(server: Server, cache: Cache) -> None:
    server.plan = [hanging_at(n) for n in range(1000, 100_000, 1000)]
    options = replace(FAST, read_timeout_seconds=0.1, total_timeout_seconds=0.4)
    with pytest.raises(BuilderFault, match=r"could not be fetched within 0.4 s: .* of 683.6 KiB"):
        get(server, make_source(server), cache, download=options)


def test_a_server_that_is_not_there_is_a_fault(server: Server, cache: Cache) -> None:
    source = make_source(server)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert "cannot be fetched from" in str(refused(source, url, cache, download=FAST))


WRONG = DATA[:-1] + bytes([DATA[-1] ^ 1])


@pytest.mark.parametrize(
    "behaviour",
    [
        serving(WRONG),
        serving(DATA[:-1]),
        serving(DATA + b"x"),
        serving(b""),
        without_length(WRONG + b"more"),
        endless,
    ],
    ids=["one bit", "short", "long", "empty", "no length", "endless"],
)
def test_wrong_data_is_fetched_once_more_and_then_refused(
    server: Server, cache: Cache, behaviour: Behaviour, caplog: pytest.LogCaptureFixture
) -> None:
    server.plan = [behaviour]
    assert get(server, make_source(server), cache) == DATA
    assert "fetching it once more" in caplog.text
    assert server.seen[1]["cache-control"] == "no-cache"

    other = make_source(server, data=DATA[1:])
    server.plan = [behaviour] * 3
    with pytest.raises(BuilderFault, match=r"fetched twice from .* is not what the hub describes"):
        get(server, other, cache)
    assert len(server.seen) == 4
    assert len(left(cache)) == 1, "the good one"


def test_data_that_ends_early_without_a_length_is_given_up(server: Server, cache: Cache) -> None:
    server.plan = [without_length(DATA[:-9])] * 20
    with pytest.raises(BuilderFault, match="the connection ended"):
        get(server, make_source(server), cache)
    assert left(cache) == []


def test_another_part_than_was_asked_for_is_not_used(server: Server, cache: Cache) -> None:
    def other_part(handler: Handler, data: bytes, start: int) -> None:
        handler.head(data, start - 10)
        handler.wfile.write(data[start - 10 :])

    def other_size(handler: Handler, data: bytes, start: int) -> None:
        well(handler, data + b"x", start)

    def no_range(handler: Handler, data: bytes, start: int) -> None:
        handler.send_response(206)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    for number, behaviour in enumerate([other_part, other_size, no_range, status(416)]):
        server.plan = [cut_at(300_000), behaviour]
        data = DATA + bytes([number])
        assert get(server, make_source(server, data=data), cache) == data


def test_bytes_are_taken_as_they_are_even_if_called_gzip(server: Server, cache: Cache) -> None:
    """Apache's AddEncoding labels every .gz file that way."""
    server.plan = [
        lambda handler, data, start: (
            handler.head(data, start, Content_Encoding="gzip"),
            handler.wfile.write(data),
        )[0]
    ]
    assert get(server, make_source(server, "a.raw.gz"), cache) == DATA
    assert len(server.seen) == 1


def test_redirects_are_followed_a_few_times_and_only_to_http(
    server: Server, cache: Cache, tmp_path: Path
) -> None:
    source = make_source(server)
    there = source.url(server.url)
    server.plan = [redirecting(there), redirecting("/kojifiles/" + source.relpath), cut_at(1000)]
    assert get(server, source, cache) == DATA

    source = make_source(server, data=DATA[2:])
    server.plan = [redirecting(there)] * 99
    with pytest.raises(BuilderFault, match="redirects more than 5 times"):
        get(server, source, cache)
    secret = tmp_path / "secret"
    secret.write_bytes(DATA[2:])
    for target in (secret.as_uri(), "ftp://127.0.0.1/x", "http://[bad", "http://a..b\x7f/"):
        server.plan = [redirecting(target)]
        with pytest.raises(BuilderFault):
            get(server, source, cache, download=replace(FAST, retries=0))


@pytest.mark.parametrize("code", [404, 410])
def test_a_file_that_is_not_there_is_the_users_doing_only_for_tasks(
    server: Server, cache: Cache, code: int
) -> None:
    source = make_source(server)
    server.plan = [status(code)] * 2
    with pytest.raises(BuilderFault, match=f"the server answers {code} .* to http"):
        get(server, source, cache)
    with pytest.raises(BuildFailed, match=r"a.raw of task 7 was deleted or has expired"):
        get(server, replace(source, nvr=None, task_id=7), cache)
    assert len(server.seen) == 2


@pytest.mark.parametrize("kind", [0, 1])
def test_old_checksums_are_verified_too_but_never_shared(
    server: Server, cache: Cache, kind: int
) -> None:
    checksum = [hashlib.md5, hashlib.sha1][kind](DATA).hexdigest()
    source = make_source(server, checksum=checksum, checksum_type=kind)
    server.plan = [serving(WRONG)]
    assert get(server, source, cache) == DATA
    assert get(server, replace(source, archive_id=2), cache) == DATA
    assert len(server.seen) == 3, "two archives of one weak checksum are two images"


@pytest.mark.parametrize("topurl", [None, "", "file:///mnt/koji", "koji.example.com"])
def test_without_a_topurl_there_is_nothing_to_fetch_from(
    server: Server, cache: Cache, topurl: str | None
) -> None:
    assert "cannot be fetched: topurl is" in str(refused(make_source(server), topurl, cache))


def test_proxies_come_from_the_configuration_or_the_environment(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = server.url.partition("/kojifiles")[0]
    source = make_source(server)
    options = replace(FAST, proxy=origin)
    with fetch(
        source, topurl="http://koji.invalid/kojifiles", topdir=None, cache=cache, download=options
    ) as path:
        assert path.read_bytes() == DATA
    assert server.seen[0]["host"] == "koji.invalid"

    monkeypatch.setenv("http_proxy", origin)
    source = make_source(server, data=DATA[3:])
    with fetch(
        source, topurl="http://koji.invalid/kojifiles", topdir=None, cache=cache, download=FAST
    ) as path:
        assert path.read_bytes() == DATA[3:]


def test_a_ca_file_that_is_missing_is_said_to_be(server: Server, cache: Cache) -> None:
    options = replace(FAST, ca_bundle=Path("/nonexistent/ca.pem"))
    url = server.url.replace("http:", "https:")
    fault = refused(make_source(server), url, cache, download=options)
    assert "/nonexistent/ca.pem" in str(fault)


def test_the_servers_certificate_is_verified_by_the_ca_of_the_settings_or_the_environment(
    server: Server, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    new = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-batch",
        "-subj",
        "/CN=koji",
    ]
    new += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(ca), "-keyout", str(key)]
    subprocess.run(new, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    topurl = server.url.replace("http:", "https:")
    source = make_source(server)

    assert "is not trusted" in str(refused(source, topurl, cache, download=FAST))
    known = replace(FAST, ca_bundle=ca)
    with fetch(source, topurl=topurl, topdir=None, cache=cache, download=known) as path:
        assert path.read_bytes() == DATA
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(ca))
    other = make_source(server, data=DATA[1:])
    with fetch(other, topurl=topurl, topdir=None, cache=cache, download=FAST) as path:
        assert path.read_bytes() == DATA[1:]


def test_progress_is_logged_now_and_then(
    server: Server, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    get(server, make_source(server), cache)
    lines = [line for line in caplog.messages if "% of" in line]
    assert len(lines) == 1
    assert lines[0].startswith("a.raw of a-1-1: 100 % of 683.6 KiB, ")


def test_progress_lines_come_every_ten_percent_or_ten_seconds(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    report = sources._ProgressLog(make_source(server, data=bytes(1000)))
    for received in range(0, 1001):
        now += 0.25
        report.update(received)
    assert len([line for line in caplog.messages if "% of" in line]) == 26  # 250 s
    caplog.clear()
    report = sources._ProgressLog(make_source(server, data=bytes(1000)))
    for received in range(0, 1001, 10):
        now += 0.2
        report.update(received)
    assert len([line for line in caplog.messages if "% of" in line]) == 10


# --- in place ---------------------------------------------------------------------------------


def test_a_mounted_file_is_read_in_place(server: Server, cache: Cache, tmp_path: Path) -> None:
    source = make_source(server)
    mounted = source.file(tmp_path / "koji")
    mounted.parent.mkdir(parents=True)
    scratch = tmp_path / "koji" / "scratch.raw"
    scratch.write_bytes(DATA)
    mounted.symlink_to(scratch)  # as the hub leaves them in a scratch task's directory
    with fetch(source, topurl=None, topdir=tmp_path / "koji", cache=cache) as path:
        assert path == mounted
    assert not server.seen
    assert not cache.directory.exists()


def test_a_mounted_file_that_is_not_the_one_is_fetched_instead(
    server: Server, cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_source(server)
    assert get(server, source, cache, topdir=tmp_path / "not there") == DATA
    mounted = source.file(tmp_path / "koji")
    mounted.parent.mkdir(parents=True)
    mounted.write_bytes(DATA[:-1])
    with fetch(source, topurl=server.url, topdir=tmp_path / "koji", cache=cache) as path:
        assert path.parent == cache.directory
    assert "is not what the hub describes" in caplog.text
    mounted.unlink()
    mounted.mkdir()
    assert get(server, source, cache, topdir=tmp_path / "koji") == DATA


# --- the cache --------------------------------------------------------------------------------


def small(server: Server, number: int, size: int = 1000) -> Source:
    return make_source(server, f"d{number}.raw", bytes([number]) * size)


def test_the_image_used_least_recently_goes_first(server: Server, cache: Cache) -> None:
    cache = replace(cache, max_bytes=3500)
    one, two, three, four = (small(server, number) for number in range(1, 5))
    for source in (one, two, three, one, four):
        get(server, source, cache)
        time.sleep(0.02)
    assert left(cache) == sorted(f"sha256-{source.checksum}" for source in (one, three, four))
    assert {path.name for path in cache.directory.glob("*.lock")} == {
        f"sha256-{source.checksum}.lock" for source in (one, three, four)
    }


def test_an_image_in_use_is_never_evicted(server: Server, cache: Cache) -> None:
    cache = replace(cache, max_bytes=2500)
    one, two, three, four = (small(server, number) for number in range(1, 5))
    with fetch(one, topurl=server.url, topdir=None, cache=cache) as path:
        get(server, two, cache)
        get(server, three, cache)
        assert path.read_bytes() == bytes([1]) * 1000
        assert f"sha256-{one.checksum}" in left(cache)
        with fetch(three, topurl=server.url, topdir=None, cache=cache):
            fault = refused(four, server.url, cache)
        assert "whose other images are in use (raise max_size" in str(fault)
    get(server, four, cache)
    assert f"sha256-{one.checksum}" not in left(cache)


def test_an_image_larger_than_the_cache_is_refused_and_evicts_nothing(
    server: Server, cache: Cache
) -> None:
    cache = replace(cache, max_bytes=2500)
    get(server, small(server, 1), cache)
    with pytest.raises(BuilderFault, match=r"d2.raw of a-1-1 \(2.9 KiB\) does not fit"):
        get(server, small(server, 2, 3000), cache)
    assert len(left(cache)) == 1
    assert len(server.seen) == 1, "it was not even asked for"


def test_an_image_for_which_there_is_no_space_is_refused(server: Server, cache: Cache) -> None:
    free = os.statvfs(cache.directory.parent.parent)
    cache = replace(cache, keep_free_bytes=free.f_bavail * free.f_frsize + 10**9)
    with pytest.raises(BuilderFault, match=r"no room for a.raw .* more than there is once"):
        get(server, make_source(server), cache)
    assert not server.seen


def test_a_disk_that_fills_up_on_the_way_is_a_fault_and_leaves_nothing(
    server: Server, cache: Cache
) -> None:
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(
            BuilderFault, match=r"the image cache .* cannot be used: File too large"
        ):
            get(server, make_source(server), cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert left(cache) == []


def test_a_cache_that_cannot_be_made_is_a_fault(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuilderFault, match=r"the image cache .* cannot be used"):
        get(server, make_source(server), Cache(tmp_path / "file" / "cache"))


def test_the_cache_is_where_the_settings_say(tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path, max_cache_bytes=5, cache_verify=True)
    assert Cache.of(settings) == Cache(tmp_path / "images", 5, 2 * GIB, True)


def test_a_cached_file_of_the_wrong_size_is_dropped(server: Server, cache: Cache) -> None:
    source = make_source(server)
    get(server, source, cache)
    path = cache.directory / left(cache)[0]
    path.unlink()
    path.write_bytes(DATA[:-1])
    assert get(server, source, cache) == DATA
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert get(server, source, cache) == DATA
    assert len(server.seen) == 3


def test_a_cached_file_of_the_right_size_is_read_again_only_on_request(
    server: Server, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_source(server)
    get(server, source, cache)
    path = cache.directory / left(cache)[0]
    path.unlink()
    path.write_bytes(WRONG)
    assert get(server, source, cache) == WRONG
    cache = replace(cache, verify=True)
    assert get(server, source, cache) == DATA
    assert "is damaged in the cache" in caplog.text
    assert get(server, source, cache) == DATA
    assert len(server.seen) == 2


def test_a_lock_file_that_was_removed_while_we_locked_it_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two processes would hold "the" lock: one of the old file, one of a new one."""
    path, real = tmp_path / "x.lock", cache_module.fcntl.flock
    removed = []

    def flock(lock: int, operation: int) -> None:
        if not removed:
            path.unlink()
            removed.append(lock)
        real(lock, operation)

    monkeypatch.setattr(cache_module.fcntl, "flock", flock)
    lock = cache_module._try_lock(path, cache_module.fcntl.LOCK_EX)
    assert lock is not None
    assert cache_module._try_lock(path, cache_module.fcntl.LOCK_SH) is None
    os.close(lock)


def test_using_an_image_does_not_touch_it(server: Server, cache: Cache) -> None:
    """The pipeline takes a changed mtime for a changed image."""
    source = make_source(server)
    get(server, source, cache)
    before = (cache.directory / left(cache)[0]).stat()
    get(server, source, cache)
    after = (cache.directory / left(cache)[0]).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_an_image_counts_as_used_from_the_start_of_its_use(server: Server, cache: Cache) -> None:
    """Whoever uses it may be killed, and then there is no end of its use."""
    source = make_source(server)
    get(server, source, cache)
    lock = next(cache.directory.glob("sha256-*.lock"))
    os.utime(lock, (1, 1))
    with fetch(source, topurl=server.url, topdir=None, cache=cache):
        assert lock.stat().st_mtime > 1


def test_an_interrupted_fetch_leaves_nothing(server: Server, cache: Cache) -> None:
    def interrupt(done: int, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server, make_source(server), cache, progress=interrupt)
    assert left(cache) == []
    assert get(server, make_source(server), cache) == DATA


def test_what_happens_in_the_block_is_not_taken_for_a_fault_of_the_cache(
    server: Server, cache: Cache
) -> None:
    fetching = fetch(make_source(server), topurl=server.url, topdir=None, cache=cache)
    with pytest.raises(FileNotFoundError), fetching:
        Path("/nonexistent").read_bytes()


def test_two_threads_fetch_one_image_once(server: Server, cache: Cache) -> None:
    source, found = make_source(server), []
    server.plan = [hanging_at(1000)]
    threads = [
        threading.Thread(target=lambda: found.append(get(server, source, cache))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert server.reached.wait(5)
    server.release.set()
    for thread in threads:
        thread.join()
    assert found == [DATA] * 4
    assert len(server.seen) == 1


# --- processes --------------------------------------------------------------------------------

WORKER = """
import dataclasses, json, sys
from pathlib import Path
from koji_indirection.config import Download
from koji_indirection.errors import IndirectionError
from koji_indirection.cache import Cache
from koji_indirection.sources import Source, fetch

order = json.loads(Path(sys.argv[1]).read_text())
cache = Cache(Path(order["directory"]), max_bytes=order["max_bytes"], keep_free_bytes=0)
print("ready", flush=True)
while True:
    for record in order["sources"]:
        try:
            with fetch(Source(**record), topurl=order["url"], topdir=None, cache=cache,
                       download=Download(retry_wait_seconds=0.01)) as path:
                print("holding", len(path.read_bytes()), flush=True)
                if order["hold"]:
                    sys.stdin.readline()
        except IndirectionError as error:
            print("error", error, flush=True)
    if order["hold"]:
        break
"""


class Worker:
    """Another process that fetches: once, holding the image until told, or for ever."""

    def __init__(
        self, directory: Path, server: Server, cache: Cache, *wanted: Source, hold: bool = True
    ) -> None:
        order = {
            "sources": [asdict(source) for source in wanted],
            "directory": str(cache.directory),
            "max_bytes": cache.max_bytes,
            "url": server.url,
            "hold": hold,
        }
        path = directory / f"order-{random.getrandbits(64):x}.json"
        path.write_text(json.dumps(order))
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def let_go(self) -> None:
        self.process.communicate("\n", timeout=10)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@pytest.fixture
def start(tmp_path: Path, server: Server, cache: Cache) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def start_worker(*wanted: Source, max_bytes: int = 10**9, hold: bool = True) -> Worker:
        limited = replace(cache, max_bytes=max_bytes)
        workers.append(Worker(tmp_path, server, limited, *wanted, hold=hold))
        return workers[-1]

    yield start_worker
    for worker in workers:
        worker.kill()


def test_two_processes_fetch_one_image_once(server: Server, start: Callable[..., Worker]) -> None:
    source = make_source(server)
    server.plan = [hanging_at(1000)]
    workers = [start(source), start(source)]
    assert [worker.line() for worker in workers] == ["ready"] * 2
    assert server.reached.wait(5)
    time.sleep(0.3)  # the other one is at the lock by now
    server.release.set()
    assert [worker.line() for worker in workers] == [f"holding {len(DATA)}"] * 2
    assert len(server.seen) == 1


def test_whoever_waits_takes_over_from_a_process_that_was_killed(
    server: Server, cache: Cache, start: Callable[..., Worker]
) -> None:
    source = make_source(server)
    server.plan = [hanging_at(400_000)]
    first = start(source)
    assert server.reached.wait(5)
    second = start(source)
    assert second.line() == "ready"
    time.sleep(0.2)
    first.kill()
    assert second.line() == f"holding {len(DATA)}"
    assert left(cache) == [f"sha256-{source.checksum}"]


def test_what_a_killed_process_left_is_swept_by_the_next_fetch_of_anything(
    server: Server, cache: Cache, start: Callable[..., Worker]
) -> None:
    one, two = make_source(server), small(server, 2)
    server.plan = [hanging_at(400_000)]
    first = start(one)
    assert server.reached.wait(5)
    get(server, two, cache)
    assert len(left(cache)) == 2, "its fetch is under way, and stays"
    first.kill()
    get(server, small(server, 3), cache)
    assert not any(name.endswith(".part") for name in left(cache))


def test_room_is_kept_for_what_others_fetch_at_the_same_time(
    server: Server, cache: Cache, start: Callable[..., Worker]
) -> None:
    server.plan = [hanging_at(400_000)]
    start(make_source(server))
    assert server.reached.wait(5)
    cache = replace(cache, max_bytes=len(DATA) + 500)
    with pytest.raises(BuilderFault, match="does not fit"):
        get(server, small(server, 2), cache)


def test_an_image_that_another_process_uses_is_not_evicted_until_it_dies(
    server: Server, cache: Cache, start: Callable[..., Worker]
) -> None:
    one, two = small(server, 1), small(server, 2)
    holder = start(one)
    assert [holder.line(), holder.line()] == ["ready", "holding 1000"]
    cache = replace(cache, max_bytes=1500)
    with pytest.raises(BuilderFault, match="whose other images are in use"):
        get(server, two, cache)
    holder.kill()
    assert get(server, two, cache) == bytes([2]) * 1000
    assert left(cache) == [f"sha256-{two.checksum}"]


def test_kill_minus_nine_at_any_moment_leaves_a_cache_that_is_right(
    server: Server, cache: Cache, start: Callable[..., Worker]
) -> None:
    wanted = [small(server, number, 300_000) for number in range(1, 6)]
    chance = random.Random(9)
    for _ in range(6):
        # Room for three of five: each fetch evicts, while the other process does the same.
        workers = [
            start(*chance.sample(wanted, 5), max_bytes=1_000_000, hold=False) for _ in range(2)
        ]
        for worker in workers:
            assert worker.line() == "ready"
        for worker in workers:
            time.sleep(chance.random() * 0.2)
            worker.kill()
        for name in left(cache):
            if not name.endswith(".part"):
                data = (cache.directory / name).read_bytes()
                assert name == f"sha256-{hashlib.sha256(data).hexdigest()}"
    for source in wanted:
        get(server, source, replace(cache, max_bytes=1_000_000))
    assert len(left(cache)) == 3
    assert not any(name.endswith(".part") for name in left(cache))
    assert len(list(cache.directory.iterdir())) == 7, "three images, their locks, the cache's lock"
