"""Attention over latent rows: by absorbed queries, or by expanded keys and values, over all rows or chosen ones.

A latent row serves all heads. Queries that have absorbed the expansion of keys read the rows as they are, which is
cheap for few queries; for many, expanding every row once is. Both compute the same sums in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pie_plugins.drivers.portable.attention import FAR, AttentionPlan, Bucket
from pie_plugins.models.layers.step import IndexHeads, LatentHeads

MAX_SCORES = 1 << 24  # of the index heads at a time


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """R requests of n new rows each, which read L cached ones."""

    q: Tensor  # [R, n, H, N + P]
    cached: Tensor  # [R, L, C + P]
    mask: Tensor  # [R, 1, n, L]


def attend_latent(
    plan: AttentionPlan, rows: Tensor, q: Tensor, heads: LatentHeads, chosen: Tensor | None
) -> Tensor:
    """[T, H, N + P] over one layer's slots [slots, C + P] to [T, H * V]; `chosen` as `choose_rows` gave it."""
    out = q.new_zeros((q.shape[0], heads.num_heads * heads.value_expansion.shape[1]))
    for bucket in plan.buckets:
        found = _gathered(bucket, rows, q[bucket.rows], None if chosen is None else chosen[bucket.rows])
        attended = _absorbed(found, heads) if _absorbs(heads, found.q.shape[1]) else _expanded(found, heads)
        out[bucket.rows] = attended.transpose(1, 2).reshape(-1, out.shape[1])
    return out


def choose_rows(
    plan: AttentionPlan, rows: Tensor, q: Tensor, head_weights: Tensor, heads: IndexHeads
) -> Tensor:
    """[T, k]: KV indexes of the rows that each new row reads, FAR where it sees fewer.

    KV indexes and not places: the groups of a model may have given up different pages, or be masked differently.
    """
    longest = max((bucket.kv_indexes.shape[1] for bucket in plan.buckets), default=0)
    count = min(heads.top_k, longest)
    chosen = torch.full((len(q), count), FAR, device=q.device)
    for bucket in plan.buckets:
        best = _chosen(bucket, rows, q[bucket.rows], head_weights[bucket.rows], heads)
        chosen[bucket.rows, : best.shape[1]] = best
    return chosen


