"""Goes through all that loading launches, on tensors without content, to learn which kernels it will need.

Torch's device "meta" has shapes and no memory, so nothing runs and no weights have to be there: one pass through the
largest step, masked ones and everything that is recorded takes a second of the host's time, while the weights are read.
What is launched is told to whom `triton_launches.rehearsing` names. What measuring will choose cannot be known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.contracts.driver import DriverRequest, Progress
from pie_core.contracts.forward import ForwardBatch
from pie_plugins.drivers.cuda_native import flashinfer_attention
from pie_plugins.drivers.cuda_native.assembly import Assembly, wants_flashinfer
from pie_plugins.drivers.cuda_native.attention import (
    AttentionPlanner,
    OwnPlanner,
)
from pie_plugins.drivers.cuda_native.cuda_graphs import Recorder, bucket_sizes
from pie_plugins.drivers.cuda_native.kernels import Angles
from pie_plugins.drivers.cuda_native.linear import Linear, Matrix
from pie_plugins.drivers.cuda_native.model_runner import AngleTables, ModelRunner
from pie_plugins.drivers.cuda_native.options import CudaNativeOptions
from pie_plugins.drivers.cuda_native.parallel import Ranks
from pie_plugins.drivers.cuda_native.timeline import Timeline
from pie_plugins.drivers.cuda_native.trial import masked, prefill_step
from pie_plugins.drivers.cuda_native.tuned_linear import TunedLinear
from pie_plugins.drivers.cuda_native.weights import outline_model
from pie_plugins.models.layers.rope import Rope
from pie_plugins.models.layers.step import Around

META = torch.device("meta")
MASKED_PROMPT = 64  # rows: more than requests have that decode
PAGES = 2**16  # as many as any context needs; no kernel is compiled for their number


class Rehearsal(Assembly):
    """One rank's share of a model on a GPU that only lends its name."""

    def __init__(
        self, request: DriverRequest, options: CudaNativeOptions, gpu: torch.device, size: int
    ) -> None:
        silent = replace(request, progress=_ignore)
        super().__init__(silent, replace(options, kernels="triton"), _Nowhere(META), _Alone(size=size))
        self._gpu = gpu
        self._dims: list[int] = []

    def launch_all(self) -> None:
        with torch.inference_mode():
            self._launch_steps()
            if isinstance(self._plain_linear, _Products):
                self._plain_linear.launch_candidates()
        if self._imports_flashinfer():
            flashinfer_attention.import_it()

    def _choose_linear(self) -> Linear:
        linear = super()._choose_linear()
        return _Products() if isinstance(linear, TunedLinear) else linear

    def _launch_steps(self) -> None:
        loaded = outline_model(
            self._path,
            self._request.architectures,
            self._dtype,
            self._linear,
            self._ranks,
            self._options.random_weights,
        )
        angles = _Angles(loaded.config.max_position_embeddings)
        self._dims = [layout.head_dim for layout in loaded.layouts]
        runner = self._runner(loaded, self._lay_out(loaded, PAGES, 0), angles)
        steps = self._steps(loaded, runner)
        for batch in self._eager_steps([cache.page_size for cache in runner.caches]):
            steps.trial(batch)
        if self._options.cuda_graphs:
            self._add_graphs(steps, runner, loaded, _Once(self._timeline))

    def _eager_steps(self, page_sizes: Sequence[int]) -> Iterator[ForwardBatch]:
        """The largest, and those with a masked row: a prompt, and as few or many requests that decode as cut their
        columns differently."""
        options = self._options
        most = options.max_batch_requests
        yield prefill_step(page_sizes, options.max_batch_tokens, most)
        yield masked(prefill_step(page_sizes, min(MASKED_PROMPT, options.max_batch_tokens), 1))
        for requests in bucket_sizes(most):
            yield masked(prefill_step(page_sizes, requests, requests))

    def _planner(self, runner: ModelRunner) -> AttentionPlanner:
        """FlashInfer's kernels are compiled already, and steps of lengths that only the device knows are not its."""
        return OwnPlanner(runner.kernels)

    def _imports_flashinfer(self) -> bool:
        return wants_flashinfer(
            self._options, flashinfer_attention.is_usable(self._gpu, self._dtype, self._dims)
        )


class _Nowhere(Timeline):
    """The host's side of a step is what it is; nothing arrives anywhere."""

    def upload(self, values: NDArray[np.generic]) -> Tensor:
        return super().upload(values).to(self.device)

    def fetch(self, values: Tensor, host: Tensor) -> None:
        """There is nothing to fetch."""


class _Alone(Ranks):
    """A rank whose sums nobody else adds to."""

    def sum(self, values: Tensor) -> Tensor:
        return values


class _Products(TunedLinear):
    """Only what comes out has a shape. Torch's own products without content load its compiler, which takes a second."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        return self.known(Matrix(weight, bias))

    def __call__(self, x: Tensor, matrix: Matrix) -> Tensor:
        return x.new_empty((len(x), len(matrix.weight)))

    def around(self, x: Tensor, matrix: Matrix, around: Around) -> Tensor | None:
        is_sum = around.onto is not None and around.norm is None and not around.gated and matrix.bias is None
        return around.onto if is_sum else None


class _Angles(AngleTables):
    def __init__(self, max_positions: int) -> None:
        super().__init__(0, torch.device("cpu"))
        self._count = max_positions

    def _computed(self, rope: Rope) -> Angles:
        values = torch.empty((self._count, len(rope.frequencies)), device=META)
        return Angles(values, values)


class _Once(Recorder):
    """Runs what is recorded; a function whose parts have run launches nothing new."""

    def record(self, function: Callable[[], None], is_warm: bool = False) -> Callable[[], None]:
        if not is_warm:
            function()
        return function


def _ignore(_: Progress) -> Any:
    """Whoever loads is told of the loading itself."""
