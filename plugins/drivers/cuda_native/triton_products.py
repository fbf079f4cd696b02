"""A matrix product with one tiling for every number of rows: a row's bits do not depend on the rows beside it."""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from pie_plugins.drivers.cuda_native.triton_launches import follow


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x,
    weight,
    bias,
    out,
    rows,
    outputs,
    inputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """out = x @ weight.T + bias; the sum over inputs always runs in the same order."""
    follow(OVERLAPS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    place = tl.arange(0, INPUTS)
    is_row, is_output = row < rows, output < outputs
    from_x = x + row.to(tl.int64)[:, None] * inputs + place[None, :]
    from_weight = weight + output.to(tl.int64)[:, None] * inputs + place[None, :]
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(0, inputs, INPUTS):
        is_input = (start + place < inputs)[None, :]
        left = tl.load(from_x + start, mask=is_row[:, None] & is_input, other=0.0)
        right = tl.load(from_weight + start, mask=is_output[:, None] & is_input, other=0.0)
        sums += tl.dot(left, tl.trans(right), input_precision=PRECISION)
    if BIASED:
        sums += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    target = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(target, sums, mask=is_row[:, None] & is_output[None, :])


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
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """out = x @ weight.T + bias for at most ROWS rows: bound by reading the weights, so several programs share the
    inputs of one tile. The last of them to arrive adds their sums up in a fixed order, and resets the counter."""
    follow(OVERLAPS)
    tile, part = tl.program_id(0), tl.program_id(1)
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    row, place = tl.arange(0, ROWS), tl.arange(0, INPUTS)
    is_row, is_output = row < rows, output < outputs
    from_x = x + row[:, None] * inputs + place[None, :]
    from_weight = weight + output.to(tl.int64)[:, None] * inputs + place[None, :]
    end = tl.minimum(inputs, (part + 1) * share)
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(part * share, end, INPUTS):
        is_input = (start + place < end)[None, :]
        right = tl.load(from_weight + start, mask=is_output[:, None] & is_input, other=0.0)
        left = tl.load(from_x + start, mask=is_row[:, None] & is_input, other=0.0)
        sums += tl.dot(left, tl.trans(right), input_precision=PRECISION)
    is_inside = is_row[:, None] & is_output[None, :]
    at = row[:, None] * outputs + output[None, :]
    is_last = True
    if SHARES > 1:
        tl.store(partial + part * rows * outputs + at, sums, mask=is_inside)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + tile, 1) == SHARES - 1
    if is_last:
        if SHARES > 1:
            tl.debug_barrier()
            tl.store(arrived + tile, 0)
            sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
            for other in range(SHARES):
                sums += tl.load(
                    partial + other * rows * outputs + at, mask=is_inside, other=0.0, cache_modifier=".cg"
                )
        if BIASED:
            sums += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, sums, mask=is_inside)
