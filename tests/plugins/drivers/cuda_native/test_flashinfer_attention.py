"""What FlashInfer is told of a step: the pages in use and how full the last one is, whatever else is listed."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_plugins.drivers.cuda_native.flashinfer_attention import page_lists
from tests.plugins.drivers.cuda_native.both_kernels import host_step


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=5
    ),
    size=st.sampled_from([1, 4, 16]),
)
def test_the_listed_rows_are_those_in_use(shapes: list[tuple[int, int, int]], size: int) -> None:
    """Each request: new rows, old rows, pages listed for later rows."""
    counts, lengths = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
    pages, start = [], 0
    for count, length, spare in shapes:
        listed = -(-(count + length) // size) + spare
        pages.append(list(range(start, start + listed)))
        start += listed
    step = host_step(counts, lengths, pages, [0] * len(counts))
    lists = page_lists(step.groups[0], step.lengths, step.counts, size)
    for place, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        used = lists.pages[lists.indptr[place] : lists.indptr[place + 1]].tolist()
        assert used == pages[place][: len(used)]
        assert (len(used) - 1) * size + lists.last_page_len[place] == count + length
        assert 1 <= lists.last_page_len[place] <= size


def test_pages_given_up_are_not_counted() -> None:
    step = host_step([2], [18], [[5, 7, 9]], [8])
    lists = page_lists(step.groups[0], step.lengths, step.counts, 4)
    assert lists.pages.tolist() == [5, 7, 9]
    assert lists.last_page_len.tolist() == [4]
    np.testing.assert_array_equal(lists.indptr, [0, 3])
