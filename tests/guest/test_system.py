"""qemu:///system: a private libvirtd, whose qemu runs as another user."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from koji_indirection.machine import libvirt_module

from .conftest import (
    RESULT,
    Builder,
    Libvirtd,
    private_libvirtd,
    wait_until,
    why_no_libvirtd,
)


@pytest.fixture
def libvirtd() -> Iterator[Libvirtd]:
    reason = why_no_libvirtd()
    if reason:
        pytest.skip(reason)
    with private_libvirtd() as daemon:
        yield daemon


@pytest.fixture
def open_work(build: Builder) -> Iterator[Path]:
    """A work directory that the other user can reach, as /var/tmp is."""
    with tempfile.TemporaryDirectory(prefix="ki-test-work-", dir="/var/tmp") as directory:
        build.work = Path(directory)
        build.work.chmod(0o755)
        yield build.work
        assert not list(build.work.iterdir())


def test_a_build_through_libvirtd_copies_what_qemus_user_cannot_read_and_dies_with_the_command(
    build: Builder, libvirtd: Libvirtd, open_work: Path, tiny_image: Path, tmp_path: Path
) -> None:
    options = ("--connect", libvirtd.uri, "--accel", "tcg")
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    image = Path(shutil.copy(tiny_image, private / "tiny.qcow2"))
    image.chmod(0o600)
    before = image.stat()
    built = build(
        [("make", f"mount /dev/vdb1 /mnt && {RESULT}")],
        *options,
        input_image=image,
    ).succeeded()
    assert built.manifest["host"]["libvirt_uri"] == "qemu:///system"
    assert "cannot read" in built.stderr
    after = image.stat()
    assert (after.st_uid, after.st_mode, after.st_mtime) == (
        before.st_uid,
        before.st_mode,
        before.st_mtime,
    )

    running = build.start([("hang", "sleep 3600")], *options, input_image=image)
    running.wait_for_phase("boot")
    wait_until(build.qemu, 20, "the VM runs")
    running.kill()
    wait_until(lambda: not build.leftovers(), 10, "AUTODESTROY")


# Only of a network of libvirt's, which its own DHCP and DNS serve.
NETWORK = """
<network>
  <name>builders</name>
  <bridge name='virbr-test'/>
  <dns><host ip='192.168.77.1'><hostname>mirror.example.com</hostname></host></dns>
  <ip address='192.168.77.1' netmask='255.255.255.0'>
    <dhcp><range start='192.168.77.20' end='192.168.77.20'/></dhcp>
  </ip>
</network>
"""
REACH = """
set -e
ifconfig | grep -o 'inet addr:192[0-9.]*'
nslookup mirror.example.com | tail -n 4
ping -c 1 -W 20 192.168.77.1
"""


def test_a_guest_on_a_libvirt_network_has_its_address_and_its_names(
    build: Builder, open_work: Path, tiny_image: Path, tmp_path: Path
) -> None:
    reason = why_no_libvirtd("--net")
    if reason:
        pytest.skip(reason)
    if shutil.which("dnsmasq") is None:
        pytest.skip("dnsmasq, which libvirt's networks need, is not installed")
    settings = tmp_path / "machine.conf"
    settings.write_text("[guest]\nnetworks = builders\n")
    with private_libvirtd(Path("/tmp"), "--net") as libvirtd:
        connection = libvirt_module().open(libvirtd.uri)
        network = connection.networkCreateXML(NETWORK)
        try:
            built = build(
                [("reach", REACH), ("make", f"mount /dev/vdb1 /mnt && {RESULT}")],
                *("--connect", libvirtd.uri, "--accel", "tcg"),
                *("--network", "builders", "--config", settings),
            ).succeeded()
        finally:
            network.destroy()
            connection.close()
    assert [(one["name"], one["status"]) for one in built.manifest["setup"]] == [("network", 0)]
    job_log = built.log("job.log")
    assert "inet addr:192.168.77.20\n" in job_log
    assert "192.168.77.1" in job_log.partition("mirror.example.com")[2]
    assert "1 packets received" in job_log


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_libvirtd_that_is_killed_or_hangs_is_a_fault_and_takes_the_vm_with_it(
    build: Builder, libvirtd: Libvirtd, open_work: Path, number: int
) -> None:
    """Killed, it ends no VM any more, AUTODESTROY or not; its successor knows of none."""
    running = build.start(
        [("hang", "sleep 3600")], *("--connect", libvirtd.uri, "--accel", "tcg")
    )  # fmt: skip
    running.wait_for("command 1 of 1: hang")
    assert build.qemu() is not None
    libvirtd.send(number)
    running.finish(90).failed(
        "libvirtd ended, or does not answer any more, during command 'hang'", status=3
    )
    assert not build.qemu()
    if number == signal.SIGKILL:
        libvirtd.start()
        assert libvirtd.domains() == []


def test_a_libvirtd_that_hangs_before_the_vm_starts_is_not_waited_for_as_for_the_start(
    build: Builder, libvirtd: Libvirtd, open_work: Path
) -> None:
    running = build.start([("never", "true")], *("--connect", libvirtd.uri, "--accel", "tcg"))
    running.wait_for_phase("inject")
    libvirtd.send(signal.SIGSTOP)
    running.wait_for_phase("boot")
    running.finish(60).failed(
        "libvirtd .* ended, or does not answer any more, before the VM ran", status=3
    )
