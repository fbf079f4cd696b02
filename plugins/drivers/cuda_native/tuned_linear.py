"""Matrix products of few rows by our own kernel where it was measured to be faster than the library's.

Such a product is bound by reading its weights. How fast a tiling reads them depends on shape and chip, so every shape
of the loaded model is timed once, over its own matrices in turn, against the library, and the fastest is kept.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import triton
from torch import Tensor
from torch.nn import functional

from pie_plugins.drivers.cuda_native.linear import Matrix
from pie_plugins.drivers.cuda_native.timeline import CudaTimeline
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
        partial = out if cut.shares == 1 else x.new_empty(cut.shares * rows * outputs, dtype=torch.float32)
        few_rows_kernel[(tiles, cut.shares)](
            x.contiguous(),
            matrix.weight,
            out if matrix.bias is None else matrix.bias,
            out,
            partial,
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
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
        return out

    def tune(self, timeline: CudaTimeline) -> None:
        """Times every shape. The matrices are forgotten afterwards."""
        for shape, matrices in self._matrices.items():
            for rows in ROW_CLASSES:
                best = self._fastest(rows, matrices, timeline)
                if best is not None:
                    self._cuts[(*shape, rows)] = best
        self._matrices.clear()
        LOG.info("products by the own kernel, (outputs, inputs, rows): %s", self._cuts or "none")

    @property
    def cuts(self) -> dict[tuple[int, int, int], Cut]:
        """(outputs, inputs, rows) -> what was found to be faster than the library."""
        return dict(self._cuts)

    def _fastest(self, rows: int, matrices: Sequence[Matrix], timeline: CudaTimeline) -> Cut | None:
        weight = matrices[0].weight
        x = torch.randn(rows, weight.shape[1], dtype=torch.float32, device=weight.device).to(weight.dtype)
        best, limit = (
            None,
            MARGIN
            * _timed(lambda matrix: functional.linear(x, matrix.weight, matrix.bias), matrices, timeline),
        )
        for cut in CUTS:
            seconds = _timed(_with_cut(self, x, cut), matrices, timeline)
            if seconds < limit:
                best, limit = cut, seconds
        return best

    def _counters(self, tiles: int, device: torch.device) -> Tensor:
        """Zero between products: the last program of each tile sees to that."""
        if self._arrived is None or len(self._arrived) < tiles:
            self._arrived = torch.zeros(max(tiles, 16384), dtype=torch.int32, device=device)
        return self._arrived


def _with_cut(linear: TunedLinear, x: Tensor, cut: Cut) -> Callable[[Matrix], Tensor]:
    return lambda matrix: linear.multiply(x, matrix, cut)


def _shape(matrix: Matrix) -> tuple[int, int]:
    return matrix.weight.shape[0], matrix.weight.shape[1]


def _row_class(rows: int) -> int:
    return next(size for size in ROW_CLASSES if size >= rows)


def _timed(call: Callable[[Matrix], Tensor], matrices: Sequence[Matrix], timeline: CudaTimeline) -> float:
    """Seconds of one product inside a graph of several, each with another matrix."""

    def several() -> None:
        for launch in range(LAUNCHES):
            call(matrices[launch % len(matrices)])

    several()
    timeline.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=timeline.stream):
        several()
    times = []
    for _ in range(REPLAYS):
        started = timeline.mark()
        graph.replay()
        ended = timeline.mark()
        ended.wait()
        times.append(ended.seconds_since(started) / LAUNCHES)
    return median(times)
