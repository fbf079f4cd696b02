"""The driver: queues steps and page operations, runs them in order when a result is asked for."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from pie_core.contracts.driver import (
    DriverCapabilities,
    DriverRequest,
    Feature,
    GenerationRequest,
)
from pie_core.contracts.forward import Float32, ForwardBatch, ForwardResult, Int32
from pie_core.contracts.media import MediaItem
from pie_core.errors import ForwardError, PieError, Unsupported
from pie_core.ids import Ticket
from pie_plugins.drivers.portable.batch_tensors import BatchReader, Cache, Outcomes, model_limits
from pie_plugins.drivers.portable.linear import linear_product
from pie_plugins.drivers.portable.memory import lay_out, space
from pie_plugins.drivers.portable.model_runner import ModelRunner
from pie_plugins.drivers.portable.options import PortableOptions
from pie_plugins.drivers.portable.step_runner import StepRunner
from pie_plugins.drivers.portable.weights import LoadedModel, choose_dtype, load_model
from pie_plugins.models.layers.architecture import position_axes, streams

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
        Feature.PROBE_COLUMNS,
        Feature.TICKET_TOKENS,
        Feature.TICKET_LENGTHS,
        Feature.DRAFTS,
        Feature.EXPORT,
    }
)
MAX_IN_FLIGHT = 4
TORCH_THREADS = torch.get_num_threads()  # its own choice, before any driver sets another


def load_portable(request: DriverRequest) -> PortableDriver:
    """Loads the checkpoint and lays out the pages. Raises LoadError."""
    options = request.options
    assert isinstance(options, PortableOptions)
    path = request.checkpoint("portable")
    torch.set_num_threads(options.cpu_threads or _default_threads())
    with torch.inference_mode():
        dtype = choose_dtype(options.dtype, request.device)
        linear = linear_product(request.device, dtype)
        loaded = load_model(path, request.architectures, dtype, request.device, linear, request.progress)
        caches = lay_out(loaded.layouts, options, dtype, request.device, request.swap_bytes)
        runner = ModelRunner(loaded.model, caches, linear)
    return PortableDriver(loaded, runner, caches, options, dtype, request.device)


def _default_threads() -> int:
    """Every core but one, which stays free for guests and the scheduler; OMP_NUM_THREADS decides where it is set.

    Threads of one product wait for the slowest. On two busy cores, with raised priority, one thread decoded 66, 378 and
    741 tokens/s at batch 1, 8 and 32, and two threads 16, 140 and 302. On an idle machine two may well be faster.
    """
    return TORCH_THREADS if "OMP_NUM_THREADS" in os.environ else max(1, TORCH_THREADS - 1)


@dataclass(frozen=True, slots=True)
class _Step:
    ticket: Ticket
    batch: ForwardBatch


class PortableDriver:
    """One loaded model. `submit` and page operations only queue; `collect` runs what is queued before its ticket."""

    def __init__(
        self,
        loaded: LoadedModel,
        runner: ModelRunner,
        caches: tuple[Cache, ...],
        options: PortableOptions,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self._caches = caches
        self._capabilities = _capabilities(loaded, caches, options, dtype)
        limits = model_limits(loaded.config)
        shares = options.shared_prefixes == "always" or (
            options.shared_prefixes == "auto" and dtype != torch.float32
        )
        reader = BatchReader(caches, limits, torch.empty(0, dtype=dtype, device=device), shares=shares)
        self._steps: StepRunner | None = StepRunner(reader, runner, Outcomes(), self._capabilities.streams)
        self._tickets = count()
        self._queue: deque[_Step | Callable[[], None]] = deque()
        self._done: dict[Ticket, ForwardResult | ForwardError] = {}
        self._running = threading.RLock()  # held by whoever works on the queue: results keep their order
        self._closed = False

    @property
    def capabilities(self) -> DriverCapabilities:
        return self._capabilities

    def submit(self, batch: ForwardBatch) -> Ticket:
        self._check_open()
        ticket = Ticket(next(self._tickets))
        self._queue.append(_Step(ticket, batch))
        return ticket

    def collect(self, ticket: Ticket) -> ForwardResult:
        with self._running:
            while ticket not in self._done:
                if not self._queue:
                    self._check_open()
                    raise ForwardError(
                        f"driver portable: ticket {ticket} was never submitted, or is collected already"
                    )
                self._run_next()
            result = self._done.pop(ticket)
        if isinstance(result, ForwardError):
            raise result
        return result

    def copy_pages(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        cache = self._cache(group)
        cache.check_pages([*sources, *targets])
        self._in_order(lambda: cache.copy(sources, targets))

    def swap_out(self, group: int, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        cache = self._swappable(group, pages, host_pages)
        self._in_order(lambda: cache.swap_out(pages, host_pages))

    def swap_in(self, group: int, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        cache = self._swappable(group, pages, host_pages)
        self._in_order(lambda: cache.swap_in(host_pages, pages))

    def export_pages(self, group: int, pages: Sequence[int]) -> NDArray[np.uint8]:
        cache = self._cache(group)
        cache.check_pages(pages)
        self._run_all()
        return cache.read(pages)

    def import_pages(self, group: int, pages: Sequence[int], content: NDArray[np.uint8]) -> None:
        cache = self._cache(group)
        cache.check_pages(pages)
        self._run_all()
        with torch.inference_mode():
            cache.write(pages, content)

    def load_adapter(self, adapter_id: int, path: Path) -> None:
        self._refuse(Feature.ADAPTERS)

    def unload_adapter(self, adapter_id: int) -> None:
        self._refuse(Feature.ADAPTERS)

    def encode_media(self, item: MediaItem) -> int:
        self._refuse(Feature.MEDIA)

    def release_media(self, handle: int) -> None:
        self._refuse(Feature.MEDIA)

    def decode_audio(self, stream: int, codes: Int32, final: bool) -> Float32:
        self._refuse(Feature.AUDIO)

    def generate(self, request: GenerationRequest) -> Int32:
        raise Unsupported(
            f"driver portable was asked for a generation of {request.max_tokens} tokens: it runs single steps "
            "and has no request level"
        )

    def close(self) -> None:
        with self._running:
            self._closed = True
            self._queue.clear()
            self._done.clear()
            self._caches, self._steps = (), None  # frees weights and pages, whoever still holds the driver

    def _check_open(self) -> None:
        if self._closed:
            raise ForwardError("driver portable: it is closed")

    def _cache(self, group: int) -> Cache:
        self._check_open()
        return self._caches[group]

    def _refuse(self, feature: Feature) -> NoReturn:
        raise Unsupported(f"driver portable cannot do {feature.value} (see its capabilities)")

    def _swappable(self, group: int, pages: Sequence[int], host_pages: Sequence[int]) -> Cache:
        cache = self._cache(group)
        if not cache.num_host_pages:
            self._refuse(Feature.SWAP)
        cache.check_pages(pages)
        cache.check_host_pages(host_pages)
        return cache

    def _in_order(self, operation: Callable[[], None]) -> None:
        """Behind the steps that are queued or running; at once where there are none."""
        self._check_open()
        self._queue.append(operation)
        waits = any(isinstance(item, _Step) for item in tuple(self._queue))
        if not waits and self._running.acquire(blocking=False):
            try:
                self._run_all()
            finally:
                self._running.release()

    def _run_all(self) -> None:
        self._check_open()
        with self._running:
            while self._queue:
                self._run_next()

    def _run_next(self) -> None:
        item = self._queue.popleft()
        with torch.inference_mode():
            if isinstance(item, _Step):
                self._done[item.ticket] = self._run_step(item)
            else:
                item()

    def _run_step(self, step: _Step) -> ForwardResult | ForwardError:
        started = perf_counter()
        assert self._steps is not None  # a closed driver has nothing queued
        try:
            return self._steps.run(step.ticket, step.batch, started)
        except PieError as error:
            return error if isinstance(error, ForwardError) else ForwardError(str(error))
        except (
            Exception
        ) as error:  # whatever torch raises belongs to this step, not to the thread that collects it
            return ForwardError(
                f"driver portable: step {step.ticket} failed: {type(error).__name__}: {error}"
            )


def _capabilities(
    loaded: LoadedModel, caches: Sequence[Cache], options: PortableOptions, dtype: torch.dtype
) -> DriverCapabilities:
    return DriverCapabilities(
        driver="portable",
        architecture=loaded.architecture,
        vocab_size=loaded.config.vocab_size,
        hidden_size=loaded.config.hidden_size,
        max_model_len=loaded.config.max_position_embeddings,
        max_batch_tokens=options.max_batch_tokens,
        max_batch_requests=options.max_batch_requests,
        cache=tuple(space(cache, dtype) for cache in caches),
        features=FEATURES | {Feature.SWAP} if all(cache.num_host_pages for cache in caches) else FEATURES,
        weights_revision=loaded.revision,
        kv_dtype=str(dtype).removeprefix("torch."),
        position_axes=position_axes(loaded.config),
        streams=streams(loaded.config),
        max_in_flight=MAX_IN_FLIGHT,
    )
