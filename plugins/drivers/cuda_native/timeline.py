"""The device's own time: streams, events and pinned memory. On a CPU everything has happened when a call returns."""

from __future__ import annotations

import gc
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

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


@dataclass(frozen=True, slots=True)
class Download:
    """Values on their way to the host: there once a later mark is reached."""

    values: Tensor

    def release(self) -> None:
        """Nobody reads them any more; their memory may be written."""


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

    def download(self, values: Tensor) -> Download:
        """Without waiting for the values."""
        return Download(values.clone())

    def fetch(self, values: Tensor, host: Tensor) -> Tensor:
        """Likewise, into a pinned tensor of the same shape, which is returned."""
        return host.copy_(values)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def synchronize(self) -> None:
        """Waits until nothing is queued."""

    def close(self) -> None:
        """Nothing is queued here any more."""

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


class Passed(Protocol):
    """Whether the device has gone past the point where it was recorded."""

    def query(self) -> bool: ...

    def record(self, stream: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class PinnedBlock:
    content: Tensor  # uint8
    passed: Passed  # where the device had read or written it for the last time


class PinnedBlocks:
    """Pinned memory in powers of two, lent again and again and never given back to torch (`lost_device` says why)."""

    SMALLEST = 256

    def __init__(self, allocate: Callable[[int], PinnedBlock]) -> None:
        self._allocate = allocate
        self._idle: defaultdict[int, deque[PinnedBlock]] = defaultdict(deque)

    def lend(self, num_bytes: int) -> PinnedBlock:
        """The one that came back first, if the device is done with it, or a new one."""
        size = 1 << (max(num_bytes, self.SMALLEST) - 1).bit_length()
        idle = self._idle[size]
        return idle.popleft() if idle and idle[0].passed.query() else self._allocate(size)

    def take_back(self, block: PinnedBlock, stream: Any) -> None:
        """What is queued on the stream until now may still use it."""
        block.passed.record(stream)
        self._idle[len(block.content)].append(block)


@dataclass(frozen=True, slots=True)
class CudaDownload(Download):
    block: PinnedBlock
    blocks: PinnedBlocks
    stream: torch.cuda.Stream

    def release(self) -> None:
        self.blocks.take_back(self.block, self.stream)


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


_idle_streams: defaultdict[torch.device, list[tuple[torch.cuda.Stream, torch.cuda.Stream]]] = defaultdict(
    list
)


class CudaTimeline(Timeline):
    """One stream for steps, one for slow copies."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        idle = _idle_streams[device]
        self.stream, self._aside = (
            idle.pop() if idle else (torch.cuda.Stream(device), torch.cuda.Stream(device))
        )
        self._blocks = PinnedBlocks(_pinned_block)
        self._used_aside: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    @contextmanager
    def main(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    @contextmanager
    def aside(self, *used: Tensor) -> Iterator[None]:
        self._drop_what_was_used()
        self._aside.wait_stream(self.stream)
        try:
            with torch.cuda.stream(self._aside):
                yield
        finally:
            done = torch.cuda.Event()
            done.record(self._aside)
            # Held, and not left to torch's `record_stream`, which asks the GPU when such a tensor is freed.
            self._used_aside.append((done, used))

    def wait_for_aside(self) -> None:
        self.stream.wait_stream(self._aside)

    def mark(self) -> Mark:
        self._drop_what_was_used()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return CudaMark(0.0, event)

    def upload(self, values: NDArray[np.generic]) -> Tensor:
        block, staged = self._staged(values)
        target = torch.empty(staged.shape, dtype=staged.dtype, device=self.device)
        target.copy_(staged, non_blocking=True)
        self._blocks.take_back(block, self.stream)
        return target

    def send(self, values: NDArray[np.generic], target: Tensor) -> None:
        block, staged = self._staged(values)
        target[: len(values)].copy_(staged, non_blocking=True)
        self._blocks.take_back(block, self.stream)

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

    def download(self, values: Tensor) -> Download:
        block = self._blocks.lend(values.nbytes)
        host = block.content[: values.nbytes].view(values.dtype).view(values.shape)
        return CudaDownload(host.copy_(values, non_blocking=True), block, self._blocks, self.stream)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def synchronize(self) -> None:
        self.stream.synchronize()
        self._aside.synchronize()

    def close(self) -> None:
        """The streams are used again: torch keeps 33 MiB for every stream on which matrices were multiplied."""
        _idle_streams[self.device].append((self.stream, self._aside))

    def is_lost(self) -> bool:
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:  # a fault stays: every later call says the same
            return True
        return False

    def _staged(self, values: NDArray[np.generic]) -> tuple[PinnedBlock, Tensor]:
        """The values in pinned memory."""
        block = self._blocks.lend(values.nbytes)
        staged = block.content.numpy()[: values.nbytes].view(values.dtype).reshape(values.shape)
        np.copyto(staged, values)
        return block, torch.from_numpy(staged)

    def _drop_what_was_used(self) -> None:
        while self._used_aside and self._used_aside[0][0].query():
            self._used_aside.popleft()


def _pinned_block(size: int) -> PinnedBlock:
    return PinnedBlock(torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())


def timeline_of(device: torch.device) -> Timeline:
    return CudaTimeline(device) if device.type == "cuda" else Timeline(device)
