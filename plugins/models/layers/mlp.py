"""Feed-forward parts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.step import Step


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return self.down(step.silu_mul(self.gate_up(x, step)), step)
