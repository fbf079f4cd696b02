"""Finds the plugins of the `pie.plugins` entry points, loads each apart from the others, lists what they provide.

A plugin that fails to import or declares nonsense is kept as a `BrokenPlugin`: it is named wherever its name is asked
for, and never takes the others down.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from time import perf_counter
from typing import Any, Protocol, TypeVar

import pluggy

from pie_core import hookspecs
from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.contracts.driver import API_VERSION, DriverDeclaration
from pie_core.contracts.media import MediaDeclaration
from pie_core.errors import PluginError

GROUP = "pie.plugins"

_log = logging.getLogger(__name__)


class _Declaration(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def api_version(self) -> int: ...


D = TypeVar("D", bound=_Declaration)


@dataclass(frozen=True, slots=True)
class LoadedPlugin:
    name: str
    distribution: str
    version: str
    provides: tuple[str, ...]  # "driver portable", "architecture llama", …
    load_s: float
    module: str = ""
    api_version: int = API_VERSION  # that it was written for


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    name: str
    distribution: str
    cause: str
    version: str = "?"
    module: str = ""


@dataclass(slots=True)
class PluginRegistry:
    """What all plugins declare, by name."""

    drivers: dict[str, DriverDeclaration] = field(default_factory=dict)
    architectures: dict[str, ArchitectureDeclaration] = field(default_factory=dict)
    media: dict[str, MediaDeclaration] = field(default_factory=dict)
    plugins: list[LoadedPlugin] = field(default_factory=list)
    broken: list[BrokenPlugin] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)  # one sentence for each name that two plugins claim

    def driver(self, name: str) -> DriverDeclaration:
        """Raises PluginError that lists the known names and whatever broke."""
        if name in self.drivers:
            return self.drivers[name]
        raise PluginError(_unknown("driver", name, self.drivers, self.broken))


def load_plugins(points: Iterable[EntryPoint] | None = None) -> PluginRegistry:
    """Every installed plugin; broken ones are told in the log. Raises PluginError when two plugins claim one name."""
    registry = inspect_plugins(points)
    if registry.conflicts:
        raise PluginError("; ".join(registry.conflicts))
    for broken in registry.broken:
        _log.warning("the plugin %s of %s is left out: %s", broken.name, broken.distribution, broken.cause)
    return registry


def inspect_plugins(points: Iterable[EntryPoint] | None = None) -> PluginRegistry:
    """Like `load_plugins`, for those who want to see what is wrong: the first plugin to claim a name has it."""
    registry = PluginRegistry()
    owners: dict[tuple[str, str], str] = {}
    for point in entry_points(group=GROUP) if points is None else points:
        _load_one(point, registry, owners)
    return registry


def _load_one(point: EntryPoint, registry: PluginRegistry, owners: dict[tuple[str, str], str]) -> None:
    distribution = point.dist.name if point.dist else "?"
    version = point.dist.version if point.dist else "?"
    started = perf_counter()
    try:
        declared = _declarations(point)
    except Exception as error:  # a third party's code may raise anything; it must not take the others down
        cause = f"{type(error).__name__}: {error}"
        registry.broken.append(BrokenPlugin(point.name, distribution, cause, version, point.value))
        return
    provides = []
    for kind, table, declaration in _sorted_by_kind(declared, registry):
        conflict = _claim(owners, kind, declaration.name, f"{point.name} ({distribution} {version})")
        if conflict is not None:
            registry.conflicts.append(conflict)
            continue
        table[declaration.name] = declaration
        provides.append(f"{kind} {declaration.name}")
    load_s = perf_counter() - started
    written_for = max(declaration.api_version for declaration in declared)
    registry.plugins.append(
        LoadedPlugin(point.name, distribution, version, tuple(provides), load_s, point.value, written_for)
    )


def _declarations(point: EntryPoint) -> list[Any]:
    """One plugin's declarations, checked: its hooks run in a manager of their own, so a fault has one culprit."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(point.load(), name=point.name)
    manager.check_pending()
    hooks = (manager.hook.pie_drivers, manager.hook.pie_architectures, manager.hook.pie_media)
    declared = [declaration for hook in hooks for part in hook() for declaration in part]
    if not declared:
        raise PluginError(
            f"plugin {point.name!r} ({point.value}) declares no driver, architecture or media front-end"
        )
    for declaration in declared:
        _check(declaration)
    return declared


def _check(declaration: Any) -> None:
    if not isinstance(declaration, DriverDeclaration | ArchitectureDeclaration | MediaDeclaration):
        raise PluginError(
            f"a hook returned {type(declaration).__name__}; expected a DriverDeclaration, ArchitectureDeclaration or"
            " MediaDeclaration of pie_core.contracts"
        )
    if declaration.api_version != API_VERSION:
        raise PluginError(
            f"{declaration.name!r} was written for plugin API {declaration.api_version}; this pie has {API_VERSION}"
        )


def _sorted_by_kind(
    declared: Sequence[Any], registry: PluginRegistry
) -> list[tuple[str, dict[str, Any], Any]]:
    tables: dict[type, tuple[str, dict[str, Any]]] = {
        DriverDeclaration: ("driver", registry.drivers),
        ArchitectureDeclaration: ("architecture", registry.architectures),
        MediaDeclaration: ("media front-end", registry.media),
    }
    return [(*tables[type(declaration)], declaration) for declaration in declared]


def _claim(owners: dict[tuple[str, str], str], kind: str, name: str, plugin: str) -> str | None:
    """The sentence that names both, should another plugin have the name already."""
    other = owners.setdefault((kind, name), plugin)
    if other == plugin:
        return None
    return f"{kind} {name!r} is claimed by both {other} and {plugin}; uninstall one of them"


def _unknown(kind: str, name: str, known: Mapping[str, object], broken: Sequence[BrokenPlugin]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    causes = "".join(f"; plugin {b.name!r} of {b.distribution} is broken: {b.cause}" for b in broken)
    return f"unknown {kind} {name!r}: installed are {', '.join(sorted(known)) or 'none'}{hint}{causes}"
