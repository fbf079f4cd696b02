"""The device's own time: streams, events and pinned memory. On a CPU everything has happened when a call returns."""

from __future__ import annotations

import gc
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.contracts.forward import Int32


class Mark:
    """A point on the timeline, set as often as one likes. On a CPU it is reached at once."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = 0.0

    def set(self) -> None:
        """It stands behind what is queued now."""
        self.at = perf_counter()

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


@dataclass(slots=True, eq=False)
class Room:
    """Host memory in which a block is put together; what stands there is old."""

    words: Int32
    written: object | None = None  # by whom, last: it knows what stands there
    sent: tuple[Tensor, int, Tensor, Tensor] | None = (
        None  # last: into which block, how much; both ends of the copy
    )


class Staging:
    """Host memory for blocks that are sent again and again. On a CPU a block has arrived when a call returns."""

    def __init__(self) -> None:
        self._room = Room(np.zeros(0, np.int32))

    def room(self, words: int) -> Room:
        """Where the next block is put together."""
        if len(self._room.words) < words:
            self._room = Room(np.zeros(words, np.int32))
        return self._room

    def send(self, room: Room, count: int, target: Tensor) -> None:
        """The beginning of a block into that of the target, without waiting. Steps of one size follow each other."""
        if room.sent is None or room.sent[0] is not target or room.sent[1] != count:
            room.sent = target, count, self._host(room)[:count], target[:count]
        _, _, source, place = room.sent
        place.copy_(source, non_blocking=True)

    def _host(self, room: Room) -> Tensor:
        return torch.from_numpy(room.words)


_ON_CPU = nullcontext()


class Timeline:
    """Work is queued in order on one main line, and slow copies run aside."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def main(self) -> AbstractContextManager[object]:
        """Everything inside is queued on the main line; not to be entered twice. Whatever copies belongs inside: memory
        that a copy reads is used again once the main line has gone past it."""
        return _ON_CPU

    @contextmanager
    def aside(self, *used: Tensor) -> Iterator[None]:
        """Everything inside runs beside the main line, after what stands there now; it uses these tensors."""
        yield

    def wait_for_aside(self) -> None:
        """Later work on the main line comes behind what was queued aside."""

    def unset_mark(self) -> Mark:
        return Mark()

    def mark(self) -> Mark:
        """Behind what is queued now."""
        mark = self.unset_mark()
        mark.set()
        return mark

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

    def fetch(self, values: Tensor, host: Tensor) -> None:
        """Likewise, into a tensor on the host that stays there."""
        host.copy_(values)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def synchronize(self) -> None:
        """Waits until nothing is queued."""

    def close(self) -> None:
        """Nothing is queued here any more."""

    def is_lost(self) -> bool:
        """Whether a fault has ended what this process can do on the device."""
        return False


class CudaMark(Mark):
    __slots__ = ("_stream", "event")

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self._stream = stream

    def set(self) -> None:
        self.event.record(self._stream)

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
        self._rooms: list[Room] = []
        self._buffers: dict[Room, Tensor] = {}
        self._sent = [torch.cuda.Event() for _ in range(self.TURNS)]
        self._turn = 0

    def room(self, words: int) -> Room:
        self._turn = (self._turn + 1) % self.TURNS
        if not self._rooms or len(self._rooms[0].words) < words:
            self._stream.synchronize()
            buffers = [torch.zeros(words, dtype=torch.int32, pin_memory=True) for _ in self._sent]
            self._rooms = [Room(buffer.numpy()) for buffer in buffers]
            self._buffers = dict(zip(self._rooms, buffers, strict=True))
        self._sent[self._turn].synchronize()
        return self._rooms[self._turn]

    def send(self, room: Room, count: int, target: Tensor) -> None:
        super().send(room, count, target)
        self._sent[self._turn].record(self._stream)

    def _host(self, room: Room) -> Tensor:
        return self._buffers[room]


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

    def main(self) -> AbstractContextManager[object]:
        on_stream: AbstractContextManager[object] = (
            self.stream
        )  # with its device, a tenth of torch.cuda.stream's time
        return on_stream

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

    def unset_mark(self) -> Mark:
        return CudaMark(self.stream)

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

    def fetch(self, values: Tensor, host: Tensor) -> None:
        self._drop_what_was_used()  # here, because every step comes by
        host.copy_(values, non_blocking=True)

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
