"""Every kernel of a decode step by itself, at the shapes of real models: microseconds, and the share of its own floor.

    python -m benchmarks.gpu_kernels --models 0.6B 8B --batches 1 32 256 [--sweep] --json FILE

They are the operations that a step of the driver runs, so a product stands there with the norm before it, the
activation behind it or the rows that it is added to; below each is the library's bare product. Times are medians over
replayed graphs of several launches, each over inputs of its own, so that neither launches nor caches flatter them.
`--sweep` also tries other tilings of decode attention.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_loop import Contexts, Story
from benchmarks.gpu_models import COPY_BYTES_PER_S, ITEM, MATRIX_FLOP_PER_S, SHAPES, Shape
from pie_core.contracts.driver import CacheGroup, CacheSpace, DriverCapabilities
from pie_core.contracts.forward import ForwardBatch
from pie_plugins.drivers.cuda_native.assembly import choose_kernels, choose_linear
from pie_plugins.drivers.cuda_native.attention import OwnAttention
from pie_plugins.drivers.cuda_native.batch_tensors import BatchReader, ModelLimits
from pie_plugins.drivers.cuda_native.cuda_graphs import Recorder
from pie_plugins.drivers.cuda_native.kernels import Kernels
from pie_plugins.drivers.cuda_native.kv_cache import KvCache
from pie_plugins.drivers.cuda_native.linear import Linear, Matrix
from pie_plugins.drivers.cuda_native.model_runner import AngleTables, CudaStep, ModelRunner
from pie_plugins.drivers.cuda_native.options import CudaNativeOptions
from pie_plugins.drivers.cuda_native.outcomes import Outcomes, RingLayout
from pie_plugins.drivers.cuda_native.step_tensors import BlockLayout, StepTensors, pack, sizes_of, view_block
from pie_plugins.drivers.cuda_native.timeline import CudaTimeline, Timeline, timeline_of
from pie_plugins.models.layers.architecture import Model, PagedLayout
from pie_plugins.models.layers.rope import Rope
from pie_plugins.models.layers.step import Around, AttentionHeads, CacheRef

if TYPE_CHECKING:
    from pie_plugins.drivers.cuda_native.tuned_linear import TunedLinear  # imports triton

PAGE = 16
SETS = 6  # of inputs, so that the caches hold none of them
BYTES_OF_MATRICES = 2**28  # likewise: small ones come in more copies
REPLAYS = 9
LAUNCHES = 12  # of a replay, so that its own launch does not count
CONTEXT = 256
LONGEST = 40960
EPS = 1e-6
LOGIT_SPREAD = 3.0  # about what models give
SAMPLED = (  # temperature, top-k, top-p
    ("sample greedy", 0.0, 0, 1.0),
    ("sample temperature", 0.8, 0, 1.0),
    ("sample top-p", 0.8, 0, 0.95),
    ("sample top-k, top-p", 0.8, 50, 0.9),
)


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
    timeline = timeline_of(torch.device(arguments.device))
    with torch.inference_mode(), timeline.main():
        for name in arguments.models:
            for row in model_rows(SHAPES[name], arguments.batches, timeline, arguments.sweep):
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
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def model_rows(shape: Shape, batches: list[int], timeline: Timeline, sweep: bool = False) -> Iterator[Row]:
    layout = RingLayout(max(batches), 4 * max(batches))
    options = CudaNativeOptions()
    kernels = choose_kernels(options, timeline.device, layout)
    linear = choose_linear(options, kernels)
    products = _products(shape, linear, timeline)
    for batch in batches:
        bench = StepBench(shape, batch, kernels, linear, Outcomes(layout, timeline), timeline)
        yield from bench.rows(products, sweep)


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix of a layer, in so many copies that no cache holds them, and what stands around it there."""

    name: str
    matrices: list[Matrix]
    launches: int
    is_normed: bool = False
    is_gated: bool = False
    is_added: bool = False

    @property
    def around(self) -> str:
        named = {", normed": self.is_normed, ", silu": self.is_gated, ", onto rows": self.is_added}
        return "".join(name for name, stands in named.items() if stands)


