"""Matrix products with weights packed once for oneDNN, or plain ones where it is missing.

Measured on 2 cores with AVX-512 BF16 at 576 x 3072: packed against plain 59 / 129 us at one row and 176 / 238 us at
32 rows in bfloat16, 166 / 432 us and 326 / 849 us in float32. A row's result does not depend on the number of rows
(equal bits from 1 to 700), apart from one row in float32, which takes another path: it is computed as two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

PACKED_FOR_ROWS = 32  # the layout that was best over 1 to 512 rows


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    weight: Tensor
    bias: Tensor | None
    pad_single_rows: bool


class PackedLinear:
    """Weights in oneDNN's own blocked layout."""

    def __init__(self) -> None:
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def prepare(self, weight: Tensor, bias: Tensor | None) -> PackedMatrix:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
        return PackedMatrix(packed, bias, weight.dtype == torch.float32)

    def __call__(self, x: Tensor, matrix: PackedMatrix) -> Tensor:
        if matrix.pad_single_rows and x.shape[0] == 1:
            x = x.expand(2, -1)
            return self._multiply(x.contiguous(), matrix)[:1]
        return self._multiply(x, matrix)

    def _multiply(self, x: Tensor, matrix: PackedMatrix) -> Tensor:
        product: Tensor = self._product(x, matrix.weight, matrix.bias, "none", [], "")
        return product


class PlainLinear:
    """Weights as they are."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.contiguous(), bias

    def __call__(self, x: Tensor, matrix: tuple[Tensor, Tensor | None]) -> Tensor:
        return functional.linear(x, *matrix)


LinearProduct = PackedLinear | PlainLinear


def linear_product(device: str, dtype: torch.dtype) -> LinearProduct:
    packed = device == "cpu" and torch._C._has_mkldnn and _has_packed_operations(dtype)
    return PackedLinear() if packed else PlainLinear()


def _has_packed_operations(dtype: torch.dtype) -> bool:
    """Tries them: they are private operations of torch, and not every build and processor has them."""
    try:
        product = PackedLinear()
        product(torch.zeros(2, 16, dtype=dtype), product.prepare(torch.zeros(16, 16, dtype=dtype), None))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True
