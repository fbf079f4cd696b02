"""Free and used pages of one cache group: ids only, each counted by how many hold it.

A page that is let go while the driver has steps is free once those are over: they may still touch it.

Two pools can be partners, one of the device and one of host memory. *Twins* are pages of both that hold the same:
whoever moves from one to the other need not copy them. A page has its twin until it is written again or free.

A cache may keep pages for whoever wants them next. Those that nobody else holds are *idle*: as good as free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from pie_core.contracts.forward import Int32
from pie_core.errors import OutOfPages


class PagePool:
    """Hands out pages and takes them back when the last holder lets go. For a state group, pages are slots."""

    __slots__ = (
        *("_finished", "_free", "_holders", "_kept", "_leaving", "_num_leaving", "_started", "_twins"),
        *("name", "num_idle", "num_pages", "partner", "promised", "reclaim"),
    )

    def __init__(self, name: str, num_pages: int) -> None:
        self.name = name
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = np.zeros(num_pages, np.int32)
        self._started = self._finished = 0  # steps
        self._num_leaving = 0
        self.promised = 0  # pages that are kept for whoever reserved them, see raw_pages
        self._kept: Int32 | None = None  # how many of the holders are the cache
        self.num_idle = 0
        self.reclaim: Callable[[PagePool, int], None] | None = (
            None  # lets go of so many idle pages, or of all
        )
        self._leaving: deque[tuple[int, list[int]]] = deque()  # the last step that may touch these pages
        self.partner: PagePool | None = None
        self._twins: dict[int, int] = {}  # page -> page of the partner

    def begin_step(self) -> None:
        """The driver has one more step."""
        self._started += 1

    def end_step(self) -> None:
        """The driver's oldest step is over."""
        self._finished += 1
        while self._leaving and self._leaving[0][0] <= self._finished:
            pages = self._leaving.popleft()[1]
            self._num_leaving -= len(pages)
            self._free.extend(pages)

    @property
    def num_free(self) -> int:
        return max(len(self._free) - self.promised, 0)

    @property
    def num_unheld(self) -> int:
        """With those that are free once the driver's steps are over."""
        return len(self._free) + self._num_leaving

    def has(self, count: int) -> bool:
        """Whether so many pages can be taken now; if that is what it takes, others have given back idle ones.

        Nothing is given back where it would not be enough: what a cache keeps is of more use than pages that wait.
        """
        missing = count + self.promised - self.num_unheld
        if 0 < missing <= self.num_idle and self.reclaim is not None:
            self.reclaim(self, missing)
        return count <= len(self._free) - self.promised

    def could_have(self, count: int) -> bool:
        """Whether so many are free, or would be with those that are idle; sooner or later."""
        return count + self.promised <= self.num_unheld + self.num_idle

    def free_up(self, count: int) -> None:
        """Others give back idle pages until so many can be taken, or there are no more."""
        missing = count + self.promised - self.num_unheld
        if missing > 0 and self.num_idle and self.reclaim is not None:
            self.reclaim(self, missing)

    def will_have(self, count: int) -> bool:
        """Like `has`, with those that are free once the driver's steps are over."""
        return self.has(count) or count + self.promised <= self.num_unheld

    def is_idle(self, pages: Int32) -> bool:
        """Whether some of these pages are."""
        return self._kept is not None and bool(np.any(self._holders[pages] == self._kept[pages]))

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
        if self._kept is not None:
            self.num_idle -= int(np.count_nonzero(held == self._kept[pages]))

    def release(self, pages: Int32 | Sequence[int]) -> None:
        """One holder less for each of these pages; they are distinct and in use."""
        held = self._holders[pages]
        assert (held > 0).all(), "a free page cannot be released"
        self._holders[pages] = held - 1
        if self._kept is not None:
            self.num_idle += int(np.count_nonzero((held - 1 == self._kept[pages]) & (held > 1)))
        freed: list[int] = np.asarray(pages, np.int32)[held == 1].tolist()
        if self._twins:
            self.part(freed)
        if self._started > self._finished:
            self._num_leaving += len(freed)
            self._leaving.append((self._started, freed))
        else:
            self._free.extend(freed)

    def is_shared(self, page: int) -> bool:
        return bool(self._holders[page] > 1)

    # ---- a cache

    def cache_with(self, reclaim: Callable[[PagePool, int], None]) -> None:
        """From now on a cache keeps pages of the pool."""
        self._kept, self.reclaim = np.zeros(self.num_pages, np.int32), reclaim

    def keep(self, pages: Int32) -> None:
        """The cache holds them, too; each as often as it likes."""
        assert self._kept is not None
        assert (self._holders[pages] > 0).all(), "a free page cannot be kept"
        self._holders[pages] += 1
        self._kept[pages] += 1

    def let_go(self, pages: Int32) -> None:
        """The cache keeps them once less."""
        assert self._kept is not None
        self.num_idle -= int(np.count_nonzero(self._holders[pages] == self._kept[pages]))
        self._kept[pages] -= 1
        self.release(pages)

    # ---- twins

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_unheld

    def has_twin(self, page: int) -> bool:
        return page in self._twins

    def twins_of(self, pages: Int32) -> list[int | None]:
        """Those pages of the partner that hold the same."""
        return [self._twins.get(page) for page in pages.tolist()]

    def pair(self, page: int, twin: int) -> None:
        """A page of the partner has just got the content of this one, which is still held."""
        assert self.partner is not None
        self.part([page])
        self.partner.part([twin])
        self._twins[page] = twin
        self.partner._twins[twin] = page

    def part(self, pages: Sequence[int]) -> None:
        """These pages get another content, or are free."""
        if not self._twins:
            return
        for page in pages:
            twin = self._twins.pop(page, None)
            if twin is not None:
                assert self.partner is not None
                del self.partner._twins[twin]
