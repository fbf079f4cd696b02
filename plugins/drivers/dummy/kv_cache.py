"""The pages and slots of the dummy driver: two words for every KV row, really stored and really read through tables.

What a token row reads is the sum, over the KV rows it may see, of content * GROWTH ** (KV index): it changes with
every row, every index, every hole. Full pages are read by their sums, which are recomputed from the content whenever
a page is written, so the short way gives the same as adding up rows. All of it is exact, modulo 2 ** 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Int32, PageTable
from pie_plugins.drivers.dummy.hashing import Powers, Words

LAYERS = 2  # of every group: what the second keeps depends on all that the first let through
UNIT_BYTES = LAYERS * 8

Int64 = NDArray[np.int64]
_REQUEST = np.int64(1) << 32  # a page is found by request * _REQUEST + its logical number


@dataclass(frozen=True, slots=True)
class KvRanges:
    """KV indexes [low, high) of a request that token row `row` may read; a row may have several ranges."""

    row: Int64
    request: Int64
    low: Int64
    high: Int64


@dataclass(frozen=True, slots=True)
class _Partial:
    """Pieces of pages: the offsets of one page that a range covers without covering all of it."""

    row: Int64
    page: Int64
    weight: Words  # [n, page_size]; 0 where nothing is read


@dataclass(frozen=True, slots=True)
class StepPages:
    """Where one step writes and what it reads in one group, worked out once for all layers."""

    pages: Int64  # [T] page written by each token row; -1 = the table has none
    offsets: Int64
    touched: Int64  # the distinct pages written
    table_pages: Int64
    table_weight: Words
    row: Int64  # of each range
    first: Int64  # of each range: its full pages are table entries [first, last)
    last: Int64
    partials: tuple[_Partial, ...]


class PagedCache:
    """Pages of KV rows in device and host space."""

    def __init__(self, num_pages: int, num_host_pages: int, page_size: int, powers: Powers) -> None:
        self._powers = powers
        self._page_size = page_size
        self._rows = np.zeros((LAYERS, num_pages, page_size), np.uint64)
        self._sums = np.zeros((LAYERS, num_pages), np.uint64)
        self._host = np.zeros((LAYERS, num_host_pages, page_size), np.uint64)
        self._offset_weight = powers.up(np.arange(page_size))

    def write(self, layer: int, step: StepPages, content: Words) -> None:
        found = step.pages >= 0
        if found.all():
            self._rows[layer, step.pages, step.offsets] = content
        else:
            self._rows[layer, step.pages[found], step.offsets[found]] = content[found]
        self._add_up(layer, step.touched)

    def read(self, layer: int, step: StepPages, num_rows: int) -> Words:
        """[T]: what each token row sees."""
        running = np.zeros(len(step.table_pages) + 1, np.uint64)
        np.cumsum(self._sums[layer, step.table_pages] * step.table_weight, out=running[1:])
        full = running[step.last] - running[step.first]
        seen = np.zeros(num_rows, np.uint64)
        if len(step.row) == num_rows and (step.row[1:] > step.row[:-1]).all():
            seen[step.row] = full
        else:
            np.add.at(seen, step.row, full)
        for part in step.partials:
            np.add.at(
                seen, part.row, (self._rows[layer, part.page] * part.weight).sum(axis=1, dtype=np.uint64)
            )
        return seen

    def plan(self, table: PageTable, request: Int64, kv_index: Int64, ranges: KvRanges) -> StepPages:
        logical = table.logical.astype(np.int64)
        pages = table.pages.astype(np.int64)
        keys = (np.arange(len(table.indptr) - 1) * _REQUEST).repeat(
            table.indptr[1:] - table.indptr[:-1]
        ) + logical
        size = self._page_size
        find = _PageFinder(keys, pages)
        written = find.page(request, kv_index // size)
        first_full, end_full = -(-ranges.low // size), ranges.high // size
        first = find.entry(ranges.request, first_full)
        return StepPages(
            pages=written,
            offsets=kv_index % size,
            touched=_without_repeats(written[written >= 0]),
            table_pages=pages,
            table_weight=self._powers.up(logical * size),
            row=ranges.row,
            first=first,
            last=np.maximum(first, find.entry(ranges.request, end_full)),
            partials=tuple(self._partials(ranges, find)),
        )

    def _partials(self, ranges: KvRanges, find: _PageFinder) -> list[_Partial]:
        size = self._page_size
        if size == 1:
            return []
        if not ranges.low.any():
            return self._ragged_ends(ranges, find)
        low_page, high_page = ranges.low // size, ranges.high // size
        ragged_start = ranges.low % size > 0
        starts = np.flatnonzero(ragged_start & (ranges.low < ranges.high))
        own_page = ~ragged_start | (high_page > low_page)  # otherwise the start covers it
        ends = np.flatnonzero((ranges.high % size > 0) & own_page & (ranges.low < ranges.high))
        parts = [(starts, low_page[starts]), (ends, high_page[ends])]
        return [self._partial(ranges, chosen, page, find) for chosen, page in parts if len(chosen)]

    def _ragged_ends(self, ranges: KvRanges, find: _PageFinder) -> list[_Partial]:
        """Where every range begins at the first row: no start is ragged."""
        ends = ((ranges.high % self._page_size > 0) & (ranges.high > 0)).nonzero()[0]
        return [self._partial(ranges, ends, ranges.high[ends] // self._page_size, find)] if len(ends) else []

    def _partial(self, ranges: KvRanges, chosen: Int64, logical: Int64, find: _PageFinder) -> _Partial:
        page = find.page(ranges.request[chosen], logical)
        here = page >= 0
        chosen, logical, page = chosen[here], logical[here], page[here]
        start = logical * self._page_size
        low, high = ranges.low[chosen] - start, ranges.high[chosen] - start
        offsets = np.arange(self._page_size)
        covered = (offsets >= low[:, None]) & (offsets < high[:, None])
        weight = np.where(covered, self._offset_weight, np.uint64(0)) * self._powers.up(start)[:, None]
        return _Partial(ranges.row[chosen], page, weight)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._rows[:, targets] = self._rows[:, sources]
        self._sums[:, targets] = self._sums[:, sources]

    def swap_out(self, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        self._host[:, host_pages] = self._rows[:, pages]

    def swap_in(self, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        self._replace(pages, self._host[:, host_pages])

    def export(self, pages: Sequence[int]) -> NDArray[np.uint8]:
        content = np.ascontiguousarray(self._rows[:, pages].swapaxes(0, 1))
        return content.reshape(len(pages), -1).view(np.uint8)

    def import_(self, pages: Sequence[int], content: NDArray[np.uint8]) -> None:
        rows = np.ascontiguousarray(content).view(np.uint64).reshape(len(pages), LAYERS, self._page_size)
        self._replace(pages, rows.swapaxes(0, 1))

    def _replace(self, pages: Sequence[int], rows: Words) -> None:
        self._rows[:, pages] = rows
        for layer in range(LAYERS):
            self._add_up(layer, np.asarray(pages, np.int64))

    def _add_up(self, layer: int, pages: Int64) -> None:
        self._sums[layer, pages] = (self._rows[layer, pages] * self._offset_weight).sum(
            axis=1, dtype=np.uint64
        )


def _without_repeats(pages: Int64) -> Int64:
    """Rows of a page follow each other as a rule; one that comes back is added up twice, which changes nothing."""
    return pages[np.concatenate([[True], pages[1:] != pages[:-1]])] if len(pages) > 1 else pages


@dataclass(frozen=True, slots=True)
class _PageFinder:
    """Looks pages up in a table by request and logical number."""

    keys: Int64
    pages: Int64

    def entry(self, request: Int64, logical: Int64) -> Int64:
        """Number of the first table entry that is not before this page."""
        return self.keys.searchsorted(request * _REQUEST + logical)

    def page(self, request: Int64, logical: Int64) -> Int64:
        """The physical page; -1 where the table has a hole."""
        if not len(self.keys):
            return np.full(len(logical), -1, np.int64)
        wanted = request * _REQUEST + logical
        entry = np.minimum(self.keys.searchsorted(wanted), len(self.keys) - 1)
        return np.where(self.keys[entry] == wanted, self.pages[entry], -1)


class StateCache:
    """Slots of recurrent state: state' = state * GROWTH + input, which has a closed form over a chunk of tokens."""

    def __init__(self, num_slots: int, num_host_slots: int, powers: Powers) -> None:
        self._powers = powers
        self._slots = np.zeros((LAYERS, num_slots), np.uint64)
        self._host = np.zeros((LAYERS, num_host_slots), np.uint64)

    def load(self, layer: int, slots_in: Int64) -> Words:
        """[R]: the state that each request begins with; slot -1 is the empty state."""
        return np.where(slots_in >= 0, self._slots[layer, slots_in], np.uint64(0))

    def advance(self, before: Words, indptr: Int32, request: Int64, inputs: Words) -> Words:
        """[T]: the state after each token row."""
        row = np.arange(len(inputs)) - indptr[request]
        running = np.zeros(len(inputs) + 1, np.uint64)
        np.cumsum(inputs * self._powers.down(row), out=running[1:])
        added = running[1:] - running[indptr[request]]
        return self._powers.up(row) * (before[request] * self._powers.up(np.ones(1, np.int64)) + added)

    def store(self, layer: int, slots: Int32, states: Words) -> None:
        self._slots[layer, slots] = states

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._slots[:, targets] = self._slots[:, sources]

    def swap_out(self, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        self._host[:, host_pages] = self._slots[:, pages]

    def swap_in(self, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        self._slots[:, pages] = self._host[:, host_pages]

    def export(self, pages: Sequence[int]) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self._slots[:, pages].T).view(np.uint8)

    def import_(self, pages: Sequence[int], content: NDArray[np.uint8]) -> None:
        self._slots[:, pages] = np.ascontiguousarray(content).view(np.uint64).reshape(len(pages), LAYERS).T
