"""Attention whose values are normed, may be the keys, and may be written by an earlier layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pie_plugins.models.layers.build import with_key_norm
from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.rope import Rope
from pie_plugins.models.layers.rope_variants import proportional_rope
from pie_plugins.models.layers.step import AttentionHeads, CacheRef, Step
from pie_plugins.models.layers.windowed_layers import HeadShape, WindowedLayers


@dataclass(frozen=True, slots=True, eq=False)
class NormedValueAttention:
    """`projection` gives queries, then keys, then values; keys alone where they are the values too; queries alone
    where the heads only read."""

    projection: Linear
    output: Linear
    heads: AttentionHeads
    cache: CacheRef
    value_norm: Tensor  # [head_dim]: the weight of the values' norm

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        projected = self.projection(x, step)
        if not self.heads.reads_only:
            projected = self._with_normed_values(projected, step)
        return self.output(step.attend(self.cache, projected, self.heads), step)

    def _with_normed_values(self, projected: Tensor, step: Step) -> Tensor:
        """The last key-value heads are values, or keys that have not been normed or rotated yet."""
        heads = self.heads
        split = projected.view(len(projected), -1, heads.head_dim)
        values = step.rms_norm(split[:, -heads.num_kv_heads :], self.value_norm, heads.norm_eps)
        keep = heads.num_heads + heads.num_kv_heads
        return torch.cat((split[:, :keep], values), 1).flatten(1)


def layer_rope(shape: HeadShape) -> Rope:
    return proportional_rope(shape.theta, shape.head_dim, shape.rotary_factor)


def build_normed_value_attention(
    layers: WindowedLayers, layer: int, parameters: Parameters, rope: Rope, eps: float
) -> NormedValueAttention:
    name, shape, reads_only = f"layers.{layer}", layers.shape(layer), layers.writer(layer) != layer
    norm = parameters.tensor(f"{name}.q_norm").expand(layers.num_heads, -1)
    if not reads_only:
        norm = with_key_norm(norm, parameters.tensor(f"{name}.k_norm"), shape.num_kv_heads)
    return NormedValueAttention(
        projection=parameters.linear(f"{name}.projection"),
        output=parameters.linear(f"{name}.output"),
        heads=AttentionHeads(
            num_heads=layers.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            norm=norm,
            norm_eps=eps,
            rope=rope,
            scale=1.0,
            reads_only=reads_only,
        ),
        cache=CacheRef(*layers.place(layer)),
        value_norm=norm.new_ones(shape.head_dim),
    )