def _products(shape: Shape, linear: Linear, timeline: Timeline) -> list[Product]:
    """Measures them as loading does, and takes what is fastest."""
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, shape.layers
    heads, q_rows = shape.heads * shape.head_dim, (shape.heads + 2 * shape.kv_heads) * shape.head_dim

    def copies(outputs: int, inputs: int) -> list[Matrix]:
        count = max(SETS, -(-BYTES_OF_MATRICES // (outputs * inputs * ITEM)))
        drawn = (_random(timeline, outputs, inputs, spread=inputs**-0.5) for _ in range(count))
        return [linear.prepare(each, None) for each in drawn]

    products = [
        Product("product qkv", copies(q_rows, hidden), layers, is_normed=True),
        Product("product output", copies(hidden, heads), layers, is_added=True),
        Product("product gate up", copies(2 * inner, hidden), layers, is_normed=True, is_gated=True),
        Product("product down", copies(hidden, inner), layers, is_added=True),
        Product("product head", copies(shape.vocab_size, hidden), 1),
    ]
    _tune(linear, timeline)
    return products


def _tune(linear: Linear, timeline: Timeline) -> None:
    if isinstance(timeline, CudaTimeline) and hasattr(linear, "tune"):
        tuned = cast("TunedLinear", linear)
        tuned.take(tuned.tune(timeline), timeline)


class StepBench:
    """One model at one batch size, every context `CONTEXT` rows long. Layers are the cache's and as many as sets."""

    def __init__(
        self,
        shape: Shape,
        batch: int,
        kernels: Kernels,
        linear: Linear,
        outcomes: Outcomes,
        timeline: Timeline,
    ) -> None:
        self.shape, self.batch, self.timeline = shape, batch, timeline
        self.kernels, self.outcomes = kernels, outcomes
        pages = batch * (CONTEXT // PAGE + 1)
        layout = PagedLayout("kv", SETS, shape.kv_heads, shape.head_dim)
        like = torch.empty(0, dtype=torch.bfloat16, device=timeline.device)
        self.cache = KvCache(layout, PAGE, pages, 0, like, timeline)
        for at in range(SETS):
            self.cache.layer(at).normal_()
        self.tensors = self._tensors(pages)
        nobody = cast(Model, None)  # the operations are called from here
        angles = AngleTables(LONGEST, timeline.device)
        runner = ModelRunner(nobody, shape.vocab_size, [self.cache], kernels, linear, angles)
        self.step = CudaStep(runner, self.tensors, OwnAttention(kernels, self.tensors))

    def rows(self, products: list[Product], sweep: bool) -> Iterator[Row]:
        shape, size = self.shape, self.batch * self.shape.hidden_size * ITEM
        yield self._row("prepare", lambda _: self._prepare(), 0, 1)
        table = self._random(shape.vocab_size, shape.hidden_size)
        yield self._row("embed", lambda _: self.step.embed(table), 2 * size, 1)
        yield from self._attention(sweep)
        for each in products:
            yield from self._product(each)
        x, weight = self._sets(self.batch, shape.hidden_size), self._random(shape.hidden_size)
        yield self._row("norm", lambda at: self.step.rms_norm(x[at], weight, EPS), 2 * size, 1)
        yield from self._sampling()

    def _tensors(self, pages: int) -> StepTensors:
        shape, group = self.shape, CacheGroup("kv", "paged", self.shape.row_bytes)
        capabilities = DriverCapabilities(
            "cuda_native", "bench", shape.vocab_size, shape.hidden_size, LONGEST, 8192, self.batch,
            (CacheSpace(group, PAGE, pages, 0),), frozenset(), "", "bfloat16",
        )  # fmt: skip
        limits = ModelLimits(shape.vocab_size, LONGEST)
        host = BatchReader([self.cache], limits).read(_decode_batch(capabilities, self.batch), self.outcomes)
        layout = BlockLayout(sizes_of(host))
        block = torch.empty(layout.words, dtype=torch.int32, device=self.timeline.device)
        self.timeline.send(pack(host, layout, 0, [self.cache.scratch_page]), block)
        return view_block(block, layout, [PAGE], np.ones(self.batch, np.int64), 0)

    def _prepare(self) -> None:
        self.kernels.prepare(self.tensors, self.outcomes.ring, self.shape.vocab_size)

    def _attention(self, sweep: bool) -> Iterator[Row]:
        shape, group = self.shape, self.tensors.groups[0]
        rope = Rope(torch.ones(shape.head_dim // 2))
        norm = self._random(shape.heads + shape.kv_heads, shape.head_dim)
        heads = AttentionHeads(shape.heads, shape.kv_heads, shape.head_dim, norm, EPS, rope, 0.1)
        columns = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        qkv = self._sets(self.batch, columns)
        moved = self.batch * CONTEXT * shape.row_bytes // shape.layers
        whole = 2 * self.batch * columns * ITEM + moved
        yield self._row(
            "heads and attention",
            lambda at: self.step.attend(CacheRef(0, at), qkv[at], heads),
            whole,
            shape.layers,
        )
        q = self._sets(self.batch, shape.heads, shape.head_dim)

        def attend(at: int) -> Tensor:
            return self.kernels.attend(q[at], self.cache.layer(at), group, self.tensors, heads.scale)

        yield self._row("attention", attend, moved, shape.layers)
        for name in self._tilings() if sweep else ():
            try:
                yield self._row(name, attend, moved, shape.layers)
            except Exception as error:  # a tiling that does not fit the chip is a row of the table, too
                print(f"{name}: {type(error).__name__}: {error}", flush=True)

    def _tilings(self) -> Iterator[str]:
        """Makes the kernels use one tiling after the other, and names it."""
        from pie_plugins.drivers.cuda_native.decode_attention import DecodeTiling  # imports triton

        decode: Any = getattr(self.kernels, "decode", None)
        if decode is None:
            return
        usual = decode.tiling
        for columns, warps, stages, programs in product((32, 64), (2, 4), (2, 3), (1, 2, 4)):
            decode.tiling = DecodeTiling(columns, warps, stages, programs)
            self._prepare()  # the list of tiles is another
            yield f"attention {columns} w{warps} s{stages} x{programs}"
        decode.tiling = usual
        self._prepare()

    def _product(self, each: Product) -> Iterator[Row]:
        outputs, inputs = each.matrices[0].weight.shape
        moved = (outputs * inputs + self.batch * (inputs + outputs)) * ITEM
        flops = 2 * self.batch * outputs * inputs
        x, rows = self._random(self.batch, inputs), self._sets(self.batch, outputs) if each.is_added else []
        norm = self._random(inputs) if each.is_normed else None

        def in_a_step(at: int) -> Tensor:
            around = Around(norm, EPS, each.is_gated, rows[at % SETS] if rows else None)
            return self.step.linear_around(x, each.matrices[at], around)

        def bare(at: int) -> Tensor:
            return functional.linear(x, each.matrices[at].weight)

        same = (moved, each.launches, flops, len(each.matrices))
        yield self._row(each.name + each.around, in_a_step, *same)
        yield self._row(f"  {each.name}, library", bare, *same)

    def _sampling(self) -> Iterator[Row]:
        logits = self._sets(self.batch, self.shape.vocab_size, spread=LOGIT_SPREAD)
        moved, tensors = self.batch * self.shape.vocab_size * ITEM, self.tensors
        for name, temperature, top_k, top_p in SAMPLED:
            tensors.floats("temperature").fill_(temperature)
            tensors.floats("top_p").fill_(top_p)
            tensors.top_k.fill_(top_k)
            yield self._row(name, lambda at: self.kernels.sample(logits[at], tensors), moved, 1)
        settle = partial(self.kernels.settle, tensors, tensors.tokens, self.outcomes.ring)
        yield self._row("settle", lambda _: settle(), 0, 1)

    def _random(self, *shape: int, spread: float = 0.1) -> Tensor:
        return _random(self.timeline, *shape, spread=spread)

    def _sets(self, *shape: int, spread: float = 0.1) -> list[Tensor]:
        return [self._random(*shape, spread=spread) for _ in range(SETS)]

    def _row(
        self,
        name: str,
        call: Callable[[int], object],
        moved: int,
        launches: int,
        flops: float = 0.0,
        sets: int = SETS,
    ) -> Row:
        floor = 1e6 * max(moved / COPY_BYTES_PER_S, flops / MATRIX_FLOP_PER_S)
        return Row(self.shape.name, self.batch, name, 1e6 * timed(call, self.timeline, sets), floor, launches)


def _random(timeline: Timeline, *shape: int, spread: float) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=timeline.device) * spread


def _decode_batch(capabilities: DriverCapabilities, count: int) -> ForwardBatch:
    """Contexts of CONTEXT rows, each fed one literal token."""
    contexts = Contexts(capabilities, [Story(CONTEXT - 1, 2)] * count, 0.0)
    contexts.lengths[:] = CONTEXT - 1
    return contexts.literal_step()


def timed(call: Callable[[int], object], timeline: Timeline, sets: int = SETS) -> float:
    """Seconds of one call, each over the next set of inputs."""
    launches = max(sets, LAUNCHES // sets * sets)

    def several() -> None:
        for at in range(launches):
            call(at % sets)

    replay, times = Recorder(timeline).record(several), []
    for _ in range(REPLAYS):
        start = timeline.mark()
        replay()
        end = timeline.mark()
        end.wait()
        times.append(end.seconds_since(start) / launches)
    return median(times[2:])


if __name__ == "__main__":
    main()
