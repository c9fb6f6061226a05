"""Where things go when nobody says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from koji_indirection.config import Settings, default_cache_dir, default_work_dir


def test_root_caches_in_var_and_others_in_their_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_cache_dir() == Path("/var/cache/koji-indirection")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_cache_dir() == Path("/home/someone/.cache/koji-indirection")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_cache_dir() == Path("/elsewhere/koji-indirection")


def test_large_files_go_to_var_tmp_unless_tmpdir_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    assert default_work_dir() == Path("/var/tmp")
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert default_work_dir() == Path("/scratch")
    assert Settings().work_dir == Path("/scratch"), "read when settings are made"
