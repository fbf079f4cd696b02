"""What the order of a context's KV pages costs: decode attention of all layers, over a cache that fills the GPU.

    python -m benchmarks.gpu_page_order --models 0.6B --page-sizes 16 32 64 --bytes 110 --json FILE

Microseconds of one layer, medians over replayed graphs that go through the layers once, as a step does. `pool` is what
pie's own pool hands out to contexts that start together, `runs of n` are n neighbouring pages at a time from anywhere
in the cache, and `n %` are single pages drawn from so large a part of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu_attention import own_kernels
from benchmarks.gpu_kernels import timed
from benchmarks.gpu_loop import Contexts, Story, pooled_pages
from benchmarks.gpu_models import COPY_BYTES_PER_S, SHAPES, Shape
from pie_core.contracts.driver import CacheGroup, CacheSpace, DriverCapabilities
from pie_plugins.drivers.cuda_native.batch_tensors import BatchReader, ModelLimits
from pie_plugins.drivers.cuda_native.kv_cache import KvCache
from pie_plugins.drivers.cuda_native.outcomes import Outcomes, RingLayout
from pie_plugins.drivers.cuda_native.step_tensors import BlockLayout, StepTensors, pack, sizes_of, view_block
from pie_plugins.drivers.cuda_native.timeline import Timeline, timeline_of
from pie_plugins.models.layers.architecture import PagedLayout

LONGEST = 2**17
DECODED = ((32, 288), (256, 256), (256, 288), (32, 4096), (256, 1024), (8, 32768))
GROWN = 512  # contexts up to here are prompts for one half, others but for their last page
RUNS = (2, 4, 8, 16, 32)
SHARES = (0.02, 0.1, 0.3, 1.0)
SCALE = 0.1

Pages = list[NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    page_size: int
    requests: int
    columns: int
    order: str
    us: float
    floor_us: float

    def line(self) -> str:
        return (
            f"{self.model:5} pages of {self.page_size:3} {self.requests:4} x {self.columns:6} {self.order:14}"
            f" {self.us:9.1f} {self.floor_us:8.1f} {self.floor_us / self.us:5.0%}"
        )


class Bench:
    """One cache of so many bytes, and attention over it."""

    def __init__(self, shape: Shape, page_size: int, size: int, timeline: Timeline) -> None:
        self.shape, self.timeline = shape, timeline
        layout = PagedLayout("kv", shape.layers, shape.kv_heads, shape.head_dim)
        like = torch.empty(0, dtype=torch.bfloat16, device=timeline.device)
        pages = size // (shape.row_bytes * page_size)
        self.cache = KvCache(layout, page_size, pages, 0, like, timeline)
        for layer in range(shape.layers):
            self.cache.layer(layer).normal_()

    def orders(self, requests: int, columns: int) -> Iterator[tuple[str, Pages]]:
        size, there = self.cache.page_size, self.cache.num_pages
        prompt = columns // 2 if columns <= GROWN else columns - size
        stories = [Story(prompt, columns - prompt)] * requests
        grown = pooled_pages(stories, size, there)
        needed = -(-columns // size)
        yield "pool", [pages[:needed] for pages in grown]
        whole = np.arange(requests * needed, dtype=np.int32)
        yield "contiguous", np.split(whole, requests)
        drawn = np.random.default_rng(0)
        lowest = drawn.permutation(sum(map(len, grown))).astype(np.int32)
        yield "lowest mixed", np.split(lowest[: requests * needed], requests)
        for share in SHARES:
            if share * there >= requests * needed:
                mixed = drawn.permutation(int(share * there))[: requests * needed].astype(np.int32)
                yield f"{share:.0%}", np.split(mixed, requests)
        for run in RUNS:
            if run <= needed:
                starts = drawn.permutation(there // run)[: requests * -(-needed // run)] * run
                runs = (starts[:, None] + np.arange(run)).reshape(requests, -1)[:, :needed]
                yield f"runs of {run}", list(runs.astype(np.int32))

    def rows(self, requests: int, columns: int) -> Iterator[Row]:
        kernels = own_kernels(self.timeline, requests)
        outcomes = Outcomes(RingLayout(requests, 4 * requests), self.timeline)
        q = self._queries(requests)
        floor = requests * columns * self.shape.row_bytes / self.shape.layers / COPY_BYTES_PER_S
        for name, pages in self.orders(requests, columns):
            step = self._step(requests, columns, pages, outcomes)
            kernels.prepare(step, outcomes.ring, self.shape.vocab_size)

            def attend(layer: int, step: StepTensors = step) -> Tensor:
                return kernels.attend(q, self.cache.layer(layer), step.groups[0], step, SCALE)

            seconds = timed(attend, self.timeline, self.shape.layers)
            yield Row(
                self.shape.name, self.cache.page_size, requests, columns, name, 1e6 * seconds, 1e6 * floor
            )

    def _queries(self, requests: int) -> Tensor:
        shape = self.shape
        device = self.timeline.device
        return torch.randn(requests, shape.heads, shape.head_dim, dtype=torch.bfloat16, device=device)

    def _step(self, requests: int, columns: int, pages: Pages, outcomes: Outcomes) -> StepTensors:
        shape, size = self.shape, self.cache.page_size
        group = CacheGroup("kv", "paged", shape.row_bytes)
        capabilities = DriverCapabilities(
            "cuda_native", "bench", shape.vocab_size, shape.hidden_size, LONGEST, 8192, requests,
            (CacheSpace(group, size, self.cache.num_pages, 0),), frozenset(), "", "bfloat16",
        )  # fmt: skip
        contexts = Contexts(capabilities, [Story(columns - 1, 1)] * requests, 0.0)
        contexts.pages = pages
        contexts.lengths[:] = columns - 1
        limits = ModelLimits(shape.vocab_size, LONGEST)
        host = BatchReader([self.cache], limits).read(contexts.literal_step(), outcomes)
        layout = BlockLayout(sizes_of(host))
        block = torch.empty(layout.words, dtype=torch.int32, device=self.timeline.device)
        self.timeline.send(pack(host, layout, 0, [self.cache.scratch_page]), block)
        return view_block(block, layout, [size], np.ones(requests, np.int64), 0)


def main() -> None:
    arguments = _parse()
    rows: list[Row] = []
    timeline = timeline_of(torch.device("cuda"))
    with torch.inference_mode(), timeline.main():
        for name in arguments.models:
            for size in arguments.page_sizes:
                rows += measured(SHAPES[name], size, arguments.bytes * 10**9, timeline)
                torch.cuda.empty_cache()
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(each) for each in rows], indent=1) + "\n")


def measured(
    shape: Shape, page_size: int, size: int, timeline: Timeline, sizes: Sequence[tuple[int, int]] = DECODED
) -> list[Row]:
    """A cache of `size` bytes, and so many requests of so many columns each, as far as they fit."""
    bench, found = Bench(shape, page_size, size, timeline), []
    for requests, columns in sizes:
        if requests * (columns + page_size) * shape.row_bytes <= size:
            for row in bench.rows(requests, columns):
                print(row.line(), flush=True)
                found.append(row)
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["0.6B"], choices=sorted(SHAPES))
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--bytes", type=int, default=110, help="of the cache, 10^9 of them")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
