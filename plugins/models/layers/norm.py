"""Norms over the hidden axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pie_plugins.models.layers.step import Around, Step


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last axis; `weight` broadcasts over the others."""
    if weight.dtype != x.dtype:
        wide = functional.rms_norm(x.to(torch.float32), weight.shape[-1:], None, eps)
        return wide.mul_(weight).to(x.dtype)
    if weight.dim() == 1:
        return functional.rms_norm(x, weight.shape, weight, eps)
    return functional.rms_norm(x, weight.shape[-1:], None, eps).mul_(weight)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x / rms(x) * weight."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return step.rms_norm(x, self.weight, self.eps)

    def after_add(self, x: Tensor, delta: Tensor, step: Step) -> Tensor:
        """Adds `delta` to the residual stream `x` in place, then norms it."""
        return step.add_rms_norm(x, delta, self.weight, self.eps)

    def before(self, *, gated: bool = False) -> Around:
        """For the product behind it."""
        return Around(self.weight, self.eps, gated)
