"""Rotary embeddings that turn a part of each head, or turn it by several position axes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pie_plugins.models.layers.rope import Rope


@dataclass(frozen=True, slots=True, eq=False)
class AxesRope(Rope):
    """M-RoPE: each frequency follows one of three position axes (time, row, column)."""

    axes: Tensor | None = None  # [head_dim / 2], int64

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[T, 1, rotary dimensions] each, of positions [T, 3]."""
        assert self.axes is not None
        angles = (
            positions.to(torch.float32).index_select(1, self.axes.to(positions.device)) * self.frequencies
        )
        cos, sin = angles.cos(), angles.sin()
        both = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return both[0].to(dtype)[:, None], both[1].to(dtype)[:, None]


def frequencies(theta: float, rotary_dim: int, divisor: int | None = None) -> Tensor:
    """[rotary_dim / 2]; exponents are fractions of `divisor`, or of the dimensions that turn."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / (divisor or rotary_dim)
    return torch.as_tensor(1.0 / (theta**exponents))


def proportional_rope(theta: float, head_dim: int, factor: float) -> Rope:
    """Only a fraction of the pairs turns, but pairs and exponents are those of the whole head."""
    turning = int(factor * head_dim // 2)
    still = torch.zeros(head_dim // 2 - turning)
    return Rope(torch.cat((frequencies(theta, 2 * turning, head_dim), still)))


def interleaved_axes_rope(theta: float, rotary_dim: int, sections: tuple[int, ...]) -> AxesRope:
    """Every third frequency follows rows and every third columns, as often as their sections say; the rest, time."""
    axes = torch.zeros(rotary_dim // 2, dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return AxesRope(frequencies(theta, rotary_dim), axes=axes)
