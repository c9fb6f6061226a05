"""The domain XML, compared whole with the files in golden/.

After a change that is meant, write them anew and read the difference:

    KOJI_INDIRECTION_WRITE_GOLDEN=1 .venv/bin/pytest tests/unit/test_domain.py
    git diff tests/unit/golden
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from koji_indirection.arches import ARCHES
from koji_indirection.domain import (
    Disk,
    Domain,
    disk_bus,
    domain_xml,
    serial_reports,
    tcg_cpu_model,
)
from koji_indirection.errors import BuildFailed, UsageError
from koji_indirection.firmware import Firmware
from koji_indirection.spec import BuildSpec

GOLDEN = Path(__file__).parent / "golden"
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
MIB = 1024**2
JOB = Path("/var/tmp/koji-indirection-abcd1234")

UTILITY = Disk(
    "vda",
    "utility",
    JOB / "utility-overlay.qcow2",
    "qcow2",
    backing=(Path("/srv/images/utility & co.qcow2"), "qcow2"),
)
WORKSPACE = Disk("vdb", "workspace", JOB / "workspace.raw", "raw")
INPUT_OVERLAY = Disk(
    "vdc",
    "input",
    JOB / "input-overlay.qcow2",
    "qcow2",
    backing=(Path("/srv/images/input.raw"), "raw"),
)


OVMF = Path("/usr/share/OVMF")
UEFI = Firmware(
    OVMF / "OVMF_CODE_4M.fd", "raw", JOB / "firmware-variables", "raw", False, needs_smm=False
)
SECURE = Firmware(
    OVMF / "OVMF_CODE_4M.ms.fd",
    "raw",
    JOB / "firmware-variables",
    "raw",
    secure_boot=True,
    needs_smm=True,
)
AAVMF = Firmware(
    Path("/usr/share/AAVMF/AAVMF_CODE.fd"),
    "raw",
    JOB / "firmware-variables",
    "raw",
    secure_boot=False,
    needs_smm=False,
)


def foreign(kind: str, arch: str, **fields: Any) -> Domain:
    model = ARCHES[arch].tcg_cpu_model
    disks = (UTILITY, WORKSPACE)
    return domain(kind, *disks, arch=ARCHES[arch], cpu_model=model, **fields)


def input_device(image_format: str) -> Disk:
    path = Path("/srv/images") / f"input.{image_format}"
    return Disk("vdc", "input", path, image_format, readonly=True)


def domain(kind: str, *disks: Disk, **fields: Any) -> Domain:
    values: dict[str, Any] = {
        "name": "koji-indirection-0123456789ab",
        "accel_kind": kind,
        "memory_bytes": 2048 * MIB,
        "cpus": 2,
        "cpu_model": "qemu64",
        "disks": disks,
        "socket_dir": Path("/tmp/ki-abcd1234"),
        **fields,
    }
    return Domain(**values)


DOMAINS = {
    "kvm-uefi": domain("kvm", UTILITY, WORKSPACE, firmware=UEFI),
    "tcg-secure-boot": domain("tcg", UTILITY, WORKSPACE, firmware=SECURE),
    "tcg-sata": domain("tcg", UTILITY, WORKSPACE, INPUT_OVERLAY, disk_bus="sata"),
    "tcg-ide-serial-reports": domain(
        "tcg", UTILITY, WORKSPACE, disk_bus="ide", serial_reports=True
    ),
    "kvm-aarch64": foreign("kvm", "aarch64", firmware=AAVMF),
    "tcg-aarch64": foreign("tcg", "aarch64", firmware=AAVMF),
    "kvm-ppc64le": foreign("kvm", "ppc64le"),
    "tcg-ppc64le": foreign("tcg", "ppc64le"),
    "kvm-s390x": foreign("kvm", "s390x"),
    "tcg-s390x": foreign("tcg", "s390x"),
    "kvm-workspace": domain("kvm", UTILITY, WORKSPACE),
    "tcg-workspace": domain("tcg", UTILITY, WORKSPACE),
    "tcg-rhel9": domain("tcg", UTILITY, WORKSPACE, cpu_model="Nehalem", cpus=4),
    "kvm-input-device-raw": domain("kvm", UTILITY, WORKSPACE, input_device("raw")),
    "kvm-input-device-qcow2": domain("kvm", UTILITY, WORKSPACE, input_device("qcow2")),
    "kvm-input-writable": domain("kvm", UTILITY, WORKSPACE, INPUT_OVERLAY),
    "tcg-devices-swapped": domain(
        "tcg",
        UTILITY,
        Disk("vdb", "input", Path("/srv/images/input.raw"), "raw", readonly=True),
        Disk("vdc", "workspace", JOB / "workspace.raw", "raw"),
    ),
    "kvm-network-user": domain("kvm", UTILITY, WORKSPACE, network="user"),
    "kvm-network-named": domain("kvm", UTILITY, WORKSPACE, network="build & net"),
    "tcg-shell": domain("tcg", UTILITY, WORKSPACE, log_is_terminal=True),
    "tcg-media": domain(
        "tcg",
        UTILITY,
        WORKSPACE,
        Disk("vdc", "media", Path("/srv/repo.iso"), "raw", readonly=True),
    ),
}

every_domain = pytest.mark.parametrize("name", DOMAINS)


@every_domain
def test_the_xml_is_the_golden_files(name: str) -> None:
    golden, made = GOLDEN / f"{name}.xml", domain_xml(DOMAINS[name])
    if os.environ.get("KOJI_INDIRECTION_WRITE_GOLDEN"):
        golden.write_text(made, encoding="utf-8")
    assert made == golden.read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.xml")} == set(DOMAINS)


@pytest.fixture(scope="module")
def schema() -> etree.RelaxNG:
    if not SCHEMA.exists():
        pytest.skip("libvirt's schemas are not installed")
    return etree.RelaxNG(file=str(SCHEMA))


@every_domain
def test_libvirts_schema_accepts_the_xml(name: str, schema: etree.RelaxNG) -> None:
    schema.assertValid(etree.fromstring(domain_xml(DOMAINS[name])))


def test_libvirts_schema_would_refuse_a_mistake(schema: etree.RelaxNG) -> None:
    wrong = domain_xml(DOMAINS["kvm-workspace"]).replace("<vcpu>", "<vcpus>")
    wrong = wrong.replace("</vcpu>", "</vcpus>")
    assert not schema.validate(etree.fromstring(wrong))


@pytest.fixture(scope="module")
def libvirt_test_driver() -> Iterator[Any]:
    libvirt = pytest.importorskip("libvirt")
    connection = libvirt.open("test:///default")
    yield connection
    connection.close()


@every_domain
def test_libvirt_understands_every_device(name: str, libvirt_test_driver: Any) -> None:
    """The test driver takes no other type than its own; it parses everything else."""
    document = etree.fromstring(domain_xml(DOMAINS[name]))
    document.set("type", "test")
    created = libvirt_test_driver.createXML(etree.tostring(document, encoding="unicode"), 0)
    try:
        understood = etree.fromstring(created.XMLDesc())
    finally:
        created.destroy()
    for path in (
        "devices/disk/target/@dev",
        "devices/disk/driver/@type",
        "devices/disk/serial/text()",
        "devices/disk/source/@file",
        "devices/disk/backingStore/source/@file",
        "devices/disk/backingStore/format/@type",
        "devices/channel/target/@name",
        "devices/channel/source/@path",
        "devices/serial/source/@path",
        "os/loader/@secure",
        "os/loader/text()",
        "os/nvram/text()",
        "features/smm/@state",
        "devices/panic/@model",
        "devices/memballoon/@model",
        "on_reboot/text()",
        "on_crash/text()",
    ):
        assert understood.xpath(path) == document.xpath(path), path
    assert understood.xpath("count(devices/disk/readonly)") == document.xpath(
        "count(devices/disk/readonly)"
    )
    assert understood.findtext("memory") == str(DOMAINS[name].memory_bytes // 1024)


@every_domain
def test_no_guest_has_a_network_unasked_and_every_backing_chain_is_closed(name: str) -> None:
    document = etree.fromstring(domain_xml(DOMAINS[name]))
    assert document.xpath("devices/hostdev | devices/filesystem") == []
    asked_for = DOMAINS[name].network is not None
    assert len(document.xpath("devices/interface")) == int(asked_for)
    for disk in document.iterfind("devices/disk"):
        innermost = disk.xpath(".//backingStore")[-1]
        assert len(innermost) == 0, "libvirt would probe for a backing file"
        assert disk.find("driver").get("type") in ("raw", "qcow2")


@every_domain
def test_a_file_of_the_users_keeps_its_owner_and_a_disk_of_ours_skips_flushes(name: str) -> None:
    document = etree.fromstring(domain_xml(DOMAINS[name]))
    for source in document.xpath("devices/disk//source"):
        ours = source.get("file").startswith(str(JOB))
        assert (source.find("seclabel[@model='dac'][@relabel='no']") is None) == ours
    for disk in document.iterfind("devices/disk"):
        ours = disk.find("source").get("file").startswith(str(JOB))
        assert (disk.find("driver").get("cache") == "unsafe") == ours
        assert (disk.find("readonly") is None) == ours


@pytest.mark.parametrize("name", [name for name in DOMAINS if name.startswith("tcg")])
def test_the_hosts_cpu_is_never_asked_for_under_tcg(name: str) -> None:
    xml = domain_xml(DOMAINS[name])
    assert 'type="qemu"' in xml
    assert "host-passthrough" not in xml
    assert "host-model" not in xml
    assert etree.fromstring(xml).findtext("cpu/model") == DOMAINS[name].cpu_model


@pytest.mark.parametrize(
    ("os_id", "version_id", "model"),
    [
        ("debian", "12", "qemu64"),
        ("fedora", "41", "qemu64"),
        ("ubuntu", "24.04", "qemu64"),
        ("", "", "qemu64"),
        ("rhel", "7.9", "qemu64"),
        ("rhel", "8.10", "qemu64"),
        ("rhel", "9.4", "Nehalem"),
        ("centos", "9", "Nehalem"),
        ("almalinux", "9.3", "Nehalem"),
        ("rocky", "9", "Nehalem"),
        ("ol", "9.2", "Nehalem"),
        ("rhel", "10.0", "Haswell-noTSX"),
        ("centos", "10", "Haswell-noTSX"),
        ("rhel", "11", "Haswell-noTSX"),
        ("opensuse-leap", "15.6", "qemu64"),
        ("opensuse-leap", "16.0", "Nehalem"),
        ("sles", "16.0", "Nehalem"),
        ("opensuse-tumbleweed", "20260101", "qemu64"),
        ("amzn", "2", "qemu64"),
        ("amzn", "2023", "Nehalem"),
        ("rhel", "", "qemu64"),
        ("rhel", "rawhide", "qemu64"),
        ("rhel", "²", "qemu64"),
    ],
)
def test_the_cpu_model_under_tcg_runs_the_guests_binaries(
    os_id: str, version_id: str, model: str
) -> None:
    assert tcg_cpu_model(os_id, version_id) == model


def test_a_guest_from_before_virtio_1_gets_a_machine_without_pci_express() -> None:
    assert domain("tcg", UTILITY, WORKSPACE, virtio_1=False).machine == "pc"
    assert domain("tcg", UTILITY, WORKSPACE).machine == "q35"
    assert foreign("tcg", "ppc64le", virtio_1=False).machine == "pseries"


def test_without_kvm_an_arch_has_its_own_cpu_model() -> None:
    for name, model in (("aarch64", "cortex-a57"), ("ppc64le", "POWER9"), ("s390x", "qemu")):
        assert tcg_cpu_model("rhel", "9.4", ARCHES[name]) == model


@pytest.mark.parametrize("arch", ["x86_64", "ppc64le"])
def test_libvirt_has_the_cpu_models_by_these_very_names(
    arch: str, libvirt_test_driver: Any
) -> None:
    """Of the other two arches libvirt has none of its own and takes qemu's."""
    versions = [("debian", "12"), ("rhel", "9.4"), ("rhel", "10.0")]
    models = {tcg_cpu_model(*version, ARCHES[arch]) for version in versions}
    assert models <= set(libvirt_test_driver.getCPUModelNames(arch))


