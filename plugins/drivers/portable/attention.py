"""Attention over paged rows: requests of one length are gathered and computed together.

A plan is made once for a step and a cache group: which slot each new row goes to, and buckets of requests with equally
many new rows and similar numbers of old ones. Each layer then writes its rows, gathers the keys and values of a bucket
with one `index_select` and calls torch's blocked attention once. Query heads of one key head count as rows of it.

In float32 a row's result is the same to the bit however it was batched, chunked or paged (seen on x86 with AVX-512 and
MKL). MKL multiplies fewer than four rows another way and cuts sums by their length, so rows and columns are padded to
where it does not. In bfloat16 torch picks its path by the size of the batch, so the last bits vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pie_core.contracts.forward import Bool, Int32, Int64
from pie_plugins.drivers.portable.kv_cache import KvCache
from pie_plugins.drivers.portable.shared_rows import Part, SharedRows, over_own, over_shared

COLUMN_MULTIPLE = 16
ROW_MULTIPLE = 4
KEY_BLOCK = 512  # of torch's blocked attention
HALVED = (192, 384)  # between these lengths MKL cuts a sum in the middle, elsewhere at 192
SHORTEST_FRACTION = 0.6  # of the longest request in a bucket
FAR = np.iinfo(np.int64).max


@dataclass(slots=True)
class Bucket:
    """R requests with n new rows each, over at most L cached rows."""

    rows: slice | Tensor  # of the batch: R * n token rows
    num_requests: int
    slots: Tensor  # [R * L]
    kv_indexes: Tensor  # [R, L], ascending; FAR behind the rows that there are
    mask: Tensor | None  # [R, 1, n, L], 0 or -inf; None: all visible, or causal
    causal: bool
    _grouped: dict[int, Tensor] = field(default_factory=dict)

    def mask_for(self, group_size: int, num_rows: int) -> Tensor | None:
        """The mask with every row repeated for the query heads that share a key head, padded to `num_rows`."""
        if self.mask is None or self.mask.shape[2] == 1:
            return self.mask
        if group_size not in self._grouped:
            repeated = self.mask.repeat_interleave(group_size, dim=2)
            self._grouped[group_size] = functional.pad(repeated, (0, 0, 0, num_rows - repeated.shape[2]))
        return self._grouped[group_size]


@dataclass(slots=True)
class AttentionPlan:
    write_slots: Tensor  # [T]
    buckets: list[Bucket]
    is_partial: bool  # some token rows are in no bucket: failed requests, and those that share rows
    shared: list[SharedRows] = field(default_factory=list)
    own: list[Bucket] = field(default_factory=list)  # what the requests that share rows read by themselves

    def run(self, rows: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`rows` are one layer's slots, [slots, 2, K, D]; returns [T, H * D]."""
        rows[:, 0].index_copy_(0, self.write_slots, k)
        rows[:, 1].index_copy_(0, self.write_slots, v)
        return self.read(rows, q, scale)

    def read(self, rows: Tensor, q: Tensor, scale: float) -> Tensor:
        """The same over rows that are written already."""
        if len(self.buckets) == 1 and not self.is_partial:
            return _attend(self.buckets[0], rows, q, scale)
        out = q.new_zeros((q.shape[0], q.shape[1] * q.shape[2]))
        for bucket in self.buckets:
            out[bucket.rows] = _attend(bucket, rows, q[bucket.rows], scale)
        if self.shared:
            self._read_shared(out, rows, q, scale)
        return out

    def _read_shared(self, out: Tensor, rows: Tensor, q: Tensor, scale: float) -> None:
        """Each in two parts: what it reads by itself, and what it reads with others."""
        own = Part.nothing(q)
        for bucket in self.own:
            assert bucket.mask is not None
            own.put(bucket.rows, over_own(bucket.slots, bucket.mask, rows, q[bucket.rows], scale))
        for shared in self.shared:
            part = over_shared(shared, rows, q[shared.rows], scale).with_part(own.at(shared.rows))
            out[shared.rows] = part.attended().flatten(1).to(out.dtype)


