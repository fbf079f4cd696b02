"""Triton kernels of paged attention whose lengths, pages and masks are read on the device.

A program takes a tile of query rows of one request and one key head: `GROUP` query heads that share it count as rows.
Requests of few rows split their columns over several programs, more of them the longer they are; the last columns of a
request are its new rows. Where only one program had work it writes the answer itself, else `merge_kernel` does.
Columns that several requests share are read by tiles of those requests' rows, in a launch of their own; each request
then begins behind them, and the merge adds what the tiles found.

The softmax runs along with its greatest score and its sum (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018), so parts of one row's columns can be merged (Flash-Decoding, Dao et al., 2023).

    q         [T, H, D], rows `q_stride` apart     pages      [P, 2 (key, value), K, PAGE, D] of one layer
    out       [T, H, D]                            columns    [R] int32, as all that counts rows or pages
    partial   [T, H, parts, D] float32, with       mask_words [M, mask_width], bit c % 32 of word c // 32 is column c
              [T, H, parts] of its best and sum    scale      times log2(e): weights are powers of two
"""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, C901

from __future__ import annotations

import triton
import triton.language as tl

from pie_plugins.drivers.cuda_native.triton_launches import follow


@triton.jit(do_not_specialize=["mask_width", "tiles", "narrow_rows", "splits"])
def attend_kernel(
    q,
    q_stride,
    pages,
    page_indptr,
    page_list,
    columns,
    row_indptr,
    requests,
    stops,
    shared,
    out,
    partial,
    partial_max,
    partial_sum,
    mask_index,
    mask_causal,
    mask_words,
    mask_width,
    scale,
    num_kv_heads,
    tiles,
    narrow_rows,
    splits,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHORTEST: tl.constexpr,
    NARROW: tl.constexpr,
    MASKED: tl.constexpr,
    CASCADE: tl.constexpr,
    PREFIX: tl.constexpr,
    TURNS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """NARROW: every request of at most `narrow_rows` rows; else the listed requests. CASCADE: from behind their shared
    columns on. PREFIX: only those, for tiles of requests with one row each, from the listed ones to their `stops`.
    TURNS: a program takes several parts of a request, one after the other."""
    follow(OVERLAPS)
    tile, kv_head = tl.program_id(0) % tiles, tl.program_id(1)
    request = tl.program_id(0) // tiles
    behind = request + 1
    if PREFIX:
        behind = tl.load(stops + request)
    if not NARROW:
        request = tl.load(requests + request)
        if not PREFIX:
            behind = request + 1
    first = tl.load(row_indptr + request)
    count = tl.load(row_indptr + behind) - first
    if (NARROW and count > narrow_rows) or tile * ROWS >= count * GROUP:
        return
    total = tl.load(columns + request)
    begin = 0
    if CASCADE:
        begin = tl.load(shared + request)
    if PREFIX:
        total = tl.load(shared + request)
    flat = tile * ROWS + tl.arange(0, ROWS)
    row, member = flat // GROUP, flat % GROUP
    is_row = row < count
    limit = total - count + row + 1  # columns that causality lets a row see
    end = total
    if PREFIX:
        limit = total + 0 * row
    elif not MASKED:
        end = tl.minimum(total, total - count + (tile * ROWS + ROWS - 1) // GROUP + 1)
    span = _span(end - begin, splits, SHORTEST, COLUMNS)
    parts = tl.maximum(tl.cdiv(end - begin, span), 1)
    if tl.program_id(2) >= parts:
        return
    turns = 1
    if TURNS:
        turns = tl.cdiv(parts - tl.program_id(2), tl.num_programs(2))
    dim = tl.arange(0, DIMS)
    head = kv_head * GROUP + member
    token = (first + row).to(tl.int64)
    is_value = is_row[:, None] & (dim < DIM)[None, :]
    for turn in range(turns):
        split = tl.program_id(2) + turn * tl.num_programs(2)
        low = begin + split * span
        high = tl.minimum(end, low + span)
        query = tl.load(
            q + token[:, None] * q_stride + head[:, None] * DIM + dim[None, :], mask=is_value, other=0.0
        )
        mask_row, is_intersected = limit, limit  # overwritten where there are masks
        if MASKED:
            mask_row = tl.load(mask_index + first + row, mask=is_row, other=-1)
            is_intersected = tl.load(mask_causal + mask_row, mask=mask_row >= 0, other=1)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, DIMS], tl.float32)
        listed = page_list + tl.load(page_indptr + request)
        half = num_kv_heads * PAGE * DIM  # keys lie before values
        for start in range(low, high, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            is_column = column < high
            page = tl.load(listed + column // PAGE, mask=is_column, other=0).to(tl.int64)
            place = page * 2 * half + kv_head * PAGE * DIM + (column % PAGE) * DIM
            is_cached = is_column[:, None] & (dim < DIM)[None, :]
            keys = tl.load(pages + place[:, None] + dim[None, :], mask=is_cached, other=0.0)
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
            visible = (column[None, :] < limit[:, None]) & is_column[None, :]
            if MASKED:
                at_word = mask_row.to(tl.int64)[:, None] * mask_width + column[None, :] // 32
                has_word = (
                    (mask_row >= 0)[:, None] & (column // 32 < mask_width)[None, :] & is_column[None, :]
                )
                word = tl.load(mask_words + at_word, mask=has_word, other=0)
                allowed = ((word >> (column % 32)[None, :]) & 1) != 0
                masked = allowed & (visible | (is_intersected == 0)[:, None]) & is_column[None, :]
                visible = tl.where((mask_row >= 0)[:, None], masked, visible)
            scores = tl.where(visible, scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, 1))
            safe = tl.where(new_best == float("-inf"), 0.0, new_best)
            weights = tl.exp2(scores - safe[:, None])
            decay = tl.exp2(best - safe)
            norm = norm * decay + tl.sum(weights, 1)
            values = tl.load(pages + place[:, None] + half + dim[None, :], mask=is_cached, other=0.0)
            sums = sums * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
            best = new_best
        heads = num_kv_heads * GROUP
        row_head = token * heads + head
        is_alone = span >= end
        if CASCADE:
            is_alone = is_alone & (begin == 0)
        if PREFIX:
            is_alone = end < 0
        if is_alone:
            answer = sums / tl.where(norm == 0.0, 1.0, norm)[:, None]
            tl.store(out + row_head[:, None] * DIM + dim[None, :], answer, mask=is_value)
        else:
            at = row_head * splits + split
            if CASCADE or PREFIX:  # the second half of the parts is the shared columns'
                at = row_head * 2 * splits + split
            if PREFIX:
                at += splits
            tl.store(partial + at[:, None] * DIM + dim[None, :], sums, mask=is_value)
            tl.store(partial_max + at, best, mask=is_row)
            tl.store(partial_sum + at, norm, mask=is_row)


@triton.jit
def _span(columns, splits, SHORTEST: tl.constexpr, COLUMNS: tl.constexpr):
    """How many columns each part has."""
    span = tl.maximum(tl.cdiv(columns, splits), SHORTEST)
    return tl.cdiv(span, COLUMNS) * COLUMNS


@triton.jit(do_not_specialize=["wide", "rows_each"])
def merge_kernel(
    partial,
    partial_max,
    partial_sum,
    columns,
    shared,
    row_indptr,
    by_rows,
    out,
    heads,
    wide,
    rows_each,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    SHORTEST: tl.constexpr,
    MASKED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One row and head whose columns were split: the parts that had work are the same as in `attend_kernel`. The first
    `wide` requests of `by_rows` were not split; each of the others has at most `rows_each` rows. Of `PARTS`, those
    from `SPLITS` on are the shared columns'."""
    follow(OVERLAPS)
    row, head = tl.program_id(0) % rows_each, tl.program_id(1)
    request = tl.load(by_rows + wide + tl.program_id(0) // rows_each)
    first = tl.load(row_indptr + request)
    count = tl.load(row_indptr + request + 1) - first
    if row >= count:
        return
    token = (first + row).to(tl.int64)
    total = tl.load(columns + request)
    tile = row * GROUP // ROWS
    end = total
    if not MASKED:
        end = tl.minimum(total, total - count + (tile * ROWS + ROWS - 1) // GROUP + 1)
    begin = 0
    if PARTS > SPLITS:
        begin = tl.load(shared + request)
    span = _span(end - begin, SPLITS, SHORTEST, COLUMNS)
    is_alone = span >= end
    if PARTS > SPLITS:
        is_alone = is_alone & (begin == 0)
    if is_alone:
        return
    part = tl.arange(0, PARTS)
    dim = tl.arange(0, DIMS)
    at = (token * heads + head) * PARTS + part
    has_work = part * span < end - begin
    if PARTS > SPLITS:
        shared_span = _span(begin, SPLITS, SHORTEST, COLUMNS)
        has_work = tl.where(part < SPLITS, has_work, (part - SPLITS) * shared_span < begin)
    best = tl.load(partial_max + at, mask=has_work, other=float("-inf"))
    norm = tl.load(partial_sum + at, mask=has_work, other=0.0)
    highest = tl.max(best, 0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.where(has_work, tl.exp2(best - safe), 0.0)
    is_value = has_work[:, None] & (dim < DIM)[None, :]
    sums = tl.load(partial + at[:, None] * DIM + dim[None, :], mask=is_value, other=0.0)
    whole = tl.sum(weight * norm, 0)
    answer = tl.sum(sums * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + (token * heads + head) * DIM + dim, answer, mask=dim < DIM)
