"""The driver: queues steps and page operations on the device in the order of the calls, and fetches what they gave."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from pie_core.contracts.driver import DriverCapabilities, Feature, GenerationRequest
from pie_core.contracts.forward import Float32, ForwardBatch, ForwardResult, Int32
from pie_core.contracts.media import MediaItem
from pie_core.errors import EngineLost, ForwardError, InvalidRequest, PieError, Unsupported
from pie_core.ids import Ticket
from pie_plugins.drivers.cuda_native.kv_cache import KvCache
from pie_plugins.drivers.cuda_native.lost_device import keep_until_exit
from pie_plugins.drivers.cuda_native.memory import is_out_of_memory
from pie_plugins.drivers.cuda_native.step_runner import PendingStep, StepRunner
from pie_plugins.drivers.cuda_native.timeline import Timeline


class CudaNativeDriver:
    """One loaded model. `submit` queues a step on the device and returns; `collect` waits for its results to arrive."""

    def __init__(
        self,
        capabilities: DriverCapabilities,
        steps: StepRunner,
        caches: tuple[KvCache, ...],
        timeline: Timeline,
    ) -> None:
        self._capabilities, self._timeline, self._caches = capabilities, timeline, caches
        self._steps: StepRunner | None = steps
        self._tickets = count()
        self._open: OrderedDict[Ticket, PendingStep | PieError] = OrderedDict()
        self._loss: str | None = None
        self._inference = torch.inference_mode()  # one for all calls: making it takes longer than entering it

    @property
    def capabilities(self) -> DriverCapabilities:
        return self._capabilities

    @property
    def is_lost(self) -> bool:
        """The GPU has faulted: nothing of this process runs on it any more, and what lies there is kept as it is."""
        return self._loss is not None

    def submit(self, batch: ForwardBatch) -> Ticket:
        self._check_open()
        assert self._steps is not None
        ticket = Ticket(next(self._tickets))
        try:
            self._check_not_lost()
            with self._inference, self._timeline.main():
                self._open[ticket] = self._steps.enqueue(ticket, batch)
        except Exception as error:  # whatever a step raises belongs to it, not to the thread that submits
            self._open[ticket] = self._failure(f"step {ticket}", error)
        return ticket

    def is_done(self, ticket: Ticket) -> bool:
        pending = self._open.get(ticket)
        return not isinstance(pending, PendingStep) or pending.done.is_reached()

    def collect(self, ticket: Ticket) -> ForwardResult:
        pending = self._open.pop(ticket, None)
        if pending is None:
            self._check_open()
            raise ForwardError(
                f"driver cuda_native: ticket {ticket} was never submitted, or is collected already"
            )
        if isinstance(pending, PieError):
            raise pending
        self._check_not_lost(pending)
        try:
            return pending.result()
        except Exception as error:  # a kernel that faults is noticed here
            raise self._failure(f"step {ticket}", error, pending) from error

    def copy_pages(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        cache = self._cache(group)
        cache.check_pages([*sources, *targets])
        with self._moving():
            cache.copy(sources, targets)

    def swap_out(self, group: int, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        cache = self._swappable(group, pages, host_pages)
        with self._moving():
            cache.swap_out(pages, host_pages)

    def swap_in(self, group: int, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        cache = self._swappable(group, pages, host_pages)
        with self._moving():
            cache.swap_in(host_pages, pages)

    def export_pages(self, group: int, pages: Sequence[int]) -> NDArray[np.uint8]:
        cache = self._cache(group)
        cache.check_pages(pages)
        with self._moving():
            return cache.read(pages)

    def import_pages(self, group: int, pages: Sequence[int], content: NDArray[np.uint8]) -> None:
        cache = self._cache(group)
        cache.check_pages(pages)
        with self._moving():
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
            f"driver cuda_native was asked for a generation of {request.max_tokens} tokens: it runs single steps "
            "and has no request level"
        )

    def parts(self) -> tuple[StepRunner, tuple[KvCache, ...], Timeline]:
        """What another driver takes over, with everything that is loaded."""
        assert self._steps is not None
        return self._steps, self._caches, self._timeline

    def leave_uncollected(self, ticket: Ticket) -> None:
        """Nobody will ask for this step. Raises if it could not even be queued: the ranks would part."""
        pending = self._open.pop(ticket)
        if isinstance(pending, PieError):
            raise pending
        pending.forgo()

    def close(self) -> None:
        if self._steps is None:
            return
        if not self.is_lost and self._timeline.is_lost():  # waits for open steps
            self._lose("the GPU faulted in or before the last step", None)
        self._open, self._caches, self._steps = OrderedDict(), (), None
        if not self.is_lost:
            self._free()

    def _free(self) -> None:
        self._timeline.close()
        if self._timeline.device.type == "cuda":
            gc.unfreeze()  # a server sets aside what lives when it begins to serve, this driver among it
        gc.collect()  # recordings and what they run refer to each other; weights, graphs and pages go with them
        torch.cuda.empty_cache()  # for other programs, and for the next model of this one

    @contextmanager
    def _queueing(self) -> Iterator[None]:
        self._check_not_lost()
        with self._inference, self._timeline.main():
            yield

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Page operations raise what steps fail with."""
        try:
            with self._queueing():
                yield
        except InvalidRequest:
            raise
        except Exception as error:
            raise self._failure("a page operation", error) from error

    def _check_not_lost(self, *seen: object) -> None:
        if self._loss is not None:
            keep_until_exit(*seen)
            raise EngineLost(self._loss)

    def _check_open(self) -> None:
        if self._steps is None:
            raise ForwardError("driver cuda_native: it is closed")

    def _cache(self, group: int) -> KvCache:
        self._check_open()
        return self._caches[group]

    def _swappable(self, group: int, pages: Sequence[int], host_pages: Sequence[int]) -> KvCache:
        cache = self._cache(group)
        if not cache.num_host_pages:
            self._refuse(Feature.SWAP)
        cache.check_pages(pages)
        cache.check_host_pages(host_pages)
        return cache

    def _refuse(self, feature: Feature) -> NoReturn:
        raise Unsupported(f"driver cuda_native cannot do {feature.value} (see its capabilities)")

    def _failure(self, what: str, error: Exception, *seen: object) -> PieError:
        if isinstance(error, ForwardError | EngineLost):
            return error
        if self._timeline.is_lost():
            return self._lose(f"the GPU faulted in or before {what}", error, *seen)
        if is_out_of_memory(error):
            torch.cuda.empty_cache()
            return ForwardError(
                f"driver cuda_native: {what} found no memory on the GPU; lower max_batch_tokens or"
                f" gpu_mem_utilization: {error}"
            )
        kind = "" if isinstance(error, PieError) else f"{type(error).__name__}: "
        return ForwardError(f"driver cuda_native: {what} failed: {kind}{error}")

    def _lose(self, why: str, error: Exception | None, *seen: object) -> EngineLost:
        """From here on nothing is asked of the device, and nothing that it knows of is freed."""
        keep_until_exit(self._steps, self._caches, self._open, self._timeline, error, *seen)
        self._loss = (
            f"driver cuda_native: {why}, and nothing of this process can run on the GPU any more; with engine_process"
            " the model is started again"
        )
        return EngineLost(f"{self._loss}: {error}" if error else self._loss)
