"""Attention by itself on a GPU: decoding, shared prefixes and prompts, beside FlashInfer where it is installed.

    python -m benchmarks.gpu_attention --models 0.6B 8B --parts decode shared prompts --json FILE

Microseconds of one layer, medians over replayed graphs of several launches, each over keys and values of its own, so
that no cache holds them. The floor is reading every key and value once (of prompts: the arithmetic), so a shared prefix
counts once in it. `plan` is what FlashInfer's plan costs the host for each step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_kernels import PAGE, timed
from benchmarks.gpu_loop import Contexts, Story
from benchmarks.gpu_models import COPY_BYTES_PER_S, MATRIX_FLOP_PER_S, SHAPES, Shape
from pie_core.contracts.driver import CacheGroup, CacheSpace, DriverCapabilities
from pie_core.contracts.forward import PrefixGroups
from pie_plugins.drivers.cuda_native.assembly import choose_kernels
from pie_plugins.drivers.cuda_native.batch_tensors import BatchReader, HostStep, ModelLimits
from pie_plugins.drivers.cuda_native.flashinfer_attention import FlashInferPlanner, page_lists
from pie_plugins.drivers.cuda_native.kernels import Kernels
from pie_plugins.drivers.cuda_native.kv_cache import KvCache
from pie_plugins.drivers.cuda_native.options import CudaNativeOptions
from pie_plugins.drivers.cuda_native.outcomes import Outcomes, RingLayout
from pie_plugins.drivers.cuda_native.shared_prefixes import plan_tiles
from pie_plugins.drivers.cuda_native.step_tensors import BlockLayout, StepTensors, pack, sizes_of, view_block
from pie_plugins.drivers.cuda_native.timeline import Timeline, timeline_of
from pie_plugins.models.layers.architecture import PagedLayout

LONGEST = 2**17
DECODED = ((1, 256), (32, 256), (256, 256), (1, 4096), (8, 4096), (32, 4096), (1, 32768), (8, 32768))
SHARED = ((8, 1024), (32, 1024), (8, 4096), (32, 4096), (32, 8192), (256, 256), (256, 1024), (256, 8192))
OWN_COLUMNS = 256  # of each request behind a shared prefix
PROMPTS = (1024, 8000)
Sizes = Sequence[tuple[int, int]]  # requests, and columns of each
BYTES_OF_SETS = 2**29  # more than any cache holds
SCALE = 0.1
WORKSPACE_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    part: str
    requests: int
    columns: int
    way: str
    us: float
    floor_us: float
    plan_us: float = 0.0

    def line(self) -> str:
        planned = f"  plan {self.plan_us:5.0f}" if self.plan_us else ""
        return (
            f"{self.model:5} {self.part:8} {self.requests:4} x {self.columns:6} {self.way:24} {self.us:9.1f}"
            f" {self.floor_us:8.1f} {self.floor_us / self.us:5.0%}{planned}"
        )


class Setting:
    """Requests with so many new rows at the end of so many columns; all of them share the first `shared` ones."""

    def __init__(
        self, shape: Shape, requests: int, columns: int, rows: int, shared: int, timeline: Timeline
    ) -> None:
        self.shape, self.requests, self.columns, self.rows, self.shared = (
            shape,
            requests,
            columns,
            rows,
            shared,
        )
        self.timeline, device = timeline, timeline.device
        pages = requests * (columns // PAGE + 1)
        row_bytes = shape.row_bytes // shape.layers
        self.bytes = (requests * (columns - shared) + shared) * row_bytes
        self.sets = min(6, max(2, -(-BYTES_OF_SETS // self.bytes)))
        layout = PagedLayout("kv", self.sets, shape.kv_heads, shape.head_dim)
        like = torch.empty(0, dtype=torch.bfloat16, device=device)
        used = pages if not shared else pages - (requests - 1) * (shared // PAGE)
        self.cache = KvCache(layout, PAGE, used, 0, like, timeline)
        for place in range(self.sets):
            self.cache.layer(place).normal_()
        self.outcomes = Outcomes(RingLayout(requests, 4 * requests), timeline)
        self.host = self._read(pages)
        self.q = [
            torch.randn(requests * rows, shape.heads, shape.head_dim, dtype=torch.bfloat16, device=device)
            for _ in range(self.sets)
        ]

    def _read(self, pages: int) -> HostStep:
        group = CacheGroup("kv", "paged", self.shape.row_bytes)
        capabilities = DriverCapabilities(
            "cuda_native", "bench", self.shape.vocab_size, self.shape.hidden_size, LONGEST, 8192, self.requests,
            (CacheSpace(group, PAGE, pages, 0),), frozenset(), "", "bfloat16",
        )  # fmt: skip
        old = self.columns - self.rows
        contexts = Contexts(capabilities, [Story(old, self.rows)] * self.requests, 0.0)
        contexts.lengths[:] = old
        if self.shared:
            share_pages(contexts, self.shared // PAGE)
        batch = contexts.literal_step(self.rows)
        if self.shared:
            whole = np.array([[0], [self.requests], [self.shared]], np.int32)
            batch = replace(batch, prefixes=PrefixGroups(*whole))
        limits = ModelLimits(self.shape.vocab_size, LONGEST)
        return BatchReader([self.cache], limits).read(batch, self.outcomes)

    def tensors(self, host: HostStep) -> StepTensors:
        layout = BlockLayout(sizes_of(host))
        block = torch.empty(layout.words, dtype=torch.int32, device=self.timeline.device)
        self.timeline.send(pack(host, layout, 0, [self.cache.scratch_page]), block)
        return view_block(block, layout, [PAGE], np.full(self.requests, self.rows, np.int64), 0)

    @property
    def floor_s(self) -> float:
        shape = self.shape
        seen = self.columns - (self.rows - 1) / 2  # columns of a row, on the average
        flops = 4 * self.requests * self.rows * seen * shape.heads * shape.head_dim
        return max(self.bytes / COPY_BYTES_PER_S, flops / MATRIX_FLOP_PER_S if self.rows > 1 else 0.0)

    def row(self, part: str, way: str, call: Callable[[int], Tensor], plan_us: float = 0.0) -> Row:
        seconds = timed(call, self.timeline, self.sets)
        columns = self.shared or self.columns
        return Row(
            self.shape.name, part, self.requests, columns, way, 1e6 * seconds, 1e6 * self.floor_s, plan_us
        )

    def own(self, part: str, way: str, host: HostStep) -> Row:
        kernels = own_kernels(self.timeline, self.requests)
        step = self.tensors(host)
        kernels.prepare(step, self.outcomes.ring, self.shape.vocab_size)
        call = lambda at: kernels.attend(self.q[at], self.cache.layer(at), step.groups[0], step, SCALE)  # noqa: E731
        return self.row(part, way, call)


def own_kernels(timeline: Timeline, requests: int) -> Kernels:
    return choose_kernels(CudaNativeOptions(), timeline.device, RingLayout(requests, 4 * requests))


def has_flashinfer(timeline: Timeline) -> bool:
    return timeline.device.type == "cuda" and find_spec("flashinfer") is not None


def share_pages(contexts: Contexts, count: int) -> None:
    """Everybody begins with the first one's pages; the pool is no larger than what is left."""
    first = np.arange(count, dtype=np.int32)
    own = np.random.default_rng(0).permutation(sum(len(pages) - count for pages in contexts.pages)) + count
    ends = np.cumsum([len(pages) - count for pages in contexts.pages])
    contexts.pages = [np.concatenate([first, rest]).astype(np.int32) for rest in np.split(own, ends[:-1])]


