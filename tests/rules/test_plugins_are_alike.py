"""Plugins use the core's public names, never each other, and are registered as a third party's would be."""

from __future__ import annotations

import tomllib

from tests.rules.source_tree import ROOT, imports, module_of, modules

PUBLIC = tuple(f"pie_core.{part}" for part in ("contracts", "errors", "ids", "hookspecs", "testing"))

# What several plugins may use: parts of the tree that declare nothing themselves.
SHARED = ("plugins.models.layers", "plugins.models.weight_table")


def plugin_of(module: str) -> str:
    """plugins.drivers.portable.sampler -> plugins.drivers.portable: the unit that must stand alone."""
    return ".".join(module.split(".")[:3])


def on_disk(imported: str) -> str:
    return imported.replace("pie_plugins", "plugins", 1)


def test_plugins_import_only_public_names_of_the_core() -> None:
    private = [
        str(each)
        for each in imports("plugins")
        if each.imported.split(".")[0] == "pie_core" and not each.imported.startswith(PUBLIC)
    ]
    assert not private


def test_no_plugin_imports_another() -> None:
    strangers = []
    for each in imports("plugins"):
        target = module_of(on_disk(each.imported), "plugins")
        if target is None or target.startswith(SHARED):
            continue
        if plugin_of(target) != plugin_of(each.importer):
            strangers.append(str(each))
    assert not strangers


def test_plugins_are_imported_by_one_name() -> None:
    everywhere = [*imports("pie_core"), *imports("plugins"), *imports("tests"), *imports("benchmarks")]
    assert not [str(each) for each in everywhere if each.imported.split(".")[0] == "plugins"]


def test_every_built_in_plugin_is_an_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    registered = {on_disk(target) for target in project["entry-points"]["pie.plugins"].values()}
    hooked = {each.importer for each in imports("plugins") if each.imported == "pie_core.hookspecs.hookimpl"}
    assert hooked == registered
    assert registered <= set(modules("plugins"))
