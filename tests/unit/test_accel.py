"""accel.py: one verdict on KVM, and when it is remembered."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from koji_indirection import accel
from koji_indirection.accel import Accel
from koji_indirection.errors import BuilderFault, UsageError

WORKS = Accel("kvm", "KVM works: 5,000,000 guest loops in 12 ms", forced=False)
HANGS = Accel("tcg", "guests hang on this host's /dev/kvm", forced=False, hint="use hardware")


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for /dev/kvm that can be opened."""
    path = tmp_path / "kvm"
    path.write_bytes(b"")
    monkeypatch.setattr(accel, "DEVICE", path)
    return path


class Probe:
    """Gives the answer it was told to give, and counts how often it was asked."""

    def __init__(self, answer: Accel, lasting: bool = True) -> None:
        self.answer, self.lasting, self.asked = answer, lasting, 0

    def __call__(self, timeout_seconds: float, loops: int = 0) -> tuple[Accel, bool]:
        self.asked += 1
        return self.answer, self.lasting


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    fake = Probe(WORKS)
    monkeypatch.setattr(accel, "_probe", fake)
    return fake


def test_the_real_probe_ends_in_time_and_gives_a_reason_which_is_then_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    first = accel.choose("auto", cache_dir=tmp_path)
    assert time.monotonic() - started < 15
    assert first.kind in ("kvm", "tcg")
    assert first.reason
    assert not first.forced

    monkeypatch.setattr(accel, "_probe", lambda *_: pytest.fail("probed again"))
    if accel.DEVICE.exists() and (tmp_path / accel.CACHE_NAME).exists():
        assert accel.choose("auto", cache_dir=tmp_path) == first


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm here")
def test_the_guest_of_the_probe_runs_to_its_port_when_it_has_time() -> None:
    found, lasting = accel._probe(30, loops=1000)
    if not lasting:
        pytest.skip(found.reason)
    assert found.kind == "kvm"
    assert found.reason.startswith("KVM works: ")


def test_a_child_that_says_nothing_is_no_kvm_and_is_not_remembered(
    tmp_path: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel.sys, "executable", "/bin/false")
    found = accel.choose("auto", cache_dir=tmp_path / "cache")
    assert found.reason.endswith("ended without an answer")
    assert not (tmp_path / "cache").exists()


def test_a_child_that_hangs_is_killed_at_the_deadline(
    tmp_path: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho ready\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(accel.sys, "executable", str(script))
    found, _ = accel._probe(0.2)
    assert found.kind == "tcg"
    assert found.reason == (
        f"guests hang on this host's {device}: 5,000,000 loops did not end within 0.2 s"
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_tcg_is_never_probed(probe: Probe, tmp_path: Path) -> None:
    chosen = accel.choose("tcg", cache_dir=tmp_path)
    assert (chosen.kind, chosen.forced) == ("tcg", True)
    assert probe.asked == 0


def test_kvm_is_used_where_it_works(probe: Probe, device: Path, tmp_path: Path) -> None:
    chosen = accel.choose("kvm", cache_dir=tmp_path)
    assert (chosen.kind, chosen.forced) == ("kvm", True)
    assert chosen.reason == WORKS.reason


def test_kvm_that_was_asked_for_and_hangs_is_a_fault_with_a_way_out(
    probe: Probe, device: Path, tmp_path: Path
) -> None:
    probe.answer = HANGS
    with pytest.raises(BuilderFault) as caught:
        accel.choose("kvm", cache_dir=tmp_path)
    assert caught.value.message == f"KVM was asked for but cannot be used: {HANGS.reason}"
    assert "--accel tcg" in caught.value.hint


def test_another_word_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown acceleration 'xen'"):
        accel.choose("xen", cache_dir=tmp_path)


def test_a_missing_device_is_told_apart(
    probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "DEVICE", tmp_path / "none")
    found = accel.choose("auto", cache_dir=tmp_path)
    assert found.kind == "tcg"
    assert found.reason == f"{tmp_path}/none does not exist"
    assert "kvm_intel" in found.hint
    assert probe.asked == 0


@pytest.mark.parametrize(
    ("number", "reason"),
    [("EACCES", "this user may not open"), ("EBUSY", "is busy"), ("ENXIO", "cannot be opened")],
)
def test_a_device_that_cannot_be_opened_says_why(
    number: str,
    reason: str,
    probe: Probe,
    device: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accel.choose("auto", cache_dir=tmp_path)  # remembered as working; access is looked at anyway

    def refuse(*_: object) -> int:
        value = getattr(accel.errno, number)
        raise OSError(value, os.strerror(value))

    monkeypatch.setattr(accel.os, "open", refuse)
    found = accel.choose("auto", cache_dir=tmp_path)
    assert found.kind == "tcg"
    assert reason in found.reason
    assert found.hint


def test_the_verdict_is_remembered(probe: Probe, device: Path, tmp_path: Path) -> None:
    first = accel.choose("auto", cache_dir=tmp_path / "made")
    assert accel.choose("auto", cache_dir=tmp_path / "made") == first == WORKS
    assert probe.asked == 1


def test_the_verdict_is_forgotten_when_the_host_reboots(
    probe: Probe, device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accel.choose("auto", cache_dir=tmp_path)
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another boot\n")
    monkeypatch.setattr(accel, "_BOOT_ID", boot_id)
    accel.choose("auto", cache_dir=tmp_path)
    assert probe.asked == 2


def test_the_verdict_is_forgotten_when_the_device_is_another(
    probe: Probe, device: Path, tmp_path: Path
) -> None:
    accel.choose("auto", cache_dir=tmp_path)
    other = tmp_path / "other"
    other.write_bytes(b"")
    other.rename(device)
    accel.choose("auto", cache_dir=tmp_path)
    assert probe.asked == 2


def test_a_passing_trouble_is_not_remembered(probe: Probe, device: Path, tmp_path: Path) -> None:
    probe.answer, probe.lasting = HANGS, False
    accel.choose("auto", cache_dir=tmp_path)
    accel.choose("auto", cache_dir=tmp_path)
    assert probe.asked == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"key": 1}', "\udcff"])
def test_a_damaged_cache_is_ignored(
    content: str, probe: Probe, device: Path, tmp_path: Path
) -> None:
    (tmp_path / accel.CACHE_NAME).write_bytes(content.encode(errors="surrogateescape"))
    assert accel.choose("auto", cache_dir=tmp_path) == WORKS
    assert probe.asked == 1


def test_a_cache_with_a_nonsense_verdict_is_ignored(
    probe: Probe, device: Path, tmp_path: Path
) -> None:
    accel.choose("auto", cache_dir=tmp_path)
    record = json.loads((tmp_path / accel.CACHE_NAME).read_text())
    record["accel"]["kind"] = "xen"
    (tmp_path / accel.CACHE_NAME).write_text(json.dumps(record))
    assert accel.choose("auto", cache_dir=tmp_path) == WORKS
    assert probe.asked == 2


def test_a_cache_directory_that_cannot_be_written_to_is_no_error(
    probe: Probe, device: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert accel.choose("auto", cache_dir=tmp_path / "file" / "below") == WORKS


def test_nothing_but_the_verdict_is_left_in_the_cache_directory(
    probe: Probe, device: Path, tmp_path: Path
) -> None:
    accel.choose("auto", cache_dir=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [accel.CACHE_NAME]
