"""What a model needs of memory, from its config.json alone: parameters, weights in several formats, cache, GPUs.

Sizes follow from the architecture's own weight table and cache groups, so they are those of the tensors that a driver
loads: layers that predict further tokens, towers and other tensors left aside are not counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.errors import LoadError

GIB = 2**30
GPU_GIB = 139  # of an H200
RESERVED_GIB = 10  # of each GPU: activations, graphs, the runtime
GPU_COUNTS = (1, 8)
BF16, FLOAT32 = 2, 4
# Bytes of a value in a layer's matrices; everything else stays in bf16. int4 has a bf16 scale for each 32 values.
FORMATS: Mapping[str, float] = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5 + BF16 / 32}
# Says how checkpoints are stored, which a plan is not about.
STORAGE_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class CachePlan:
    name: str
    bytes_per_token: int  # bf16; 0 for recurrent state
    window: int | None  # tokens behind which rows are given up
    bytes_per_context: int  # recurrent state


@dataclass(frozen=True, slots=True)
class ModelPlan:
    architecture: str
    num_parameters: int
    weight_bytes: Mapping[str, int]  # by format
    caches: tuple[CachePlan, ...]

    @property
    def bytes_per_token(self) -> int:
        """Of groups that grow with the context."""
        return sum(cache.bytes_per_token for cache in self.caches if cache.window is None)

    @property
    def bytes_per_context(self) -> int:
        """Of what each context keeps whatever its length: state, and rows inside windows."""
        return sum(
            cache.bytes_per_context + cache.bytes_per_token * (cache.window or 0) for cache in self.caches
        )

    def tokens_that_fit(self, form: str, num_gpus: int) -> int | None:
        """Of one context beside the weights, both spread evenly over the GPUs; None: the weights do not fit."""
        room = num_gpus * (GPU_GIB - RESERVED_GIB) * GIB - self.weight_bytes[form] - self.bytes_per_context
        return room // max(self.bytes_per_token, 1) if room >= 0 else None


def plan_model(path: Path, architectures: Mapping[str, ArchitectureDeclaration]) -> ModelPlan:
    """`path` is a config.json or a folder that has one. Raises LoadError."""
    file = path / "config.json" if path.is_dir() else path
    values = {key: value for key, value in _read(file).items() if key not in STORAGE_KEYS}
    text = values.get("text_config")
    if isinstance(text, dict):
        values["text_config"] = {key: value for key, value in text.items() if key not in STORAGE_KEYS}
    declaration = architecture_of(values, file, architectures)
    architecture = declaration.load()
    config = architecture.config(values, str(file))
    sources = list(architecture.weights(config).sources())
    return ModelPlan(
        architecture=declaration.name,
        num_parameters=sum(prod(source.shape) for source in sources),
        weight_bytes={
            form: round(sum(_weight_bytes(source, size) for source in sources))
            for form, size in FORMATS.items()
        },
        caches=tuple(_cache_plan(layout) for layout in architecture.cache_layouts(config)),
    )


def architecture_of(
    values: Mapping[str, Any], origin: Path, architectures: Mapping[str, ArchitectureDeclaration]
) -> ArchitectureDeclaration:
    kind = values.get("model_type")
    for declaration in architectures.values():
        if kind in declaration.model_types:
            return declaration
    known = sorted(kind for each in architectures.values() for kind in each.model_types)
    raise LoadError(
        f"{origin}: no installed architecture reads model_type {kind!r}; known are {', '.join(known)}"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise LoadError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise LoadError(f"{file}: holds a {type(values).__name__}, expected an object")
    return values


def _weight_bytes(source: Any, matrix_bytes: float) -> float:
    """Of one tensor of a weight table; embeddings, heads and vectors are not quantized."""
    count: int = prod(source.shape)
    if source.keep_float32:
        return FLOAT32 * count
    is_table = "embed" in source.hf or "lm_head" in source.hf
    return count * (matrix_bytes if len(source.shape) > 1 and not is_table else BF16)


def _cache_plan(layout: Any) -> CachePlan:
    """Of a cache layout: rows by token, or a state by context."""
    if hasattr(layout, "parts"):
        sizes = [prod(part.shape) * (FLOAT32 if part.keep_float32 else BF16) for part in layout.parts]
        return CachePlan(layout.name, 0, None, layout.num_layers * sum(sizes))
    return CachePlan(layout.name, layout.num_layers * prod(layout.row) * BF16, layout.window, 0)
