"""Attention whose values are normed, may be the keys, and may be written by an earlier layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.step import AttentionHeads, CacheRef, Step


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
