"""Puts a driver together: weights, kernels, pages and graphs, in the order in which they take memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pie_core.contracts.driver import (
    CacheGroup,
    CacheSpace,
    DriverCapabilities,
    DriverRequest,
    Feature,
    Progress,
    ProgressCallback,
)
from pie_core.contracts.forward import ForwardBatch
from pie_core.errors import LoadError
from pie_plugins.drivers.cuda_native import flashinfer_attention
from pie_plugins.drivers.cuda_native.attention import AttentionPlanner, OwnPlanner
from pie_plugins.drivers.cuda_native.batch_tensors import BatchReader, ModelLimits
from pie_plugins.drivers.cuda_native.cuda_graphs import Recorder, bucket_shapes, make_buckets
from pie_plugins.drivers.cuda_native.driver import CudaNativeDriver
from pie_plugins.drivers.cuda_native.kernels import Kernels
from pie_plugins.drivers.cuda_native.kv_cache import KvCache
from pie_plugins.drivers.cuda_native.linear import Linear, PlainLinear, RowByRowLinear
from pie_plugins.drivers.cuda_native.memory import MemoryUse, pages_that_fit
from pie_plugins.drivers.cuda_native.model_runner import AngleTables, ModelRunner
from pie_plugins.drivers.cuda_native.options import CudaNativeOptions
from pie_plugins.drivers.cuda_native.outcomes import Outcomes, RingLayout
from pie_plugins.drivers.cuda_native.parallel import Ranks, SharedLinear
from pie_plugins.drivers.cuda_native.prompt_graphs import PromptGraphs, PromptLimits
from pie_plugins.drivers.cuda_native.step_runner import StepRunner
from pie_plugins.drivers.cuda_native.timeline import CudaTimeline, Timeline
from pie_plugins.drivers.cuda_native.torch_kernels import TorchKernels
from pie_plugins.drivers.cuda_native.trial import idle_step, prefill_step
from pie_plugins.drivers.cuda_native.weights import LoadedModel, draw_model, load_model
from pie_plugins.models.layers.architecture import PagedLayout

if TYPE_CHECKING:
    from pie_plugins.drivers.cuda_native.compilation import Compilation

FEATURES = frozenset(
    {
        Feature.ATTENTION_MASK,
        Feature.NONCAUSAL_MASK,
        Feature.LOGIT_MASK,
        Feature.PENALTIES,
        Feature.LOGIT_BIAS,
        Feature.PROBE_LOGITS,
        Feature.PROBE_DISTRIBUTION,
        Feature.PROBE_LOGPROBS,
        Feature.PROBE_ENTROPY,
        Feature.PROBE_HIDDEN,
        Feature.TICKET_TOKENS,
        Feature.TICKET_LENGTHS,
        Feature.DRAFTS,
        Feature.EXPORT,
    }
)
LOG = logging.getLogger(__name__)
MAX_IN_FLIGHT = 4
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HOST_PAGES_PER_PAGE = 8  # of swap space; beyond, it would hardly ever be used
CPU_PAGES = 1024  # where no GPU says how much memory there is


class Assembly:
    """What the steps of loading hand on to each other."""

    def __init__(
        self, request: DriverRequest, options: CudaNativeOptions, timeline: Timeline, ranks: Ranks
    ) -> None:
        self._request, self._options, self._timeline, self._ranks = request, options, timeline, ranks
        self._dtype, self._device = DTYPES[options.dtype], timeline.device
        max_samplers = max(options.max_batch_tokens, 4 * options.max_batch_requests)
        self._outcomes = Outcomes(RingLayout(options.max_batch_requests, max_samplers), timeline)
        self.kernels = choose_kernels(options, self._device, self._outcomes.layout)
        linear = self._plain_linear = self._choose_linear()
        self._linear: Any = linear if ranks.size == 1 else SharedLinear(linear, ranks)

    def _choose_linear(self) -> Linear:
        return choose_linear(self._options, self.kernels)

    def driver(self, compile_ahead: Callable[[], Compilation] | None = None) -> CudaNativeDriver:
        """Waits for `compile_ahead` before anything is launched."""
        options = self._options
        others = self._taken()
        with self._compiling_meanwhile(compile_ahead):
            loaded = self._model()
        self._tune()
        angles = AngleTables(loaded.config.max_position_embeddings, self._device)
        pages = options.total_pages or self._pages_that_fit(loaded, angles, others)
        pages = self._ranks.least(pages, self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps of the loading is counted as free, for recordings among others
        caches = self._lay_out(loaded, pages, self._host_pages(loaded, pages))
        runner = self._runner(loaded, caches, angles)
        steps = self._steps(loaded, runner)
        if options.cuda_graphs and not (self.kernels.waits and isinstance(self._timeline, CudaTimeline)):
            self._add_graphs(steps, runner, loaded, Recorder(self._timeline))
        self._timeline.synchronize()
        capabilities = _capabilities(loaded, caches, options, self._dtype)
        return CudaNativeDriver(capabilities, steps, caches, self._timeline)

    @contextmanager
    def _compiling_meanwhile(self, begin: Callable[[], Compilation] | None) -> Iterator[None]:
        """The first rank compiles; the others find it on the disk."""
        if begin is None:
            yield
            return
        first = begin() if self._ranks.rank == 0 else None
        try:
            yield
        except BaseException:
            if first is not None:
                first.abandon()
            raise
        self._ranks.first_before_others(lambda: (first or begin()).wait(self._request.progress))

    @property
    def _path(self) -> Path:
        return self._request.checkpoint("cuda_native")

    def _model(self) -> LoadedModel:
        path, request = self._path, self._request
        placed = (self._dtype, self._device, self._linear, self._ranks)
        if self._options.random_weights:
            return draw_model(path, request.architectures, *placed)
        return load_model(path, request.architectures, *placed, request.progress)

    def _tune(self) -> None:
        """Products are measured while the GPU is still empty. The first rank does that, and compiles before the others,
        who find what it compiled. All take what it chose: where another kernel rounds the logits otherwise, ranks would
        draw different tokens."""
        linear: Any = self._plain_linear
        if not hasattr(linear, "tune") or not isinstance(self._timeline, CudaTimeline):
            return
        self._tell("measuring matrix products")
        cuts = self._ranks.first_s(linear.tune(self._timeline) if self._ranks.rank == 0 else {})
        self._ranks.first_before_others(lambda: linear.take(cuts, self._timeline))

    def _tell(self, phase: str) -> None:
        self._request.progress(Progress(phase, 0, 0, ""))

    def _taken(self) -> int:
        if self._device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def _lay_out(self, loaded: LoadedModel, pages: int, host_pages: int) -> tuple[KvCache, ...]:
        like = torch.empty(0, dtype=self._dtype, device=self._device)
        size = self._options.kv_page_size
        return tuple(
            KvCache(layout, size, pages, host_pages, like, self._timeline) for layout in loaded.layouts
        )

    def _host_pages(self, loaded: LoadedModel, pages: int) -> int:
        """What the option says, or what this rank's part of the host memory for swapping holds."""
        fitting = self._request.swap_bytes // self._ranks.size // self._page_bytes(loaded)
        return self._options.host_pages or min(fitting, HOST_PAGES_PER_PAGE * pages)

    def _page_bytes(self, loaded: LoadedModel) -> int:
        rows = sum(_unit_bytes(layout, self._dtype) for layout in loaded.layouts)
        return rows * self._options.kv_page_size

    def _runner(self, loaded: LoadedModel, caches: tuple[KvCache, ...], angles: AngleTables) -> ModelRunner:
        return ModelRunner(loaded.model, loaded.config.vocab_size, caches, self.kernels, self._linear, angles)

    def _steps(self, loaded: LoadedModel, runner: ModelRunner) -> StepRunner:
        limits = ModelLimits(loaded.config.vocab_size, loaded.config.max_position_embeddings)
        reader = BatchReader(runner.caches, limits, cascades=not self._options.batch_invariant)
        return StepRunner(reader, runner, self._outcomes, self._planner(runner), self._timeline)

    def _planner(self, runner: ModelRunner) -> AttentionPlanner:
        return choose_planner(self._options, self.kernels, runner, self._timeline, self._dtype)

    def _pages_that_fit(self, loaded: LoadedModel, angles: AngleTables, others: int) -> int:
        if self._device.type != "cuda":
            return CPU_PAGES
        weights = torch.cuda.memory_allocated(self._device)
        use = MemoryUse(
            total=torch.cuda.mem_get_info(self._device)[1],
            others=others,
            weights=weights,
            activations=self._measured_activations(loaded, angles) - weights,
        )
        return pages_that_fit(use, self._options.gpu_mem_utilization, self._page_bytes(loaded))

    def _measured_activations(self, loaded: LoadedModel, angles: AngleTables) -> int:
        """The peak of the largest step there may be, on pages that are given back afterwards."""
        self._tell("trying the largest step")
        options = self._options
        pages = -(-options.max_batch_tokens // options.kv_page_size) + options.max_batch_requests
        caches = self._lay_out(loaded, pages, 0)
        runner = self._runner(loaded, caches, angles)
        steps = self._steps(loaded, runner)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        steps.trial(self._largest_step(caches)).result()
        peak = torch.cuda.max_memory_allocated(self._device) - before
        weights = before - sum(cache.num_bytes for cache in caches)
        recorded = peak if replays_prompts(options) else 0  # recordings have memory of their own
        return weights + peak + recorded

    def _largest_step(self, caches: Sequence[KvCache]) -> ForwardBatch:
        options = self._options
        return prefill_step(
            [cache.page_size for cache in caches], options.max_batch_tokens, options.max_batch_requests
        )

    def _add_graphs(
        self, steps: StepRunner, runner: ModelRunner, loaded: LoadedModel, recorder: Recorder
    ) -> None:
        """Those of prompts first: they are the largest, and the others fit into their memory."""
        options, idle = self._options, idle_step(len(runner.caches))
        longest = loaded.config.max_position_embeddings
        pages = [min(-(-longest // cache.page_size), cache.num_pages) for cache in runner.caches]
        prompts = self._prompt_graphs(steps, runner, pages) if replays_prompts(options) else None
        before = prompts.count if prompts else 0
        total = before + len(bucket_shapes(options.max_batch_requests, options.graph_drafts))
        tell = partial(_tell_graphs, self._request.progress, total)
        if prompts:
            prompts.record(recorder, idle, partial(tell, "prompts", 0))
            steps.prompts = prompts
        steps.buckets = make_buckets(
            options.max_batch_requests,
            options.graph_drafts,
            pages,
            runner,
            self._outcomes,
            self._timeline,
            recorder,
            idle,
            partial(tell, "decoding", before),
        )

    def _prompt_graphs(self, steps: StepRunner, runner: ModelRunner, pages: Sequence[int]) -> PromptGraphs:
        options = self._options
        steps.trial(
            prefill_step([cache.page_size for cache in runner.caches], 1, 1)
        ).result()  # shows its heads
        limits = PromptLimits(
            rows=prompt_rows(options),
            full_rows=options.max_batch_tokens
            if self._ranks.size == 1
            else 0,  # sums over ranks may keep their memory
            requests=options.max_batch_requests,
            pages=tuple(options.max_batch_requests * (each + 1) for each in pages),
            products=steps.planner.most_recorded,
        )
        return PromptGraphs(limits, runner, self._outcomes, self._timeline)


def replays_prompts(options: CudaNativeOptions) -> bool:
    """Batch-invariant steps keep to the kernels whose cuts depend on nothing but the request."""
    return options.cuda_graphs and prompt_rows(options) > 0 and not options.batch_invariant


def prompt_rows(options: CudaNativeOptions) -> int:
    return min(options.graph_rows, options.max_batch_tokens)


def _tell_graphs(progress: ProgressCallback, total: int, of: str, before: int, done: int) -> None:
    progress(Progress(f"recording graphs of {of}", before + done, total, "graphs"))


def choose_kernels(options: CudaNativeOptions, device: torch.device, layout: RingLayout) -> Kernels:
    """Fused kernels where Triton and a GPU are there, plain operations elsewhere."""
    wanted = options.kernels
    if wanted == "auto":
        wanted = "triton" if device.type == "cuda" and find_spec("triton") else "torch"
    if wanted == "torch":
        return TorchKernels(layout)
    if not find_spec("triton"):
        raise LoadError(
            f"driver cuda_native: kernels is {wanted!r}, but triton is not installed: pip install triton, or leave "
            "kernels at 'auto'"
        )
    from pie_plugins.drivers.cuda_native.triton_kernels import TritonKernels  # imports triton

    return TritonKernels(layout, batch_invariant=options.batch_invariant)


def choose_linear(options: CudaNativeOptions, kernels: Kernels) -> Linear:
    if not options.batch_invariant and (kernels.name == "torch" or options.products == "library"):
        return PlainLinear()
    if kernels.name == "torch":
        return RowByRowLinear()
    from pie_plugins.drivers.cuda_native.invariant_linear import InvariantLinear  # both import triton
    from pie_plugins.drivers.cuda_native.tuned_linear import TunedLinear

    if options.batch_invariant:
        return InvariantLinear()
    return TunedLinear()


def choose_planner(
    options: CudaNativeOptions, kernels: Kernels, runner: ModelRunner, timeline: Timeline, dtype: torch.dtype
) -> AttentionPlanner:
    dims = [cache.layout.head_dim for cache in runner.caches]
    usable = flashinfer_attention.is_usable(timeline.device, dtype, dims)
    if options.attention == "flashinfer" and not usable:
        raise LoadError(
            f"driver cuda_native: attention is 'flashinfer', which needs a GPU, the package flashinfer-python, dtype"
            f" bfloat16 or float16 and head dimensions of 64, 128 or 256; here are {timeline.device.type}, {dtype} and"
            f" {dims}; use auto or own"
        )
    if not wants_flashinfer(options, usable):
        return OwnPlanner(kernels)
    try:
        planner = flashinfer_attention.FlashInferPlanner(
            kernels, runner.caches, timeline.device, MAX_IN_FLIGHT + 1
        )
        planner.try_out(dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an install without this GPU's kernels fails in ways of its own
        if options.attention == "flashinfer":
            raise LoadError(
                f"driver cuda_native: attention is 'flashinfer', which fails here: {error}"
            ) from error
        LOG.warning("FlashInfer is installed but fails here; prompts run on the own attention: %s", error)
        return OwnPlanner(kernels)
    return planner


def wants_flashinfer(options: CudaNativeOptions, usable: bool) -> bool:
    return usable and options.attention != "own" and not options.batch_invariant


def _capabilities(
    loaded: LoadedModel, caches: Sequence[KvCache], options: CudaNativeOptions, dtype: torch.dtype
) -> DriverCapabilities:
    return DriverCapabilities(
        driver="cuda_native",
        architecture=loaded.architecture,
        vocab_size=loaded.config.vocab_size,
        hidden_size=loaded.config.hidden_size,
        max_model_len=loaded.config.max_position_embeddings,
        max_batch_tokens=options.max_batch_tokens,
        max_batch_requests=options.max_batch_requests,
        cache=tuple(_space(cache, dtype) for cache in caches),
        features=FEATURES | {Feature.SWAP} if any(cache.num_host_pages for cache in caches) else FEATURES,
        weights_revision=loaded.revision,
        kv_dtype=str(dtype).removeprefix("torch."),
        max_in_flight=MAX_IN_FLIGHT,
        can_poll=True,
    )


def _space(cache: KvCache, dtype: torch.dtype) -> CacheSpace:
    group = CacheGroup(cache.layout.name, "paged", _unit_bytes(cache.layout, dtype))
    return CacheSpace(group, cache.page_size, cache.num_pages, cache.num_host_pages)


def _unit_bytes(layout: PagedLayout, dtype: torch.dtype) -> int:
    return layout.num_layers * 2 * layout.num_kv_heads * layout.head_dim * dtype.itemsize
