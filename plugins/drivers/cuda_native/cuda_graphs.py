"""Steps that only decode, replayed from CUDA graphs: one bucket for each rounded-up number of requests.

A bucket owns the block that its graphs read, so a step is one copy and two launches: the forward pass up to the logits,
then sampling with everything later steps may refer to. Steps whose samplers change the logits run the second part
eagerly. Without a GPU a bucket runs the same functions over the same block, so padding is tested on a CPU.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pie_plugins.drivers.cuda_native.attention import OwnAttention
from pie_plugins.drivers.cuda_native.batch_tensors import HostStep
from pie_plugins.drivers.cuda_native.model_runner import ModelRunner
from pie_plugins.drivers.cuda_native.outcomes import Outcomes
from pie_plugins.drivers.cuda_native.step_tensors import (
    BlockLayout,
    Sizes,
    StepTensors,
    pack,
    view_block,
)
from pie_plugins.drivers.cuda_native.timeline import CudaTimeline, Mark, Timeline

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
WARM_UPS = 2  # compile kernels and let the libraries choose before anything is recorded


class Recorder:
    """Turns a function over fixed tensors into something that is cheap to run again."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._pool = torch.cuda.graph_pool_handle() if isinstance(timeline, CudaTimeline) else None

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Graphs share their memory: what one leaves there lasts until the next is replayed."""
        if not isinstance(self._timeline, CudaTimeline):
            return function
        for _ in range(WARM_UPS):
            function()
        self._timeline.synchronize()
        assert self._pool is not None
        return self._timeline.record(function, self._pool)


class Bucket:
    """Room for so many requests with one row and one sampler each."""

    def __init__(
        self, requests: int, pages: Sequence[int], runner: ModelRunner, outcomes: Outcomes, timeline: Timeline
    ) -> None:
        self._runner, self._outcomes, self._timeline = runner, outcomes, timeline
        self._layout = BlockLayout(
            Sizes(requests, requests, requests, tuple(count + requests for count in pages))
        )
        self._scratch = [cache.scratch_page for cache in runner.caches]
        self._block = torch.zeros(self._layout.words, dtype=torch.int32, device=timeline.device)
        sizes = [cache.page_size for cache in runner.caches]
        self.tensors: StepTensors = view_block(
            self._block, self._layout, sizes, np.ones(requests, np.int64), max_drafts=0
        )
        self._attention = OwnAttention(runner.kernels, self.tensors)
        self._forward: Callable[[], None] = self._run_forward
        self._sample: Callable[[], None] = self._run_sample
        self.normalized: Tensor
        self.logits: Tensor

    def record(self, recorder: Recorder, idle: HostStep) -> None:
        """`idle` has no requests: every row is padding."""
        self._send(idle, base=0)
        self._forward = recorder.record(self._run_forward)
        self._sample = recorder.record(self._run_sample)

    def holds(self, step: HostStep) -> bool:
        room = self._layout.sizes
        padded = room.requests - len(step.counts)
        return all(
            len(group.pages) + padded <= pages for group, pages in zip(step.groups, room.pages, strict=True)
        )

    def forward(self, step: HostStep, base: int) -> Mark:
        """The mark stands where the device began."""
        self._send(step, base)
        started = self._timeline.mark()
        self._forward()
        return started

    def sample(self) -> None:
        """Draws from `logits` as they are, and settles the step."""
        self._sample()

    def _send(self, step: HostStep, base: int) -> None:
        self._timeline.send(pack(step, self._layout, base, self._scratch), self._block)

    def _run_forward(self) -> None:
        runner, tensors = self._runner, self.tensors
        vocab_size = runner.vocab_size
        runner.kernels.prepare(tensors, self._outcomes.ring, vocab_size)
        self.normalized, self.logits = runner.answer(tensors, self._attention, None)

    def _run_sample(self) -> None:
        kernels = self._runner.kernels
        sampled = kernels.sample(self.logits, self.tensors)
        kernels.settle(self.tensors, sampled, self._outcomes.ring)


class Buckets:
    """All of them, largest first when recorded: the smaller ones then fit into its memory."""

    def __init__(self, buckets: Sequence[Bucket], sizes: Sequence[int]) -> None:
        self._buckets, self._sizes = buckets, sizes

    def find(self, step: HostStep) -> Bucket | None:
        """None where the step does more than decode with one sampler a row, or is too large."""
        place = bisect_left(self._sizes, len(step.counts))
        if place == len(self._sizes) or not step.is_decode or not _samples_every_row(step):
            return None
        bucket = self._buckets[place]
        return bucket if bucket.holds(step) else None


def _samples_every_row(step: HostStep) -> bool:
    rows = step.batch.samplers.rows
    count = len(step.counts)
    return len(rows) == count and bool((rows == np.arange(count)).all()) and not step.batch.num_drafts.any()


def bucket_sizes(max_requests: int) -> tuple[int, ...]:
    """The usual sizes below, and the limit itself."""
    return (*(size for size in SIZES if size < max_requests), max_requests)


def make_buckets(
    max_requests: int,
    pages_per_request: Sequence[int],
    runner: ModelRunner,
    outcomes: Outcomes,
    timeline: Timeline,
    idle: HostStep,
    progress: Callable[[int, int], None],
) -> Buckets:
    sizes = bucket_sizes(max_requests)
    recorder = Recorder(timeline)
    made: dict[int, Bucket] = {}
    for done, size in enumerate(reversed(sizes)):
        progress(done, len(sizes))
        bucket = Bucket(size, [size * pages for pages in pages_per_request], runner, outcomes, timeline)
        bucket.record(recorder, idle)
        made[size] = bucket
    return Buckets([made[size] for size in sizes], sizes)
