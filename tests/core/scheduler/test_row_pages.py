"""Page tables of rows: the same object as long as they say the same."""

from __future__ import annotations

import numpy as np
import pytest

from pie_core.contracts.driver import CacheGroup, CacheSpace
from pie_core.contracts.forward import Int32, Int64, PageTable
from pie_core.kv_pages.page_list import PageList
from pie_core.kv_pages.pool import PagePool
from pie_core.scheduler.row_pages import GroupRows

PLACES: Int64 = np.array([0, 1])
SPACE = CacheSpace(CacheGroup("kv", "paged", 4), 4, 64, 0)


def rows_of(*pages: list[int]) -> tuple[GroupRows, list[PageList]]:
    """The pages of some places, four rows on each."""
    pool = PagePool("kv", 64)
    rows, lists = GroupRows(0, 4, pool), []
    for place, held in enumerate(pages):
        lists.append(listed(held, pool))
        rows.enter(place, lists[-1])
    return rows, lists


def listed(pages: list[int], pool: PagePool) -> PageList:
    found = PageList(0, SPACE, pool)
    for page in pages:
        found.add(page)
    return found


def at(*rows: int) -> Int32:
    return np.array(rows, np.int32)


def pages_of(table: PageTable) -> list[list[int]]:
    return [part.tolist() for part in np.split(table.pages, table.indptr[1:-1])]


def test_rows_on_the_same_pages_have_the_same_table() -> None:
    rows, _ = rows_of([7, 9], [8])
    table = rows.table(PLACES, at(4, 0))
    assert rows.table(PLACES.copy(), at(7, 3)) is table
    assert pages_of(table) == [[7, 9], [8]]
    assert pages_of(rows.table(PLACES, at(3, 3))) == [[7], [8]]
    assert pages_of(rows.table(PLACES[::-1], at(3, 4))) == [[8], [7, 9]]


def test_nobody_can_write_into_a_table_that_comes_again() -> None:
    rows, _ = rows_of([7, 9], [8])
    with pytest.raises(ValueError, match="read-only"):
        rows.table(PLACES, at(4, 0)).pages[0] = 1


def test_a_page_more_makes_another_table() -> None:
    rows, lists = rows_of([7, 9], [8])
    first = rows.table(PLACES, at(4, 3))
    rows.take(np.array([1]), [lists[1]], [12])
    assert pages_of(rows.table(PLACES, at(5, 4))) == [[7, 9], [8, 12]]
    assert pages_of(first) == [[7, 9], [8]]


def test_another_context_at_a_place_makes_another_table() -> None:
    rows, _ = rows_of([7, 9], [8])
    rows.table(PLACES, at(4, 0))
    rows.enter(1, listed([30], rows.pool))
    assert pages_of(rows.table(PLACES, at(4, 0))) == [[7, 9], [30]]
