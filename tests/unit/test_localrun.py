"""Builds on this machine, up to where the engine begins: templates from git, and nothing else."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import json
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from koji_indirection.errors import BuilderFault, BuildFailed, UsageError
from koji_indirection.localrun import Here, Hub, LocalOrder, run, template_in
from koji_indirection.spec import BuildSpec
from koji_indirection.taskspec import TaskSpec

OLD, NEW = (
    f"<template><commands><command name='one'>{text}</command></commands></template>".encode()
    for text in ("old", "new")
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Not in the tests' output."""


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    done = subprocess.run(
        ["git", *identity, "-C", str(directory), *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


class Repository:
    """With a.tdl and t/b.tdl, in an old commit that has a tag, and a new one on main."""

    def __init__(self, directory: Path, url: str) -> None:
        self.url = f"git+{url}/r.git"
        work = directory / "work"
        (work / "t").mkdir(parents=True)
        git(work, "init", "-q", "-b", "main")
        (work / "t/link.tdl").symlink_to("/etc/passwd")
        for text in (OLD, NEW):
            (work / "a.tdl").write_bytes(text)
            (work / "t/b.tdl").write_bytes(text)
            git(work, "add", ".")
            git(work, "commit", "-qm", "Change the template")
            if text == OLD:
                git(work, "tag", "v1")
        self.old, self.new = git(work, "rev-parse", "v1"), git(work, "rev-parse", "main")
        git(work, "branch", "other", "v1")
        bare = directory / "www/r.git"
        git(directory, "clone", "-q", "--bare", str(work), str(bare))
        git(bare, "update-server-info")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    directory = tmp_path_factory.mktemp("scm")
    (directory / "www").mkdir()
    handler = functools.partial(Quiet, directory=str(directory / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Repository(directory, f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("ref", ["main", "origin/main", "v1", "other", "old", "old[:10]"])
def test_a_template_comes_from_a_branch_a_tag_or_a_commit(
    repository: Repository, tmp_path: Path, ref: str
) -> None:
    ref = {"old": repository.old, "old[:10]": repository.old[:10]}.get(ref, ref)
    text, source = template_in(f"{repository.url}#{ref}", "a.tdl", tmp_path)
    new = ref.endswith("main")
    assert text == (NEW if new else OLD)
    assert source == f"{repository.url}#{repository.new if new else repository.old}"


def test_the_url_may_name_a_directory_of_the_repository(
    repository: Repository, tmp_path: Path
) -> None:
    text, source = template_in(f"{repository.url}?t#main", "b.tdl", tmp_path)
    assert text == NEW
    assert source == f"{repository.url}?t#{repository.new}"


@pytest.mark.parametrize(
    ("directory", "name", "message"),
    [
        ("", "none.tdl", "there is no template none.tdl in the checkout"),
        ("", "t/link.tdl", "leads out of its checkout"),
        ("?../../../../../etc", "passwd", "leads out of its checkout"),
        ("", ".git/config", "leads out of its checkout"),
    ],
)
def test_nothing_but_the_repositorys_own_files_is_read(
    repository: Repository, tmp_path: Path, directory: str, name: str, message: str
) -> None:
    with pytest.raises(BuildFailed, match=message):
        template_in(f"{repository.url}{directory}#main", name, tmp_path)


def test_what_git_cannot_get_is_told_in_its_words(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"git cannot check out git\+http://.*#nowhere: fatal: "):
        template_in(f"{repository.url}#nowhere", "a.tdl", tmp_path / "1")
    missing = repository.url.replace("r.git", "missing.git")
    with pytest.raises(BuildFailed, match=r"missing\.git#main: fatal: .*not found"):
        template_in(f"{missing}#main", "a.tdl", tmp_path / "2")


def test_a_ref_is_never_an_option_of_git(repository: Repository, tmp_path: Path) -> None:
    # With --force git would fetch main.
    with pytest.raises(BuildFailed, match="git cannot check out"):
        template_in(f"{repository.url}#origin/--force", "a.tdl", tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "file:///srv/r.git#main",
        "git+file:///srv/r.git#main",
        "ext::sh -c id#main",
        "git+ext://sh/x#main",
        "svn://h/r#1",
        "git+http://me:secret@h/r#main",
        "git+https:///r.git#main",
        "git+https://h/r.git",
    ],
)
def test_other_urls_never_reach_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="cannot be checked out here") as caught:
        template_in(url, "a.tdl", tmp_path)
    assert "secret" not in str(caught.value)


def test_a_server_cannot_send_git_to_local_files(tmp_path: Path, repository: Repository) -> None:
    """As url.insteadOf does, or a server that redirects."""
    config = tmp_path / "gitconfig"
    config.write_text(f'[url "file://{tmp_path}/"]\n\tinsteadOf = http://elsewhere.example/\n')
    work = tmp_path / "r.git"
    work.mkdir()
    git(work, "init", "-q")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", str(config))
        with pytest.raises(BuildFailed, match="transport 'file' not allowed"):
            template_in("git+http://elsewhere.example/r.git#main", "a.tdl", tmp_path / "checkout")


def order(arch: str) -> LocalOrder:
    def find_inputs(*_: object) -> None:
        raise AssertionError("nothing may be looked for")

    spec = TaskSpec.from_dict(
        {
            "target": "images",
            "name": "live",
            "version": "1",
            "arches": [arch],
            "input_image": "in-1-1",
            "utility_image": "in-1-1",
            "template": "live.tdl",
            "template_scm": "git+https://h/r#main",
        }
    )
    return LocalOrder(spec, arch, BuildSpec(), find_inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", ["libvirt", "guestfs", "rich"])
def test_a_machine_without_the_engine_says_so_before_anything_is_fetched(
    tmp_path: Path, module: str
) -> None:
    program = f"""
import sys
sys.modules[{module!r}] = None
from koji_indirection import errors, localrun
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_localrun import order
from pathlib import Path
try:
    localrun.run(localrun.Hub(None, None, None), localrun.Here(Path({str(tmp_path / "out")!r})),
                 order("x86_64"), quiet=False, as_json=False)
except errors.BuilderFault as fault:
    print(fault.one_line())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.startswith("builder fault: ")
    assert len(done.stdout.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_guest_of_another_machine_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("libvirt")
    pytest.importorskip("guestfs")
    here = Here(tmp_path / "out")
    with pytest.raises((UsageError, BuilderFault), match="cannot run a guest of arch s390x"):
        run(Hub(None, None, None), here, order("s390x"), quiet=True, as_json=False)


def test_json_tells_of_this_run_and_not_of_an_earlier_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("libvirt")
    pytest.importorskip("guestfs")
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text('{"outcome": "built", "outputs": []}')

    def find_inputs(*_: object) -> None:
        raise BuildFailed("the image is gone", "name another one")

    asked = dataclasses.replace(order(platform.machine()), find_inputs=find_inputs)
    here = Here(out, force=True, work_dir=tmp_path / "work", cache_dir=tmp_path / "cache")
    with pytest.raises(BuildFailed):
        run(Hub(None, None, None), here, asked, quiet=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told == {"outcome": "build failed", "reason": "the image is gone (name another one)"}
    assert (out / "manifest.json").exists(), "it is replaced when a build begins, and not before"
    assert list((tmp_path / "work").iterdir()) == []
