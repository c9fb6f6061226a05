"""UEFI firmware for the utility VM: which of those that are installed, and its variables.

qemu's firmware packages describe themselves in JSON files, which every
distribution ships (qemu's docs/interop/firmware.json). libvirt could choose by
them too, but would keep the variables in a directory of its own, beyond the build.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import programs
from .errors import BuilderFault

log = logging.getLogger(__name__)

# A file of the first directory replaces one of the same name in the second.
_DESCRIPTIONS = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
_PACKAGES = {
    "x86_64": "ovmf (Debian) or edk2-ovmf (Fedora, RHEL)",
    "aarch64": "qemu-efi-aarch64 (Debian) or edk2-aarch64 (Fedora, RHEL)",
}


@dataclass(frozen=True)
class Firmware:
    """One installed UEFI firmware: its code, read-only, and the variables that a VM begins with.

    secure_boot -- whether it refuses to start what is not signed.
    needs_smm -- whether it runs only on a machine with system management mode.
    """

    code: Path
    code_format: str
    variables: Path
    variables_format: str
    secure_boot: bool
    needs_smm: bool

    def for_one_vm(self, directory: Path) -> Firmware:
        """The same firmware with variables that a VM may write to, and both files raw.

        libvirt has known other formats for them only since 2023.
        """
        variables = directory / "firmware-variables"
        _copy_as_raw(self.variables, self.variables_format, variables)
        code = self.code
        if self.code_format != "raw":
            code = directory / "firmware-code"
            _copy_as_raw(self.code, self.code_format, code)
        return dataclasses.replace(
            self, code=code, code_format="raw", variables=variables, variables_format="raw"
        )


def _copy_as_raw(source: Path, image_format: str, target: Path) -> None:
    if image_format == "raw":
        shutil.copyfile(source, target)
        return
    argv = ["qemu-img", "convert", "-f", image_format, "-O", "raw", str(source), str(target)]
    programs.run(argv, timeout_seconds=60, limits=programs.Limits())
    target.chmod(0o644)  # qemu may run as another user


def find(
    arch: str, machine: str, *, secure_boot: bool, directories: Sequence[Path] = _DESCRIPTIONS
) -> Firmware:
    """The installed UEFI that fits best; BuilderFault when there is none.

    secure_boot -- whether it is to enforce Secure Boot, with the usual keys.
    """
    usable = []
    for name, description in _descriptions(directories):
        try:
            one = _fitting(description, arch, machine, secure_boot)
        except (KeyError, TypeError, AttributeError) as error:
            log.warning("%s describes no firmware as qemu defines it: %r", name, error)
            continue
        if one is not None and one.code.exists() and one.variables.exists():
            usable.append(one)
    # Secure Boot needs SMM; a firmware that has both, but no keys, does not enforce it. What
    # goes without is quicker.
    best = next((one for one in usable if not one.needs_smm), usable[0] if usable else None)
    if best is not None:
        return best
    kind = "UEFI firmware with Secure Boot" if secure_boot else "UEFI firmware"
    package = _PACKAGES.get(arch, "one for this arch")
    raise BuilderFault(
        f"no {kind} for virtual machines of the arch {arch} is installed", f"install {package}"
    )


def _descriptions(directories: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
    """The descriptions, best first: their names begin with their priority."""
    files: dict[str, Path] = {}
    for directory in directories:
        if directory.is_dir():
            for path in directory.glob("*.json"):
                files.setdefault(path.name, path)
    for name in sorted(files):
        text = files[name].read_text(encoding="utf-8")
        if not text.strip():
            continue  # how an administrator hides the file of the same name
        try:
            yield files[name], json.loads(text)
        except ValueError as error:
            log.warning("%s is not JSON: %s", files[name], error)


def _fitting(
    description: dict[str, Any], arch: str, machine: str, secure_boot: bool
) -> Firmware | None:
    """The firmware of this description if it is one to use, else None."""
    mapping = description["mapping"]
    if "uefi" not in description["interface-types"] or mapping["device"] != "flash":
        return None
    if mapping.get("mode", "split") != "split":
        return None  # without variables, or with them in the code
    if not any(
        target["architecture"] == arch and any(_runs(machine, glob) for glob in target["machines"])
        for target in description["targets"]
    ):
        return None
    features = set(description["features"])
    if ("enrolled-keys" in features and "secure-boot" in features) != secure_boot:
        return None
    code, variables = mapping["executable"], mapping["nvram-template"]
    return Firmware(
        Path(code["filename"]),
        code["format"],
        Path(variables["filename"]),
        variables["format"],
        secure_boot,
        "requires-smm" in features,
    )


def _runs(machine: str, glob: str) -> bool:
    """Whether a glob of versioned machine types, such as pc-q35-*, has this machine in it."""
    family = {"q35": "pc-q35-9.9", "pc": "pc-i440fx-9.9", "virt": "virt-9.9"}.get(machine, machine)
    return fnmatch.fnmatchcase(family, glob) or fnmatch.fnmatchcase(machine, glob)
