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
    COUNTERS,
    FACTS,
    WEIGHTS,
    WORDS,
    contest_kernel,
    draw_kernel,
    finish_kernel,
    scout_kernel,
)

CHUNK = 1024  # tokens
BLOCK = 2048  # candidates that the program which ends a row looks at together
LISTABLE = 8192  # tokens of one row that are listed
PROGRAMS_WANTED = 1056  # eight for each multiprocessor of an H100 or H200
SCOUT_STAGES = 3  # chunks on their way
SCOUT_WARPS = 4
FINISH_STAGES = 1  # more on their way take three times the registers
FINISH_WARPS = 8


@dataclass(frozen=True, slots=True)
class _Cut:
    """How rows are cut. Chunks are the same for every number of rows, for sums depend on them; shares need not be."""

    chunk: int  # tokens
    chunks: int
    shares: int  # of a row, each for one program
    chunks_each: int  # of one share
    listable: int
    block: int  # candidates

    @staticmethod
    def of(rows: int, vocab_size: int) -> _Cut:
        whole = int(triton.next_power_of_2(vocab_size))
        chunk = min(CHUNK, whole)
        chunks = -(-vocab_size // chunk)
        each = -(-chunks // min(chunks, -(-PROGRAMS_WANTED // rows)))
        return _Cut(chunk, chunks, -(-chunks // each), each, min(LISTABLE, whole), min(BLOCK, whole))


@dataclass(frozen=True, slots=True)
class _Room:
    """What the kernels leave for one another, for each row."""

    chunks: int  # a power of two; room for as many shares, for kernels would be compiled anew for each number of them
    best: Tensor
    best_id: Tensor
    score: Tensor
    score_id: Tensor
    parts: Tensor
    facts: Tensor
    weights: Tensor
    words: Tensor
    listed: Tensor
    tokens: Tensor

    @staticmethod
    def of(rows: int, cut: _Cut, device: torch.device) -> _Room:
        chunks = int(triton.next_power_of_2(cut.chunks))
        wide = -(-rows // ALIGNED) * ALIGNED

        def made(dtype: torch.dtype, *each: int) -> Iterator[Tensor]:
            sizes = [wide * size for size in each]
            return iter(torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes))

        best, score, parts = made(torch.float32, chunks, 2 * chunks, 2 * chunks)
        best_id, score_id, words, tokens = made(torch.int32, chunks, 2 * chunks, int(WORDS), 1)
        (facts,) = made(torch.float64, int(FACTS))
        weights, listed = made(torch.int64, int(WEIGHTS), cut.listable)
        return _Room(chunks, best, best_id, score, score_id, parts, facts, weights, words, listed, tokens)


class FusedSampler:
    """Draws one token for each row of logits; everything is queued, and what rows need is decided on the device."""

    def __init__(self, layout: RingLayout) -> None:
        self._layout = layout
        self._counters: Tensor | None = None

    def draw(self, logits: Tensor, step: StepTensors) -> Tensor:
        """[S] int32"""
        call = _Call(logits, step, self._counted(len(logits), logits.device))
        call.scout()
        call.draw()
        call.contest()
        call.finish()
        return call.room.tokens[: len(logits)]

    def _counted(self, rows: int, device: torch.device) -> Tensor:
        """How many programs of each row have arrived, and what they have listed: zero between kernels, so made once."""
        if self._counters is None or len(self._counters) < rows:
            size = max(rows, self._layout.max_samplers)
            self._counters = torch.zeros((size, int(COUNTERS)), dtype=torch.int32, device=device)
        return self._counters


class _Call:
    """The launches for one step."""

    def __init__(self, logits: Tensor, step: StepTensors, counters: Tensor) -> None:
        self._rows, self._vocab_size = logits.shape
        self._logits, self._step, self._counters = logits, step, counters
        self._cut = _Cut.of(self._rows, self._vocab_size)
        self.room = _Room.of(self._rows, self._cut, logits.device)
        self._same: dict[str, Any] = {"SHARES": self.room.chunks, **overlapping(logits.device)}
        self._min_p = step.floats("min_p")
        self._filters = (step.floats("temperature"), step.top_k, step.floats("top_p"))
        self._noise = (
            step.stream_low, step.stream_high, step.index, step.shift, step.sampler_request, step.slot, step.epoch,
        )  # fmt: skip
        self._known = (self.room.facts, self.room.weights, self.room.words)

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
            self._counters,
            room.best,
            room.best_id,
            room.score,
            room.score_id,
            room.parts,
            *self._known,
            room.listed,
            room.tokens,
            self._vocab_size,
            cut.shares,
            cut.chunks,
            cut.chunks_each,
            CHUNK=cut.chunk,
            LISTABLE=cut.listable,
            STAGES=SCOUT_STAGES,
            num_warps=SCOUT_WARPS,
            NOTHING_ALLOWED=int(Failure.NOTHING_ALLOWED),
            NOT_A_NUMBER=int(Failure.NOT_A_NUMBER),
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
            self._vocab_size,
            cut.shares,
            cut.chunks_each,
            CHUNK=cut.chunk,
            LISTABLE=cut.listable,
            **self._same,
        )

    def contest(self) -> None:
        cut, room = self._cut, self.room
        launch(
            contest_kernel,
            (self._rows, cut.shares),
            self._logits,
            self._filters[0],
            self._min_p,
            *self._noise,
            room.score,
            room.score_id,
            *self._known,
            self._vocab_size,
            cut.shares,
            cut.chunks_each,
            CHUNK=cut.chunk,
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
            room.tokens,
            self._vocab_size,
            cut.shares,
            BLOCK=cut.block,
            LISTABLE=cut.listable,
            STAGES=FINISH_STAGES,
            num_warps=FINISH_WARPS,
            **self._same,
        )
