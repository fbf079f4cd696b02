"""What building a decoder comes down to in several families: its ends, its norms, and the heads of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pie_plugins.models.layers.decoder import Decoder
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.rope import Rope
from pie_plugins.models.layers.step import AttentionHeads


class Heads(Protocol):
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def build_decoder(layers: Sequence[Any], norm: RMSNorm, parameters: Parameters, tied: bool) -> Decoder:
    embedding = parameters.tensor("embedding")
    return Decoder(
        embedding=embedding,
        layers=tuple(layers),
        norm=norm,
        head=parameters.tied_linear(embedding) if tied else parameters.linear("head"),
    )


def build_norm(parameters: Parameters, name: str, eps: float) -> RMSNorm:
    return RMSNorm(parameters.tensor(name), eps)


def build_heads(config: Heads, rope: Rope | None, norm: Tensor | None, eps: float) -> AttentionHeads:
    return AttentionHeads(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        norm=norm,
        norm_eps=eps,
        rope=rope,
        scale=config.head_dim**-0.5,
    )


def head_norm(q: Tensor, k: Tensor, config: Heads) -> Tensor:
    """One norm over all query and key heads: its weight has a row for each."""
    return with_key_norm(q.expand(config.num_attention_heads, -1), k, config.num_key_value_heads)


def with_key_norm(q_norms: Tensor, k_norm: Tensor, num_kv_heads: int) -> Tensor:
    return torch.cat((q_norms, k_norm.expand(num_kv_heads, -1)))
