"""From a Koji reference to the one image that it means, or to a sentence that says why not."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import xmlrpc.client
from pathlib import Path
from typing import Any

import pytest

from koji_indirection.errors import BuilderFault, BuildFailed, UsageError
from koji_indirection.sources import Reference, Source, resolve

koji = pytest.importorskip("koji", reason="Koji's client library is not installed")
pytest.importorskip("requests", reason="requests is not installed")

ARCH = "x86_64"
UTILITY, INPUT = "utility image", "input image"
DATA = bytes(700_000)


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
