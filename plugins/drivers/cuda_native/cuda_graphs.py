"""Steps that decode or verify drafts, replayed from CUDA graphs: a bucket for each rounded-up number of requests.

A bucket owns the block that its graphs read, so a step is one copy and one launch. Steps whose logits somebody reads or
changes take two recordings instead: the forward pass up to the logits, then sampling with everything later steps may
refer to, which runs eagerly where samplers change the logits. Where requests share prefixes, another recording of the
forward pass reads those once (`shared_prefixes`). Without a GPU a bucket runs the same functions over the same block,
so padding is tested on a CPU.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pie_core.contracts.forward import Int64
from pie_plugins.drivers.cuda_native.attention import OwnAttention
from pie_plugins.drivers.cuda_native.batch_tensors import HostStep
from pie_plugins.drivers.cuda_native.model_runner import ModelRunner
from pie_plugins.drivers.cuda_native.outcomes import Outcomes, RingRow
from pie_plugins.drivers.cuda_native.shared_prefixes import MOST_TILES
from pie_plugins.drivers.cuda_native.step_tensors import (
    BlockLayout,
    BlockPacker,
    Sizes,
    StepTensors,
    view_block,
)
from pie_plugins.drivers.cuda_native.timeline import CudaTimeline, Staging, Timeline

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
MOST_VERIFYING = 32  # requests of a replayed step that verifies drafts


class Recorder:
    """Turns a function over fixed tensors into something that is cheap to run again."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._pool = torch.cuda.graph_pool_handle() if isinstance(timeline, CudaTimeline) else None

    def record(self, function: Callable[[], None], is_warm: bool = False) -> Callable[[], None]:
        """Graphs share their memory: what one leaves there lasts until the next is replayed. A function runs once
        before, which compiles its kernels and lets the libraries choose; not where its parts have run already."""
        if not isinstance(self._timeline, CudaTimeline):
            return function
        if not is_warm:
            function()
        self._timeline.synchronize()
        assert self._pool is not None
        return self._timeline.record(function, self._pool)


