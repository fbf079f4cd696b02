"""What recurrences that run in chunks of rows share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def in_chunks(x: Tensor, size: int) -> Tensor:
    """[R, H, n, d] to [R, H, chunks, size, d]; rows of zeros at the end change nothing."""
    padded: Tensor = functional.pad(x, (0, 0, 0, -x.shape[2] % size))
    chunks: Tensor = padded.unflatten(2, (-1, size))
    return chunks


def future(size: int, device: torch.device) -> Tensor:
    """[i, j]: whether row j comes after row i."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def pair_decay(total: Tensor) -> Tensor:
    """From log decays [..., i, 1] since a chunk's beginning, the decays from row j to row i; zero where j > i."""
    between = total - total.transpose(-1, -2)
    return between.masked_fill(future(total.shape[-2], total.device), float("-inf")).exp()
