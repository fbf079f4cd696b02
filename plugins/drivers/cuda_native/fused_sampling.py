"""Launches the kernels of sampling: how rows of logits are cut, and what one kernel leaves for the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from pie_plugins.drivers.cuda_native.outcomes import Failure, RingLayout
from pie_plugins.drivers.cuda_native.step_tensors import ALIGNED, StepTensors
from pie_plugins.drivers.cuda_native.triton_launches import launch, overlapping
from pie_plugins.drivers.cuda_native.triton_sampling import (
    FACTS,
    WORDS,
    draw_kernel,
    finish_kernel,
    scout_kernel,
    weigh_kernel,
)

CHUNK = 4096  # tokens
PIVOTS = 16
WEIGHINGS = 3  # coarsely, finer, and finer still where the second found no short bracket
LISTABLE = 2048  # tokens of one row that are sorted
PROGRAMS_WANTED = 1056  # eight for each multiprocessor of an H100 or H200


@dataclass(frozen=True, slots=True)
class _Cut:
    """How rows are cut. Chunks are the same for every number of rows, for sums depend on them; shares need not be."""

    chunk: int  # tokens
    chunks: int
    shares: int  # of a row, each for one program
    chunks_each: int  # of one share
    listable: int

    @staticmethod
    def of(rows: int, vocab_size: int) -> _Cut:
        whole = int(triton.next_power_of_2(vocab_size))
        chunk = min(CHUNK, whole)
        chunks = -(-vocab_size // chunk)
        each = -(-chunks // min(chunks, -(-PROGRAMS_WANTED // rows)))
        return _Cut(chunk, chunks, -(-chunks // each), each, min(LISTABLE, whole))


@dataclass(frozen=True, slots=True)
class _Room:
    """What the kernels leave for one another, for each row."""

    chunks: int  # a power of two; room for as many shares, for kernels would be compiled anew for each number of them
    best: Tensor
    best_id: Tensor
    score: Tensor
    score_id: Tensor
    parts: Tensor
    pivots: Tensor
    facts: Tensor
    words: Tensor
    listed: Tensor
    listed_id: Tensor
    tokens: Tensor

    @staticmethod
    def of(rows: int, cut: _Cut, device: torch.device) -> _Room:
        chunks = int(triton.next_power_of_2(cut.chunks))
        wide = -(-rows // ALIGNED) * ALIGNED

        def made(dtype: torch.dtype, *each: int) -> Iterator[Tensor]:
            sizes = [wide * size for size in each]
            return iter(torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes))

        floats = made(torch.float32, chunks, chunks, chunks * PIVOTS, 3 * PIVOTS, cut.listable)
        best, score, parts, pivots, listed = floats
        best_id, score_id, words, listed_id, tokens = made(
            torch.int32, chunks, chunks, int(WORDS), cut.listable, 1
        )
        (facts,) = made(torch.float64, int(FACTS))
        ends = (facts, words, listed, listed_id, tokens)
        return _Room(chunks, best, best_id, score, score_id, parts, pivots, *ends)


class FusedSampler:
    """Draws one token for each row of logits; everything is queued, and what rows need is decided on the device."""

    def __init__(self, layout: RingLayout) -> None:
        self._layout = layout
        self._arrivals: Tensor | None = None

    def draw(self, logits: Tensor, step: StepTensors) -> Tensor:
        """[S] int32"""
        call = _Call(logits, step, self._counted(len(logits), logits.device))
        call.scout()
        for weighing in range(WEIGHINGS):
            call.weigh(is_last=weighing == WEIGHINGS - 1)
        call.draw()
        call.finish()
        return call.room.tokens[: len(logits)]

    def _counted(self, rows: int, device: torch.device) -> Tensor:
        """How many programs of each row have arrived: zero between kernels, so it is made once."""
        if self._arrivals is None or len(self._arrivals) < rows:
            size = max(rows, self._layout.max_samplers)
            self._arrivals = torch.zeros(size, dtype=torch.int32, device=device)
        return self._arrivals


class _Call:
    """The launches for one step."""

    def __init__(self, logits: Tensor, step: StepTensors, arrivals: Tensor) -> None:
        self._rows, self._vocab_size = logits.shape
        self._logits, self._step, self._arrivals = logits, step, arrivals
        self._cut = _Cut.of(self._rows, self._vocab_size)
        self.room = _Room.of(self._rows, self._cut, logits.device)
        self._same: dict[str, Any] = {"LISTABLE": self._cut.listable, **overlapping(logits.device)}
        self._min_p = step.floats("min_p")
        self._filters = (step.floats("temperature"), step.top_k, step.floats("top_p"))
        self._noise = (
            step.stream_low, step.stream_high, step.index, step.shift, step.sampler_request, step.slot, step.epoch,
        )  # fmt: skip
        self._known = (self.room.facts, self.room.words)

    def scout(self) -> None:
        cut, room = self._cut, self.room
        launch(
            scout_kernel,
            (self._rows, cut.shares),
            self._logits,
            *self._filters,
            self._min_p,
            *self._noise,
            self._step.fail,
            self._arrivals,
            room.best,
            room.best_id,
            room.score,
            room.score_id,
            room.pivots,
            *self._known,
            room.tokens,
            self._vocab_size,
            cut.shares,
            cut.chunks_each,
            CHUNK=cut.chunk,
            SHARES=room.chunks,
            PIVOTS=PIVOTS,
            NOTHING_ALLOWED=int(Failure.NOTHING_ALLOWED),
            NOT_A_NUMBER=int(Failure.NOT_A_NUMBER),
            **self._same,
        )

    def weigh(self, is_last: bool) -> None:
        cut, room = self._cut, self.room
        launch(
            weigh_kernel,
            (self._rows, cut.shares),
            self._logits,
            *self._filters,
            self._arrivals,
            room.pivots,
            room.parts,
            *self._known,
            room.tokens,
            self._vocab_size,
            cut.chunks,
            cut.chunks_each,
            LAST=is_last,
            CHUNK=cut.chunk,
            CHUNKS=room.chunks,
            PIVOTS=PIVOTS,
            **self._same,
        )

    def draw(self) -> None:
        cut, room = self._cut, self.room
        launch(
            draw_kernel,
            (self._rows, cut.shares),
            self._logits,
            self._filters[0],
            self._min_p,
            *self._noise,
            room.score,
            room.score_id,
            *self._known,
            room.listed,
            room.listed_id,
            self._vocab_size,
            cut.chunks_each,
            CHUNK=cut.chunk,
            SHARES=room.chunks,
            **self._same,
        )

    def finish(self) -> None:
        cut, room = self._cut, self.room
        launch(
            finish_kernel,
            (self._rows,),
            self._logits,
            *self._filters,
            self._min_p,
            *self._noise,
            room.score,
            room.score_id,
            *self._known,
            room.listed,
            room.listed_id,
            room.tokens,
            self._vocab_size,
            cut.shares,
            BLOCK=cut.chunk,
            SHARES=room.chunks,
            num_warps=8,
            **self._same,
        )
