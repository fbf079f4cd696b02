"""Feed-forward parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.step import Around, Step

Activation = Callable[[Tensor, Step], Tensor]


def silu_gated(gate_up: Tensor, step: Step) -> Tensor:
    return step.silu_mul(gate_up)


def gelu_gated(gate_up: Tensor, _: Step) -> Tensor:
    """The tanh approximation."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh").mul_(up)


def squared_relu(up: Tensor, _: Step) -> Tensor:
    return functional.relu(up).square_()


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up in one matrix; or with another activation."""

    gate_up: Linear
    down: Linear
    activation: Activation = silu_gated

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return self.down(self.activation(self.gate_up(x, step), step), step)

    def add_to(self, x: Tensor, norm: RMSNorm, step: Step) -> None:
        before = norm.before(gated=self.activation is silu_gated)
        hidden = self.gate_up.around(x, before, step)
        if not before.gated:
            hidden = self.activation(hidden, step)
        self.down.around(hidden, Around(onto=x), step)


@dataclass(frozen=True, slots=True)
class GatedPart:
    """What a part gives, more or less of it for each row."""

    gate: Linear  # hidden to 1
    part: Callable[[Tensor, Step], Tensor]

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return self.part(x, step).mul_(self.gate(x, step).sigmoid())


@dataclass(frozen=True, slots=True)
class PlainMLP:
    """down(activation(up(x)))"""

    up: Linear
    down: Linear
    activation: Activation

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return self.down(self.activation(self.up(x, step), step), step)
