"""Plugins are found through real entry points; one that is broken is named and takes no other down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

import pytest

from pie_core.errors import PluginError
from pie_core.plugins import GROUP, inspect_plugins, load_plugins

GOOD = """
from dataclasses import dataclass
from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.contracts.driver import DriverDeclaration
from pie_core.contracts.media import MediaDeclaration
from pie_core.hookspecs import hookimpl

@dataclass(frozen=True)
class Options:
    pass

def load(request):
    raise RuntimeError("declaring must not load")

@hookimpl
def pie_drivers():
    return [DriverDeclaration({name!r}, "a driver", Options, load, api_version={version})]
"""
MORE = """
@hookimpl
def pie_architectures():
    return [ArchitectureDeclaration("tiny", "an architecture", ("tiny",), load)]

@hookimpl
def pie_media():
    return [MediaDeclaration("eye", "a front-end", ("tiny",), ("image",), load)]
"""

Install = Callable[..., list[EntryPoint]]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs one module of that source as a distribution, and gives the entry points of all installed so."""
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)

    def install(name: str, source: str, module: str | None = None) -> list[EntryPoint]:
        (tmp_path / f"plugin_{name}.py").write_text(source)
        info = tmp_path / f"dist_{name}-2.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: 2.5\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module or f'plugin_{name}'}\n")
        found = (point for dist in distributions(path=[str(tmp_path)]) for point in dist.entry_points)
        return sorted(found, key=lambda point: point.name)

    yield install
    for added in set(sys.modules) - known:
        if added.startswith("plugin_"):
            del sys.modules[added]


def good(name: str = "mine", version: int = 1) -> str:
    return GOOD.format(name=name, version=version)


def test_a_plugin_provides_what_its_hooks_declare(install: Install) -> None:
    registry = load_plugins(install("whole", good() + MORE))
    assert registry.broken == []
    assert registry.driver("mine").summary == "a driver"
    assert list(registry.architectures) == ["tiny"]
    assert list(registry.media) == ["eye"]
    (plugin,) = registry.plugins
    assert (plugin.name, plugin.distribution, plugin.version) == ("whole", "dist-whole", "2.5")
    assert plugin.provides == ("driver mine", "architecture tiny", "media front-end eye")
    assert plugin.load_s > 0


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise ZeroDivisionError('while importing')", "ZeroDivisionError: while importing"),
        (
            "import a_module_that_is_not_there",
            "ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
        ),
        ("def f(:", "SyntaxError"),
        ("x = 1", "declares no driver, architecture or media front-end"),
        (good().replace("def pie_drivers", "def pie_driver"), "pie_driver"),
        (good().replace("def pie_drivers()", "def pie_drivers(surprise)"), "surprise"),
        (good().replace("return [Driver", "raise KeyError('hook')\n    return [Driver"), "KeyError: 'hook'"),
        (good().replace("return [Driver", "return 5\n    return [Driver"), "not iterable"),
        (good().replace("return [Driver", "return ['mine']\n    return [Driver"), "a hook returned str"),
        (good(version=2), "'mine' was written for plugin API 2; this pie has 1"),
    ],
)
def test_a_broken_plugin_is_named_and_takes_no_other_down(install: Install, source: str, cause: str) -> None:
    install("broken", source)
    registry = load_plugins(install("fine", good("other")))
    assert list(registry.drivers) == ["other"]
    (broken,) = registry.broken
    assert (broken.name, broken.distribution) == ("broken", "dist-broken")
    assert cause in broken.cause


def test_an_entry_point_to_nothing_is_a_broken_plugin(install: Install) -> None:
    registry = load_plugins(install("lost", "", module="plugin_nowhere"))
    assert "plugin_nowhere" in registry.broken[0].cause


def test_two_plugins_that_claim_one_name_are_both_named(install: Install) -> None:
    install("first", good("same"))
    with pytest.raises(PluginError) as caught:
        load_plugins(install("second", good("same")))
    message = str(caught.value)
    assert "driver 'same'" in message
    assert "first (dist-first 2.5)" in message
    assert "second (dist-second 2.5)" in message


def test_who_inspects_sees_the_conflict_and_everything_else(install: Install) -> None:
    install("first", good("same"))
    install("broken", "raise ZeroDivisionError('while importing')")
    registry = inspect_plugins(install("second", good("same") + MORE))
    (conflict,) = registry.conflicts
    assert "first (dist-first 2.5) and second (dist-second 2.5)" in conflict
    provided = {plugin.name: plugin.provides for plugin in registry.plugins}
    assert provided == {"first": ("driver same",), "second": ("architecture tiny", "media front-end eye")}
    assert [(plugin.api_version, plugin.module) for plugin in registry.plugins] == [
        (1, "plugin_first"),
        (1, "plugin_second"),
    ]
    (broken,) = registry.broken
    assert (broken.name, broken.version, broken.module) == ("broken", "2.5", "plugin_broken")


def test_a_broken_plugin_is_told_in_the_log(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    load_plugins(install("broken", "raise ZeroDivisionError('while importing')"))
    assert "broken of dist-broken is left out: ZeroDivisionError: while importing" in caplog.text


def test_kinds_have_names_of_their_own(install: Install) -> None:
    source = good("tiny") + MORE.replace('"eye"', '"tiny"')
    registry = load_plugins(install("tinies", source))
    assert list(registry.drivers) == list(registry.architectures) == list(registry.media) == ["tiny"]


def test_an_unknown_driver_is_refused_with_the_known_ones_the_nearest_and_what_broke(
    install: Install,
) -> None:
    install("broken", "raise ZeroDivisionError('while importing')")
    registry = load_plugins(install("fine", good("portable")))
    with pytest.raises(PluginError) as caught:
        registry.driver("portabel")
    message = str(caught.value)
    assert "unknown driver 'portabel': installed are portable; did you mean 'portable'?" in message
    assert "'broken' of dist-broken is broken: ZeroDivisionError: while importing" in message


def test_without_plugins_an_unknown_driver_is_still_explained() -> None:
    with pytest.raises(PluginError, match="installed are none"):
        load_plugins([]).driver("dummy")


def test_the_built_in_plugins_register_through_the_same_entry_points() -> None:
    registry = load_plugins()
    assert registry.broken == []
    assert {"dummy", "portable"} <= registry.drivers.keys()
    assert {"llama", "qwen3"} <= registry.architectures.keys()
    assert "dummy" in registry.media
