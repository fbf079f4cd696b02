"""The device's own time: streams, events and pinned memory. On a CPU everything has happened when a call returns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.contracts.forward import Int32


@dataclass(frozen=True, slots=True)
class Mark:
    """A point on the timeline of a CPU: always reached."""

    at: float

    def is_reached(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return True

    def wait(self) -> None:
        """Returns when everything before this point is done."""

    def seconds_since(self, earlier: Mark) -> float:
        return self.at - earlier.at


class Staging:
    """Host memory for blocks that are sent again and again. On a CPU a block is its own."""

    def room(self, words: int) -> Int32:
        """Where the next block is put together; what stands there is old."""
        return np.zeros(words, np.int32)

    def send(self, block: Int32, target: Tensor) -> None:
        """The block that was put together last, or its beginning, into that of the target; without waiting."""
        target[: len(block)].copy_(torch.from_numpy(block))


class Timeline:
    """Work is queued in order on one main line, and slow copies run aside."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def main(self) -> Iterator[None]:
        """Everything inside is queued on the main line."""
        yield

    @contextmanager
    def aside(self, *used: Tensor) -> Iterator[None]:
        """Everything inside runs beside the main line, after what stands there now; it uses these tensors."""
        yield

    def wait_for_aside(self) -> None:
        """Later work on the main line comes behind what was queued aside."""

    def mark(self) -> Mark:
        return Mark(perf_counter())

    def upload(self, values: NDArray[np.generic]) -> Tensor:
        """A tensor on the device, without waiting for it; the array may be reused at once."""
        return torch.from_numpy(np.array(values))

    def send(self, values: NDArray[np.generic], target: Tensor) -> None:
        """Into the beginning of a tensor that stays where it is."""
        target[: len(values)].copy_(torch.from_numpy(values))

    def staging(self) -> Staging:
        return Staging()

    def download(self, values: Tensor) -> Tensor:
        """A host tensor that holds the values once a later mark is reached."""
        return values.clone()

    def fetch(self, values: Tensor, host: Tensor) -> Tensor:
        """Likewise, into a pinned tensor of the same shape, which is returned."""
        return host.copy_(values)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def synchronize(self) -> None:
        """Waits until nothing is queued."""

    def is_lost(self) -> bool:
        """Whether a fault has ended what this process can do on the device."""
        return False


@dataclass(frozen=True, slots=True)
class CudaMark(Mark):
    event: torch.cuda.Event

    def is_reached(self) -> bool:
        try:
            return bool(self.event.query())
        except RuntimeError:  # a kernel has faulted
            return True

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, CudaMark)
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class CudaStaging(Staging):
    """Pinned buffers in turn: memory that is new each time costs page faults."""

    TURNS = 8  # more than steps may be open, so that nobody waits

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._buffers: list[Tensor] = []
        self._sent = [torch.cuda.Event() for _ in range(self.TURNS)]
        self._turn = 0

    def room(self, words: int) -> Int32:
        self._turn = (self._turn + 1) % self.TURNS
        if not self._buffers or len(self._buffers[0]) < words:
            self._stream.synchronize()
            self._buffers = [torch.zeros(words, dtype=torch.int32, pin_memory=True) for _ in self._sent]
        self._sent[self._turn].synchronize()
        array: Int32 = self._buffers[self._turn].numpy()
        return array[:words]

    def send(self, block: Int32, target: Tensor) -> None:
        target[: len(block)].copy_(self._buffers[self._turn][: len(block)], non_blocking=True)
        self._sent[self._turn].record(self._stream)


class CudaTimeline(Timeline):
    """One stream for steps, one for slow copies. Pinned buffers come from torch's caching allocator, which gives them
    out again only after the copies that used them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self._aside = torch.cuda.Stream(device)

    @contextmanager
    def main(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    @contextmanager
    def aside(self, *used: Tensor) -> Iterator[None]:
        self._aside.wait_stream(self.stream)
        with torch.cuda.stream(self._aside):
            yield
        for tensor in used:
            tensor.record_stream(self._aside)

    def wait_for_aside(self) -> None:
        self.stream.wait_stream(self._aside)

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return CudaMark(0.0, event)

    def upload(self, values: NDArray[np.generic]) -> Tensor:
        return _staged(values).to(self.device, non_blocking=True)

    def send(self, values: NDArray[np.generic], target: Tensor) -> None:
        target[: len(values)].copy_(_staged(values), non_blocking=True)

    def record(self, function: Callable[[], None], pool: Any) -> Callable[[], None]:
        """A graph of what the function queues, its memory from a pool of torch's. Returns what replays it."""
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # what it frees meanwhile would be freed inside the graph
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph.replay

    def staging(self) -> Staging:
        return CudaStaging(self.stream)

    def fetch(self, values: Tensor, host: Tensor) -> Tensor:
        return host.copy_(values, non_blocking=True)

    def download(self, values: Tensor) -> Tensor:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def synchronize(self) -> None:
        self.stream.synchronize()
        self._aside.synchronize()

    def is_lost(self) -> bool:
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:  # a fault stays: every later call says the same
            return True
        return False


def _staged(values: NDArray[np.generic]) -> Tensor:
    """The values in pinned memory."""
    dtype = torch.from_numpy(np.empty(0, values.dtype)).dtype
    staged = torch.empty(values.shape, dtype=dtype, pin_memory=True)
    np.copyto(staged.numpy(), values)
    return staged


def timeline_of(device: torch.device) -> Timeline:
    return CudaTimeline(device) if device.type == "cuda" else Timeline(device)