class Bucket:
    """Room for so many requests with equally many rows, each row with one sampler."""

    def __init__(
        self,
        requests: int,
        rows_each: int,
        pages: Sequence[int],
        runner: ModelRunner,
        outcomes: Outcomes,
        timeline: Timeline,
        staging: Staging,
    ) -> None:
        self._runner, self._outcomes, self._timeline = runner, outcomes, timeline
        self._staging = staging
        page_sizes = [cache.page_size for cache in runner.caches]
        idle = tuple(-(-rows_each // size) for size in page_sizes)
        room = tuple(requests * (listed + spare) for listed, spare in zip(pages, idle, strict=True))
        rows = requests * rows_each
        tiles = min(MOST_TILES, requests // 2) if rows_each == 1 else 0
        self._layout = BlockLayout(Sizes(rows, requests, rows, room, tiles, rows_each, idle))
        self._packer = BlockPacker(self._layout, [cache.scratch_page for cache in runner.caches])
        self._block = torch.zeros(self._layout.words, dtype=torch.int32, device=timeline.device)
        self._cascading = view_block(
            self._block, self._layout, page_sizes, np.full(requests, rows_each), max_drafts=rows_each - 1
        )
        self._plain = replace(self._cascading, tiles=0)
        self._forward: Callable[[], None] = self._run_forward
        self._cascade: Callable[[], None] = self._run_cascade
        self._sample: Callable[[], None] = self._run_sample
        self._whole: Callable[[], None] = self._run_whole
        self._answers: tuple[Tensor, Tensor] | None = None

    @property
    def tensors(self) -> StepTensors:
        return self._plain

    @property
    def normalized(self) -> Tensor:
        return self._left()[0]

    @property
    def logits(self) -> Tensor:
        return self._left()[1]

    def record(self, recorder: Recorder, idle: HostStep) -> None:
        """`idle` has no requests: every row is padding."""
        self._send(idle, base=0)
        self._forward = recorder.record(self._run_forward)
        if self._cascading.tiles:
            self._cascade = recorder.record(self._run_cascade)
        self._sample = recorder.record(self._run_sample)
        self._whole = recorder.record(self._run_whole, is_warm=True)

    def holds(self, step: HostStep) -> bool:
        room = self._layout.sizes
        padded = room.requests - len(step.counts)
        for group, pages, idle in zip(step.groups, room.pages, room.idle_pages, strict=True):
            if len(group.pages) + padded * idle > pages:
                return False
        return True

    def forward(self, step: HostStep, row: RingRow) -> None:
        """Up to the logits. The row's mark says when the device begins."""
        self._send(step, row.base)
        row.started.set()
        if step.tiles.count:
            self._cascade()
        else:
            self._forward()

    def whole(self, step: HostStep, row: RingRow) -> None:
        """All of a step whose logits nobody else reads."""
        if step.tiles.count:
            self.forward(step, row)
            self._sample()
            return
        self._send(step, row.base)
        row.started.set()
        self._whole()

    def probed(self, step: HostStep) -> Int64:
        """Every row has its logits."""
        return step.batch.probes.rows.astype(np.int64)

    def sample(self, step: HostStep) -> None:
        """Draws from `logits` as they are, and settles the step."""
        self._sample()

    def _send(self, step: HostStep, base: int) -> None:
        room = self._staging.room(self._layout.words)
        self._staging.send(room, self._packer.pack(step, base, room), self._block)

    def _run_forward(self) -> None:
        self._answers = self._answer(self.tensors)

    def _run_cascade(self) -> None:
        """Leaves what it gives where sampling expects it: logits of a second recording would need their own memory."""
        answers = self._answer(self._cascading)
        if self._answers is None:  # nothing was recorded: no graph that looks at one place
            self._answers = answers
            return
        for place, answer in zip(self._answers, answers, strict=True):
            place.copy_(answer)

    def _left(self) -> tuple[Tensor, Tensor]:
        assert self._answers is not None, "no step went through"
        return self._answers

    def _answer(self, tensors: StepTensors) -> tuple[Tensor, Tensor]:
        runner = self._runner
        runner.kernels.prepare(tensors, self._outcomes.ring, runner.vocab_size)
        return runner.answer(tensors, OwnAttention(runner.kernels, tensors), None)

    def _run_sample(self) -> None:
        self._draw(self.logits)

    def _run_whole(self) -> None:
        """Its logits last no longer than it runs, so they need no memory of their own."""
        _, logits = self._answer(self.tensors)
        self._draw(logits)

    def _draw(self, logits: Tensor) -> None:
        kernels = self._runner.kernels
        sampled = kernels.sample(logits, self.tensors)
        kernels.settle(self.tensors, sampled, self._outcomes.ring)


class Buckets:
    """All of them, by rows of each request and then by number of requests."""

    def __init__(self, buckets: Mapping[int, Sequence[Bucket]]) -> None:
        self._buckets = buckets
        self._sizes = {
            rows: [bucket.tensors.sizes.requests for bucket in group] for rows, group in buckets.items()
        }

    def find(self, step: HostStep) -> Bucket | None:
        """None where rows differ or are many, some row has not just one sampler, or the step is too large."""
        each = step.rows_each
        sizes = self._sizes.get(each)
        if sizes is None or not _samples_every_row(step):
            return None
        place = bisect_left(sizes, len(step.counts))
        if place == len(sizes):
            return None
        bucket = self._buckets[each][place]
        return bucket if bucket.holds(step) else None


def _samples_every_row(step: HostStep) -> bool:
    if step.is_plain:
        return True
    rows, drafts = step.batch.samplers.rows, step.batch.num_drafts
    count = len(step.row_request)
    is_each = len(rows) == count and bool((rows == np.arange(count)).all())
    return is_each and bool((drafts < step.rows_each).all())


def bucket_sizes(max_requests: int, rows_each: int = 1) -> tuple[int, ...]:
    """The usual sizes below, and the limit itself; steps that verify drafts are small ones."""
    limit = max_requests if rows_each == 1 else min(max_requests, MOST_VERIFYING)
    return (*(size for size in SIZES if size < limit), limit)


def bucket_shapes(max_requests: int, max_drafts: int) -> list[tuple[int, int]]:
    """Requests, and rows of each."""
    return [(size, rows) for rows in range(1, max_drafts + 2) for size in bucket_sizes(max_requests, rows)]


def make_buckets(
    max_requests: int,
    max_drafts: int,
    pages_per_request: Sequence[int],
    runner: ModelRunner,
    outcomes: Outcomes,
    timeline: Timeline,
    recorder: Recorder,
    idle: HostStep,
    progress: Callable[[int], None],
) -> Buckets:
    """Largest first: the smaller ones then fit into its memory."""
    shapes = bucket_shapes(max_requests, max_drafts)
    staging = timeline.staging()
    made: dict[tuple[int, int], Bucket] = {}
    for done, (size, rows) in enumerate(sorted(shapes, key=lambda shape: -shape[0] * shape[1])):
        progress(done)
        bucket = Bucket(size, rows, pages_per_request, runner, outcomes, timeline, staging)
        bucket.record(recorder, idle)
        made[size, rows] = bucket
    return Buckets(
        {
            rows: [made[size, rows] for size in bucket_sizes(max_requests, rows)]
            for rows in range(1, max_drafts + 2)
        }
    )
