"""Imports point one way along the flow of a request; the microkernel knows no plugin and no tensor library."""

from __future__ import annotations

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.rules.source_tree import ROOT, Import, imports, module_of, modules

# From the edge inwards. A module imports its own layer and those below it, never one above.
LAYERS = (
    {"testing"},  # the contract suites: they stand outside and look at everything
    {"__main__", "cli"},
    {"server", "client", "offline"},
    {"app"},
    {"processes"},
    {"sandbox", "host_api", "guests", "programs", "program_store", "program_artifact", "manifest"},
    {"text"},
    {"engine", "scheduler"},
    {"kv_pages"},
    {"models", "config"},
    {"plugins"},
    {"hookspecs"},
    {"contracts"},
    {"paths", "resources", "telemetry"},
    {"errors", "ids", "naming"},
)

HEAVY = ("torch", "transformers", "vllm", "sglang", "tensorrt_llm", "flashinfer")


def layer(module: str) -> int:
    part = module.split(".")[1]
    places = [depth for depth, parts in enumerate(LAYERS) if part in parts]
    assert places, f"{module}: say in LAYERS where pie_core/{part} stands in the flow"
    return places[0]


def core_imports() -> list[tuple[Import, str]]:
    """Imports of one core module by another, without those of the package itself (its version)."""
    found = [(each, module_of(each.imported, "pie_core")) for each in imports("pie_core")]
    return [(each, target) for each, target in found if target and "." in target and "." in each.importer]


def test_imports_point_one_way_along_the_flow() -> None:
    backwards = [str(each) for each, target in core_imports() if layer(target) < layer(each.importer)]
    assert not backwards


def test_no_module_is_on_an_import_cycle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules("pie_core")}
    for each, target in core_imports():
        inside = target == each.importer or each.importer.startswith(f"{target}.")
        if not inside and not each.for_types:
            graph[each.importer].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_the_core_names_no_plugin_and_no_tensor_library() -> None:
    forbidden = {*HEAVY, "plugins", "pie_plugins"}
    assert not [str(each) for each in imports("pie_core") if each.imported.split(".")[0] in forbidden]


def test_importing_the_whole_core_loads_no_plugin_and_no_tensor_library() -> None:
    names = [name for name in modules("pie_core") if not name.endswith("__main__")]
    assert loaded_by(names) == []


def test_importing_every_plugin_declaration_loads_no_tensor_library() -> None:
    loading = "from pie_core.plugins import load_plugins; r = load_plugins(); assert not r.broken, r.broken"
    assert loaded_by([], loading, watched=HEAVY) == []


def loaded_by(
    names: list[str], code: str = "", watched: tuple[str, ...] = (*HEAVY, "pie_plugins")
) -> list[str]:
    """Which of the watched packages a fresh interpreter has loaded after importing these modules."""
    lines = [
        "import importlib, sys",
        f"for name in {names!r}: importlib.import_module(name)",
        code,
        f"print(*(name for name in {watched!r} if name in sys.modules))",
    ]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()
