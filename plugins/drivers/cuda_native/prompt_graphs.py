"""Steps with prompts in them, replayed from CUDA graphs: any mix of prompts, decoding and drafts, by their token rows.

All recordings read one block. A step goes through the smallest forward pass that holds its rows, which leaves hidden
states at one place, and then through the smallest answer that holds the rows somebody asked about. Rows left over
belong to one request more than a step may have, and go to the scratch page.

Large steps take the device longer than launching them, and padding them would take it longer still. Full ones are
recorded nevertheless: where many prompts wait, most steps are, and the host has their programs to look after.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pie_core.contracts.forward import Int64
from pie_plugins.drivers.cuda_native.attention import OwnAttention
from pie_plugins.drivers.cuda_native.attention_work import room_for
from pie_plugins.drivers.cuda_native.batch_tensors import HostStep
from pie_plugins.drivers.cuda_native.cuda_graphs import Recorder
from pie_plugins.drivers.cuda_native.model_runner import ModelRunner
from pie_plugins.drivers.cuda_native.outcomes import Outcomes, RingRow
from pie_plugins.drivers.cuda_native.step_tensors import (
    BlockLayout,
    BlockPacker,
    Sizes,
    StepTensors,
    asked_rows,
    room_to_make,
    view_block,
)
from pie_plugins.drivers.cuda_native.timeline import Timeline

ROWS = (16, 32, 64, 96, 128, 192, 256, *range(384, 4096, 128))
ASKED = (0, 8, 64, 256)
NEARLY_FULL = 128  # rows that a full step may lack
MOST_DRAFTS = 8  # of one request
TILE = 64  # rows of a program, each query head counted


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """Which steps are replayed."""

    rows: int
    full_rows: int  # and these, or hardly fewer
    requests: int
    pages: tuple[int, ...]  # of each group, in all
    products: int  # rows times columns: beyond, another attention is faster

    @property
    def recorded(self) -> tuple[int, ...]:
        """Rows of the forward passes."""
        return up_to(ROWS, self.rows) + ((self.full_rows,) if self.full_rows > self.rows else ())

    def holds(self, rows: int) -> bool:
        return 0 < rows <= self.rows or self.full_rows - NEARLY_FULL < rows <= self.full_rows


def _nothing() -> None:
    """What is replayed before anything is recorded."""


class _Forward:
    """The layers over so many rows."""

    def __init__(self, layout: BlockLayout, tensors: StepTensors, scratch_pages: Sequence[int]) -> None:
        self.layout, self.tensors = layout, tensors
        self.packer = BlockPacker(layout, scratch_pages)
        self.run: Callable[[], None] = _nothing


class _Answer:
    """Logits of so many rows, and sampling from them; with drafts to verify, which takes time, or without."""

    def __init__(self, tensors: StepTensors) -> None:
        self.tensors = tensors
        self.read: Callable[[], None] = _nothing
        self.sample: dict[bool, Callable[[], None]] = {}
        self.whole: dict[bool, Callable[[], None]] = {}  # both in one
        self.found: tuple[Tensor, Tensor] | None = None  # normalized hidden states, logits


class PromptGraphs:
    """All recordings over one block."""

    def __init__(
        self, limits: PromptLimits, runner: ModelRunner, outcomes: Outcomes, timeline: Timeline
    ) -> None:
        self._limits, self._runner, self._outcomes, self._timeline = limits, runner, outcomes, timeline
        self._staging = timeline.staging()
        scratch = [cache.scratch_page for cache in runner.caches]
        self._rows, self._asked = limits.recorded, up_to(ASKED, min(limits.rows, limits.requests))
        room = self._sizes(self._rows[-1])
        layout = BlockLayout(room)
        self._block = torch.zeros(layout.words, dtype=torch.int32, device=timeline.device)
        made = room_to_make(self._block, room, len(limits.pages))
        self._forwards = [
            _Forward(*self._view(self._sizes(rows), room, made), scratch) for rows in self._rows
        ]
        self._answers = [
            _Answer(self._view(replace(room, samplers=asked, asked=asked), room, made)[1])
            for asked in self._asked
        ]
        self._hidden: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self._forwards) + len(self._answers)

    def record(self, recorder: Recorder, idle: HostStep, progress: Callable[[int], None]) -> None:
        """Largest first: the smaller ones then fit into its memory. `idle` has no requests."""
        for done, forward in enumerate(reversed(self._forwards)):
            progress(done)
            self._send(idle, forward, base=0)
            forward.run = recorder.record(partial(self._run_forward, forward))
        for done, answer in enumerate(reversed(self._answers), len(self._forwards)):
            progress(done)
            if answer.tensors.sizes.asked:
                answer.read = recorder.record(partial(self._run_read, answer))
            for drafted in (False, True):
                answer.sample[drafted] = recorder.record(partial(self._run_sample, answer, drafted))
                answer.whole[drafted] = recorder.record(
                    partial(self._run_whole, answer, drafted), is_warm=True
                )

    def find(self, step: HostStep) -> PromptReplay | None:
        """None for steps that are large, read masked rows or shared prefixes, or ask about many rows."""
        rows, asked = len(step.row_request), len(asked_rows(step))
        if not self._limits.holds(rows) or asked > self._asked[-1] or not self._suits(step):
            return None
        forward = self._forwards[bisect_left(self._rows, rows)]
        return PromptReplay(self, forward, self._answers[bisect_left(self._asked, asked)])

    def start(self, step: HostStep, forward: _Forward, then: Callable[[], None], row: RingRow) -> None:
        """The row's mark says when the device begins."""
        self._send(step, forward, row.base)
        row.started.set()
        forward.run()
        then()

    def _suits(self, step: HostStep) -> bool:
        limits, padded = self._limits, self._limits.requests + 1 - len(step.counts)
        fits = (
            len(group.pages) + padded <= pages and group.masks is None
            for group, pages in zip(step.groups, limits.pages, strict=True)
        )
        products = int((step.counts * (step.lengths + step.counts)).sum())
        return (
            all(fits)
            and not step.tiles.count
            and int(step.batch.num_drafts.max()) <= MOST_DRAFTS
            and products <= limits.products
        )

    def _send(self, step: HostStep, forward: _Forward, base: int) -> None:
        room = self._staging.room(forward.layout.words)
        self._staging.send(room, forward.packer.pack(step, base, room), self._block)

    def _run_forward(self, forward: _Forward) -> None:
        runner, tensors = self._runner, forward.tensors
        runner.kernels.prepare(tensors, self._outcomes.ring, runner.vocab_size)
        hidden = runner.hidden(tensors, OwnAttention(runner.kernels, tensors))
        if self._hidden is None:
            self._hidden = hidden.new_zeros((self._rows[-1], hidden.shape[1]))
        self._hidden[: len(hidden)].copy_(hidden)

    def _run_read(self, answer: _Answer) -> None:
        answer.found = self._found(answer)

    def _run_sample(self, answer: _Answer, drafted: bool) -> None:
        self._draw(answer, None if answer.found is None else answer.found[1], drafted)

    def _run_whole(self, answer: _Answer, drafted: bool) -> None:
        self._draw(answer, self._found(answer)[1] if answer.tensors.sizes.asked else None, drafted)

    def _found(self, answer: _Answer) -> tuple[Tensor, Tensor]:
        assert self._hidden is not None
        runner, tensors = self._runner, answer.tensors
        asked = self._hidden.index_select(0, tensors.asked)
        return runner.read(tensors, OwnAttention(runner.kernels, tensors), asked)

    def _draw(self, answer: _Answer, logits: Tensor | None, drafted: bool) -> None:
        kernels, tensors = self._runner.kernels, answer.tensors
        sampled = tensors.tokens.new_empty(0) if logits is None else kernels.sample(logits, tensors)
        verified = replace(tensors, max_drafts=MOST_DRAFTS if drafted else 0)
        kernels.settle(verified, sampled, self._outcomes.ring)

    def _sizes(self, rows: int) -> Sizes:
        limits = self._limits
        return Sizes(
            rows,
            limits.requests + 1,
            self._asked[-1],
            limits.pages,
            rows_each=0,
            asked=self._asked[-1],
            work=room_for(rows, limits.requests, max(1, TILE // self._runner.most_shared)),
        )

    def _view(self, sizes: Sizes, room: Sizes, made: Sequence[Tensor]) -> tuple[BlockLayout, StepTensors]:
        layout, page_sizes = BlockLayout(sizes, room), [cache.page_size for cache in self._runner.caches]
        nobody = np.zeros(0, np.int64)  # which rows a request has is for the list of work to say
        return layout, view_block(self._block, layout, page_sizes, nobody, 0, made)


@dataclass(frozen=True, slots=True)
class PromptReplay:
    """The recordings that one step goes through."""

    graphs: PromptGraphs
    _forward: _Forward
    _answer: _Answer

    @property
    def tensors(self) -> StepTensors:
        return self._answer.tensors

    @property
    def normalized(self) -> Tensor:
        assert self._answer.found is not None, "the step asks about no row"
        return self._answer.found[0]

    @property
    def logits(self) -> Tensor:
        assert self._answer.found is not None, "the step asks about no row"
        return self._answer.found[1]

    def whole(self, step: HostStep, row: RingRow) -> None:
        """All of a step whose logits nobody else reads."""
        self.graphs.start(step, self._forward, self._answer.whole[_has_drafts(step)], row)

    def forward(self, step: HostStep, row: RingRow) -> None:
        self.graphs.start(step, self._forward, self._answer.read, row)

    def probed(self, step: HostStep) -> Int64:
        """Where the rows of the probes lie among the logits."""
        asked = asked_rows(step)
        order = np.argsort(asked, kind="stable")
        places: Int64 = order[np.searchsorted(asked, step.batch.probes.rows, sorter=order)]
        return places

    def sample(self, step: HostStep) -> None:
        """Draws from `logits` as they are, and settles the step."""
        self._answer.sample[_has_drafts(step)]()


def _has_drafts(step: HostStep) -> bool:
    return bool(step.batch.num_drafts.any())


def up_to(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    """The usual sizes below, and the limit itself."""
    return (*(size for size in sizes if size < limit), limit)
