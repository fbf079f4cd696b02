"""Every kernel of a decode step by itself, at the shapes of real models: microseconds, and the share of its own floor.

    python -m benchmarks.gpu_kernels --models 0.6B 8B --batches 1 32 256 [--sweep] --json FILE

Times are medians over replayed graphs of several launches, each over inputs of its own, so neither launches nor caches
flatter them. `--sweep` also tries other tilings of decode attention.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_loop import Contexts, Story
from benchmarks.gpu_models import COPY_BYTES_PER_S, ITEM, MATRIX_FLOP_PER_S, SHAPES, Shape
from pie_core.contracts.driver import CacheGroup, CacheSpace, DriverCapabilities
from pie_core.contracts.forward import ForwardBatch
from pie_plugins.drivers.cuda_native.batch_tensors import BatchReader, ModelLimits
from pie_plugins.drivers.cuda_native.decode_attention import TILING, DecodeTiling
from pie_plugins.drivers.cuda_native.kernels import Angles
from pie_plugins.drivers.cuda_native.kv_cache import KvCache
from pie_plugins.drivers.cuda_native.outcomes import Outcomes, RingLayout
from pie_plugins.drivers.cuda_native.step_tensors import BlockLayout, StepTensors, pack, sizes_of, view_block
from pie_plugins.drivers.cuda_native.timeline import CudaTimeline
from pie_plugins.drivers.cuda_native.triton_kernels import TritonKernels
from pie_plugins.models.layers.architecture import PagedLayout
from pie_plugins.models.layers.rope import Rope
from pie_plugins.models.layers.step import AttentionHeads

PAGE = 16
SETS = 6  # of inputs, so that the caches hold none of them
REPLAYS = 9
LAUNCHES = 12  # of a replay, so that its own launch does not count
CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    batch: int
    kernel: str
    us: float
    floor_us: float
    launches: int  # of one step

    def line(self) -> str:
        share = self.floor_us / self.us if self.us else 0.0
        return (
            f"{self.model:9} {self.batch:4} {self.kernel:34} {self.us:9.2f} {self.floor_us:9.2f} {share:6.0%}"
            f" x{self.launches:<3} {self.us * self.launches / 1e3:8.3f} ms"
        )


def main() -> None:
    arguments = _parse()
    rows: list[Row] = []
    device = torch.device("cuda")
    timeline = CudaTimeline(device)
    with torch.inference_mode(), timeline.main():
        for name, batch in product(arguments.models, arguments.batches):
            for row in _Bench(SHAPES[name], batch, timeline).rows(arguments.sweep):
                print(row.line(), flush=True)
                rows.append(row)
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(each) for each in rows], indent=1) + "\n")
            torch.cuda.empty_cache()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["0.6B"], choices=sorted(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class _Bench:
    """One model at one batch size, every context `CONTEXT` rows long."""

    def __init__(self, shape: Shape, batch: int, timeline: CudaTimeline) -> None:
        self.shape, self.batch, self.timeline = shape, batch, timeline
        self.device = timeline.device
        self.kernels = TritonKernels(RingLayout(max(batch, 1), 4 * batch))
        pages = batch * (CONTEXT // PAGE + 1)
        layout = PagedLayout("kv", SETS, shape.kv_heads, shape.head_dim)
        like = torch.empty(0, dtype=torch.bfloat16, device=self.device)
        self.cache = KvCache(layout, PAGE, pages, 0, like, timeline)
        self.outcomes = Outcomes(RingLayout(max(batch, 1), 4 * batch), timeline)
        self.step = self._step(pages)
        self.kernels.prepare(self.step, self.outcomes.ring, shape.vocab_size)

    def _step(self, pages: int) -> StepTensors:
        group = CacheGroup("kv", "paged", self.shape.row_bytes)
        capabilities = DriverCapabilities(
            "cuda_native", "bench", self.shape.vocab_size, self.shape.hidden_size, 40960, 8192, self.batch,
            (CacheSpace(group, PAGE, pages, 0),), frozenset(), "", "bfloat16",
        )  # fmt: skip
        batch = _decode_batch(capabilities, self.batch)
        limits = ModelLimits(self.shape.vocab_size, 40960)
        host = BatchReader([self.cache], limits).read(batch, self.outcomes)
        layout = BlockLayout(sizes_of(host))
        block = torch.empty(layout.words, dtype=torch.int32, device=self.device)
        self.timeline.send(pack(host, layout, 0, [self.cache.scratch_page]), block)
        return view_block(block, layout, [PAGE], np.ones(self.batch, np.int64), 0)

    def rows(self, sweep: bool) -> Iterator[Row]:
        shape, layers = self.shape, self.shape.layers
        yield self._row("prepare", lambda _: self._prepare(), 0, 1)
        yield from self._products()
        hidden = [self._random(self.batch, shape.hidden_size) for _ in range(2 * SETS)]
        weight = self._random(shape.hidden_size)
        size = self.batch * shape.hidden_size * ITEM
        norm = lambda at: self.kernels.add_rms_norm(hidden[2 * at], hidden[2 * at + 1], weight, 1e-6)  # noqa: E731
        yield self._row("add + norm", norm, 4 * size, 2 * layers)
        gates = [self._random(self.batch, 2 * shape.intermediate_size) for _ in range(SETS)]
        bytes_moved = 3 * self.batch * shape.intermediate_size * ITEM
        yield self._row("silu * up", lambda at: self.kernels.silu_mul(gates[at]), bytes_moved, layers)
        yield from self._heads(sweep)
        yield from self._sampling()

    def _products(self) -> Iterator[Row]:
        shape = self.shape
        q_rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        for name, outputs, inputs, launches in (
            ("product qkv", q_rows, shape.hidden_size, shape.layers),
            ("product output", shape.hidden_size, shape.heads * shape.head_dim, shape.layers),
            ("product gate, up", 2 * shape.intermediate_size, shape.hidden_size, shape.layers),
            ("product down", shape.hidden_size, shape.intermediate_size, shape.layers),
            ("product head", shape.vocab_size, shape.hidden_size, 1),
        ):
            weights = [self._random(outputs, inputs) for _ in range(SETS)]
            x = self._random(self.batch, inputs)
            moved = (outputs * inputs + self.batch * (inputs + outputs)) * ITEM
            flops = 2 * self.batch * outputs * inputs
            yield self._row(name, _product(x, weights), moved, launches, flops)

    def _heads(self, sweep: bool) -> Iterator[Row]:
        shape = self.shape
        rope = Rope(torch.ones(shape.head_dim // 2))
        norm = self._random(shape.heads + shape.kv_heads, shape.head_dim)
        heads = AttentionHeads(shape.heads, shape.kv_heads, shape.head_dim, norm, 1e-6, rope, 0.1)
        angles = Angles(*(torch.randn(40960, shape.head_dim // 2, device=self.device) for _ in range(2)))
        columns = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        qkv = [self._random(self.batch, columns) for _ in range(SETS)]
        group, pages = self.step.groups[0], [self.cache.layer(at) for at in range(SETS)]
        for each in pages:
            each.normal_()

        def place(at: int) -> Tensor:
            return self.kernels.place_heads(
                qkv[at], heads, angles, self.step.positions, group.slots, pages[at]
            )

        yield self._row("place heads", place, 2 * self.batch * columns * ITEM, shape.layers)
        q = [place(at) for at in range(SETS)]

        def attend(at: int) -> Tensor:
            return self.kernels.attend(q[at], pages[at], group, self.step, 0.1)

        moved = self.batch * CONTEXT * shape.row_bytes // shape.layers
        yield self._row("attention", attend, moved, shape.layers)
        for name in self._sweep() if sweep else ():
            yield self._row(name, attend, moved, shape.layers)

    def _sweep(self) -> Iterator[str]:
        """Makes the kernels use one tiling after the other, and names it."""
        decode = self.kernels.decode
        assert decode is not None
        for columns, warps, stages, programs in product((32, 64), (2, 4), (2, 3), (1, 2, 4)):
            decode.tiling = DecodeTiling(columns, warps, stages, programs)
            self._prepare()  # the list of tiles is another
            yield f"attention {columns} w{warps} s{stages} x{programs}"
        decode.tiling = TILING
        self._prepare()

    def _sampling(self) -> Iterator[Row]:
        logits = [self._random(self.batch, self.shape.vocab_size) for _ in range(SETS)]
        moved = self.batch * self.shape.vocab_size * ITEM
        for name, temperature, top_k, top_p in (
            ("sample greedy", 0.0, 0, 1.0),
            ("sample temperature", 0.8, 0, 1.0),
            ("sample top-p", 0.8, 0, 0.95),
            ("sample top-k, top-p", 0.8, 50, 0.9),
        ):
            self.step.floats("temperature").fill_(temperature)
            self.step.floats("top_p").fill_(top_p)
            self.step.top_k.fill_(top_k)
            yield self._row(name, lambda at: self.kernels.sample(logits[at], self.step), moved, 1)
        sampled = self.step.tokens
        yield self._row("settle", lambda _: self._settle(sampled), 0, 1)

    def _settle(self, sampled: Tensor) -> Tensor:
        self.kernels.settle(self.step, sampled, self.outcomes.ring)
        return sampled

    def _prepare(self) -> Tensor:
        self.kernels.prepare(self.step, self.outcomes.ring, self.shape.vocab_size)
        return self.step.tokens

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.device) * 0.1

    def _row(
        self, name: str, call: Callable[[int], Tensor], moved: int, launches: int, flops: float = 0.0
    ) -> Row:
        floor = 1e6 * max(moved / COPY_BYTES_PER_S, flops / MATRIX_FLOP_PER_S)
        try:
            seconds = timed(call, self.timeline)
        except Exception as error:  # a tiling that does not fit the chip is a row of the table, too
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            seconds = 0.0
        return Row(self.shape.name, self.batch, name, 1e6 * seconds, floor, launches)


def _product(x: Tensor, weights: list[Tensor]) -> Callable[[int], Tensor]:
    return lambda at: functional.linear(x, weights[at])


def _decode_batch(capabilities: DriverCapabilities, count: int) -> ForwardBatch:
    """Contexts of CONTEXT rows, each fed one literal token."""
    contexts = Contexts(capabilities, [Story(CONTEXT - 1, 2)] * count, 0.0)
    contexts.lengths[:] = CONTEXT - 1
    return contexts.literal_step()


def timed(call: Callable[[int], Tensor], timeline: CudaTimeline, sets: int = SETS) -> float:
    """Seconds of one call, each over the next set of inputs."""
    launches = max(sets, LAUNCHES // sets * sets)
    for at in range(sets):
        call(at)
    timeline.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=timeline.stream):
        for at in range(launches):
            call(at % sets)
    times = []
    for _ in range(REPLAYS):
        start, end = timeline.mark(), None
        graph.replay()
        end = timeline.mark()
        end.wait()
        times.append(end.seconds_since(start) / launches)
    return median(times[2:])


if __name__ == "__main__":
    main()
