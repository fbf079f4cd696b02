"""How often something may happen: a bucket that fills at a steady rate and holds a burst."""

from __future__ import annotations

import time


class Rate:
    __slots__ = ("_burst", "_left", "_per_second", "_time")

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second = per_second
        self._burst = burst
        self._left = burst
        self._time = time.monotonic()

    @property
    def has_room(self) -> bool:
        self._fill()
        return self._left >= 1

    def take(self) -> bool:
        """Counts one; false if that is one too many."""
        self._fill()
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def _fill(self) -> None:
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._time) * self._per_second)
        self._time = now
