"""The output directory: made before all else, and careful with what is in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from koji_indirection.errors import UsageError
from koji_indirection.output import prepare


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def earlier_build(output: Path, *outputs: object) -> None:
    (output / "logs").mkdir(parents=True)
    (output / "logs" / "job.log").write_text("earlier")
    document = {"outputs": [{"name": name} for name in outputs]}
    (output / "manifest.json").write_text(json.dumps(document))


def test_a_new_directory_is_made_with_all_above_it(tmp_path: Path) -> None:
    output = prepare(tmp_path / "a" / "b", force=False)
    assert output == tmp_path / "a" / "b"
    assert names(output) == ["logs"]


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare(Path("out"), force=False) == tmp_path / "out"


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    assert names(prepare(tmp_path, force=False)) == ["logs"]


def test_a_directory_with_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError) as caught:
        prepare(tmp_path, force=False)
    assert caught.value.message == f"the output directory {tmp_path} is not empty"
    assert "--force" in caught.value.hint
    assert names(tmp_path) == ["thesis.txt"]


def test_force_removes_what_an_earlier_build_wrote_and_nothing_else(tmp_path: Path) -> None:
    earlier_build(tmp_path, "boot.iso", "gone-already.iso")
    (tmp_path / "boot.iso").write_text("earlier")
    (tmp_path / "thesis.txt").write_text("years of work")
    prepare(tmp_path, force=True)
    assert names(tmp_path) == ["logs", "thesis.txt"]
    assert names(tmp_path / "logs") == []


@pytest.mark.parametrize("evil", ["../victim", "/etc/hostname-of-nobody", "sub/victim", 7, None])
def test_force_trusts_no_name_in_the_earlier_manifest(tmp_path: Path, evil: object) -> None:
    output = tmp_path / "out"
    earlier_build(output, evil)
    (output / "sub").mkdir()
    victims = [tmp_path / "victim", output / "sub" / "victim"]
    for victim in victims:
        victim.write_text("keep me")
    prepare(output, force=True)
    assert all(victim.exists() for victim in victims)


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"outputs": 5}', '{"outputs": [1]}'])
def test_force_removes_nothing_where_no_build_of_ours_was(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    (tmp_path / "boot.iso").write_text("of nobody knows whom")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "diary.txt").write_text("keep me")
    prepare(tmp_path, force=True)
    assert names(tmp_path) == ["boot.iso", "logs", "manifest.json"]
    assert names(tmp_path / "logs") == ["diary.txt"]


def test_a_file_in_its_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError) as caught:
        prepare(tmp_path / "out", force=False)
    assert caught.value.message.startswith(f"the output directory {tmp_path}/out cannot be used: ")
    assert (tmp_path / "out").read_text() == "a file"


def test_a_directory_that_cannot_be_written_is_said() -> None:
    # /proc takes no new directories, not even root's.
    with pytest.raises(UsageError, match="the output directory /proc/out cannot be used: "):
        prepare(Path("/proc/out"), force=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_without_write_permission_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        prepare(tmp_path, force=False)
