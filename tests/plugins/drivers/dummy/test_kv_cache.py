"""Reading pages by their sums gives what adding up row by row gives, for any table, mask and window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.contracts.forward import PageTable
from pie_plugins.drivers.dummy.hashing import GROWTH, Powers, Words
from pie_plugins.drivers.dummy.kv_cache import KvRanges, PagedCache, StateCache

NUM_PAGES = 12
MODULUS = 2**64


def filled_cache(page_size: int, seed: int) -> PagedCache:
    cache = PagedCache(NUM_PAGES, 0, page_size, Powers())
    content = np.random.default_rng(seed).integers(0, 256, (NUM_PAGES, 2 * 8 * page_size)).astype(np.uint8)
    cache.import_(range(NUM_PAGES), content)
    return cache


def rows_of(cache: PagedCache, page: int) -> Words:
    """[layer, offset] content of a page."""
    return cache.export([page]).view(np.uint64).reshape(2, -1)


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, list[dict[int, int]]]:
    """A page size, and for each of some requests which logical pages it has and where."""
    pages = draw(st.permutations(range(NUM_PAGES)))
    requests: list[dict[int, int]] = []
    for _ in range(draw(st.integers(1, 3))):
        logical = sorted(draw(st.sets(st.integers(0, 5), max_size=4)))
        requests.append({number: pages.pop() for number in logical})
    return draw(st.sampled_from([1, 2, 3, 8])), requests


@settings(max_examples=60, deadline=None)
@given(tables(), st.data())
def test_what_a_row_sees_is_the_sum_over_its_rows(
    table: tuple[int, list[dict[int, int]]], data: st.DataObject
) -> None:
    size, requests = table
    bound = st.integers(0, 6 * size)
    drawn = data.draw(
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, len(requests) - 1), bound, bound), max_size=6)
    )
    ranges = [(row, request, min(one, two), max(one, two)) for row, request, one, two in drawn]
    cache = filled_cache(size, seed=size)
    plan = cache.plan(_page_table(requests), np.zeros(5, np.int64), np.zeros(5, np.int64), _columns(ranges))
    for layer in (0, 1):
        seen = cache.read(layer, plan, 5)
        assert seen.tolist() == _added_up(cache, layer, size, requests, ranges)


def _page_table(requests: list[dict[int, int]]) -> PageTable:
    return PageTable(
        np.cumsum([0, *map(len, requests)]).astype(np.int32),
        np.array([page for request in requests for page in request.values()], np.int32),
        np.array([logical for request in requests for logical in request], np.int32),
    )


def _columns(ranges: list[tuple[int, int, int, int]]) -> KvRanges:
    columns = np.array(ranges, np.int64).reshape(-1, 4).T
    return KvRanges(*columns)


def _added_up(
    cache: PagedCache,
    layer: int,
    size: int,
    requests: list[dict[int, int]],
    ranges: list[tuple[int, int, int, int]],
) -> list[int]:
    """The definition, in Python's integers."""
    seen = [0] * 5
    for row, request, low, high in ranges:
        for index in range(low, high):
            page = requests[request].get(index // size)
            if page is not None:
                content = int(rows_of(cache, page)[layer, index % size])
                seen[row] = (seen[row] + content * pow(GROWTH, index, MODULUS)) % MODULUS
    return seen


def test_state_after_a_chunk_is_the_state_after_its_rows_one_by_one() -> None:
    cache = StateCache(4, 0, Powers())
    inputs = np.random.default_rng(1).integers(0, 2**63, 9).astype(np.uint64)
    indptr = np.array([0, 4, 9], np.int32)
    before = np.array([5, 0], np.uint64)
    states = cache.advance(before, indptr, np.repeat([0, 1], [4, 5]), inputs).tolist()
    expected = []
    for start, end, state in ((0, 4, 5), (4, 9, 0)):
        for row in range(start, end):
            state = (state * GROWTH + int(inputs[row])) % MODULUS
            expected.append(state)
    assert states == expected


@pytest.mark.parametrize("exponent", [0, 1, 1023, 1024, 70_000])
def test_powers_of_any_size_and_their_inverses_are_exact(exponent: int) -> None:
    powers, at = Powers(), np.array([exponent])
    assert int(powers.up(at)[0]) == pow(GROWTH, exponent, MODULUS)
    assert int(powers.up(at)[0]) * int(powers.down(at)[0]) % MODULUS == 1
