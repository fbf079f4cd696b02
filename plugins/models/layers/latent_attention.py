"""Multi-head latent attention: queries through a low rank or directly, keys and values as one small cached row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.sparse_indexer import SparseIndexer
from pie_plugins.models.layers.step import CacheRef, LatentHeads, Step


@dataclass(frozen=True, slots=True)
class LowRankQuery:
    """up(norm(low)), where `low` are the first columns of the fused projection."""

    norm: RMSNorm
    up: Linear


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """`down` is one matrix: query or its low rank, latent, rotary end of the key."""

    down: Linear
    query: LowRankQuery | None
    latent_norm: RMSNorm
    output: Linear
    heads: LatentHeads
    cache: CacheRef
    indexer: SparseIndexer | None = None  # chooses what this layer and perhaps the next ones read
    chosen: CacheRef | None = None  # whose choice this layer follows; None: it reads all rows

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        row = self.heads.latent_dim + self.heads.rope_dim
        down = self.down(x, step)
        q, latent, key = down.split((down.shape[1] - row, self.heads.latent_dim, self.heads.rope_dim), -1)
        low = q if self.query is None else self.query.norm(q, step)
        if self.indexer is not None:
            self.indexer(x, low, step)
        q = low if self.query is None else self.query.up(low, step)
        latent = torch.cat((self.latent_norm(latent, step), key), -1)
        return self.output(step.attend_latent(self.cache, q, latent, self.heads, self.chosen), step)