def _chosen(bucket: Bucket, rows: Tensor, q: Tensor, weights: Tensor, heads: IndexHeads) -> Tensor:
    """[R * n, k], fewer columns where there are no more rows."""
    requests, length = bucket.kv_indexes.shape
    new = len(q) // requests
    mask = _mask(bucket, new, length)[:, 0].to(torch.float32).expand(requests, -1, -1)
    kv_indexes = bucket.kv_indexes[:, None].expand(-1, new, -1)
    if length <= heads.top_k:
        return kv_indexes.masked_fill(mask.isinf(), FAR).flatten(0, 1)
    cached = rows.index_select(0, bucket.slots).view(requests, length, -1).to(torch.float32)
    q = q.to(torch.float32).view(requests, new, *q.shape[1:]) * q.shape[-1] ** -0.5
    weights = weights.view(requests, new, -1) * heads.num_heads**-0.5
    size = max(1, MAX_SCORES // (requests * heads.num_heads * length))
    pieces = zip(q.split(size, 1), weights.split(size, 1), mask.split(size, 1), strict=True)
    scores, columns = zip(*(_best(*piece, cached, heads.top_k) for piece in pieces), strict=True)
    best = kv_indexes.gather(-1, torch.cat(columns, 1))
    return best.masked_fill(torch.cat(scores, 1).isinf(), FAR).flatten(0, 1)


def _best(q: Tensor, weights: Tensor, mask: Tensor, cached: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Scores and columns [R, n, k]; hidden rows score -inf. Of equal scores, as of rows that no head likes, the first
    columns are best: `topk` takes others in a step of another shape."""
    products = torch.einsum("rnhd,rld->rnhl", q, cached).relu_()
    scores = torch.einsum("rnhl,rnh->rnl", products, weights) + mask
    best = scores.sort(dim=-1, descending=True, stable=True)
    return best.values[..., :top_k], best.indices[..., :top_k]


def _gathered(bucket: Bucket, rows: Tensor, q: Tensor, chosen: Tensor | None) -> _Rows:
    requests, length = bucket.kv_indexes.shape
    new = len(q) // requests
    q = q.view(requests, new, *q.shape[1:])
    mask = _mask(bucket, new, length).to(q.dtype)
    if chosen is not None:
        columns, absent = _columns(bucket, chosen)
        if chosen.shape[1] * new <= length:
            return _only_chosen(bucket, rows, q, mask, columns, absent)
        mask = mask.masked_fill(_unchosen(columns, absent, length), float("-inf"))
    return _Rows(q, rows.index_select(0, bucket.slots).view(requests, length, -1), mask)


def _columns(bucket: Bucket, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[R, n, k] each: where the chosen KV indexes are among the bucket's rows, and which of them are not there."""
    requests, length = bucket.kv_indexes.shape
    wanted = chosen.view(requests, -1)
    columns = torch.searchsorted(bucket.kv_indexes, wanted).clamp_(max=length - 1)
    absent = bucket.kv_indexes.gather(1, columns) != wanted
    shape = (requests, -1, chosen.shape[1])
    return columns.view(shape), absent.view(shape)


def _unchosen(columns: Tensor, absent: Tensor, length: int) -> Tensor:
    """[R, 1, n, L]"""
    unchosen = torch.ones((*columns.shape[:2], length + 1), dtype=torch.bool, device=columns.device)
    unchosen.scatter_(-1, columns.masked_fill(absent, length), False)
    return unchosen[:, None, :, :length]


def _only_chosen(
    bucket: Bucket, rows: Tensor, q: Tensor, mask: Tensor, columns: Tensor, absent: Tensor
) -> _Rows:
    """Every new row becomes a request of its own that reads its chosen rows and no others."""
    requests, new, count = columns.shape
    slots = bucket.slots.view(requests, -1).gather(1, columns.flatten(1))
    cached = rows.index_select(0, slots.flatten()).view(requests * new, count, -1)
    visible = mask[:, 0].expand(requests, -1, -1).gather(-1, columns).masked_fill(absent, float("-inf"))
    return _Rows(q.reshape(requests * new, 1, *q.shape[2:]), cached, visible.view(-1, 1, 1, count))


def _mask(bucket: Bucket, new: int, length: int) -> Tensor:
    """[R, 1, n, L], 0 or -inf."""
    if bucket.mask is not None:
        return bucket.mask
    hidden = torch.full((new, length), float("-inf"), device=bucket.slots.device)
    return hidden.triu_(1)[None, None]


def _absorbs(heads: LatentHeads, new: int) -> bool:
    """Compares the multiplications for one cached row: in longer products, or in expanding it."""
    _, plain, latent = heads.key_expansion.shape
    value = heads.value_expansion.shape[1]
    return new * (2 * latent - plain - value) <= (plain + value) * latent


def _absorbed(found: _Rows, heads: LatentHeads) -> Tensor:
    """[R, H, n, V]"""
    plain, rotated = found.q.split((heads.plain_dim, heads.rope_dim), -1)
    wide = torch.einsum("rnhd,hdc->rhnc", plain, heads.key_expansion)
    q = torch.cat((wide, rotated.transpose(1, 2)), -1)
    k = found.cached[:, None].expand(-1, heads.num_heads, -1, -1)
    # Whole rows as values: torch's blocked attention wants keys and values of one width.
    mixed = functional.scaled_dot_product_attention(q, k, k, attn_mask=found.mask, scale=heads.scale)
    return torch.einsum("rhnc,hvc->rhnv", mixed[..., : heads.latent_dim], heads.value_expansion)


def _expanded(found: _Rows, heads: LatentHeads) -> Tensor:
    """[R, H, n, V]"""
    latent, rotated = found.cached.split((heads.latent_dim, heads.rope_dim), -1)
    plain = torch.einsum("rlc,hdc->rhld", latent, heads.key_expansion)
    k = torch.cat((plain, rotated[:, None].expand(-1, heads.num_heads, -1, -1)), -1)
    v = torch.einsum("rlc,hvc->rhlv", latent, heads.value_expansion)
    q, width = found.q.transpose(1, 2), v.shape[-1]
    wide = functional.pad(v, (0, max(k.shape[-1] - width, 0)))  # as wide as keys, as in _absorbed
    mixed = functional.scaled_dot_product_attention(q, k, wide, attn_mask=found.mask, scale=heads.scale)
    return mixed[..., :width]
