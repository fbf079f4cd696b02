"""What is worth least: by value and recency in one number.

An entry's priority is its value plus the priority of what was taken last. So time alone makes nothing worthless, but
what is set again, or anew, gets ahead of what is as valuable and older. The rule is known as GreedyDual.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Priorities(Generic[Key]):
    """A heap in which entries that were set again or removed stay until they come up."""

    __slots__ = ("_heap", "_serial", "_valid", "clock")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Key]] = []
        self._valid: dict[Key, int] = {}  # the serial number of its latest entry
        self.clock = 0.0  # the greatest priority that was taken
        self._serial = 0

    def __len__(self) -> int:
        return len(self._valid)

    def set(self, key: Key, value: float, since: float | None = None) -> None:
        """`since`: what the clock said when it was last used; None: it is used now."""
        self._serial += 1
        self._valid[key] = self._serial
        heapq.heappush(self._heap, ((self.clock if since is None else since) + value, self._serial, key))
        if len(self._heap) > 2 * len(self._valid) + 64:
            self._heap = [each for each in self._heap if self._valid.get(each[2]) == each[1]]
            heapq.heapify(self._heap)

    def remove(self, key: Key) -> None:
        self._valid.pop(key, None)

    def pop(self) -> Key | None:
        """Takes what is worth least; None: there is nothing."""
        while self._heap:
            priority, serial, key = heapq.heappop(self._heap)
            if self._valid.get(key) == serial:
                del self._valid[key]
                self.clock = max(self.clock, priority)
                return key
        return None
