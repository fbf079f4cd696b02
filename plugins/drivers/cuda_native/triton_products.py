"""A matrix product with one tiling for every number of rows: a row's bits do not depend on the rows beside it."""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
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
):
    """out = x @ weight.T + bias; the sum over inputs always runs in the same order."""
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
