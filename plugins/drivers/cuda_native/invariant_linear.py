"""Matrix products for the batch-invariant mode, in Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pie_plugins.drivers.cuda_native.linear import Matrix
from pie_plugins.drivers.cuda_native.triton_launches import launch, overlapping
from pie_plugins.drivers.cuda_native.triton_products import product_kernel
from pie_plugins.models.layers.step import Around

ROWS, OUTPUTS, INPUTS = 64, 64, 64  # one tiling for a batch of one and for a prompt of thousands


class InvariantLinear:
    """Always the same tiles, whatever the number of rows."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        return Matrix(weight.contiguous(), bias)

    def __call__(self, x: Tensor, matrix: Matrix) -> Tensor:
        rows, inputs = x.shape
        outputs = len(matrix.weight)
        out = x.new_empty((rows, outputs))
        if rows:
            launch(
                product_kernel,
                (triton.cdiv(outputs, OUTPUTS), triton.cdiv(rows, ROWS)),
                x.contiguous(),
                matrix.weight,
                x if matrix.bias is None else matrix.bias,
                out,
                rows,
                outputs,
                inputs,
                ROWS=ROWS,
                OUTPUTS=OUTPUTS,
                INPUTS=INPUTS,
                BIASED=matrix.bias is not None,
                PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
                **overlapping(x.device),
                num_warps=4,
                num_stages=4,
            )
        return out

    def around(self, x: Tensor, matrix: Matrix, around: Around) -> Tensor | None:
        return None
