"""The decoder stack: the loop over layers and the order of the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.step import Step

Part = Callable[[Tensor, Step], Tensor]


@runtime_checkable
class AddingPart(Protocol):
    """A part that can also do x += part(norm(x)) by itself: its products take in the norm and the sum."""

    def __call__(self, x: Tensor, step: Step) -> Tensor: ...

    def add_to(self, x: Tensor, norm: RMSNorm, step: Step) -> None: ...


@dataclass(frozen=True, slots=True)
class PreNormLayer:
    """x + mixer(norm(x)), then x + mlp(norm(x)). The mixer may be attention of any kind, or a recurrence."""

    mixer_norm: RMSNorm
    mixer: Part
    mlp_norm: RMSNorm
    mlp: Part

    @property
    def parts(self) -> tuple[tuple[RMSNorm, Part], ...]:
        return (self.mixer_norm, self.mixer), (self.mlp_norm, self.mlp)


@dataclass(frozen=True, slots=True)
class PreNormPart:
    """A layer of one part alone: x + part(norm(x))."""

    norm: RMSNorm
    part: Part

    @property
    def parts(self) -> tuple[tuple[RMSNorm, Part], ...]:
        return ((self.norm, self.part),)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Embedding, layers, final norm, head. What a part does not add itself is added by the norm behind it."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[PreNormLayer, ...] | tuple[PreNormPart, ...]
    norm: RMSNorm
    head: Linear

    def hidden(self, step: Step) -> Tensor:
        return self.layers_over(step.embed(self.embedding), step)

    def layers_over(self, x: Tensor, step: Step) -> Tensor:
        """The residual stream from its embedding `x` on."""
        delta: Tensor | None = None
        for layer in self.layers:
            for norm, part in layer.parts:
                if delta is None and isinstance(part, AddingPart):
                    part.add_to(x, norm, step)
                else:
                    delta = part(norm(x, step) if delta is None else norm.after_add(x, delta, step), step)
        return x if delta is None else x.add_(delta)

    def normalized(self, hidden: Tensor, step: Step) -> Tensor:
        return self.norm(hidden, step)

    def logits(self, normalized: Tensor, step: Step) -> Tensor:
        return self.head(normalized, step)
