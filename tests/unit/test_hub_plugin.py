"""The hub plugin without a hub: it loads whatever is missing beside Koji, and says what is.

What it decides is tested on a real hub, in tests/koji/test_hub.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

koji = pytest.importorskip("koji", reason="the library koji is not installed")

PLUGIN = Path(__file__).parents[2] / "hub" / "indirection.py"


class Session:
    user_id = 1

    def assertPerm(self, name: str) -> None:
        assert name == "image"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loaded as the hub loads it, from its file, with nothing in kojihub."""
    import koji.tasks
    from koji.context import context

    # koji.context is per thread, and empty outside of a request.
    monkeypatch.setattr(context, "session", Session(), raising=False)
    monkeypatch.setitem(sys.modules, "kojihub", ModuleType("kojihub"))
    monkeypatch.setattr(koji.tasks, "LEGACY_SIGNATURES", dict(koji.tasks.LEGACY_SIGNATURES))
    return _load()


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("hub_plugin_under_test", PLUGIN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "koji_indirection":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "koji_indirection", None)


def test_it_exports_one_call_to_users_and_one_to_hosts(plugin: Any) -> None:
    exported = {
        getattr(value, "export_alias", name)
        for name, value in vars(plugin).items()
        if getattr(value, "exported", False)
    }
    assert exported == {"indirectionBuild", "host.recordIndirectionInputs"}


@pytest.mark.usefixtures("_no_library")
def test_without_the_library_it_loads_and_its_call_says_what_to_install(plugin: Any) -> None:
    with pytest.raises(koji.GenericError, match=r"koji_indirection .*install it on the hub"):
        plugin.indirectionBuild({})


def test_without_jsonschema_its_call_says_what_to_install(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from koji_indirection import spec, taskspec

    monkeypatch.setitem(sys.modules, "jsonschema", None)
    spec._validator.cache_clear()
    taskspec._validator.cache_clear()
    whole = dict.fromkeys(taskspec.SCHEMA["required"], "x")
    with pytest.raises(koji.GenericError, match="install python3-jsonschema") as caught:
        plugin.indirectionBuild(whole)
    assert not isinstance(caught.value, koji.ParameterError), "it is not the user's fault"


def test_a_wrong_field_is_a_parameter_error_that_names_it(plugin: Any) -> None:
    with pytest.raises(koji.ParameterError, match="task spec: target is missing"):
        plugin.indirectionBuild({})


def test_koji_can_name_the_parameters_of_both_tasks(plugin: Any) -> None:
    import koji.tasks

    parse = koji.tasks.parse_task_params
    assert parse("indirectionBuild", [{"name": "live"}, "images", {"scratch": True}]) == {
        "spec": {"name": "live"},
        "target": "images",
        "opts": {"scratch": True},
    }
    assert parse("indirectionBuildArch", [{}, "x86_64", "live-41-1", {"a": 1}]) == {
        "spec": {},
        "arch": "x86_64",
        "nvr": "live-41-1",
        "pinned": {"a": 1},
    }
    assert plugin.METHOD == "indirectionBuild"


def test_the_settings_are_the_defaults_where_there_is_no_file(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plugin, "CONFIG_FILE", str(tmp_path / "none.conf"))
    assert plugin._settings() == {"channel": "image"}


def test_the_sample_file_has_every_setting_with_its_default(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = PLUGIN.parents[1] / "hub" / "indirection.conf"
    monkeypatch.setattr(plugin, "CONFIG_FILE", str(sample))
    assert plugin._settings() == plugin.DEFAULTS
    assert all(f"\n{key} = " in sample.read_text() for key in plugin.DEFAULTS)


def test_a_setting_that_is_changed_counts_at_once(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "indirection.conf"
    monkeypatch.setattr(plugin, "CONFIG_FILE", str(file))
    for channel in ("one", "two"):
        file.write_text(f"[indirection]\nchannel = {channel}\n")
        assert plugin._settings() == {"channel": channel}


@pytest.mark.parametrize("text", ["channel = x\n", "[indirection]\nother = 1\n", "[x]\na = 1\n"])
def test_a_file_with_mistakes_is_an_error_that_names_the_file(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "indirection.conf"
    file.write_text(text)
    monkeypatch.setattr(plugin, "CONFIG_FILE", str(file))
    with pytest.raises(koji.GenericError, match=r"indirection\.conf"):
        plugin._settings()


def test_an_arch_is_looked_for_among_those_of_the_build_tag(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from koji.context import context

    config = {"name": "f41-build", "arches": "x86_64 i686"}
    handlers = SimpleNamespace(call=lambda _name, _tag: config)
    monkeypatch.setattr(context, "handlers", handlers, raising=False)
    target = {"name": "f41", "build_tag": 1}
    plugin._check_arches(SimpleNamespace(arches=("x86_64", "i386")), target)
    with pytest.raises(koji.ParameterError, match=r"'s390x'.*x86_64, i686"):
        plugin._check_arches(SimpleNamespace(arches=("s390x",)), target)
