"""Install the library, the local command and the files of the three Koji plugins."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

from koji_indirection import __version__

HERE = Path(__file__).parent

setup(
    name="koji-indirection",
    version=__version__,
    description="Make images with tools that live inside another image, locally or in Koji",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["koji_indirection", "koji_indirection.*"]),
    package_data={"koji_indirection": ["job/*"]},
    python_requires=">=3.9",
    install_requires=[
        "jsonschema",
        "lxml",
        "oslo.utils>=7.3",
        "rich",
    ],
    extras_require={
        # libvirt and guestfs have no wheels; both come from the distribution.
        "zstd": ["zstandard"],
        "test": [
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "lxml-stubs",
        ],
    },
    entry_points={"console_scripts": ["koji-indirection = koji_indirection.command:main"]},
)