def _attend(bucket: Bucket, rows: Tensor, q: Tensor, scale: float) -> Tensor:
    requests, (total, heads, dim) = bucket.num_requests, q.shape
    kv_heads, new = rows.shape[2], total // requests
    cached = rows.index_select(0, bucket.slots).view(requests, -1, 2, kv_heads, dim)
    k, v = cached[:, :, 0].transpose(1, 2), cached[:, :, 1].transpose(1, 2)  # (R, K, L, D)
    if bucket.causal:
        wide = _padded_rows(q.view(requests, new, heads, dim).transpose(1, 2))
        attended = functional.scaled_dot_product_attention(
            wide, k, v, is_causal=True, scale=scale, enable_gqa=True
        )
        return attended[:, :, :new].transpose(1, 2).reshape(total, heads * dim)
    size = heads // kv_heads
    grouped = q.view(requests, new, kv_heads, size, dim).transpose(1, 2).reshape(requests, kv_heads, -1, dim)
    num_rows = new * size
    grouped = _padded_rows(grouped)
    mask = bucket.mask_for(size, grouped.shape[2])
    attended = functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return (
        attended[:, :, :num_rows]
        .view(requests, kv_heads, new, size, dim)
        .transpose(1, 2)
        .reshape(total, heads * dim)
    )


def _padded_rows(q: Tensor) -> Tensor:
    """[R, heads, rows, D] in float32 with a multiple of four rows."""
    missing = -q.shape[2] % ROW_MULTIPLE
    return functional.pad(q, (0, 0, 0, missing)) if missing and q.dtype == torch.float32 else q


