"""Reads tensors of a checkpoint before they are asked for: threads bring them from the disk into pinned memory while
the ones before go to the device."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from pie_plugins.models.layers.checkpoint import Checkpoint, StoredTensor
from pie_plugins.models.weight_table import Format

THREADS = 4
MOST_BYTES = 2 * 2**30  # read and not asked for yet; a tensor that is larger comes alone

Stage = Callable[[Tensor], Tensor]


def in_memory(tensor: Tensor) -> Tensor:
    """A copy of what may still lie on the disk."""
    return tensor.clone()


def pinned(tensor: Tensor) -> Tensor:
    """A copy that the device can fetch by itself."""
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return staged.copy_(tensor)


class ReadAhead:
    """A checkpoint whose `expect` begins to read. A tensor that cannot be read raises when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, stage: Stage, most_bytes: int = MOST_BYTES) -> None:
        self._checkpoint, self._stage, self._most_bytes = checkpoint, stage, most_bytes
        self._pool = ThreadPoolExecutor(THREADS, "pie-read-ahead")
        self._expected: deque[str] = deque()
        self._coming: defaultdict[str, deque[Future[Tensor]]] = defaultdict(deque)
        self._coming_bytes = 0

    @property
    def form(self) -> Format:
        return self._checkpoint.form

    @property
    def origin(self) -> str:
        return self._checkpoint.origin

    @property
    def kind(self) -> str:
        return self._checkpoint.kind

    @property
    def config(self) -> Mapping[str, Any]:
        return self._checkpoint.config

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._checkpoint.tensors

    def expect(self, names: Sequence[str]) -> None:
        self._expected.extend(names)
        self._begin()

    def read(self, name: str) -> Tensor:
        coming = self._coming.get(name)
        if not coming:  # nobody has announced it
            return self._checkpoint.read(name)
        tensor = coming.popleft().result()
        self._coming_bytes -= self.tensors[name].num_bytes
        self._begin()
        return tensor

    def close(self) -> None:
        self._expected.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()
        self._checkpoint.close()

    def _begin(self) -> None:
        while self._expected:
            size = self.tensors[self._expected[0]].num_bytes
            if self._coming_bytes and self._coming_bytes + size > self._most_bytes:
                return
            name = self._expected.popleft()
            self._coming_bytes += size
            self._coming[name].append(self._pool.submit(self._bring, name))

    def _bring(self, name: str) -> Tensor:
        return self._stage(self._checkpoint.read(name))