def decoded(shape: Shape, timeline: Timeline, sizes: Sizes = DECODED) -> Iterator[Row]:
    for requests, columns in sizes:
        setting = Setting(shape, requests, columns, 1, 0, timeline)
        yield setting.own("decode", "own", setting.host)
        for tensor_cores in (True, False) if has_flashinfer(timeline) else ():
            yield flashinfer_decode(setting, tensor_cores)
        del setting
        torch.cuda.empty_cache()


def flashinfer_decode(setting: Setting, tensor_cores: bool) -> Row:
    """As a graph replays it: planned by the host for every step, run from fixed buffers."""
    import flashinfer

    shape, device, cache = setting.shape, setting.timeline.device, setting.cache
    lists = page_lists(setting.host.groups[0], setting.host.lengths, setting.host.counts, PAGE)
    numbers = [
        torch.from_numpy(np.ascontiguousarray(part))
        for part in (lists.indptr, lists.pages, lists.last_page_len)
    ]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        backend="fa2" if tensor_cores else "auto",
        paged_kv_indptr_buffer=numbers[0].to(device),
        paged_kv_indices_buffer=numbers[1].to(device),
        paged_kv_last_page_len_buffer=numbers[2].to(device),
    )
    plan_us = 1e6 * median_time(lambda: plan_decode(wrapper, numbers, shape))
    call = lambda at: wrapper.run(setting.q[at], cache.layer(at))  # noqa: E731
    return setting.row("decode", f"flashinfer{' tensor cores' if tensor_cores else ''}", call, plan_us)


def plan_decode(wrapper: Any, numbers: list[Tensor], shape: Shape) -> None:
    kind = torch.bfloat16
    wrapper.plan(
        *numbers, shape.heads, shape.kv_heads, shape.head_dim, PAGE, q_data_type=kind, kv_data_type=kind
    )


def median_time(call: Callable[[], None]) -> float:
    """Of the host, after a first call that loads kernels."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


def shared(shape: Shape, timeline: Timeline, sizes: Sizes = SHARED) -> Iterator[Row]:
    for requests, columns in sizes:
        setting = Setting(shape, requests, columns + OWN_COLUMNS, 1, columns, timeline)
        everybody = np.ones(requests, np.bool_)
        setting.host.tiles = plan_tiles(setting.host.batch.prefixes, everybody, least_saved=1)
        yield setting.own("shared", "read once for tiles", setting.host)
        alone = BatchReader([setting.cache], ModelLimits(shape.vocab_size, LONGEST), cascades=False)
        yield setting.own("shared", "read by everybody", alone.read(setting.host.batch, setting.outcomes))
        del setting
        torch.cuda.empty_cache()


def prompts(shape: Shape, timeline: Timeline, sizes: Sequence[int] = PROMPTS) -> Iterator[Row]:
    for columns in sizes:
        setting = Setting(shape, 1, columns, columns, 0, timeline)
        yield setting.own("prompt", "own", setting.host)
        if has_flashinfer(timeline):
            planner = FlashInferPlanner(own_kernels(timeline, 1), [setting.cache], timeline.device, 1)
            planned = planner.plan(setting.host, setting.tensors(setting.host))
            call = lambda at: planned.run(0, setting.q[at], setting.cache.layer(at), SCALE)  # noqa: E731, B023
            yield setting.row("prompt", "flashinfer", call)


PARTS: Mapping[str, Callable[[Shape, Timeline], Iterator[Row]]] = {
    "decode": decoded,
    "shared": shared,
    "prompts": prompts,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["0.6B"], choices=sorted(SHAPES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[Row] = []
    timeline = timeline_of(torch.device("cuda"))
    with torch.inference_mode(), timeline.main():
        for name, part in product(arguments.models, arguments.parts):
            for row in PARTS[part](SHAPES[name], timeline):
                print(row.line(), flush=True)
                rows.append(row)
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(each) for each in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
