"""The indexer of DeepSeek sparse attention: small heads that choose which rows the large ones read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.step import CacheRef, IndexHeads, Step

KEY_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class SparseIndexer:
    query: Linear
    key: Linear
    key_norm: Tensor
    key_norm_bias: Tensor
    head_weights: Tensor  # [heads, hidden], float32
    heads: IndexHeads
    cache: CacheRef

    def __call__(self, x: Tensor, low_query: Tensor, step: Step) -> None:
        """Queries come from the attention's own low rank, keys and weights from the hidden states."""
        k = functional.layer_norm(
            self.key(x, step), self.key_norm.shape, self.key_norm, self.key_norm_bias, KEY_NORM_EPS
        )
        weights = functional.linear(x.to(torch.float32), self.head_weights)
        step.choose_rows(self.cache, self.query(low_query, step), k, weights, self.heads)
