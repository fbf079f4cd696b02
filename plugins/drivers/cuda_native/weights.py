"""Checkpoint -> model on the device: picks the architecture, applies the weight table, builds the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.contracts.driver import ProgressCallback
from pie_core.errors import LoadError
from pie_plugins.drivers.cuda_native.linear import Linear
from pie_plugins.drivers.cuda_native.parallel import (
    Ranks,
    SharedLinear,
    SharedParameters,
    share_of_config,
    share_of_tensor,
    share_of_weights,
)
from pie_plugins.drivers.cuda_native.random_weights import draw_weights, outline_weights
from pie_plugins.drivers.cuda_native.read_ahead import ReadAhead, in_memory, pinned
from pie_plugins.models.layers.architecture import (
    Architecture,
    CacheLayout,
    Model,
    ModelConfig,
    PagedLayout,
    position_axes,
    streams,
)
from pie_plugins.models.layers.checkpoint import config_origin, read_json
from pie_plugins.models.layers.loading import (
    architecture_of,
    find_architecture,
    load_weights,
    open_checkpoint,
)
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.weight_table import Entry, WeightTable


@dataclass(frozen=True, slots=True)
class LoadedModel:
    architecture: str
    config: ModelConfig
    layouts: tuple[PagedLayout, ...]
    model: Model
    revision: str


def load_model(
    path: Path,
    architectures: Mapping[str, ArchitectureDeclaration],
    dtype: torch.dtype,
    device: torch.device,
    linear: Linear | SharedLinear,
    ranks: Ranks,
    progress: ProgressCallback,
) -> LoadedModel:
    """Raises LoadError that says which file, key or tensor is wrong. Tensors go to the device one by one, while those
    behind them are read; where ranks share the model, each joins them on the host and takes its own part."""
    checkpoint = ReadAhead(open_checkpoint(path), pinned if device.type == "cuda" else in_memory)

    def place(entry: Entry, name: str, tensor: Tensor) -> Tensor:
        return share_of_tensor(entry, name, tensor, ranks).to(device)

    try:
        declaration = architecture_of(checkpoint, architectures)
        plan = _planned(declaration, checkpoint.config, config_origin(checkpoint), ranks)
        first = str(device) if ranks.size == 1 else "cpu"
        loaded = load_weights(checkpoint, plan.table, dtype, first, progress, place)
    finally:
        checkpoint.close()
    return plan.built(loaded.tensors, linear, f"{loaded.revision}-{dtype}")


def outline_model(
    path: Path,
    architectures: Mapping[str, ArchitectureDeclaration],
    dtype: torch.dtype,
    linear: Linear | SharedLinear,
    ranks: Ranks,
    is_random: bool,
) -> LoadedModel:
    """The model with tensors that have shapes and no content."""
    declaration, values, origin = _described(path, architectures, is_random)
    plan = _planned(declaration, values, origin, ranks)
    outlines = share_of_weights(plan.table, outline_weights(plan.table, dtype), ranks)
    return plan.built(outlines, linear, "")


def _described(
    path: Path, architectures: Mapping[str, ArchitectureDeclaration], is_random: bool
) -> tuple[ArchitectureDeclaration, Mapping[str, Any], str]:
    """What the model is, its configuration, and where that stands."""
    if is_random:
        file = path / "config.json"
        values = read_json(file)
        return find_architecture(str(values.get("model_type")), architectures, str(file)), values, str(file)
    checkpoint = open_checkpoint(path)
    try:
        return architecture_of(checkpoint, architectures), checkpoint.config, config_origin(checkpoint)
    finally:
        checkpoint.close()


def draw_model(
    path: Path,
    architectures: Mapping[str, ArchitectureDeclaration],
    dtype: torch.dtype,
    device: torch.device,
    linear: Linear | SharedLinear,
    ranks: Ranks,
) -> LoadedModel:
    """The model that config.json describes, with random weights."""
    declaration, values, origin = _described(path, architectures, is_random=True)
    plan = _planned(declaration, values, origin, ranks)
    drawn = share_of_weights(plan.table, draw_weights(plan.table, dtype, device), ranks)
    return plan.built(drawn, linear, f"random-{origin}-{dtype}")


@dataclass(frozen=True, slots=True)
class _Plan:
    """One rank's share of a model that this driver can run, before its weights are there."""

    name: str
    architecture: Architecture[Any]
    config: ModelConfig  # of the whole
    share: Any
    layouts: tuple[PagedLayout, ...]
    table: WeightTable  # of the whole

    def built(self, tensors: dict[str, Tensor], linear: Linear | SharedLinear, revision: str) -> LoadedModel:
        parameters = (
            SharedParameters(tensors, linear)
            if isinstance(linear, SharedLinear)
            else Parameters(tensors, linear)
        )
        model = self.architecture.build(self.share, parameters)
        parameters.finish()
        return LoadedModel(self.name, self.config, self.layouts, model, revision)


def _planned(
    declaration: ArchitectureDeclaration, values: Mapping[str, Any], origin: str, ranks: Ranks
) -> _Plan:
    """Raises LoadError where this driver cannot run such a model: nothing has been read yet."""
    architecture: Architecture[Any] = declaration.load()
    config = architecture.config(values, origin)
    _check_rows(declaration.name, config)
    share = share_of_config(config, ranks)
    layouts = _plain_layouts(declaration.name, architecture.cache_layouts(share))
    return _Plan(declaration.name, architecture, config, share, layouts, architecture.weights(config))


def _check_rows(architecture: str, config: ModelConfig) -> None:
    """One token each, at one position."""
    for what, seen in (("tokens", streams(config)), ("positions", position_axes(config))):
        if seen > 1:
            raise LoadError(
                f"driver cuda_native: architecture {architecture!r} has {what} of {seen} columns, this driver computes"
                " with one: use the driver portable"
            )


def _plain_layouts(architecture: str, layouts: tuple[CacheLayout, ...]) -> tuple[PagedLayout, ...]:
    plain = tuple(layout for layout in layouts if isinstance(layout, PagedLayout) and layout.window is None)
    for layout in layouts:
        if layout not in plain:
            raise LoadError(
                f"driver cuda_native: architecture {architecture!r} keeps group {layout.name!r} as {layout}; this"
                " driver has kernels for full attention over keys and values only: use the driver portable"
            )
    return plain
