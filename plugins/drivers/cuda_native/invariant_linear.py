"""Matrix products for the batch-invariant mode, in Triton.

Few rows go one way and more another, with the same sums: inputs are cut into shares by the shape of the matrix alone;
within a share, sums run from its first input to its last by the same matrix instruction, and shares are added up in
their order, whatever the tiles. So a row has the same bits among any others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pie_plugins.drivers.cuda_native.linear import Matrix
from pie_plugins.drivers.cuda_native.triton_launches import launch, overlapping
from pie_plugins.drivers.cuda_native.triton_products import product_kernel
from pie_plugins.drivers.cuda_native.tuned_linear import MOST_ROWS, Cut, TunedLinear
from pie_plugins.models.layers.step import NOTHING, Around

OUTPUTS, INPUTS = 64, 128  # of a tile of few rows
PROGRAMS_WANTED = 264  # two for each multiprocessor of an H100 or H200
MOST_SHARES, LEAST_INPUTS = 12, 256  # of one product; of one share


@dataclass(frozen=True, slots=True)
class Tiles:
    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


SMALL, LARGE, EXACT = Tiles(64, 64, 128, 4, 3), Tiles(128, 128, 64, 8, 4), Tiles(64, 64, 32, 4, 3)
LEAST_LARGE = 96  # large tiles that fill the GPU well enough to be faster


class InvariantLinear:
    """Always the same sums, whatever the number of rows."""

    def __init__(self) -> None:
        self._few = TunedLinear()  # for its kernel; nothing is measured, which might differ from load to load

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        return Matrix(weight.contiguous(), bias)

    def __call__(self, x: Tensor, matrix: Matrix) -> Tensor:
        return self._multiply(x, matrix, NOTHING, x.new_empty((len(x), len(matrix.weight))))

    def around(self, x: Tensor, matrix: Matrix, around: Around) -> Tensor | None:
        if around.onto is None or around.norm is not None or around.gated:
            return None
        return self._multiply(x, matrix, around, around.onto)

    def _multiply(self, x: Tensor, matrix: Matrix, around: Around, out: Tensor) -> Tensor:
        rows, is_exact = len(x), x.dtype == torch.float32
        if 0 < rows <= MOST_ROWS and not is_exact:
            cut = Cut(OUTPUTS, INPUTS, _shares(matrix.weight), stages=4)
            self._few.multiply_few(x.contiguous(), matrix, cut, around, out)
        elif rows:
            tiles = EXACT if is_exact else _tiles(rows, len(matrix.weight))
            _multiply_many(x.contiguous(), matrix, tiles, around, out)
        return out


def _tiles(rows: int, outputs: int) -> Tiles:
    """All give the same bits."""
    large: int = triton.cdiv(rows, LARGE.rows) * triton.cdiv(outputs, LARGE.outputs)
    return LARGE if large >= LEAST_LARGE else SMALL


def _multiply_many(x: Tensor, matrix: Matrix, tiles: Tiles, around: Around, out: Tensor) -> None:
    (rows, inputs), outputs = x.shape, out.shape[1]
    launch(
        product_kernel,
        (triton.cdiv(rows, tiles.rows), triton.cdiv(outputs, tiles.outputs)),
        x,
        matrix.weight,
        x if matrix.bias is None else matrix.bias,
        out,
        rows,
        outputs,
        inputs,
        _share(matrix.weight),
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        INPUTS=tiles.inputs,
        BIASED=matrix.bias is not None,
        ADDED=around.onto is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        **overlapping(x.device),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _shares(weight: Tensor) -> int:
    """So many that few rows fill the GPU."""
    outputs, inputs = weight.shape
    wanted: int = triton.cdiv(PROGRAMS_WANTED, triton.cdiv(outputs, OUTPUTS))
    return max(1, min(wanted, MOST_SHARES, inputs // LEAST_INPUTS))


def _share(weight: Tensor) -> int:
    """Inputs of one share, as `TunedLinear.multiply_few` cuts them."""
    return int(triton.cdiv(triton.cdiv(weight.shape[1], _shares(weight)), INPUTS)) * INPUTS
