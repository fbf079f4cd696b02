"""Which requests of a step read the same first pages, laid side by side so that a driver can read those once.

    requests   a  b  c  d  e  f          pages of each, by first page and then by where they part
               └──┬──┘     └┬─┘
               4 pages      9 pages      PrefixGroups(first=[0, 4], stop=[3, 6], rows=[64, 144])

Where some of those that share a page share more, they are a group of their own if that saves more reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pie_core.contracts.driver import CacheSpace
from pie_core.contracts.forward import NO_PREFIX_GROUPS, Int32, Int64, PrefixGroups
from pie_core.kv_pages.page_list import PageList
from pie_core.scheduler.cohort import Cohort
from pie_core.scheduler.request import Chunk

Group = tuple[Int64, int]  # requests, and how many pages or rows they share


@dataclass(frozen=True, slots=True)
class Arranged:
    """An order of requests, and the groups in it."""

    order: Int64
    groups: PrefixGroups


class SharedReads:
    def __init__(self, spaces: Sequence[CacheSpace], cohort: Cohort) -> None:
        self._cohort = cohort
        self._row_groups = [
            group for group, space in enumerate(spaces) if space.group.kind in ("paged", "latent")
        ]
        self._sizes = [spaces[group].page_size for group in self._row_groups]
        self._whole = math.lcm(*self._sizes)
        self._last: tuple[Int64, Int64, Arranged | None] | None = None

    def arrange(self, chunks: Sequence[Chunk], places: Int64) -> tuple[Sequence[Chunk], Int64, PrefixGroups]:
        """The same requests, those side by side that share pages; and the groups that they are."""
        some, others = self._of_chunks(chunks), self._of_places(places)
        if some is not None:
            chunks = [chunks[each] for each in some.order.tolist()]
        if others is not None:
            places = places[others.order]
        return chunks, places, _both(some, others, len(chunks))

    def _of_chunks(self, chunks: Sequence[Chunk]) -> Arranged | None:
        """None: nothing is shared."""
        if len(chunks) < 2 or not self._row_groups:
            return None
        heads = [self._head(chunk) for chunk in chunks]
        candidates = _with_equals(np.array(heads))
        if not len(candidates):
            return None
        tables = [self._tables(group, size, chunks, candidates) for group, size in self._row_sizes()]
        return self._arranged(len(chunks), candidates, tables)

    def _of_places(self, places: Int64) -> Arranged | None:
        """Of the cohort's rows. While the same contexts are there, they share the same pages."""
        if len(places) < 2 or not self._row_groups:
            return None
        stamps = self._cohort.columns.stamp[places]
        last = self._last
        if last is None or not (np.array_equal(last[0], places) and np.array_equal(last[1], stamps)):
            last = self._last = (places, stamps, self._arranged_places(places))
        return last[2]

    def _arranged_places(self, places: Int64) -> Arranged | None:
        rows = self._cohort.columns.submitted[places]
        pages = self._cohort.pages.groups
        candidates = _with_equals(pages[0].first_whole(places, rows))
        if not len(candidates):
            return None
        chosen, rows = places[candidates], rows[candidates]
        tables = [group.whole(chosen, rows) for group in pages]
        return self._arranged(len(places), candidates, tables)

    def _arranged(
        self, count: int, candidates: Int64, tables: Sequence[tuple[Int32, Int32]]
    ) -> Arranged | None:
        """`tables`: for each cache group, the first pages of the candidates, and how many of them are whole."""
        found: list[Group] = []
        for members, pages in _groups(np.arange(len(candidates)), *tables[0], 0):
            others = zip(tables[1:], self._sizes[1:], strict=True)
            rows = [pages * self._sizes[0], *(_common(members, *table, 0) * size for table, size in others)]
            shared = min(rows) // self._whole * self._whole
            if shared:
                found.append((candidates[members], shared))
        return _side_by_side(count, found) if found else None

    # ---- chunks

    def _row_sizes(self) -> Iterator[tuple[int, int]]:
        return zip(self._row_groups, self._sizes, strict=True)

    def _head(self, chunk: Chunk) -> int:
        """The first page, if it can be shared: others may have it, too, and every row of the chunk reads it."""
        context = chunk.running.context
        held = context.pages.groups[self._row_groups[0]]
        assert isinstance(held, PageList)
        is_plain = not context.evictions.evicted and not context.history.masks
        return int(held.pages[0]) if is_plain and chunk.start >= self._whole else -1

    def _tables(
        self, group: int, size: int, chunks: Sequence[Chunk], candidates: Int64
    ) -> tuple[Int32, Int32]:
        counts = np.array([chunks[each].start // size for each in candidates], np.int32)
        table = np.full((len(candidates), int(counts.max())), -1, np.int32)
        for row, each in enumerate(candidates.tolist()):
            held = chunks[each].running.context.pages.groups[group]
            assert isinstance(held, PageList)
            table[row, : counts[row]] = held.pages[: counts[row]]
        return table, counts


def _with_equals(heads: Int64 | Int32) -> Int64:
    """Where a number stands that stands somewhere else, too; -1 is none."""
    order = np.argsort(heads, kind="stable")
    ordered = heads[order]
    alike = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
    if not alike.any():
        return np.empty(0, np.int64)
    chosen = np.zeros(len(heads), np.bool_)
    chosen[order[1:][alike]] = chosen[order[:-1][alike]] = True
    return np.flatnonzero(chosen)


def _common(members: Int64, table: Int32, counts: Int32, start: int) -> int:
    """How many first pages these have in common; `start` of them are known to be."""
    most = int(counts[members].min())
    same = (table[members, start:most] == table[members[0], start:most]).all(axis=0)
    return most if same.all() else start + int(np.argmin(same))


def _groups(members: Int64, table: Int32, counts: Int32, start: int) -> list[Group]:
    """The groups that save most pages, of requests that have `start` first pages in common."""
    common = _common(members, table, counts, start) if start or len(members) == 1 else start
    longer = members[counts[members] > common]
    deeper: list[Group] = []
    for part in _runs(longer, table[longer, common] if len(longer) else longer):
        deeper += _groups(part, table, counts, common + 1)
    saved = sum((len(each) - 1) * pages for each, pages in deeper)
    return deeper if saved > (len(members) - 1) * common else [(members, common)]


def _runs(members: Int64, keys: Int32 | Int64) -> Iterator[Int64]:
    """Those with equal keys, two or more together."""
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(np.diff(keys[order])) + 1
    for part in np.split(members[order], edges):
        if len(part) > 1:
            yield part


def _side_by_side(count: int, found: Sequence[Group]) -> Arranged:
    """Groups come first, in the order in which their first requests stood; the others keep theirs."""
    ordered = sorted(found, key=lambda each: int(each[0].min()))
    members = [np.sort(each) for each, _ in ordered]
    alone = np.ones(count, np.bool_)
    alone[np.concatenate(members)] = False
    stops = np.cumsum([len(each) for each in members], dtype=np.int32)
    firsts = np.concatenate([[0], stops[:-1]]).astype(np.int32)
    groups = PrefixGroups(firsts, stops, np.array([rows for _, rows in ordered], np.int32))
    return Arranged(np.concatenate([*members, np.flatnonzero(alone)]), groups)


def _both(first: Arranged | None, second: Arranged | None, shift: int) -> PrefixGroups:
    """The groups of two parts of a step, of which the second begins behind `shift` requests."""
    if second is None:
        return NO_PREFIX_GROUPS if first is None else first.groups
    groups = second.groups
    behind = PrefixGroups(groups.first + np.int32(shift), groups.stop + np.int32(shift), groups.rows)
    if first is None:
        return behind
    return PrefixGroups(
        np.concatenate([first.groups.first, behind.first]),
        np.concatenate([first.groups.stop, behind.stop]),
        np.concatenate([first.groups.rows, behind.rows]),
    )
