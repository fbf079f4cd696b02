"""Rotary position embedding: frequencies once for a model, angles once for a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pie_plugins.models.layers.rope_settings import (
    FrequencyDivisors,
    LinearScaling,
    Llama3Scaling,
    RopeSettings,
    YarnScaling,
)


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Rotates pairs (i, i + head_dim / 2) of each head, the layout of most Hugging Face checkpoints.

    `interleaved` pairs (2 i, 2 i + 1) are laid out in halves before they are rotated, and stay so: queries and keys
    are permuted alike, which their products do not see.
    """

    frequencies: Tensor  # [head_dim / 2], float32
    magnitude: float = 1.0  # of cosines and sines
    interleaved: bool = False

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[T, 1, head_dim] each; the sine is negative in the first half, so x*cos + swapped(x)*sin rotates."""
        angles = positions.to(torch.float32)[:, None] * self.frequencies
        cos, sin = angles.cos() * self.magnitude, angles.sin() * self.magnitude
        both = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return both[0].to(dtype)[:, None], both[1].to(dtype)[:, None]


def build_rope(head_dim: int, settings: RopeSettings, interleaved: bool = False) -> Rope:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (settings.theta**exponents)
    magnitude = settings.scaling.magnitude if isinstance(settings.scaling, YarnScaling) else 1.0
    return Rope(_scaled(frequencies, settings), magnitude, interleaved)


def _scaled(frequencies: Tensor, settings: RopeSettings) -> Tensor:
    scaling = settings.scaling
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, FrequencyDivisors):
        return frequencies / torch.tensor(scaling.divisors, dtype=torch.float32)
    if isinstance(scaling, Llama3Scaling):
        return _llama3(frequencies, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(frequencies, scaling, settings.theta)
    return frequencies


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    stretched = frequencies / scaling.factor
    return (1 - blend) * stretched + blend * frequencies


def _yarn(frequencies: Tensor, scaling: YarnScaling, theta: float) -> Tensor:
    dims = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        """The one that turns so often in the original context."""
        length = scaling.original_max_position_embeddings
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), dims - 1)
    ramp = (torch.arange(len(frequencies), dtype=torch.float32) - low) / (high - low or 0.001)
    stretched = ramp.clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)
