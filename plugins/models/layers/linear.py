"""Linear layers. Packing, quantization, sharding and adapters live behind the weight that the driver prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pie_plugins.models.layers.step import Step


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Any

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return step.linear(x, self.weight)
