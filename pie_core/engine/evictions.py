"""Rows of a context that later rows no longer read, and rows that are kept from that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pie_core.contracts.forward import Int32
from pie_core.kv_pages.intervals import Range, cut, from_flags, gaps, united

_NEVER = np.iinfo(np.int32).max


class Evictions:
    """A row that was written before an eviction has read the evicted rows, and does so again if it is recomputed."""

    __slots__ = ("_since", "evicted", "latest", "pinned")

    def __init__(self) -> None:
        self.evicted: list[Range] = []
        self.pinned: list[Range] = []
        self.latest = 0  # rows of the context at the last eviction
        self._since: Int32 = np.empty(0, np.int32)  # by row: rows of the context when it was evicted

    def pin(self, start: int, stop: int) -> None:
        """Later evictions leave these rows alone."""
        if start < stop:
            self.pinned = united(self.pinned, start, stop)

    def evict(self, start: int, stop: int, length: int) -> None:
        """The rows that a context of `length` rows gets from now on do not read these; pinned ones excepted."""
        fresh = [part for free in gaps(self.pinned, start, stop) for part in gaps(self.evicted, *free)]
        if not fresh:
            return
        self._make_room(length)
        for low, high in fresh:
            self._since[low:high] = length
            self.evicted = united(self.evicted, low, high)
        self.latest = length

    def hidden_from(self, row: int) -> Sequence[Range]:
        if row >= self.latest:
            return self.evicted
        return from_flags(self._since <= row)

    def truncate(self, length: int) -> None:
        """What is evicted stays so, for every row that is written from now on."""
        self.evicted, self.pinned = cut(self.evicted, length), cut(self.pinned, length)
        self._since = np.where(self._since == _NEVER, _NEVER, np.minimum(self._since, length))[:length]
        self.latest = min(self.latest, length)

    def since(self, length: int) -> Int32:
        """By row: how many rows there were when it was evicted, or more than there can be."""
        self._make_room(length)
        return self._since[:length].copy()

    def restore(self, since: Int32) -> None:
        """Becomes what `since` told."""
        evicted = since[since != _NEVER]
        self._since = since.copy()
        self.evicted, self.latest = from_flags(since != _NEVER), int(evicted.max(initial=0))

    def copy(self) -> Evictions:
        other = Evictions()
        other.evicted, other.pinned, other.latest = list(self.evicted), list(self.pinned), self.latest
        other._since = self._since.copy()
        return other

    def _make_room(self, length: int) -> None:
        if length > len(self._since):
            grown = np.full(max(length, 2 * len(self._since)), _NEVER, np.int32)
            grown[: len(self._since)] = self._since
            self._since = grown
