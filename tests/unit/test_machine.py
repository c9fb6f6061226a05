"""libvirt that hangs or goes away, and the user that qemu runs as."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lxml import etree

from koji_indirection import machine
from koji_indirection.domain import Disk, Domain, domain_xml
from koji_indirection.errors import BuilderFault
from koji_indirection.machine import Hypervisor


@pytest.fixture
def open_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if everybody could get here, and /dev/kvm belonged to group 107."""

    def stat(path: Path, **_options: Any) -> Any:
        if str(path) == "/dev/kvm":
            return SimpleNamespace(st_mode=0o20660, st_gid=107)
        if path.name == "closed":
            return SimpleNamespace(st_mode=0o40700)
        return SimpleNamespace(st_mode=0o40711)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def users(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    entries = [SimpleNamespace(pw_name=name, pw_gid=65534) for name in names]
    monkeypatch.setattr(machine.pwd, "getpwall", lambda: entries)


def test_root_runs_qemu_as_an_unprivileged_user_who_may_use_kvm(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users(monkeypatch, "root", "nobody", "qemu")
    assert machine._qemu_account([open_directory]) == ("qemu", "+107")


def test_where_that_user_could_not_reach_the_disks_qemu_runs_as_root_and_that_is_said(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    users(monkeypatch, "root", "nobody")
    assert machine._qemu_account([open_directory / "closed" / "work"]) is None
    assert f"user nobody may not enter {open_directory}/closed, see --work-dir" in caplog.text


def test_where_no_such_user_is_qemu_runs_as_root_and_that_is_said(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    users(monkeypatch, "root")
    assert machine._qemu_account([open_directory]) is None
    assert "there is no user libvirt-qemu or qemu or nobody" in caplog.text


def test_whoever_is_not_root_has_only_one_user_to_run_qemu_as(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert machine._qemu_account([open_directory]) is None


def test_labels_of_selinux_and_apparmor_are_left_to_libvirt(tmp_path: Path) -> None:
    """Only the owner of what is the user's own stays; nothing turns confinement off."""
    disks = [
        Disk("vda", "utility", tmp_path / "o", "qcow2", backing=(tmp_path / "u", "raw")),
        Disk("vdb", "input", tmp_path / "i", "qcow2", readonly=True),
    ]
    xml = domain_xml(Domain("x", "tcg", 2**28, 1, "qemu64", disks, tmp_path))
    labels = list(etree.fromstring(xml).iter("seclabel"))
    assert len(labels) == 2
    for label in labels:
        assert dict(label.attrib) == {"model": "dac", "relabel": "no"}
        parent = label.getparent()
        assert parent is not None
        assert parent.tag == "source"


# Calls that do not come back


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """Calls that wait for this hang until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_a_libvirt_call_that_hangs_is_a_fault_that_names_the_call(hanging: threading.Event) -> None:
    with pytest.raises(BuilderFault) as caught:
        machine._Call(hanging.wait).result("let the VM run", 0.2)
    assert caught.value.message == "libvirt did not let the VM run within 0 s"
    assert caught.value.hint == "restart libvirtd"


class HangingConnection:
    """A libvirtd that took a VM and then says nothing."""

    def __init__(self, hanging: threading.Event) -> None:
        self._hanging = hanging

    def createXML(self, _xml: str, _flags: int) -> Any:
        self._hanging.wait()

    def lookupByName(self, _name: str) -> Any:
        self._hanging.wait()


def test_an_interrupt_gets_through_a_hanging_libvirtd_within_seconds(
    hanging: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_SOON_SECONDS", 0.5)
    domain = Domain("koji-indirection-test", "tcg", 1, 1, "qemu64",
                    [Disk("vda", "utility", tmp_path / "x", "raw")], tmp_path)  # fmt: skip
    hypervisor = Hypervisor(HangingConnection(hanging), "qemu:///system", "system", True)

    def interrupt() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt), machine.start(hypervisor, domain):
            pass
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


def test_a_vm_that_libvirt_cannot_be_asked_about_counts_as_running_and_lost(
    tmp_path: Path, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    libvirt = pytest.importorskip("libvirt")
    monkeypatch.setattr(machine, "_SOON_SECONDS", 0.2)
    monkeypatch.setattr(machine, "_connect_socket", lambda path: None)
    connection = libvirt.open("test:///default")
    domain = connection.lookupByName("test")
    spec = Domain("test", "tcg", 1, 1, "qemu64", [], tmp_path)
    events: Any = machine.queue.SimpleQueue()
    one = machine.Machine(domain, spec, events)
    assert one.is_active()
    monkeypatch.setattr(one, "_domain", SimpleNamespace(isActive=hanging.wait))
    assert one.is_active(), "no answer is no proof of its end"
    assert events.empty()

    def fail() -> None:
        raise libvirt.libvirtError("broken pipe")

    monkeypatch.setattr(one, "_domain", SimpleNamespace(isActive=fail))
    monkeypatch.setattr(libvirt.libvirtError, "get_error_code", lambda error: 38)
    assert one.is_active()
    assert events.get_nowait() == "lost"
    monkeypatch.setattr(libvirt.libvirtError, "get_error_code", lambda error: 42)
    assert not one.is_active()
    connection.close()
