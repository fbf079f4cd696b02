"""Cached rows that several requests read, gathered once for all of them (cascade attention).

    softmax over shared and own rows = (shared sums * e^(its peak - peak) + own sums * e^(its peak - peak)) / weights

Sums are cut in another place than where a request reads all of its rows by itself, so the last bits differ: in float32
this is done only where the option `shared_prefixes` asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Rows that these token rows all see, whole."""

    rows: slice  # of the batch
    slots: Tensor  # [L]


@dataclass(frozen=True, slots=True)
class Part:
    """Attention over some of the rows: sums, what they are to be divided by, and the peak both are relative to."""

    sums: Tensor  # [T, H, D] float32
    weight: Tensor  # [T, H, 1]
    peak: Tensor  # [T, H, 1]

    @classmethod
    def nothing(cls, q: Tensor) -> Part:
        """Nothing is read yet."""
        sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        return cls(sums, sums[..., :1].clone(), torch.full_like(sums[..., :1], float("-inf")))

    def put(self, rows: slice | Tensor, part: Part) -> None:
        self.sums[rows], self.weight[rows], self.peak[rows] = part.sums, part.weight, part.peak

    def at(self, rows: slice | Tensor) -> Part:
        return Part(self.sums[rows], self.weight[rows], self.peak[rows])

    def with_part(self, other: Part) -> Part:
        peak = torch.maximum(self.peak, other.peak)
        mine, theirs = (self.peak - peak).exp(), (other.peak - peak).exp()
        return Part(self.sums * mine + other.sums * theirs, self.weight * mine + other.weight * theirs, peak)

    def attended(self) -> Tensor:
        """[T, H, D]"""
        return self.sums / self.weight


def over_shared(shared: SharedRows, rows: Tensor, q: Tensor, scale: float) -> Part:
    """q is [T, H, D], of all token rows that share."""
    total, heads, dim = q.shape
    cached = rows.index_select(0, shared.slots).float()  # (L, 2, K, D)
    kv_heads = cached.shape[2]
    grouped = q.float().view(total, kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
    part = _over(grouped, cached[:, 0].transpose(0, 1), cached[:, 1].transpose(0, 1), None, scale)
    sums, weight, peak = (
        each.view(kv_heads, total, heads // kv_heads, -1).transpose(0, 1).reshape(total, heads, -1)
        for each in part
    )
    return Part(sums, weight, peak)


def over_own(slots: Tensor, mask: Tensor, rows: Tensor, q: Tensor, scale: float) -> Part:
    """q is [R * n, H, D], slots are [R * L], and the mask is [R, 1, n, L]: 0 or -inf."""
    requests, new = mask.shape[0], mask.shape[2]
    total, heads, dim = q.shape
    cached = rows.index_select(0, slots).float().view(requests, -1, *rows.shape[1:])  # (R, L, 2, K, D)
    kv_heads = cached.shape[3]
    size = heads // kv_heads
    grouped = q.float().view(requests, new, kv_heads, size, dim).transpose(1, 2)
    k, v = cached[:, :, 0].transpose(1, 2), cached[:, :, 1].transpose(1, 2)  # (R, K, L, D)
    wide = mask.float().repeat_interleave(size, dim=2)
    part = _over(grouped.reshape(requests, kv_heads, -1, dim), k, v, wide, scale)
    sums, weight, peak = (
        each.view(requests, kv_heads, new, size, -1).transpose(1, 2).reshape(total, heads, -1)
        for each in part
    )
    return Part(sums, weight, peak)


def _over(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores += mask
    peak = scores.amax(-1, keepdim=True)
    weights = (scores - peak).exp()
    return weights @ v, weights.sum(-1, keepdim=True), peak
