"""Which UEFI firmware is taken, from descriptions as distributions install them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from koji_indirection import firmware
from koji_indirection.errors import BuilderFault


class Installed:
    """A directory of descriptions, and the files that they name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "firmware"
        self.directory.mkdir()

    def add(self, name: str, features: tuple[str, ...] = (), **changes: Any) -> Path:
        code, variables = (self.directory / f"{name}.{kind}" for kind in ("code", "vars"))
        code.write_bytes(b"code")
        variables.write_bytes(b"variables")
        description: dict[str, Any] = {
            "interface-types": ["uefi"],
            "mapping": {
                "device": "flash",
                "executable": {"filename": str(code), "format": "raw"},
                "nvram-template": {"filename": str(variables), "format": "raw"},
            },
            "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
            "features": list(features),
            **changes,
        }
        (self.directory / f"{name}.json").write_text(json.dumps(description))
        return code

    def find(self, *, secure_boot: bool = False, machine: str = "q35") -> firmware.Firmware:
        return firmware.find(
            "x86_64", machine, secure_boot=secure_boot, directories=[self.directory]
        )


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path)


SECURE = ("secure-boot", "requires-smm", "enrolled-keys")


def test_secure_boot_is_taken_only_when_asked_for(installed: Installed) -> None:
    secure = installed.add("40-secure", SECURE)
    no_keys = installed.add("50-no-keys", ("secure-boot", "requires-smm"))
    plain = installed.add("60-plain")
    assert (installed.find().code, installed.find().secure_boot) == (plain, False)
    found = installed.find(secure_boot=True)
    assert (found.code, found.secure_boot, found.needs_smm) == (secure, True, True)
    plain.unlink()
    assert (installed.find().code, installed.find().needs_smm) == (no_keys, True)


def test_the_first_by_name_is_taken_and_an_empty_file_hides_one(
    installed: Installed, tmp_path: Path
) -> None:
    first, second = installed.add("50-b"), installed.add("60-a")
    assert installed.find().code == first
    own = tmp_path / "own"
    own.mkdir()
    (own / "50-b.json").write_text("")
    found = firmware.find(
        "x86_64", "q35", secure_boot=False, directories=[own, installed.directory]
    )
    assert found.code == second


@pytest.mark.parametrize(
    "changes",
    [
        {"interface-types": ["bios"]},
        {"targets": [{"architecture": "aarch64", "machines": ["virt-*"]}]},
        {"targets": [{"architecture": "x86_64", "machines": ["microvm"]}]},
        {"mapping": {"device": "memory", "filename": "/x"}},
        {"mapping": {"device": "flash", "mode": "stateless", "executable": {}}},
        {"mapping": "not as qemu defines it"},
    ],
)
def test_what_does_not_fit_is_passed_over(installed: Installed, changes: dict[str, Any]) -> None:
    installed.add("10-other", **changes)
    (installed.directory / "05-broken.json").write_text("{")
    with pytest.raises(BuilderFault, match=r"no UEFI firmware for .* x86_64 is") as caught:
        installed.find()
    assert "install ovmf" in caught.value.hint
    good = installed.add("20-good")
    assert installed.find().code == good


def test_without_secure_boot_firmware_that_is_said(installed: Installed) -> None:
    installed.add("60-plain")
    with pytest.raises(BuilderFault, match="no UEFI firmware with Secure Boot"):
        installed.find(secure_boot=True)


def test_an_ide_machine_takes_what_runs_on_it(installed: Installed) -> None:
    q35 = [{"architecture": "x86_64", "machines": ["pc-q35-*"]}]
    installed.add("10-q35", targets=q35)
    both = installed.add("20-both")
    assert installed.find(machine="pc").code == both


def test_a_vm_gets_variables_of_its_own_and_raw_files(installed: Installed, tmp_path: Path) -> None:
    installed.add("60-plain")
    own = tmp_path / "job"
    own.mkdir()
    found = installed.find()
    used = found.for_one_vm(own)
    assert used.code == found.code
    assert used.variables.parent == own
    used.variables.write_bytes(b"changed")
    assert found.variables.read_bytes() == b"variables"


def test_firmware_in_qcow2_is_unpacked_for_libvirt(installed: Installed, tmp_path: Path) -> None:
    code = installed.add("60-plain")
    for path in (code, code.with_suffix(".vars")):
        raw = path.with_suffix(".raw")
        raw.write_bytes(bytes([7]) * 65536)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    description = installed.directory / "60-plain.json"
    description.write_text(description.read_text().replace('"raw"', '"qcow2"'))
    used = installed.find().for_one_vm(tmp_path)
    assert (used.code_format, used.variables_format) == ("raw", "raw")
    assert used.code.read_bytes() == used.variables.read_bytes() == bytes([7]) * 65536
