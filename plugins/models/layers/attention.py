"""Attention over paged keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.rope import Rope
from pie_plugins.models.layers.step import CacheRef, Step


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention: one fused projection, an optional norm over each query and key head, rotation."""

    qkv: Linear
    output: Linear
    qk_norm: RMSNorm | None  # its weight is [num_heads + num_kv_heads, head_dim]
    rope: Rope
    cache: CacheRef
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        heads = self.qkv(x, step).view(x.shape[0], -1, self.head_dim)  # (tokens, H + 2 K, head_dim)
        rotated = self.num_heads + self.num_kv_heads
        qk, v = heads[:, :rotated], heads[:, rotated:]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk, step)
        step.rotate(qk, self.rope)
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        return self.output(step.attention(self.cache, q, k, v, self.head_dim**-0.5), step)
