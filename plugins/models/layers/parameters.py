"""The loaded parameters of one model, handed out once each while its layers are built."""

from __future__ import annotations

from torch import Tensor

from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.step import LinearKernels


class Parameters:
    """Owns the tensors that the weight table produced; a matrix is freed as soon as the driver has packed it."""

    def __init__(self, tensors: dict[str, Tensor], kernels: LinearKernels) -> None:
        self._tensors = tensors
        self._kernels = kernels

    def tensor(self, name: str) -> Tensor:
        return self._tensors.pop(name)

    def linear(self, name: str, bias: bool = False) -> Linear:
        """The linear layer of `name`.weight and, if it has one, `name`.bias."""
        weight = self.tensor(f"{name}.weight")
        return Linear(self._kernels.prepare(weight, self.tensor(f"{name}.bias") if bias else None))

    def tied_linear(self, table: Tensor) -> Linear:
        """A head that shares the matrix of an embedding."""
        return Linear(self._kernels.prepare(table, None))

    def finish(self) -> None:
        assert not self._tensors, f"parameters that no layer took: {sorted(self._tensors)}"
