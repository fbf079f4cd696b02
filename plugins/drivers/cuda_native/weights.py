"""Checkpoint -> model on the device: picks the architecture, applies the weight table, builds the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.contracts.driver import ProgressCallback
from pie_core.errors import LoadError
from pie_plugins.drivers.cuda_native.linear import Linear
from pie_plugins.models.layers.architecture import Architecture, CacheLayout, Model, ModelConfig
from pie_plugins.models.layers.checkpoint import Checkpoint
from pie_plugins.models.layers.loading import load_weights, open_checkpoint
from pie_plugins.models.layers.parameters import Parameters


@dataclass(frozen=True, slots=True)
class LoadedModel:
    architecture: str
    config: ModelConfig
    layouts: tuple[CacheLayout, ...]
    model: Model
    revision: str


def load_model(
    path: Path,
    architectures: Mapping[str, ArchitectureDeclaration],
    dtype: torch.dtype,
    device: torch.device,
    linear: Linear,
    progress: ProgressCallback,
) -> LoadedModel:
    """Raises LoadError that says which file, key or tensor is wrong. Tensors go to the device one by one."""
    checkpoint = open_checkpoint(path)
    try:
        declaration = _architecture(checkpoint, architectures)
        architecture: Architecture[Any] = declaration.load()
        config = architecture.config(checkpoint.config, _config_origin(checkpoint))
        loaded = load_weights(checkpoint, architecture.weights(config), dtype, str(device), progress)
    finally:
        checkpoint.close()
    parameters = Parameters(loaded.tensors, linear)
    model = architecture.build(config, parameters)
    parameters.finish()
    layouts = architecture.cache_layouts(config)
    _check_layouts(declaration.name, layouts)
    return LoadedModel(declaration.name, config, layouts, model, f"{loaded.revision}-{dtype}")


def _check_layouts(architecture: str, layouts: tuple[CacheLayout, ...]) -> None:
    for layout in layouts:
        if layout.window is not None:
            raise LoadError(
                f"driver cuda_native: architecture {architecture!r} keeps group {layout.name!r} in a window of"
                f" {layout.window} rows; this driver has kernels for full attention only: use the driver portable"
            )


def _architecture(
    checkpoint: Checkpoint, architectures: Mapping[str, ArchitectureDeclaration]
) -> ArchitectureDeclaration:
    kind = checkpoint.kind
    for declaration in architectures.values():
        known = declaration.model_types if checkpoint.form == "hf" else declaration.gguf_architectures
        if kind in known:
            return declaration
    raise LoadError(
        f"{checkpoint.origin}: no installed architecture reads {kind!r}; installed are"
        f" {', '.join(sorted(architectures)) or 'none'}"
    )


def _config_origin(checkpoint: Checkpoint) -> str:
    form = "/config.json" if checkpoint.form == "hf" else " (metadata)"
    return f"{checkpoint.origin}{form}"
