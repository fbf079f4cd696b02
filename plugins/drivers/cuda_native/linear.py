"""Matrix products of the linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pie_plugins.models.layers.step import Around


@dataclass(frozen=True, slots=True)
class Matrix:
    weight: Tensor  # [out, in]
    bias: Tensor | None


class Linear(Protocol):
    """How matrices are kept and multiplied; `prepare` is `layers.step.LinearKernels`."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Matrix: ...

    def __call__(self, x: Tensor, matrix: Matrix) -> Tensor: ...

    def around(self, x: Tensor, matrix: Matrix, around: Around) -> Tensor | None:
        """The product with all that stands around it; None where there is no operation that does it at once."""
        ...


class PlainLinear:
    """The library's own products: the fastest, with tiles that depend on the number of rows."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        return Matrix(weight.contiguous(), bias)

    def __call__(self, x: Tensor, matrix: Matrix) -> Tensor:
        return functional.linear(x, matrix.weight, matrix.bias)

    def around(self, x: Tensor, matrix: Matrix, around: Around) -> Tensor | None:
        if around.onto is None or around.norm is not None or around.gated or matrix.bias is not None:
            return None
        return around.onto.addmm_(x, matrix.weight.t())


class RowByRowLinear:
    """The same bits for a row whatever stands beside it, without Triton: one row at a time. For tests on a CPU."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        return Matrix(weight.contiguous(), bias)

    def __call__(self, x: Tensor, matrix: Matrix) -> Tensor:
        if not len(x):
            return functional.linear(x, matrix.weight, matrix.bias)
        return torch.cat([functional.linear(row, matrix.weight, matrix.bias) for row in x.split(1)])

    def around(self, x: Tensor, matrix: Matrix, around: Around) -> Tensor | None:
        return None
