"""Counts by name, to which whole arrays can be added: names have numbers."""

from __future__ import annotations

import numpy as np

from pie_core.contracts.forward import Int32, Int64


class Tally:
    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._free: list[int] = []
        self._counts: Int64 = np.zeros(16, np.int64)

    def number(self, name: str) -> int:
        """The same until the name is forgotten."""
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = self._free.pop() if self._free else len(self._numbers)
            if number >= len(self._counts):
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        return number

    def __getitem__(self, name: str) -> int:
        number = self._numbers.get(name)
        return 0 if number is None else int(self._counts[number])

    def add(self, name: str, count: int) -> None:
        number = self.number(name)  # may replace the counts
        self._counts[number] += count

    def add_each(self, numbers: Int32) -> None:
        """One more for each of these numbers, as often as it is there."""
        self._counts += np.bincount(numbers, minlength=len(self._counts))

    def exceeding(self, numbers: Int32, limit: int) -> Int64:
        """The places of those numbers that would be above the limit, were all of them added."""
        after = self._counts + np.bincount(numbers, minlength=len(self._counts))
        return np.flatnonzero(after[numbers] > limit)

    def forget(self, name: str) -> None:
        number = self._numbers.pop(name, None)
        if number is not None:
            self._counts[number] = 0
            self._free.append(number)
