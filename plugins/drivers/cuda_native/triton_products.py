"""Matrix products: of few rows, which are bound by reading the weights, and one with the same tiling for any rows.

The products of few rows take in what stands around them in a layer. GATED: the first half of the matrix is silu's, the
second what it gates, and a program has the same columns of both. ADDED: `out` is added to in place. NORMED: the one row
is normed on its way in; the scale multiplies the sums.

    x    [rows, inputs]       weight  [outputs, inputs], [2 outputs, inputs] where it is gated
    out  [rows, outputs]      partial [(1 + GATED) SHARES, rows, outputs] float32
"""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, C901

from __future__ import annotations

import triton
import triton.language as tl

from pie_plugins.drivers.cuda_native.triton_launches import follow, let_next_begin

LANE = tl.constexpr(8)  # 16-bit weights of one load of a thread


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x,
    weight,
    bias,
    out,
    rows,
    outputs,
    inputs,
    share,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """out = x @ weight.T + bias, of any number of rows: sums run in the order of `few_rows_kernel` with such shares."""
    follow(OVERLAPS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    place = tl.arange(0, INPUTS)
    is_row, is_output = row < rows, output < outputs
    from_x = x + row.to(tl.int64)[None, :] * inputs + place[:, None]
    from_weight = weight + output.to(tl.int64)[:, None] * inputs + place[None, :]
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for begin in range(0, inputs, share):
        end = tl.minimum(begin + share, inputs)
        part = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for start in range(begin, end, INPUTS):
            is_input = start + place < end
            left = tl.load(from_weight + start, mask=is_output[:, None] & is_input[None, :], other=0.0)
            right = tl.load(from_x + start, mask=is_row[None, :] & is_input[:, None], other=0.0)
            part = tl.dot(left, right, part, input_precision=PRECISION)
        sums += part
    if BIASED:
        sums += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    target = out + row.to(tl.int64)[None, :] * outputs + output[:, None]
    is_inside = is_row[None, :] & is_output[:, None]
    if ADDED:
        sums += tl.load(target, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(target, sums, mask=is_inside)


@triton.jit
def one_row_kernel(
    x,
    weight,
    bias,
    norm,
    out,
    outputs,
    inputs,
    eps,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One row: plain sums of products. The first weights are on their way before the row is there, the next ones while
    these are used."""
    let_next_begin(OVERLAPS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    place = tl.arange(0, INPUTS)
    is_output = (output < outputs)[:, None]
    from_weight = weight + output.to(tl.int64)[:, None] * inputs + place[None, :]
    to_gated = outputs.to(tl.int64) * inputs
    is_input = (place < inputs)[None, :]
    ahead = tl.load(from_weight, mask=is_output & is_input, other=0.0)
    sums = tl.zeros([OUTPUTS, INPUTS // LANE], tl.float32)
    squares = tl.zeros([INPUTS], tl.float32)
    ahead_gated, gated = ahead, sums
    if GATED:
        ahead_gated = tl.load(from_weight + to_gated, mask=is_output & is_input, other=0.0)
    follow(OVERLAPS)
    for start in tl.range(0, inputs, INPUTS, num_stages=1):
        is_next = (start + INPUTS + place < inputs)[None, :]
        now, ahead = ahead, tl.load(from_weight + start + INPUTS, mask=is_output & is_next, other=0.0)
        is_here = start + place < inputs
        values = tl.load(x + start + place, mask=is_here, other=0.0).to(tl.float32)
        if NORMED:
            squares += values * values
            values *= tl.load(norm + start + place, mask=is_here, other=0.0).to(tl.float32)
        sums += _summed(now.to(tl.float32) * values[None, :], OUTPUTS, INPUTS)
        if GATED:
            now = ahead_gated
            ahead_gated = tl.load(
                from_weight + to_gated + start + INPUTS, mask=is_output & is_next, other=0.0
            )
            gated += _summed(now.to(tl.float32) * values[None, :], OUTPUTS, INPUTS)
    total = tl.sum(sums, 1)
    scale = 1.0
    if NORMED:
        scale = tl.rsqrt(tl.sum(squares, 0) / inputs + eps)
        total *= scale
    inside = output < outputs
    if BIASED:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * (tl.sum(gated, 1) * scale)
    if ADDED:
        total += tl.load(out + output, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + output, total, mask=inside)


@triton.jit
def _summed(products, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """The sums of what one thread holds of a row."""
    return tl.sum(tl.reshape(products, [OUTPUTS, INPUTS // LANE, LANE]), 2)


@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(
    x,
    weight,
    bias,
    out,
    partial,
    arrived,
    rows,
    outputs,
    inputs,
    share,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SHARES: tl.constexpr,
    HELD: tl.constexpr,
    REST: tl.constexpr,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS rows of 16-bit numbers, which are the columns here: the tensor cores want 64 outputs and are content with
    few rows; more of them are other programs'. Several programs may share the inputs of one tile: the last of them to
    arrive adds their sums up in a fixed order, and resets the counter. HELD: so many tiles of weights, up to two, are
    on their way before the rows are there. REST: there are more of them."""
    let_next_begin(OVERLAPS)
    tile, part = tl.program_id(0), tl.program_id(1)
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    row, place = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, INPUTS)
    is_row, is_output = row < rows, output < outputs
    from_x = x + row[None, :] * inputs + place[:, None]
    from_weight = weight + output.to(tl.int64)[:, None] * inputs + place[None, :]
    to_gated = outputs.to(tl.int64) * inputs
    begin, end = part * share, tl.minimum(inputs, (part + 1) * share)
    first, first_gated, other, other_gated = begin, begin, begin, begin  # overwritten where tiles are held
    if HELD > 0:
        is_weight = is_output[:, None] & (begin + place < end)[None, :]
        first = tl.load(from_weight + begin, mask=is_weight, other=0.0)
        if GATED:
            first_gated = tl.load(from_weight + to_gated + begin, mask=is_weight, other=0.0)
    if HELD > 1:
        is_weight = is_output[:, None] & (begin + INPUTS + place < end)[None, :]
        other = tl.load(from_weight + begin + INPUTS, mask=is_weight, other=0.0)
        if GATED:
            other_gated = tl.load(from_weight + to_gated + begin + INPUTS, mask=is_weight, other=0.0)
    follow(OVERLAPS)
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    gated = sums
    if HELD > 0:
        right = tl.load(from_x + begin, mask=is_row[None, :] & (begin + place < end)[:, None], other=0.0)
        sums = tl.dot(first, right, sums)
        if GATED:
            gated = tl.dot(first_gated, right, gated)
    if HELD > 1:
        is_input = begin + INPUTS + place < end
        right = tl.load(from_x + begin + INPUTS, mask=is_row[None, :] & is_input[:, None], other=0.0)
        sums = tl.dot(other, right, sums)
        if GATED:
            gated = tl.dot(other_gated, right, gated)
    if REST:
        for start in range(begin + HELD * INPUTS, end, INPUTS):
            is_input = start + place < end
            left = tl.load(from_weight + start, mask=is_output[:, None] & is_input[None, :], other=0.0)
            right = tl.load(from_x + start, mask=is_row[None, :] & is_input[:, None], other=0.0)
            sums = tl.dot(left, right, sums)
            if GATED:
                second = tl.load(
                    from_weight + to_gated + start, mask=is_output[:, None] & is_input[None, :], other=0.0
                )
                gated = tl.dot(second, right, gated)
    is_inside = is_row[None, :] & is_output[:, None]
    at = row[None, :] * outputs + output[:, None]
    size = rows * outputs
    is_last = True
    counter = arrived + tl.program_id(2) * tl.num_programs(0) + tile
    if SHARES > 1:
        tl.store(partial + part * size + at, sums, mask=is_inside)
        if GATED:
            tl.store(partial + (SHARES + part) * size + at, gated, mask=is_inside)
        tl.debug_barrier()
        is_last = tl.atomic_add(counter, 1) == SHARES - 1
    if is_last:
        if SHARES > 1:
            tl.debug_barrier()
            tl.store(counter, 0)
            sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
            gated = sums
            for each in tl.static_range(SHARES):
                sums += tl.load(partial + each * size + at, mask=is_inside, other=0.0, cache_modifier=".cg")
                if GATED:
                    there = partial + (SHARES + each) * size + at
                    gated += tl.load(there, mask=is_inside, other=0.0, cache_modifier=".cg")
        if BIASED:
            sums += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
        if GATED:
            sums = sums / (1.0 + tl.exp(-sums)) * gated
        if ADDED:
            sums += tl.load(out + at, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(out + at, sums, mask=is_inside)