def padded_columns(longest: int, dtype: torch.dtype) -> int:
    width = -(-longest // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    rest = width % KEY_BLOCK
    if dtype == torch.float32 and HALVED[0] < rest < HALVED[1]:
        return width + HALVED[1] - rest
    return width


@dataclass(frozen=True, slots=True)
class GroupRows:
    """What the plan of one cache group needs to know about the batch, references resolved, failures known."""

    indptr: Int64  # [R + 1] token rows
    kv_lengths: Int64  # [R] before this step
    is_alive: Bool  # [R]
    page_indptr: Int64
    pages: Int64
    logical: Int64
    masks: dict[int, tuple[bool, Bool]]  # token row -> (causal, visible KV indexes)
    window: int | None
    prefixes: Sequence[tuple[int, int, int]] = ()  # requests first to stop read their first rows together


class PlanBuilder:
    """Makes the plan of one group: pages to slots, requests to buckets."""

    def __init__(self, cache: KvCache, group: GroupRows, like: Tensor) -> None:
        self._cache, self._group, self._like = cache, group, like
        self._counts = np.diff(group.indptr)
        self._totals = group.kv_lengths + self._counts
        self._skipped = np.zeros(
            len(self._counts), np.int64
        )  # pages at the beginning, which are read together

    def build(self, write_slots: Int64) -> AttentionPlan:
        shared = [self._share(*prefix) for prefix in self._group.prefixes if self._can_share(*prefix)]
        columns = self._columns()
        alive = self._group.is_alive
        alone, sharing = np.flatnonzero(alive & (self._skipped == 0)), np.flatnonzero(self._skipped)
        chosen = [self._bucket(requests, columns) for requests in _alike(alone, self._counts, columns)]
        own = [self._bucket(requests, columns) for requests in _alike(sharing, self._counts, columns)]
        slots = torch.from_numpy(write_slots).to(self._like.device)
        return AttentionPlan(slots, chosen, len(alone) < len(self._counts), shared, own)

    def _can_share(self, first: int, stop: int, rows: int) -> bool:
        """Who fails is left out, and who hides rows reads by itself: then all of them do."""
        group = self._group
        is_masked = any(group.indptr[first] <= row < group.indptr[stop] for row in group.masks)
        return bool(group.is_alive[first:stop].all()) and rows % self._cache.page_size == 0 and not is_masked

    def _share(self, first: int, stop: int, rows: int) -> SharedRows:
        group, size = self._group, self._cache.page_size
        self._skipped[first:stop] = rows // size
        begin = group.page_indptr[first]
        slots = group.pages[begin : begin + rows // size, None] * size + np.arange(size)
        token_rows = slice(int(group.indptr[first]), int(group.indptr[stop]))
        return SharedRows(token_rows, self._tensor(slots))

    def _columns(self) -> Int64:
        """[R]: how many cached rows each request has, holes not counted."""
        group, size = self._group, self._cache.page_size
        owners = np.repeat(np.arange(len(self._counts)), np.diff(group.page_indptr))
        filled = np.clip(self._totals[owners] - group.logical * size, 0, size)
        return np.bincount(owners, filled, len(self._counts)).astype(np.int64) - self._skipped * size

    def _bucket(self, requests: Int64, columns: Int64) -> Bucket:
        new, longest = int(self._counts[requests[0]]), int(columns[requests].max())
        rows = self._group.indptr[requests][:, None] + np.arange(new)
        width = padded_columns(longest, self._like.dtype)
        slots, kv_indexes = self._gather(requests, width)
        seen = torch.from_numpy(np.ascontiguousarray(kv_indexes)).to(self._like.device)
        if self._is_plain_prefill(requests, columns):
            return Bucket(selection(rows), 1, self._tensor(slots), seen, None, causal=True)
        visible = self._visible(requests, rows, kv_indexes)
        mask = torch.zeros(visible.shape, dtype=self._like.dtype)
        mask.masked_fill_(torch.from_numpy(~visible), float("-inf"))
        mask = mask.to(self._like.device)[:, None]
        return Bucket(selection(rows), len(requests), self._tensor(slots), seen, mask, causal=False)

    def _is_plain_prefill(self, requests: Int64, columns: Int64) -> bool:
        """One request, nothing cached before, no holes and no masks: causality needs no mask tensor."""
        group, first = self._group, requests[0]
        if len(requests) > 1 or columns[first] != self._counts[first] or group.window is not None:
            return False
        if self._skipped[first]:
            return False
        is_masked = any(group.indptr[first] <= row < group.indptr[first + 1] for row in group.masks)
        return not is_masked and self._counts[first] >= ROW_MULTIPLE

    def _gather(self, requests: Int64, width: int) -> tuple[Int64, Int64]:
        """Slots and KV indexes [R, width] of the cached rows; places without a row repeat the first one, far away."""
        group, size = self._group, self._cache.page_size
        table_width = -(-width // size)
        pages = np.full((len(requests), table_width), -1, np.int64)
        logical = np.full((len(requests), table_width), -1, np.int64)
        for place, request in enumerate(requests):
            start, stop = group.page_indptr[request] + self._skipped[request], group.page_indptr[request + 1]
            stop = min(stop, start + table_width)
            pages[place, : stop - start] = group.pages[start:stop]
            logical[place, : stop - start] = group.logical[start:stop]
        places = np.arange(width)
        slots = pages[:, places // size] * size + places % size
        kv_indexes = logical[:, places // size] * size + places % size
        absent = (logical[:, places // size] < 0) | (kv_indexes >= self._totals[requests][:, None])
        return np.where(absent, slots[:, :1], slots), np.where(absent, FAR, kv_indexes)

    def _visible(self, requests: Int64, rows: Int64, kv_indexes: Int64) -> Bool:
        """[R, n, L]"""
        own = self._group.kv_lengths[requests][:, None] + np.arange(rows.shape[1])
        causal = kv_indexes[:, None, :] <= own[:, :, None]
        if self._group.window is not None:
            causal &= kv_indexes[:, None, :] > own[:, :, None] - self._group.window
        for row, mask in self._group.masks.items():
            for place, new in np.argwhere(rows == row):
                causal[place, new] = _masked(causal[place, new], kv_indexes[place], *mask)
        return causal

    def _tensor(self, values: Int64) -> Tensor:
        return torch.from_numpy(values.reshape(-1)).to(self._like.device)


def _masked(causal: Bool, kv_indexes: Int64, intersect: bool, visible: Bool) -> Bool:
    known = kv_indexes < len(visible)
    allowed = np.zeros(len(kv_indexes), np.bool_)
    allowed[known] = visible[kv_indexes[known]]
    return causal & allowed if intersect else allowed


def _alike(requests: NDArray[np.intp], counts: Int64, columns: Int64) -> list[Int64]:
    """Requests in buckets of equally many new rows and similar lengths."""
    order = requests[np.lexsort((-columns[requests], counts[requests]))]
    chosen: list[list[int]] = []
    for request in order.tolist():
        first = chosen[-1][0] if chosen else None
        if (
            first is not None
            and counts[first] == counts[request]
            and columns[request] >= SHORTEST_FRACTION * columns[first] - COLUMN_MULTIPLE
        ):
            chosen[-1].append(request)
        else:
            chosen.append([request])
    return [np.array(sorted(bucket), np.int64) for bucket in chosen]


def selection(rows: Int64) -> slice | Tensor:
    flat = rows.reshape(-1)
    if len(flat) == flat[-1] - flat[0] + 1 and (np.diff(flat) == 1).all():
        return slice(int(flat[0]), int(flat[-1]) + 1)
    return torch.from_numpy(flat)


def visible_runs(runs: Int32) -> Bool:
    """Run lengths (hidden, visible, hidden, …) to one flag for each KV index; past the end is hidden."""
    kinds = np.arange(len(runs)) % 2 == 1
    return np.repeat(kinds, runs)
