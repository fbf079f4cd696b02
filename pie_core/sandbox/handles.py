"""The host objects that one guest holds handles to: numbered, limited, closed when dropped or at its end."""

from __future__ import annotations

import logging
from typing import Any

from pie_core.errors import LimitExceeded, NotFound

log = logging.getLogger(__name__)


class Handles:
    """Numbers are not reused soon, so that a stale one never names another object."""

    __slots__ = ("_limit", "_next", "_objects")

    def __init__(self, limit: int) -> None:
        self._objects: dict[int, Any] = {}
        self._next = 1
        self._limit = limit

    def __len__(self) -> int:
        return len(self._objects)

    def add(self, item: Any) -> int:
        """The number by which the guest will name `item`."""
        if len(self._objects) >= self._limit:
            raise LimitExceeded(f"the program holds {self._limit} handles, its limit: drop some")
        number = self._next
        self._next = number % 0xFFFFFFFF + 1
        while self._next in self._objects:
            self._next = self._next % 0xFFFFFFFF + 1
        self._objects[number] = item
        return number

    def get(self, number: int) -> Any:
        """The object of a borrowed handle."""
        try:
            return self._objects[number]
        except KeyError:
            raise NotFound(
                f"handle {number} is not in this program's table: it was dropped or given away"
            ) from None

    def take(self, number: int) -> Any:
        """The object of an owned handle, which the guest gives up."""
        item = self.get(number)
        del self._objects[number]
        return item

    def drop(self, number: int) -> None:
        """The guest dropped its handle."""
        item = self._objects.pop(number, None)
        if item is not None:
            _close(item)

    def sweep(self) -> None:
        """Closes everything that is left, the youngest first, because children follow their parents."""
        while self._objects:
            _close(self._objects.popitem()[1])


def _close(item: Any) -> None:
    close = getattr(item, "close", None)
    if close is None:
        return
    try:
        close()
    except Exception:  # one object's failure must not keep the others open
        log.exception("closing a %s that a program held", type(item).__name__)
