"""Free and used pages of one cache group: ids only, each counted by how many hold it.

A page that is let go while the driver has steps is free once those are over: they may still touch it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from pie_core.contracts.forward import Int32
from pie_core.errors import OutOfPages


class PagePool:
    """Hands out pages and takes them back when the last holder lets go. For a state group, pages are slots."""

    __slots__ = ("_finished", "_free", "_holders", "_leaving", "_started", "name", "num_pages")

    def __init__(self, name: str, num_pages: int) -> None:
        self.name = name
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = np.zeros(num_pages, np.int32)
        self._started = self._finished = 0  # steps
        self._leaving: deque[tuple[int, list[int]]] = deque()  # the last step that may touch these pages

    def begin_step(self) -> None:
        """The driver has one more step."""
        self._started += 1

    def end_step(self) -> None:
        """The driver's oldest step is over."""
        self._finished += 1
        while self._leaving and self._leaving[0][0] <= self._finished:
            self._free.extend(self._leaving.popleft()[1])

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Pages with one holder, the caller."""
        if count > len(self._free):
            raise OutOfPages(
                f"cache group {self.name!r}: {count} pages wanted, {len(self._free)} of {self.num_pages} are free"
            )
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        self._holders[taken] = 1
        return taken

    def share(self, pages: Int32 | Sequence[int]) -> None:
        """One more holder for each of these pages; they are distinct and in use."""
        held = self._holders[pages]
        assert (held > 0).all(), "a free page cannot be shared"
        self._holders[pages] = held + 1

    def release(self, pages: Int32 | Sequence[int]) -> None:
        """One holder less for each of these pages; they are distinct and in use."""
        held = self._holders[pages]
        assert (held > 0).all(), "a free page cannot be released"
        self._holders[pages] = held - 1
        freed: list[int] = np.asarray(pages, np.int32)[held == 1].tolist()
        if self._started > self._finished:
            self._leaving.append((self._started, freed))
        else:
            self._free.extend(freed)

    def is_shared(self, page: int) -> bool:
        return bool(self._holders[page] > 1)
