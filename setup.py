"""Install the library, the local command and the files of the three Koji plugins."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import find_packages, setup

from koji_indirection import __version__

HERE = Path(__file__).parent

# Where Koji looks for plugins, below the installation prefix, and which room they come from.
PLUGIN_PLACES = {
    "lib/koji-hub-plugins": "hub",
    "lib/koji-builder-plugins": "builder",
    f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
    "/site-packages/koji_cli_plugins": "cli",
}

setup(
    name="koji-indirection",
    version=__version__,
    description="Make images with tools that live inside another image, locally or in Koji",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["koji_indirection", "koji_indirection.*"]),
    package_data={"koji_indirection": ["job/*", "template.rng"]},
    data_files=[
        (place, [str(path.relative_to(HERE)) for path in sorted((HERE / room).glob("*.py"))])
        for place, room in PLUGIN_PLACES.items()
    ],
    python_requires=">=3.9",
    install_requires=[
        "cryptography",  # oslo.utils' format inspector imports it and does not say so
        "jsonschema",
        "lxml",
        "oslo.utils>=7.3",
        "rich",
    ],
    extras_require={
        # libvirt and guestfs have no wheels; both come from the distribution.
        "zstd": ["zstandard"],
        # The Koji plugins: Koji's own packages bring these along on hub, builder and client.
        "koji": ["koji", "requests"],
        "test": [
            "hypothesis",
            "koji",
            "mypy",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "requests",
            "ruff",
            "lxml-stubs",
            # A package is built with these, without the network.
            "setuptools",
            "wheel",
        ],
        # To run a real Koji; its hub and kojid need Debian packages too, see the Makefile.
        "koji-test": ["defusedxml", "gunicorn", "koji", "python-multilib"],
    },
    entry_points={"console_scripts": ["koji-indirection = koji_indirection.command:main"]},
)