VIRTIO = {"virtio_blk", "virtio_console"}


@pytest.mark.parametrize(
    ("asked", "missing", "bus"),
    [
        ("auto", set(), "virtio"),
        ("auto", {"ahci", "ata_piix", "virtio_console"}, "virtio"),
        ("auto", VIRTIO, "sata"),
        ("auto", {*VIRTIO, "ahci"}, "ide"),
        ("virtio", VIRTIO, "virtio"),
        ("sata", set(), "sata"),
        ("ide", set(), "ide"),
    ],
)
def test_the_bus_is_the_one_asked_for_or_one_that_the_guest_knows(
    asked: str, missing: set[str], bus: str
) -> None:
    assert disk_bus(asked, missing, ARCHES["x86_64"]) == bus


def test_other_arches_have_virtio_disks_and_ports_only() -> None:
    for name in ("aarch64", "ppc64le", "s390x"):
        assert disk_bus("auto", {"ahci"}, ARCHES[name]) == "virtio"
        assert not serial_reports(set(), ARCHES[name])
        with pytest.raises(BuildFailed, match="no kernel of the utility image has virtio_blk"):
            disk_bus("auto", VIRTIO, ARCHES[name])
        with pytest.raises(BuildFailed, match="no kernel of the utility image has virtio_console"):
            serial_reports(VIRTIO, ARCHES[name])
        with pytest.raises(UsageError, match=f"--disk-bus sata makes no sense .* {name}"):
            disk_bus("sata", set(), ARCHES[name])


def test_reports_come_over_serial_ports_where_there_is_no_driver_for_others() -> None:
    assert serial_reports(VIRTIO, ARCHES["x86_64"])
    assert not serial_reports({"virtio_blk"}, ARCHES["x86_64"])


def test_the_specs_order_of_disks_is_the_order_of_their_names() -> None:
    spec = BuildSpec(workspace_device="vdc", input_device="vdb")
    assert [tuple(disk) for disk in spec.guest_disks()] == [
        ("vda", "utility"),
        ("vdb", "input"),
        ("vdc", "workspace"),
    ]


def test_sockets_lie_in_the_short_directory() -> None:
    one = DOMAINS["kvm-workspace"]
    assert {one.console_socket, one.status_socket, one.log_socket} == {
        Path("/tmp/ki-abcd1234/console"),
        Path("/tmp/ki-abcd1234/status"),
        Path("/tmp/ki-abcd1234/log"),
    }
