"""Free and used pages of one cache group: ids only, each counted by how many hold it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pie_core.contracts.forward import Int32
from pie_core.errors import OutOfPages


class PagePool:
    """Hands out pages and takes them back when the last holder lets go. For a state group, pages are slots."""

    __slots__ = ("_free", "_holders", "name", "num_pages")

    def __init__(self, name: str, num_pages: int) -> None:
        self.name = name
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = np.zeros(num_pages, np.int32)

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
        self._free.extend(np.asarray(pages, np.int32)[held == 1].tolist())

    def is_shared(self, page: int) -> bool:
        return bool(self._holders[page] > 1)
