"""Attention whose output is gated by a part of the query projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.step import AttentionHeads, CacheRef, Step


@dataclass(frozen=True, slots=True)
class GatedAttention:
    """`projection` gives for each head a query and a gate, then all keys, then all values."""

    projection: Linear
    output: Linear
    heads: AttentionHeads
    cache: CacheRef

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        count, dim = self.heads.num_heads, self.heads.head_dim
        both, kv = self.projection(x, step).tensor_split((2 * count * dim,), -1)
        q, gate = both.unflatten(-1, (count, 2, dim)).unbind(-2)
        qkv = torch.cat((q.flatten(1), kv), -1)
        return self.output(step.attend(self.cache, qkv, self.heads).mul_(gate.sigmoid().flatten(1)), step)
