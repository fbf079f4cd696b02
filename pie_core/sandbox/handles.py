"""The host objects that one guest holds handles to: numbered, limited, closed when dropped or at its end."""

from __future__ import annotations

import logging
from typing import Any

from pie_core.errors import LimitExceeded, NotFound

log = logging.getLogger(__name__)


class _Objects(dict[int, Any]):
    """Host objects by number; asking for one that is not there is the guest's mistake."""

    def __missing__(self, number: int) -> Any:
        raise NotFound(f"handle {number} is not in this program's table: it was dropped or given away")


class Handles:
    """Numbers are not reused soon, so that a stale one never names another object."""

    __slots__ = ("_limit", "_next", "objects")

    def __init__(self, limit: int) -> None:
        self.objects = _Objects()  # to be read: `objects[number]` is the object of a borrowed handle
        self._next = 1
        self._limit = limit

    def __len__(self) -> int:
        return len(self.objects)

    def add(self, item: Any) -> int:
        """The number by which the guest will name `item`."""
        if len(self.objects) >= self._limit:
            raise LimitExceeded(f"the program holds {self._limit} handles, its limit: drop some")
        number = self._next
        self._next = number % 0xFFFFFFFF + 1
        while self._next in self.objects:
            self._next = self._next % 0xFFFFFFFF + 1
        self.objects[number] = item
        return number

    def get(self, number: int) -> Any:
        """The object of a borrowed handle."""
        return self.objects[number]

    def take(self, number: int) -> Any:
        """The object of an owned handle, which the guest gives up."""
        item = self.objects[number]
        del self.objects[number]
        return item

    def drop(self, number: int) -> None:
        """The guest dropped its handle."""
        item = self.objects.pop(number, None)
        if item is not None:
            _close(item)

    def sweep(self) -> None:
        """Closes everything that is left, the youngest first, because children follow their parents."""
        while self.objects:
            _close(self.objects.popitem()[1])


def _close(item: Any) -> None:
    close = getattr(item, "close", None)
    if close is None:
        return
    try:
        close()
    except Exception:  # one object's failure must not keep the others open
        log.exception("closing a %s that a program held", type(item).__name__)
