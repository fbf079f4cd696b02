"""Norms over the hidden axis."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pie_plugins.models.layers.step import Around, Step


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
