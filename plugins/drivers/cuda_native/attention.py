"""Which attention runs a step: the driver's own kernel, or FlashInfer where it is installed and faster."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pie_plugins.drivers.cuda_native.batch_tensors import HostStep
from pie_plugins.drivers.cuda_native.kernels import Kernels
from pie_plugins.drivers.cuda_native.step_tensors import StepTensors

NEVER = 2**62


class AttentionPlan(Protocol):
    """One step's attention, ready for its layers."""

    def run(self, group: int, q: Tensor, pages: Tensor, scale: float) -> Tensor:
        """q [T, H, D] over the pages of one layer; [T, H * D]."""
        ...


class OwnAttention:
    """The driver's own kernel: lengths and masks live on the device, so nothing has to be known when it is queued."""

    def __init__(self, kernels: Kernels, step: StepTensors) -> None:
        self._kernels, self._step = kernels, step

    def run(self, group: int, q: Tensor, pages: Tensor, scale: float) -> Tensor:
        return self._kernels.attend(q, pages, self._step.groups[group], self._step, scale)


class AttentionPlanner(Protocol):
    """Chooses for each step that is not replayed from a graph."""

    @property
    def most_recorded(self) -> int:
        """Rows times columns beyond which a step is better not replayed, for its attention."""
        ...

    def plan(self, host: HostStep, step: StepTensors) -> AttentionPlan: ...


class OwnPlanner:
    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    @property
    def most_recorded(self) -> int:
        return NEVER

    def plan(self, host: HostStep, step: StepTensors) -> AttentionPlan:
        return OwnAttention(self._kernels, step)
