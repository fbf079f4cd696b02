"""Positions of KV rows, against a plain list of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pie_core.engine.positions import PositionRuns

CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.integers(0, 5)),
        st.tuples(st.just("extend_at"), st.lists(st.integers(0, 30), max_size=4)),
        st.tuples(st.just("truncate"), st.integers(0, 30)),
        st.tuples(st.just("copy"), st.none()),
    ),
    max_size=20,
)


@given(CHANGES)
def test_the_next_position_is_one_past_the_greatest_whatever_was_added_and_cut(
    changes: list[tuple[str, object]],
) -> None:
    rows, plain = PositionRuns(), list[int]()
    for change, value in changes:
        if change == "extend" and isinstance(value, int):
            rows.extend(value)
            start = max(plain, default=-1) + 1
            plain += range(start, start + value)
        elif change == "extend_at" and isinstance(value, list):
            rows.extend_at(value)
            plain += value
        elif change == "truncate" and isinstance(value, int):
            rows.truncate(value)
            del plain[value:]
        else:
            rows = PositionRuns(rows.length, rows.copy().runs)
        assert rows.length == len(plain)
        assert rows.next == max(plain, default=-1) + 1
