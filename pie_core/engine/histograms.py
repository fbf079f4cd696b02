"""How often values fell into which interval: counted in place, and as counts that cross the port."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


class Distribution(msgspec.Struct, frozen=True):
    """`counts[i]` values were at most `bounds[i]` and above the bound before; the last count has no bound."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    total: float = 0.0  # the sum of all values

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """0 while there is no value."""
        return self.total / self.count if self.count else 0.0

    def since(self, before: Distribution) -> Distribution:
        """What was counted after `before` was."""
        if before.bounds != self.bounds:
            return self
        counts = tuple(now - then for now, then in zip(self.counts, before.counts, strict=True))
        return Distribution(self.bounds, counts, self.total - before.total)

    def quantile(self, fraction: float) -> float | None:
        """A value below which this fraction lies, as if each interval were evenly filled; None without values.

        Beyond the last bound nothing is known but that bound.
        """
        wanted, lower, below = fraction * self.count, 0.0, 0
        if not self.count:
            return None
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= wanted:
                return lower + (bound - lower) * (wanted - below) / count
            lower, below = bound, below + count
        return lower


class Histogram:
    """Counts values into intervals whose upper ends are `bounds`."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def observe_all(self, values: NDArray[np.float64]) -> None:
        places = np.searchsorted(self._bounds, values)
        for place, count in zip(*np.unique(places, return_counts=True), strict=True):
            self._counts[place] += int(count)
        self._total += float(values.sum())

    def distribution(self) -> Distribution:
        """What has been counted so far."""
        return Distribution(self._bounds, tuple(self._counts), self._total)
