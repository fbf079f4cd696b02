"""Every hook of pie. Hooks declare; what they declare is loaded on use, and per-token work goes through methods."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.contracts.driver import DriverDeclaration
from pie_core.contracts.media import MediaDeclaration

PROJECT = "pie"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def pie_drivers() -> Sequence[DriverDeclaration]:  # type: ignore[empty-body]
    """The drivers that this plugin provides."""


@hookspec
def pie_architectures() -> Sequence[ArchitectureDeclaration]:  # type: ignore[empty-body]
    """The model architectures that this plugin provides."""


@hookspec
def pie_media() -> Sequence[MediaDeclaration]:  # type: ignore[empty-body]
    """The media front-ends that this plugin provides."""
