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
)


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Rotates pairs (i, i + head_dim / 2) of each head, the layout of Hugging Face checkpoints."""

    frequencies: Tensor  # [head_dim / 2], float32

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[T, 1, head_dim] each; the sine is negative in the first half, so x*cos + swapped(x)*sin rotates."""
        angles = positions.to(torch.float32)[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        both = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return both[0].to(dtype)[:, None], both[1].to(dtype)[:, None]


def build_rope(head_dim: int, settings: RopeSettings) -> Rope:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (settings.theta**exponents)
    return Rope(_scaled(frequencies, settings))


def _scaled(frequencies: Tensor, settings: RopeSettings) -> Tensor:
    scaling = settings.scaling
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, FrequencyDivisors):
        return frequencies / torch.tensor(scaling.divisors, dtype=torch.float32)
    if isinstance(scaling, Llama3Scaling):
        return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    stretched = frequencies / scaling.factor
    return (1 - blend) * stretched + blend * frequencies
