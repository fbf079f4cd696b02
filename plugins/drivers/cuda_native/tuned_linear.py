"""Matrix products of few rows by our own kernel where it was measured to be faster than the library's.

Such a product is bound by reading its weights. How fast a tiling reads them depends on shape and chip, so every shape
of the loaded model is timed once, over its own matrices in turn, against the library, and the fastest is kept.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import triton
from torch import Tensor
from torch.nn import functional

from pie_plugins.drivers.cuda_native.linear import Matrix
from pie_plugins.drivers.cuda_native.timeline import CudaTimeline
from pie_plugins.drivers.cuda_native.triton_launches import overlapping
from pie_plugins.drivers.cuda_native.triton_products import few_rows_kernel

LOG = logging.getLogger(__name__)
MOST_ROWS = 16
ROW_CLASSES = (1, 2, 4, 8, 16)
LAUNCHES, REPLAYS = 16, 5  # of one measurement
MARGIN = 0.97  # of the library's time: what is not clearly faster is not taken


@dataclass(frozen=True, slots=True)
class Cut:
    """How one product is cut into programs."""

    outputs: int
    inputs: int
    shares: int
    warps: int = 4
    stages: int = 4


CUTS = (
    Cut(16, 256, 1),
    Cut(32, 256, 1),
    Cut(64, 128, 1),
    Cut(16, 256, 4),
    Cut(32, 128, 4),
    Cut(64, 128, 4),
    Cut(32, 256, 8),
)


class TunedLinear:
    """The library's products until `tune` finds better ones."""

    def __init__(self) -> None:
        self._matrices: dict[tuple[int, int], list[Matrix]] = defaultdict(list)
        self._cuts: dict[tuple[int, int, int], Cut] = {}
        self._arrived: Tensor | None = None

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        matrix = Matrix(weight.contiguous(), bias)
        self._matrices[_shape(matrix)].append(matrix)
        return matrix

    def __call__(self, x: Tensor, matrix: Matrix) -> Tensor:
        rows = x.shape[0]
        cut = self._cuts.get((*_shape(matrix), _row_class(rows))) if 0 < rows <= MOST_ROWS else None
        if cut is None:
            return functional.linear(x, matrix.weight, matrix.bias)
        return self.multiply(x, matrix, cut)

    def multiply(self, x: Tensor, matrix: Matrix, cut: Cut) -> Tensor:
        (rows, inputs), outputs = x.shape, len(matrix.weight)
        tiles = triton.cdiv(outputs, cut.outputs)
        share = triton.cdiv(triton.cdiv(inputs, cut.shares), cut.inputs) * cut.inputs
        out = x.new_empty((rows, outputs))
        sums = out if cut.shares == 1 else x.new_empty(cut.shares * rows * outputs, dtype=torch.float32)
        few_rows_kernel[(tiles, cut.shares)](
            x.contiguous(),
            matrix.weight,
            out if matrix.bias is None else matrix.bias,
            out,
            sums,
            self._counters(tiles, x.device),
            rows,
            outputs,
            inputs,
            share,
            ROWS=MOST_ROWS,
            OUTPUTS=cut.outputs,
            INPUTS=cut.inputs,
            SHARES=cut.shares,
            BIASED=matrix.bias is not None,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            **overlapping(x.device),
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
        return out

    def tune(self, timeline: CudaTimeline) -> None:
        """Times every shape. The matrices are forgotten afterwards."""
        clock = _Clock(timeline)
        for shape, matrices in self._matrices.items():
            seconds, cut = min(self._own_times(matrices, clock), key=lambda each: each[0])
            for rows in ROW_CLASSES:
                library = clock.seconds(partial(_library, _input(rows, matrices[0])), matrices)
                if seconds < MARGIN * library:
                    self._cuts[(*shape, rows)] = cut
        self._matrices.clear()
        LOG.info("products by the own kernel, (outputs, inputs, rows): %s", self._cuts or "none")

    def _own_times(self, matrices: Sequence[Matrix], clock: _Clock) -> Iterator[tuple[float, Cut]]:
        """At the most rows: fewer take as long, for the weights are the same."""
        x = _input(MOST_ROWS, matrices[0])
        for cut in CUTS:
            yield clock.seconds(partial(self._own, x, cut), matrices), cut

    def _own(self, x: Tensor, cut: Cut, matrix: Matrix) -> Tensor:
        return self.multiply(x, matrix, cut)

    @property
    def cuts(self) -> dict[tuple[int, int, int], Cut]:
        """(outputs, inputs, rows) -> what was found to be faster than the library."""
        return dict(self._cuts)

    def _counters(self, tiles: int, device: torch.device) -> Tensor:
        """Zero between products: the last program of each tile sees to that."""
        if self._arrived is None or len(self._arrived) < tiles:
            self._arrived = torch.zeros(max(tiles, 16384), dtype=torch.int32, device=device)
        return self._arrived


def _shape(matrix: Matrix) -> tuple[int, int]:
    return matrix.weight.shape[0], matrix.weight.shape[1]


def _row_class(rows: int) -> int:
    return next(size for size in ROW_CLASSES if size >= rows)


def _library(x: Tensor, matrix: Matrix) -> Tensor:
    return functional.linear(x, matrix.weight, matrix.bias)


def _input(rows: int, matrix: Matrix) -> Tensor:
    weight = matrix.weight
    return torch.randn(rows, weight.shape[1], dtype=torch.float32, device=weight.device).to(weight.dtype)


class _Clock:
    """Times one product inside a graph of several, each with another matrix, so that no cache holds them."""

    def __init__(self, timeline: CudaTimeline) -> None:
        self._timeline = timeline

    def seconds(self, call: Callable[[Matrix], Tensor], matrices: Sequence[Matrix]) -> float:
        def several() -> None:
            for launch in range(LAUNCHES):
                call(matrices[launch % len(matrices)])

        several()
        self._timeline.synchronize()
        replay = self._timeline.record(
            several, torch.cuda.graph_pool_handle()
        )  # a pool ends with its last graph
        return median(self._replayed(replay) for _ in range(REPLAYS))

    def _replayed(self, replay: Callable[[], None]) -> float:
        started = self._timeline.mark()
        replay()
        ended = self._timeline.mark()
        ended.wait()
        return ended.seconds_since(started) / LAUNCHES
