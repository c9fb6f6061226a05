"""qemu:///system: a private libvirtd, whose qemu runs as another user."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from koji_indirection.machine import libvirt_module

from .conftest import RESULT, Builder, wait_until

# Its own /etc/libvirt, state and sockets, in a mount namespace: nothing of the machine is touched.
# No /dev/kvm: where qemu's user may not open it, libvirtd would ask qemu for its capabilities again
# and again, 100 s for one VM.
START = """
set -e
for place in /etc /run /var/lib /var/cache /var/log; do
    place=$place/libvirt
    mkdir -p $place $1$place
    chmod 755 $1$place
    mount --bind $1$place $place
done
touch $1/no-kvm
chmod 600 $1/no-kvm
[ ! -e /dev/kvm ] || mount --bind $1/no-kvm /dev/kvm
exec libvirtd --config $1/libvirtd.conf --pid-file $1/pid
"""
LIBVIRTD_CONF = """
unix_sock_dir = "{directory}/sock"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "2:file:{directory}/libvirtd.log"
"""
# Without cgroups, namespaces and virtlogd, as in a container; user and ownership as by default.
QEMU_CONF = """
cgroup_controllers = []
namespaces = []
security_driver = "none"
stdio_handler = "file"
"""


@pytest.fixture
def system_uri() -> Iterator[str]:
    with private_libvirtd("--mount") as uri:
        yield uri


@contextlib.contextmanager
def private_libvirtd(*unshared: str) -> Iterator[str]:
    """The URI of a libvirtd in namespaces of its own, as unshare(1) names them."""
    if shutil.which("libvirtd") is None:
        pytest.skip("libvirtd is not installed")
    if subprocess.run(["unshare", *unshared, "true"], capture_output=True).returncode != 0:
        pytest.skip("private namespaces are not permitted here")
    directory = Path(tempfile.mkdtemp(prefix="libvirtd-", dir="/tmp"))
    directory.chmod(0o755)
    qemu_conf = directory / "etc/libvirt/qemu.conf"
    qemu_conf.parent.mkdir(parents=True)
    (directory / "sock").mkdir()
    qemu_conf.write_text(QEMU_CONF)
    (directory / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(directory=directory))
    socket = directory / "sock" / "libvirt-sock"
    argv = ["unshare", *unshared, "sh", "-c", START, "sh", str(directory)]
    with (directory / "output").open("wb") as output:
        daemon = subprocess.Popen(argv, stdout=output, stderr=output)
    try:
        wait_until(socket.exists, 30, f"libvirtd's socket; see {directory}")
        yield f"qemu:///system?socket={socket}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(daemon.pid, signal.SIGCONT)
        daemon.terminate()
        daemon.wait(30)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def open_work(build: Builder) -> Iterator[Path]:
    """A work directory that the other user can reach, as /var/tmp is."""
    with tempfile.TemporaryDirectory(prefix="ki-test-work-", dir="/var/tmp") as directory:
        build.work = Path(directory)
        build.work.chmod(0o755)
        yield build.work
        assert not list(build.work.iterdir())


def test_a_build_through_libvirtd_copies_what_qemus_user_cannot_read_and_dies_with_the_command(
    build: Builder, system_uri: str, open_work: Path, tiny_image: Path, tmp_path: Path
) -> None:
    options = ("--connect", system_uri, "--accel", "tcg")
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
    if shutil.which("dnsmasq") is None:
        pytest.skip("dnsmasq, which libvirt's networks need, is not installed")
    settings = tmp_path / "machine.conf"
    settings.write_text("[guest]\nnetworks = builders\n")
    with private_libvirtd("--mount", "--net") as uri:
        connection = libvirt_module().open(uri)
        network = connection.networkCreateXML(NETWORK)
        try:
            built = build(
                [("reach", REACH), ("make", f"mount /dev/vdb1 /mnt && {RESULT}")],
                *("--connect", uri, "--accel", "tcg"),
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
    build: Builder, system_uri: str, open_work: Path, number: int
) -> None:
    """Killed, it ends no VM any more, AUTODESTROY or not."""
    daemon = int((Path(system_uri.partition("=")[2]).parents[1] / "pid").read_text())
    running = build.start(
        [("hang", "sleep 3600")], *("--connect", system_uri, "--accel", "tcg")
    )  # fmt: skip
    running.wait_for("command 1 of 1: hang")
    assert build.qemu() is not None
    os.kill(daemon, number)
    running.finish(90).failed(
        "libvirtd ended, or does not answer any more, during command 'hang'", status=3
    )
    assert not build.qemu()
