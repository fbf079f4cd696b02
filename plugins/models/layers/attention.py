"""Attention over paged keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.step import Around, AttentionHeads, CacheRef, Step


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention: one fused projection, an optional norm over each query and key head, rotation."""

    qkv: Linear
    output: Linear
    heads: AttentionHeads
    cache: CacheRef

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return self.output(step.attend(self.cache, self.qkv(x, step), self.heads), step)

    def add_to(self, x: Tensor, norm: RMSNorm, step: Step) -> None:
        qkv = self.qkv.around(x, norm.before(), step)
        self.output.around(step.attend(self.cache, qkv, self.heads), Around(onto=x), step)
