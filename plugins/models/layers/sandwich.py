"""A decoder whose parts have norms on both sides, the second one in front of the residual sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pie_plugins.models.layers.decoder import Part
from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.moe import Experts
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.per_layer_embedding import PerLayerEmbedding, PerLayerInput
from pie_plugins.models.layers.router import ScaledRouter
from pie_plugins.models.layers.step import Step


@dataclass(frozen=True, slots=True)
class NormedPart:
    """part(norm(x)): a part that reads the residual stream itself."""

    norm: RMSNorm
    part: Part

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return self.part(self.norm(x, step), step)


@dataclass(frozen=True, slots=True, eq=False)
class MlpBesideExperts:
    """norm(mlp(norm(x))) + norm(experts(norm(x))); the router looks at x itself."""

    mlp: NormedPart
    mlp_norm: RMSNorm
    router: ScaledRouter
    experts: Experts
    experts_input_norm: RMSNorm
    experts_norm: RMSNorm

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        plain = self.mlp_norm(self.mlp(x, step), step)
        mixed = self.experts(self.experts_input_norm(x, step), self.router(x), step)
        return plain.add_(self.experts_norm(mixed, step))


@dataclass(frozen=True, slots=True, eq=False)
class SandwichLayer:
    """x + norm(mixer(x)), then x + norm(feed_forward(x)), then the per-layer input, all times a scalar."""

    mixer: Part
    mixer_norm: RMSNorm
    feed_forward: Part
    feed_forward_norm: RMSNorm
    per_layer: PerLayerInput | None
    scalar: Tensor  # [1]

    def __call__(self, x: Tensor, side: Tensor | None, step: Step) -> Tensor:
        x = x.add_(self.mixer_norm(self.mixer(x, step), step))
        x = x.add_(self.feed_forward_norm(self.feed_forward(x, step), step))
        if self.per_layer is not None and side is not None:
            x = x.add_(self.per_layer(x, side, step))
        return x.mul_(self.scalar)


@dataclass(frozen=True, slots=True, eq=False)
class SandwichDecoder:
    """Scaled embedding, layers, final norm, and a head whose logits are capped softly."""

    embedding: Tensor  # [vocab, hidden]
    per_layer: PerLayerEmbedding | None
    layers: tuple[SandwichLayer, ...]
    norm: RMSNorm
    head: Linear
    soft_cap: float | None

    def hidden(self, step: Step) -> Tensor:
        x = scaled_embedding(self.embedding, step)
        sides = None if self.per_layer is None else self.per_layer(x, step)  # [layers, T, size]
        for place, layer in enumerate(self.layers):
            x = layer(x, None if sides is None else sides[place], step)
        return x

    def normalized(self, hidden: Tensor, step: Step) -> Tensor:
        return self.norm(hidden, step)

    def logits(self, normalized: Tensor, step: Step) -> Tensor:
        logits = self.head(normalized, step)
        if self.soft_cap is None:
            return logits
        return logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)


def scaled_embedding(table: Tensor, step: Step) -> Tensor:
    """Rows times the square root of their width, which is rounded to the rows' dtype first, as in training."""
    scale = torch.tensor(math.sqrt(table.shape[1]), dtype=table.dtype)
    return step.embed(table).mul_(float(scale))
