"""Triton kernel of grouped products: rows that lie sorted by the matrix they meet, as a mixture of experts has them.

Which rows a program has is found on the device: nothing waits for the router's choice, and a step can be recorded.

    x [R, inputs]      matrices [E, outputs, inputs]      ends [E] int32      out [R, outputs]
"""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from pie_plugins.drivers.cuda_native.triton_launches import follow


@triton.jit
def grouped_kernel(
    x,
    matrices,
    ends,
    out,
    num_matrices,
    outputs,
    inputs,
    MATRICES: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One tile of rows of one matrix; programs beyond the last tile have nothing to do. The sum over inputs always runs
    in the same order."""
    follow(OVERLAPS)
    number = tl.arange(0, MATRICES)
    end = tl.load(ends + number, mask=number < num_matrices, other=0)
    start = tl.load(ends + number - 1, mask=(number > 0) & (number < num_matrices), other=0)
    tiles = (end - start + ROWS - 1) // ROWS
    behind = tl.cumsum(tiles, 0)
    tile = tl.program_id(1)
    chosen = tl.sum((behind <= tile).to(tl.int32), 0)
    if chosen < num_matrices:
        is_chosen = number == chosen
        first = tl.sum(tl.where(is_chosen, start + (tile - behind + tiles) * ROWS, 0), 0)
        row = first + tl.arange(0, ROWS)
        is_row = row < tl.sum(tl.where(is_chosen, end, 0), 0)
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        is_output = output < outputs
        place = tl.arange(0, INPUTS)
        from_x = x + row.to(tl.int64)[:, None] * inputs + place[None, :]
        at = chosen.to(tl.int64) * outputs + output
        from_matrix = matrices + at[:, None] * inputs + place[None, :]
        sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
        for begin in range(0, inputs, INPUTS):
            is_input = (begin + place < inputs)[None, :]
            left = tl.load(from_x + begin, mask=is_row[:, None] & is_input, other=0.0)
            right = tl.load(from_matrix + begin, mask=is_output[:, None] & is_input, other=0.0)
            sums += tl.dot(left, tl.trans(right), input_precision=PRECISION)
        target = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
        tl.store(target, sums, mask=is_row[:, None] & is_output[None, :])
