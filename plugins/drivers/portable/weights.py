"""Checkpoint -> model: picks the architecture and the dtype, applies the weight table, builds the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.contracts.driver import ProgressCallback
from pie_plugins.drivers.portable.linear import LinearProduct
from pie_plugins.models.layers.architecture import Architecture, CacheLayout, Model, ModelConfig
from pie_plugins.models.layers.checkpoint import config_origin
from pie_plugins.models.layers.loading import architecture_of, load_weights, open_checkpoint
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
    device: str,
    linear: LinearProduct,
    progress: ProgressCallback,
) -> LoadedModel:
    """Raises LoadError that says which file, key or tensor is wrong."""
    checkpoint = open_checkpoint(path)
    try:
        declaration = architecture_of(checkpoint, architectures)
        architecture: Architecture[Any] = declaration.load()
        config = architecture.config(checkpoint.config, config_origin(checkpoint))
        loaded = load_weights(checkpoint, architecture.weights(config), dtype, device, progress)
    finally:
        checkpoint.close()
    parameters = Parameters(loaded.tensors, linear)
    model = architecture.build(config, parameters)
    parameters.finish()
    return LoadedModel(
        declaration.name, config, architecture.cache_layouts(config), model, f"{loaded.revision}-{dtype}"
    )


def choose_dtype(name: str, device: str) -> torch.dtype:
    """bfloat16 pays only where the processor multiplies it: elsewhere it is emulated and slower than float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return torch.bfloat16 if device != "cpu" or _multiplies_bfloat16() else torch.float32


def _multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities:
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    asked = [
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    return any(ask() for ask in asked if ask is not None)
