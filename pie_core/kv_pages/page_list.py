"""The pages of one context in one paged, window or latent group, and the copy that a write to a shared page needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.driver import CacheSpace
from pie_core.contracts.forward import Int32
from pie_core.kv_pages.pool import PagePool

_FIRST = 32  # pages that there is room for at once: a thousand contexts in step that all need more room hold a step up


@dataclass(frozen=True, slots=True)
class PageCopy:
    """A page that was shared, and the one that took its place in a context: the driver copies one to the other."""

    group: int
    source: int
    target: int


class PageList:
    """Physical pages by ascending logical number; logical numbers that are missing are holes.

    Rows are only ever written behind the last one, so just the page of the next row can need a copy; or a new page,
    where the context went back into a hole.
    """

    __slots__ = (
        "_end",
        "_left",
        "_logical",
        "_may_share",
        "_pages",
        "_size",
        "group",
        "page_size",
        "pool",
        "window",
    )

    def __init__(self, group: int, space: CacheSpace, pool: PagePool) -> None:
        self.group = group
        self.pool = pool
        self.page_size = space.page_size
        self.window = space.group.window if space.group.kind == "window" else None
        self._pages: Int32 = np.empty(_FIRST, np.int32)
        self._logical: Int32 = np.empty(_FIRST, np.int32)
        self._size = 0
        self._end = 0  # one more than the last logical number
        self._left = 0  # logical numbers below have left the window
        self._may_share = False  # the last page may have other holders: look before writing

    @property
    def num_pages(self) -> int:
        return self._size

    @property
    def pages(self) -> Int32:
        return self._pages[: self._size]

    held = pages

    @property
    def logical(self) -> Int32:
        return self._logical[: self._size]

    def are_complete(self, written: int) -> NDArray[np.bool_]:
        """By page: whether all its rows are written, so that it never changes but by going back."""
        return (self.logical + 1) * self.page_size <= written

    def move_to(self, pool: PagePool, pages: Int32) -> None:
        """What is held lies on these pages of another pool now."""
        self.pool = pool
        self._pages[: self._size] = pages
        self._may_share = True

    def table(self, length: int) -> tuple[Int32, Int32]:
        """Pages and logical numbers of the first `length` rows, without pages reserved for later ones."""
        reserved = self._end - self._pages_for(length)
        size = self._size - reserved if reserved > 0 else self._size
        return self._pages[:size], self._logical[:size]

    def covers(self, length: int) -> bool:
        """Whether rows up to `length` can be written without a look at the pool."""
        return not self._may_share and length <= self._end * self.page_size

    def missing(self, written: int, length: int) -> int:
        """How many pages writing the rows from `written` to `length` takes from the pool."""
        return max(self._pages_for(length) - self._end, 0) + self._needs_page(written)

    def needed_behind(self, written: int, length: int) -> int:
        """How many pages the rows from `written` to `length` take, or with a window the next.

        Of pages that come from another pool, only those are shared that have a twin here.
        """
        first = self._end * self.page_size
        if self.window is not None:
            length = min(length, max(first, written + 1))
        more = max(self._pages_for(length) - self._end, 0)
        if written >= first:
            return more
        if not self.lists_any(written, written + 1):
            return more + 1
        return more + self.pool.has_twin(self._page_of(written))

    def missing_behind(self, length: int, stop: int) -> int:
        """How many pages the rows from `length`, which is shared, to `stop` take; with a window, the next of them."""
        copied = length % self.page_size > 0
        if self.window is not None:
            return 1
        return self._pages_for(stop) - self._pages_for(length) + copied

    def size_at(self, length: int) -> int:
        """How many pages the context has once it has so many rows."""
        return self._size + max(self._pages_for(length) - self._end, 0)

    def room(self, written: int) -> int:
        """How many rows can be written behind `written` with what the pool has."""
        free = self.pool.num_free - self._needs_page(written)
        return (self._end + free) * self.page_size - written if free >= 0 else 0

    def reserve(self, written: int, length: int) -> PageCopy | None:
        """Takes the missing pages; a shared page that would be written is replaced and its copy returned."""
        copy = None
        if self._writes_hole(written):
            self._fill_hole(written // self.page_size)
        elif self.writes_shared(written):
            copy = self._replace_shared(written)
        elif self._may_share and written % self.page_size:
            self.pool.part([self._page_of(written)])
        self._may_share = False
        start, stop = self._end, self._pages_for(length)
        if stop > start:
            self._append(self.pool.allocate(stop - start), start, stop)
        return copy

    def add(self, page: int) -> None:
        """A page for the rows behind the last one."""
        if self._size == len(self._pages):
            self._pages, self._logical = (
                _enlarged(values, self._size + 1) for values in (self._pages, self._logical)
            )
        self._pages[self._size], self._logical[self._size] = page, self._end
        self._size += 1
        self._end += 1

    def writes_shared(self, written: int) -> bool:
        """Whether the page of the next row has other holders, too."""
        if not self._may_share or written % self.page_size == 0:
            return False
        return self.lists_any(written - 1, written) and self.pool.is_shared(self._page_of(written))

    def undo(self, copy: PageCopy) -> None:
        """The copy failed: the context reads the old page again, which somebody else has kept in use."""
        self.pool.share([copy.source])
        self._pages[: self._size][self.pages == copy.target] = copy.source
        self.pool.release([copy.target])
        self._may_share = True

    def truncate(self, length: int) -> None:
        """Keeps the pages of the first `length` rows."""
        self._end = min(self._end, self._pages_for(length))
        self._left = min(self._left, self._end)
        self._keep(0, int(np.searchsorted(self.logical, self._end)))
        self._may_share = True

    def leave_window(self, length: int) -> None:
        """Frees the pages that no row from `length` on can read."""
        if self.window is None:
            return
        readable = max(length - self.window + 1, 0) // self.page_size
        if self._left < readable:
            self._left = readable
            self._keep(int(np.searchsorted(self.logical, readable)), self._size)

    def evict(self, start: int, stop: int) -> None:
        """Frees the pages all of whose rows lie in the range."""
        low = int(np.searchsorted(self.logical, -(-start // self.page_size)))
        high = int(np.searchsorted(self.logical, stop // self.page_size))
        if low < high:
            self.pool.release(self._pages[low:high])
            kept = self._size - (high - low)
            self._pages[low:kept] = self._pages[high : self._size].copy()
            self._logical[low:kept] = self._logical[high : self._size].copy()
            self._size = kept

    def of_rows(self, start: int, stop: int) -> Int32:
        """The pages of these rows, as far as they are here; `start` is at a page boundary."""
        low, high = np.searchsorted(self.logical, [start // self.page_size, self._pages_for(stop)])
        return self._pages[low:high].copy()

    def needs(self, start: int, stop: int) -> int:
        """How many pages hold these rows."""
        return self._pages_for(stop) - start // self.page_size

    def adopt(self, written: int, length: int, pages: Int32) -> None:
        """These pages, held already for the context, end its first `length` rows; what is out of reach goes.

        They begin behind `written`, which is at a page boundary, or where what a row at `length` reads begins.
        """
        self.truncate(written)
        stop = self._pages_for(length)
        first = first_needed(length, self.window, self.page_size) // self.page_size
        self._keep(int(np.searchsorted(self.logical, first)), self._size)
        self._left = max(self._left, first) if self.window is not None else self._left
        self._append(pages.tolist(), stop - len(pages), stop)

    def lists_any(self, start: int, stop: int) -> bool:
        """Whether some row of the range lies on a page that is here."""
        low = np.searchsorted(self.logical, start // self.page_size)
        return bool(low < np.searchsorted(self.logical, self._pages_for(stop)))

    def can_restart(self, length: int) -> bool:
        """Whether everything that a row at `length` may read is still here, but for what was evicted."""
        if self.window is None or length == 0:
            return True
        return self._left <= max(length - self.window + 1, 0) // self.page_size

    def fork(self) -> PageList:
        """No page may be reserved: both would write to it."""
        child = object.__new__(PageList)
        child.group, child.pool = self.group, self.pool
        child.page_size, child.window = self.page_size, self.window
        child._pages, child._logical = self.pages.copy(), self.logical.copy()
        child._size, child._end, child._left = self._size, self._end, self._left
        self._may_share = child._may_share = True
        self.pool.share(self.pages)
        return child

    def release(self) -> None:
        self._keep(0, 0)
        self._end = self._left = 0

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _needs_page(self, written: int) -> bool:
        """Whether the page of the next row is there, but not to be written to."""
        return self._writes_hole(written) or self.writes_shared(written)

    def _writes_hole(self, written: int) -> bool:
        if not self._may_share or written % self.page_size == 0:
            return False
        return not self.lists_any(written - 1, written)

    def _page_of(self, row: int) -> int:
        return int(self._pages[np.searchsorted(self.logical, row // self.page_size)])

    def _replace_shared(self, written: int) -> PageCopy:
        place = np.searchsorted(self.logical, written // self.page_size)
        source, (target,) = int(self._pages[place]), self.pool.allocate(1)
        self.pool.release([source])
        self._pages[place] = target
        return PageCopy(self.group, source, target)

    def _fill_hole(self, number: int) -> None:
        self._append(self.pool.allocate(1), number, number + 1)

    def _append(self, pages: list[int], start: int, stop: int) -> None:
        size = self._size + len(pages)
        if size > len(self._pages):
            self._pages = _enlarged(self._pages, size)
            self._logical = _enlarged(self._logical, size)
        self._pages[self._size : size] = pages
        self._logical[self._size : size] = np.arange(start, stop)
        self._size, self._end = size, stop

    def _keep(self, first: int, stop: int) -> None:
        """Releases all entries but those from `first` to `stop`."""
        for given_up in (self._pages[:first], self._pages[stop : self._size]):
            if len(given_up):
                self.pool.release(given_up)
        if first:
            self._pages, self._logical = self._pages[first:stop].copy(), self._logical[first:stop].copy()
        self._size = stop - first


def first_needed(length: int, window: int | None, page_size: int) -> int:
    """The first row that a row at `length` may read; as a page boundary."""
    first = 0 if window is None else max(length - window + 1, 0)
    return first // page_size * page_size


def _enlarged(values: Int32, size: int) -> Int32:
    larger = np.empty(max(size, 2 * len(values)), np.int32)
    larger[: len(values)] = values
    return larger
