"""The pages of the cohort's rows: tables as arrays beside each context's own lists, which always say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pie_core.contracts.forward import Int32, Int64, PageTable
from pie_core.kv_pages.context_pages import Cache, ContextPages
from pie_core.kv_pages.page_list import PageList
from pie_core.kv_pages.pool import PagePool


@dataclass(frozen=True, slots=True)
class _Listed:
    """The pages of these places, so many each."""

    places: Int64
    counts: Int32
    table: PageTable


class GroupRows:
    """One paged or latent group: page n of the context in place p is `table[p, n]`. There are no holes."""

    def __init__(self, group: int, page_size: int, pool: PagePool) -> None:
        self.group = group
        self.page_size = page_size
        self.pool = pool
        self.held: Int32 = np.zeros(0, np.int32)
        self._table: Int32 = np.zeros((0, 8), np.int32)
        self._last: _Listed | None = None

    def enter(self, place: int, pages: PageList) -> None:
        if place >= len(self.held):
            self._grow(2 * place + 16, self._table.shape[1])
        count = pages.num_pages
        self._last = None
        self._widen(count)
        self._table[place, :count] = pages.pages
        self.held[place] = count

    def lacking(self, places: Int64, rows: Int32) -> Int64:
        """Those whose next row is on a page that they do not have."""
        return places[self.held[places] * self.page_size <= rows]

    def take(self, places: Int64, lists: Sequence[PageList], pages: list[int]) -> None:
        """One more page each."""
        held = self.held[places]
        self._last = None
        self._widen(int(held.max()) + 1)
        self._table[places, held] = pages
        self.held[places] = held + 1
        for each, page in zip(lists, pages, strict=True):
            each.add(page)

    def table(self, places: Int64, rows: Int32) -> PageTable:
        """For a step that writes these rows: the pages up to theirs. The same object while they stay the same, so that
        drivers need not look at it again."""
        counts = rows // self.page_size + 1
        last = self._last
        if last is None or not (_are_equal(counts, last.counts) and _are_equal(places, last.places)):
            last = self._last = _Listed(places, counts, _unwritten(self._listed(places, counts)))
        return last.table

    def _listed(self, places: Int64, counts: Int32) -> PageTable:
        width, indptr = int(counts.max()), np.zeros(len(places) + 1, np.int32)
        np.cumsum(counts, out=indptr[1:])
        pages, numbers = self._table[places, :width], _numbers(len(places), width)
        if indptr[-1] == pages.size:
            return PageTable(indptr, pages.reshape(-1), numbers.reshape(-1))
        here = numbers < counts[:, None]
        return PageTable(indptr, pages[here], numbers[here])

    def first_whole(self, places: Int64, rows: Int32) -> Int32:
        """The first page of each that has so many rows; -1 where it is not full."""
        return np.where(rows >= self.page_size, self._table[places, 0], np.int32(-1))

    def whole(self, places: Int64, rows: Int32) -> tuple[Int32, Int32]:
        """The first pages of each that has so many rows, and how many of them are full."""
        counts = rows // self.page_size
        return self._table[places, : int(counts.max())], counts

    def _widen(self, count: int) -> None:
        if count > self._table.shape[1]:
            self._grow(len(self.held), 2 * count)

    def _grow(self, height: int, width: int) -> None:
        held, table = self.held, self._table
        self.held, self._table = np.zeros(height, np.int32), np.zeros((height, width), np.int32)
        self.held[: len(held)] = held
        self._table[: table.shape[0], : table.shape[1]] = table


class RowPages:
    """All groups of a model whose groups are all paged or latent."""

    def __init__(self, cache: Cache) -> None:
        self.groups = [
            GroupRows(group, space.page_size, pool)
            for group, (space, pool) in enumerate(zip(cache.spaces, cache.pools, strict=True))
        ]

    def enter(self, place: int, pages: ContextPages) -> None:
        for group in self.groups:
            group.enter(place, _list_of(pages, group))

    def lacking(self, places: Int64, rows: Int32) -> list[Int64]:
        """By group, those whose next row is on a page that they do not have."""
        return [group.lacking(places, rows) for group in self.groups]

    def take(self, lacking: Sequence[Int64], pages: Sequence[ContextPages | None]) -> bool:
        """A page for each of them, if there are enough for all."""
        if not all(group.pool.has(len(each)) for group, each in zip(self.groups, lacking, strict=True)):
            return False
        for group, each in zip(self.groups, lacking, strict=True):
            if len(each):
                lists = [_list_of(pages[place], group) for place in each.tolist()]
                group.take(each, lists, group.pool.allocate(len(each)))
        return True


@lru_cache(maxsize=8)
def _numbers(count: int, width: int) -> Int32:
    """[count, width]: the logical numbers of each row's pages; nobody writes to them."""
    numbers = np.tile(np.arange(width, dtype=np.int32), (count, 1))
    numbers.flags.writeable = False
    return numbers


def _are_equal(some: Int64 | Int32, others: Int64 | Int32) -> bool:
    return len(some) == len(others) and not np.count_nonzero(some != others)


def _unwritten(table: PageTable) -> PageTable:
    for each in (table.indptr, table.pages, table.logical):
        each.flags.writeable = False
    return table


def _list_of(pages: ContextPages | None, group: GroupRows) -> PageList:
    assert pages is not None
    held = pages.groups[group.group]
    assert isinstance(held, PageList)
    return held
