"""A short causal convolution over each channel of the rows of a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, eq=False)
class ShortConvolution:
    """silu(conv(x)): a `Recurrence` whose state is the last K - 1 rows. Sums in float32, rounds once."""

    taps: Tensor  # [K, channels], float32, the oldest row's first
    bias: Tensor | None = None  # [channels], float32

    def __call__(self, inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = inputs
        rows = torch.cat((state, x), 1)  # (pieces, K - 1 + n, channels)
        count = x.shape[1]
        out = rows[:, :count] * self.taps[0]
        for place in range(1, len(self.taps)):
            out.addcmul_(rows[:, place : place + count], self.taps[place])
        if self.bias is not None:
            out.add_(self.bias)
        return functional.silu(out).to(x.dtype), rows[:, count:]


def convolution(weight: Tensor, bias: Tensor | None = None) -> ShortConvolution:
    """From a checkpoint's [channels, 1, K]."""
    taps = weight[:, 0].t().to(torch.float32).contiguous()
    return ShortConvolution(taps, None if bias is None else bias.to(torch.float32))
