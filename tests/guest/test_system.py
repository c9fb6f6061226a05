"""qemu:///system: a private libvirtd, whose qemu runs as another user."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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
