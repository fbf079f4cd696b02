"""Linear layers. Packing, quantization, sharding and adapters live behind the weight that the driver prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pie_plugins.models.layers.step import Around, Step


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Any

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return step.linear(x, self.weight)

    def around(self, x: Tensor, around: Around, step: Step) -> Tensor:
        return step.linear_around(x, self.weight, around)


def one_by_one(step: Step, x: Tensor, weight: Any, around: Around) -> Tensor:
    """`Step.linear_around` in other operations of the step."""
    if around.norm is not None:
        x = step.rms_norm(x, around.norm, around.norm_eps)
    product = step.linear(x, weight)
    if around.gated:
        product = step.silu_mul(product)
    return product if around.onto is None else around.onto.add_(product)
