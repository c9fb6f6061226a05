"""The README's command for Koji's machines: each plugin lands where Koji looks for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_pip_puts_the_plugins_where_koji_looks_for_them(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    for room in ("koji_indirection", "hub", "builder", "cli"):
        shutil.copytree(REPOSITORY / room, source / room)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed"),
            "--no-build-isolation",
            *("--root", str(root), "--prefix", "/usr", "."),
        ],
        cwd=source,
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    library = root / f"usr/lib/python{sys.version_info.major}.{sys.version_info.minor}"
    places = {
        "hub/indirection.py": root / "usr/lib/koji-hub-plugins/indirection.py",
        "builder/indirection.py": root / "usr/lib/koji-builder-plugins/indirection.py",
        "cli/indirection.py": library / "site-packages/koji_cli_plugins/indirection.py",
        "koji_indirection/template.rng": library / "site-packages/koji_indirection/template.rng",
        "koji_indirection/job/run.sh": library / "site-packages/koji_indirection/job/run.sh",
    }
    for name, place in places.items():
        assert place.read_bytes() == (REPOSITORY / name).read_bytes()
    assert os.access(root / "usr/bin/koji-indirection", os.X_OK)
