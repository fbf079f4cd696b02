"""Sets of rows as ranges, against plain sets."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from pie_core.kv_pages.intervals import from_flags, gaps, hidden_too, hiding_runs, united

flags = st.lists(st.booleans(), max_size=40)


def shown_by(runs: list[int]) -> list[bool]:
    """The rows that run lengths (hidden, visible, …) show, without hidden ones at the end."""
    shown = [bool(place % 2) for place, run in enumerate(runs) for _ in range(run)]
    while shown and not shown[-1]:
        shown.pop()
    return shown


@given(runs=st.lists(st.integers(0, 9), max_size=12), hidden=flags)
def test_a_mask_that_hides_more_shows_what_both_show(runs: list[int], hidden: list[bool]) -> None:
    found = hidden_too(np.array(runs, np.int32), from_flags(hidden)).tolist()
    padded = [*hidden, *[False] * 200]
    expected = [shown and not padded[row] for row, shown in enumerate(shown_by(runs))]
    while expected and not expected[-1]:
        expected.pop()
    assert shown_by(found) == expected


@given(hidden=flags, length=st.integers(0, 50))
def test_hiding_some_rows_shows_the_others(hidden: list[bool], length: int) -> None:
    found = shown_by(hiding_runs(from_flags(hidden), length).tolist())
    rows = {row for row in range(length) if row >= len(hidden) or not hidden[row]}
    assert {row for row, shown in enumerate(found) if shown} == rows


@given(some=flags, start=st.integers(0, 40), count=st.integers(1, 9))
def test_ranges_stay_apart_and_in_order(some: list[bool], start: int, count: int) -> None:
    found = united(from_flags(some), start, start + count)
    rows = {row for row, flag in enumerate(some) if flag} | set(range(start, start + count))
    assert {row for low, high in found for row in range(low, high)} == rows
    assert all(one[1] < other[0] for one, other in pairwise(found))
    free = gaps(found, 0, 60)
    assert {row for low, high in free for row in range(low, high)} == set(range(60)) - rows
