"""Per-layer embeddings: besides its embedding, a token has a small vector for every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pie_plugins.models.layers.build import build_norm
from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.step import Step


@dataclass(frozen=True, slots=True, eq=False)
class PerLayerEmbedding:
    """The vectors of all layers: what the token looks up, and what its embedding is projected to."""

    table: Tensor  # [vocab, layers * size]
    projection: Linear  # hidden to layers * size
    norm: RMSNorm  # over size
    size: int

    def __call__(self, embedded: Tensor, step: Step) -> Tensor:
        """[T, hidden] to [layers, T, size]"""
        projected = self.projection(embedded, step).mul_(embedded.shape[1] ** -0.5)
        projected = self.norm(projected.view(len(embedded), -1, self.size), step)
        scale = torch.tensor(math.sqrt(self.size), dtype=embedded.dtype)
        looked_up = step.embed(self.table).mul_(float(scale)).view_as(projected)
        return looked_up.add_(projected).mul_(2**-0.5).transpose(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class PerLayerInput:
    """How one layer takes its vector in: as a gate of a projection down and up again."""

    gate: Linear
    projection: Linear
    norm: RMSNorm

    def __call__(self, x: Tensor, side: Tensor, step: Step) -> Tensor:
        gated = functional.gelu(self.gate(x, step), approximate="tanh").mul_(side)
        return self.norm(self.projection(gated, step), step)


def build_per_layer_embedding(parameters: Parameters, size: int, norm_eps: float) -> PerLayerEmbedding:
    return PerLayerEmbedding(
        table=parameters.tensor("per_layer.table"),
        projection=parameters.linear("per_layer.projection"),
        norm=build_norm(parameters, "per_layer.norm", norm_eps),
        size=size,
    )


def build_per_layer_input(parameters: Parameters, name: str, norm_eps: float) -> PerLayerInput:
    return PerLayerInput(
        gate=parameters.linear(f"{name}.per_layer_gate"),
        projection=parameters.linear(f"{name}.per_layer_projection"),
        norm=build_norm(parameters, f"{name}.per_layer_norm", norm_eps),
    )
