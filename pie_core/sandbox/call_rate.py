"""How often a program may call the host: a countdown, filled in portions from the buckets of program and tenant."""

from __future__ import annotations

import time

from pie_core.errors import LimitExceeded

PORTION = 1024  # calls that are counted without a look at the clock


class Bucket:
    """Calls that may be made now: it fills at a steady rate, and holds what one second brings."""

    __slots__ = ("__weakref__", "_left", "_time", "per_second")

    def __init__(self, per_second: float) -> None:
        self.per_second = per_second
        self._left = self._size
        self._time = time.monotonic()

    @property
    def _size(self) -> float:
        return max(self.per_second, 1.0)

    @property
    def room(self) -> int:
        now = time.monotonic()
        self._left = min(self._size, self._left + (now - self._time) * self.per_second)
        self._time = now
        return int(self._left)

    @property
    def portion(self) -> int:
        """Small enough to leave something for those who share it."""
        return max(min(PORTION, int(self.per_second) // 16), 1)

    def take(self, count: int) -> None:
        self._left -= count


class CallRate:
    """What one guest may call. Without buckets it only counts."""

    __slots__ = ("_buckets", "_portion", "granted")

    def __init__(self, program: Bucket | None = None, tenant: Bucket | None = None) -> None:
        limits = {"runtime.calls_per_s_per_program": program, "runtime.calls_per_s_per_tenant": tenant}
        self._buckets = {option: bucket for option, bucket in limits.items() if bucket is not None}
        self._portion = min((each.portion for each in self._buckets.values()), default=PORTION)
        self.granted = 0

    def more(self, owed: int) -> int:
        """How many calls may follow, besides `owed` that were made already. Raises LimitExceeded if there are none.

        What was made in excess of a portion, by calls that cannot be refused, is forgiven.
        """
        owed = min(owed, self._portion)
        count = owed + self._portion
        for option, bucket in self._buckets.items():
            count = min(count, bucket.room)
            if count < owed:
                raise LimitExceeded(
                    f"call {self.granted + 1} of the host comes too soon: {option} allows {bucket.per_second:g} in a"
                    " second; wait a little, call less often, or have it raised"
                )
        for bucket in self._buckets.values():
            bucket.take(count)
        self.granted += count
        return count - owed
