"""Matrix products of few rows by our own kernels where they were measured to be faster than the library's.

Such a product is bound by reading its weights. How fast a tiling reads them depends on shape and chip, so every shape
of the loaded model is timed once, over its own matrices in turn, against the library, and the fastest is kept.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import median

import torch
import triton
from torch import Tensor
from torch.nn import functional
from triton.runtime.errors import OutOfResources

from pie_plugins.drivers.cuda_native.compilation import compiling
from pie_plugins.drivers.cuda_native.linear import Matrix, PlainLinear
from pie_plugins.drivers.cuda_native.timeline import CudaTimeline
from pie_plugins.drivers.cuda_native.triton_launches import launch, overlapping
from pie_plugins.drivers.cuda_native.triton_layers import rms_norm_kernel
from pie_plugins.drivers.cuda_native.triton_products import few_rows_kernel, one_row_kernel
from pie_plugins.models.layers.step import NOTHING, Around

LOG = logging.getLogger(__name__)
ROW_CLASSES = (1, 16, 32, 64)
MOST_ROWS = ROW_CLASSES[-1]
LAUNCHES, REPLAYS = 16, 5  # of one measurement
MARGIN = 0.97  # of the library's time: what is not clearly faster is not taken
COUNTERS = 16384  # tiles of the largest product whose inputs are shared


@dataclass(frozen=True, slots=True)
class Cut:
    """How one product is cut into programs."""

    outputs: int
    inputs: int
    shares: int = 1
    warps: int = 4
    stages: int = 4
    held: int = 0  # tiles of weights that are asked for in advance


ONE_ROW_CUTS = (
    Cut(8, 512),
    Cut(4, 1024),
    Cut(4, 2048),
    Cut(4, 2048, warps=8),
    Cut(16, 512, warps=8),
    Cut(16, 1024, warps=8),
)
FEW_ROWS_CUTS = (
    Cut(64, 128),
    Cut(64, 128, shares=4),
    Cut(64, 256, shares=2, stages=3),
    Cut(64, 128, held=1),
)
MOST_SHARES, MOST_HELD_OUTPUTS = 12, 8192  # of a matrix that programs hold as a whole


@dataclass(frozen=True, slots=True)
class Choice:
    """What a cut was chosen for: at most so many rows times a matrix of such a shape."""

    outputs: int
    inputs: int
    gated: bool
    rows: int


class TunedLinear(PlainLinear):
    """The library's products until `tune` finds better ones."""

    def __init__(self) -> None:
        self._matrices: dict[tuple[int, int], list[Matrix]] = defaultdict(list)
        self._width = 0  # of the residual stream: what the first product takes
        self.cuts: Mapping[Choice, Cut] = {}  # where the own kernels were found to be faster
        self._arrived: Tensor | None = None

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        return self.known(super().prepare(weight, bias))

    def known(self, matrix: Matrix) -> Matrix:
        self._matrices[_shape(matrix)].append(matrix)
        self._width = self._width or matrix.weight.shape[1]
        return matrix

    def __call__(self, x: Tensor, matrix: Matrix) -> Tensor:
        cut = self._cut(x, matrix, NOTHING)
        return super().__call__(x, matrix) if cut is None else self.multiply(x, matrix, cut)

    def around(self, x: Tensor, matrix: Matrix, around: Around) -> Tensor | None:
        cut = self._cut(x, matrix, around)
        if cut is None:
            return super().around(x, matrix, around)
        return self.multiply(x, matrix, cut, around) if _takes_in(x, matrix, around) else None

    def multiply(self, x: Tensor, matrix: Matrix, cut: Cut, around: Around = NOTHING) -> Tensor:
        out = around.onto
        if out is None:
            out = x.new_empty((len(x), len(matrix.weight) // (2 if around.gated else 1)))
        multiply = self._one_row if len(x) == 1 else self.multiply_few
        multiply(x.contiguous(), matrix, cut, around, out)
        return out

    def tune(self, timeline: CudaTimeline) -> dict[Choice, Cut]:
        """Times every shape: where the own kernels are faster, and how."""
        with compiling(timeline.device):
            self.launch_candidates()
        clock, cuts = _Clock(timeline), dict[Choice, Cut]()
        for choice, matrices in self._choices():
            x = _input(choice.rows, matrices[0])
            library = clock.seconds(partial(_library, self._in_a_layer(choice, x)), x, matrices)
            seconds, cut = min(self._own_times(choice, x, matrices, clock), key=lambda each: each[0])
            LOG.debug("%s: library %.2f us, %s %.2f us", choice, 1e6 * library, cut, 1e6 * seconds)
            if seconds < MARGIN * library:
                cuts[choice] = cut
        return cuts

    def take(self, cuts: Mapping[Choice, Cut], timeline: CudaTimeline) -> None:
        """What `tune` found, here or on another rank. The matrices are forgotten then."""
        self.cuts = cuts
        with compiling(timeline.device):
            self._launch_chosen()
        self._matrices.clear()
        LOG.info("products by the own kernels: %s", self.cuts or "none")

    def _cut(self, x: Tensor, matrix: Matrix, around: Around) -> Cut | None:
        rows = len(x)
        if not 0 < rows <= MOST_ROWS:
            return None
        at_most = next(size for size in ROW_CLASSES if size >= rows)
        outputs, inputs = matrix.weight.shape
        return self.cuts.get(Choice(outputs, inputs, around.gated, at_most))

    def _one_row(self, x: Tensor, matrix: Matrix, cut: Cut, around: Around, out: Tensor) -> None:
        outputs = out.shape[1]
        launch(
            one_row_kernel,
            (triton.cdiv(outputs, cut.outputs),),
            x,
            matrix.weight,
            out if matrix.bias is None else matrix.bias,
            out if around.norm is None else around.norm,
            out,
            outputs,
            x.shape[1],
            around.norm_eps,
            OUTPUTS=cut.outputs,
            INPUTS=cut.inputs,
            BIASED=matrix.bias is not None,
            NORMED=around.norm is not None,
            GATED=around.gated,
            ADDED=around.onto is not None,
            num_warps=cut.warps,
            **overlapping(x.device),
        )

    def multiply_few(self, x: Tensor, matrix: Matrix, cut: Cut, around: Around, out: Tensor) -> None:
        (rows, inputs), outputs = x.shape, out.shape[1]
        tiles = triton.cdiv(outputs, cut.outputs)
        share = triton.cdiv(triton.cdiv(inputs, cut.shares), cut.inputs) * cut.inputs
        sums = out
        if cut.shares > 1:
            sums = x.new_empty((1 + around.gated) * cut.shares * rows * outputs, dtype=torch.float32)
        together = next(size for size in ROW_CLASSES[1:] if size >= min(rows, MOST_ROWS))
        blocks = triton.cdiv(rows, together)
        launch(
            few_rows_kernel,
            (tiles, cut.shares, blocks),
            x,
            matrix.weight,
            out if matrix.bias is None else matrix.bias,
            out,
            sums,
            self._counters(tiles * blocks, x.device),
            rows,
            outputs,
            inputs,
            share,
            ROWS=together,
            OUTPUTS=cut.outputs,
            INPUTS=cut.inputs,
            SHARES=cut.shares,
            HELD=cut.held,
            REST=share > cut.held * cut.inputs,
            BIASED=matrix.bias is not None,
            GATED=around.gated,
            ADDED=around.onto is not None,
            num_warps=cut.warps,
            num_stages=cut.stages,
            **overlapping(x.device),
        )

    def _choices(self) -> Iterator[tuple[Choice, Sequence[Matrix]]]:
        """A matrix may be gated where half its outputs are the inputs of another. Tensor cores have no float32, so that
        only single rows of it are ours."""
        inner = {inputs for _, inputs in self._matrices}
        for (outputs, inputs), matrices in self._matrices.items():
            may_be_gated = 2 * (outputs // 2) == outputs and outputs // 2 in inner
            for gated in (False, True) if may_be_gated else (False,):
                for rows in ROW_CLASSES if _is_narrow(matrices[0]) else ROW_CLASSES[:1]:
                    yield Choice(outputs, inputs, gated, rows), matrices

    def _own_times(
        self, choice: Choice, x: Tensor, matrices: Sequence[Matrix], clock: _Clock
    ) -> Iterator[tuple[float, Cut]]:
        """At the most rows: fewer take as long, for the weights are the same."""
        around = self._in_a_layer(choice, x)
        for cut in _cuts(choice):
            try:
                yield clock.seconds(partial(self._own, cut, around), x, matrices), cut
            except OutOfResources:  # wide numbers: a tile does not fit
                yield inf, cut

    def _in_a_layer(self, choice: Choice, x: Tensor) -> Around:
        """What stands around a product of one row, as far as shapes tell: sums go to the residual stream, which is as
        wide as what the first product takes; the others norm it."""
        if choice.rows > 1:
            return Around(gated=choice.gated)
        if choice.outputs == self._width and not choice.gated:
            return Around(onto=x.new_zeros((1, choice.outputs)))
        return Around(norm=x[0], norm_eps=1e-6, gated=choice.gated)

    def _own(self, cut: Cut, around: Around, x: Tensor, matrix: Matrix) -> Tensor:
        return self.multiply(x, matrix, cut, around)

    def launch_candidates(self) -> None:
        """Everything that is going to be timed, once."""
        for choice, matrices in self._choices():
            x = _room(choice.rows, matrices[0])
            around = self._in_a_layer(choice, x)
            _normed(x)
            for cut in _cuts(choice):
                self.multiply(x, matrices[0], cut, around)

    def _launch_chosen(self) -> None:
        """What was chosen once more, with what may stand around it."""
        for choice, matrices in self._choices():
            if choice in self.cuts:
                x = _room(choice.rows, matrices[0])
                for around in _likely(x, choice):
                    self.multiply(x, matrices[0], self.cuts[choice], around)

    def _counters(self, tiles: int, device: torch.device) -> Tensor:
        """Zero between products: the last program of each tile sees to that."""
        if self._arrived is None or len(self._arrived) < tiles:
            self._arrived = torch.zeros(max(tiles, COUNTERS), dtype=torch.int32, device=device)
        return self._arrived


def _takes_in(x: Tensor, matrix: Matrix, around: Around) -> bool:
    """A norm stands before the only row; biases of a gated product would be two."""
    if around.gated and matrix.bias is not None:
        return False
    return around.norm is None or (len(x) == 1 and around.norm.dim() == 1)


def _shape(matrix: Matrix) -> tuple[int, int]:
    outputs, inputs = matrix.weight.shape
    return outputs, inputs


def _is_narrow(matrix: Matrix) -> bool:
    return matrix.weight.dtype in (torch.bfloat16, torch.float16)


def _cuts(choice: Choice) -> tuple[Cut, ...]:
    if choice.rows == 1:
        return ONE_ROW_CUTS
    return FEW_ROWS_CUTS + tuple(_holding(choice))


def _holding(choice: Choice) -> Iterator[Cut]:
    """So many programs that they hold the whole matrix before the rows are there: for those that fit on the chip."""
    for held in (1,) if choice.gated else (1, 2):
        shares = triton.cdiv(choice.inputs, 256 * held)
        if shares <= MOST_SHARES and choice.outputs <= MOST_HELD_OUTPUTS:
            yield Cut(64, 256, shares, stages=2, held=held)


def _likely(x: Tensor, choice: Choice) -> Iterator[Around]:
    """Sums onto the residual stream, norms of it; the head is behind a norm of its own."""
    if choice.rows == 1:
        yield NOTHING
    if not choice.gated:
        yield Around(onto=x.new_empty((len(x), choice.outputs)))
    if choice.rows == 1:
        yield Around(norm=x[0], norm_eps=1e-6, gated=choice.gated)


def _library(around: Around, x: Tensor, matrix: Matrix) -> Tensor:
    product = functional.linear(x if around.norm is None else _normed(x), matrix.weight, matrix.bias)
    if around.gated:  # about what the activation takes then
        columns = product.shape[1] // 2
        return product[:, :columns] * product[:, columns:]
    return product


def _room(rows: int, matrix: Matrix) -> Tensor:
    return matrix.weight.new_empty((rows, matrix.weight.shape[1]))


def _input(rows: int, matrix: Matrix) -> Tensor:
    weight = matrix.weight
    return torch.randn(rows, weight.shape[1], dtype=torch.float32, device=weight.device).to(weight.dtype)


def _normed(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    columns = x.shape[1]
    block = triton.next_power_of_2(columns)
    launch(
        rms_norm_kernel,
        (len(x),),
        x,
        x,
        out,
        columns,
        1e-6,
        BLOCK=block,
        num_warps=8,
        **overlapping(x.device),
    )
    return out


class _Clock:
    """Times one product inside a graph of several, each with another matrix, so that no cache holds them, and behind a
    norm, as in a layer: what begins early gains by it."""

    def __init__(self, timeline: CudaTimeline) -> None:
        self._timeline = timeline

    def seconds(
        self, call: Callable[[Tensor, Matrix], Tensor], x: Tensor, matrices: Sequence[Matrix]
    ) -> float:
        def several() -> None:
            for each in range(LAUNCHES):
                call(_normed(x), matrices[each % len(matrices)])

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
