"""Triton kernels of attention by a list of work (`attention_work`): prompts and decoding in one launch of fixed size.

A program takes one item and one key head; `GROUP` query heads that share it count as rows. Items that are not in use
leave at once. Shapes and the running softmax are those of `triton_attention`, but for the parts: [slots, H, D] float32,
the places of a row's parts following each other.
"""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from pie_plugins.drivers.cuda_native.triton_launches import follow


@triton.jit(do_not_specialize=["tile_rows"])
def attend_items_kernel(
    q,
    q_stride,
    pages,
    page_indptr,
    page_list,
    columns,
    row_indptr,
    item_request,
    item_row,
    item_part,
    item_parts,
    item_slot,
    out,
    partial,
    partial_max,
    partial_sum,
    scale,
    num_kv_heads,
    tile_rows,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Columns that every row of the tile sees come first, without masks."""
    follow(OVERLAPS)
    kv_head, item = tl.program_id(0), tl.program_id(1)  # all heads of the longest items come first
    request = tl.load(item_request + item)
    if request < 0:
        return
    tile = tl.load(item_row + item)
    part, parts = tl.load(item_part + item), tl.load(item_parts + item)
    first = tl.load(row_indptr + request)
    count = tl.load(row_indptr + request + 1) - first
    rows = tl.minimum(count - tile, tile_rows)
    before = tl.load(columns + request) - count + tile  # what lies before the tile's first row
    end = before + rows
    span = tl.cdiv(tl.cdiv(end, parts), COLUMNS) * COLUMNS
    low = part * span
    high = tl.minimum(end, low + span)
    seen_by_all = tl.maximum(low, tl.minimum(high, before + 1) // COLUMNS * COLUMNS)

    flat = tl.arange(0, ROWS)
    row, member = flat // GROUP, flat % GROUP
    is_row = row < rows
    dim = tl.arange(0, DIMS)
    is_value = is_row[:, None] & (dim < DIM)[None, :]
    head = kv_head * GROUP + member
    token = (first + tile + row).to(tl.int64)
    query = tl.load(
        q + token[:, None] * q_stride + head[:, None] * DIM + dim[None, :], mask=is_value, other=0.0
    )
    limit = before + row + 1
    best = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIMS], tl.float32)
    listed = page_list + tl.load(page_indptr + request)
    half = num_kv_heads * PAGE * DIM  # keys lie before values
    at = tl.arange(0, COLUMNS)
    for start in range(low, seen_by_all, COLUMNS):
        column = start + at
        page = tl.load(listed + column // PAGE).to(tl.int64)
        place = page * 2 * half + kv_head * PAGE * DIM + (column % PAGE) * DIM
        keys = tl.load(pages + place[:, None] + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        decay = tl.exp2(best - new_best)
        norm = norm * decay + tl.sum(weights, 1)
        values = tl.load(pages + place[:, None] + half + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
        sums = sums * decay[:, None]
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision=PRECISION)
        best = new_best
    for start in range(seen_by_all, high, COLUMNS):
        column = start + at
        is_column = column < high
        page = tl.load(listed + column // PAGE, mask=is_column, other=0).to(tl.int64)
        place = page * 2 * half + kv_head * PAGE * DIM + (column % PAGE) * DIM
        is_cached = is_column[:, None] & (dim < DIM)[None, :]
        keys = tl.load(pages + place[:, None] + dim[None, :], mask=is_cached, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
        visible = (column[None, :] < limit[:, None]) & is_column[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - safe[:, None])
        decay = tl.exp2(best - safe)
        norm = norm * decay + tl.sum(weights, 1)
        values = tl.load(pages + place[:, None] + half + dim[None, :], mask=is_cached, other=0.0)
        sums = sums * decay[:, None]
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision=PRECISION)
        best = new_best
    heads = num_kv_heads * GROUP
    if parts == 1:
        answer = sums / norm[:, None]
        tl.store(out + (token * heads + head)[:, None] * DIM + dim[None, :], answer, mask=is_value)
    else:
        slot = (tl.load(item_slot + item) + row * parts + part).to(tl.int64) * heads + head
        tl.store(partial + slot[:, None] * DIM + dim[None, :], sums, mask=is_value)
        tl.store(partial_max + slot, best, mask=is_row)
        tl.store(partial_sum + slot, norm, mask=is_row)


@triton.jit
def merge_items_kernel(
    partial,
    partial_max,
    partial_sum,
    merged_row,
    merged_slot,
    merged_parts,
    out,
    heads,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One row whose columns were split, and some of its heads. A part without columns has a weight of 0."""
    follow(OVERLAPS)
    entry = tl.program_id(0)
    row = tl.load(merged_row + entry)
    if row < 0:
        return
    slot, parts = tl.load(merged_slot + entry).to(tl.int64), tl.load(merged_parts + entry)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, DIMS)
    is_head = head < heads
    is_value = is_head[:, None] & (dim < DIM)[None, :]
    best = tl.full([HEADS], float("-inf"), tl.float32)
    norm = tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([HEADS, DIMS], tl.float32)
    for part in range(parts):
        at = (slot + part) * heads + head
        highest = tl.load(partial_max + at, mask=is_head, other=float("-inf"))
        found = tl.load(partial + at[:, None] * DIM + dim[None, :], mask=is_value, other=0.0)
        new_best = tl.maximum(best, highest)
        safe = tl.where(new_best == float("-inf"), 0.0, new_best)
        decay, weight = tl.exp2(best - safe), tl.exp2(highest - safe)
        norm = norm * decay + weight * tl.load(partial_sum + at, mask=is_head, other=0.0)
        sums = sums * decay[:, None] + found * weight[:, None]
        best = new_best
    answer = sums / tl.where(is_head, norm, 1.0)[:, None]
    target = out + (row.to(tl.int64) * heads + head)[:, None] * DIM + dim[None, :]
    tl.store(target, answer, mask=is_value)
