"""A small decoder over the columns of one token: each is drawn in the light of those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.mlp import GatedMLP
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.rope import Rope
from pie_plugins.models.layers.step import Step


@dataclass(frozen=True, slots=True)
class DepthLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)), over the few places of a token's columns."""

    input_norm: RMSNorm
    qkv: Linear
    output: Linear
    mlp_norm: RMSNorm
    mlp: GatedMLP
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __call__(self, x: Tensor, cache: Tensor, first: int, rope: Rope, step: Step) -> Tensor:
        """x [S, n, hidden] at the places from `first` on; `cache` [S, places, 2, K, D]."""
        flat = x.flatten(0, 1)
        qkv = self.qkv(self.input_norm(flat, step), step)
        attended = self._attend(qkv.unflatten(0, x.shape[:2]), cache, first, rope)
        flat = flat + self.output(attended.flatten(0, 1), step)
        return (flat + self.mlp(self.mlp_norm(flat, step), step)).view_as(x)

    def _attend(self, qkv: Tensor, cache: Tensor, first: int, rope: Rope) -> Tensor:
        heads = qkv.unflatten(-1, (-1, self.head_dim))  # (S, n, H + 2 K, D)
        count, stop = self.num_heads, first + qkv.shape[1]
        cos, sin = rope.cos_sin(torch.arange(first, stop, device=qkv.device), qkv.dtype)
        turning = heads[:, :, : count + self.num_kv_heads]
        turned = turning * cos + turning.roll(self.head_dim // 2, -1) * sin
        cache[:, first:stop, 0] = turned[:, :, count:]
        cache[:, first:stop, 1] = heads[:, :, count + self.num_kv_heads :]
        k, v = (cache[:, :stop, half].transpose(1, 2) for half in (0, 1))
        hidden = torch.ones(stop - first, stop, dtype=torch.bool, device=qkv.device).tril(first)
        q = turned[:, :, :count].transpose(1, 2)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden, enable_gqa=True)
        return attended.transpose(1, 2).flatten(2)


@dataclass(frozen=True, slots=True, eq=False)
class DepthDecoder:
    """At place 0 stands the backbone's hidden row, at place p the column p - 1, which says column p."""

    table: Tensor  # [columns * vocab, backbone's hidden]: one embedding behind the other
    projection: Linear
    layers: tuple[DepthLayer, ...]
    norm: RMSNorm
    heads: Sequence[Linear]  # of column 1, 2, …
    rope: Rope
    vocab_size: int

    def columns(self, hidden: Tensor) -> DepthColumns:
        first = self.layers[0]
        shape = (len(hidden), len(self.heads) + 1, 2, first.num_kv_heads, first.head_dim)
        return DepthColumns(self, hidden, [hidden.new_empty(shape) for _ in self.layers])


@dataclass(frozen=True, slots=True, eq=False)
class DepthColumns:
    """The columns of some rows' next tokens, while they are drawn. Owns their keys and values."""

    decoder: DepthDecoder
    hidden: Tensor  # [S, backbone's hidden]
    caches: list[Tensor]

    def logits(self, column: int, tokens: Tensor, step: Step) -> Tensor:
        """[S, vocab] of column 1, 2, … in order; `tokens` [S] are those of the column before."""
        decoder = self.decoder
        rows = decoder.table.index_select(0, tokens + (column - 1) * decoder.vocab_size)[:, None]
        if column == 1:
            rows = torch.cat((self.hidden[:, None], rows), 1)
        x = decoder.projection(rows.flatten(0, 1), step).unflatten(0, rows.shape[:2])
        first = column + 1 - rows.shape[1]
        for layer, cache in zip(decoder.layers, self.caches, strict=True):
            x = layer(x, cache, first, decoder.rope, step)
        return decoder.heads[column - 1](decoder.norm(x[:, -1].contiguous(), step), step)
