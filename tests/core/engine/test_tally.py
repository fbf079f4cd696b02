"""Counts by name."""

from __future__ import annotations

import numpy as np

from pie_core.engine.tally import Tally


def test_counts_are_kept_by_name_and_by_number() -> None:
    tally = Tally()
    for place in range(40):
        tally.add(f"p{place}", place)
    numbers = np.array([tally.number(name) for name in ("p3", "p39", "p3", "new")], np.int32)
    tally.add_each(numbers)
    assert [tally[name] for name in ("p3", "p39", "new", "p4", "nobody")] == [5, 40, 1, 4, 0]


def test_a_forgotten_name_starts_again_and_its_number_is_used_again() -> None:
    tally = Tally()
    tally.add("a", 5)
    number = tally.number("a")
    tally.forget("a")
    tally.forget("a")
    assert (tally["a"], tally.number("b"), tally["b"]) == (0, number, 0)


def test_exceeding_counts_all_that_would_be_added_at_once() -> None:
    tally = Tally()
    tally.add("a", 8)
    tally.add("b", 3)
    a, b = tally.number("a"), tally.number("b")
    assert tally.exceeding(np.array([a, b, a], np.int32), 9).tolist() == [0, 2]
    assert tally.exceeding(np.array([a, b], np.int32), 9).tolist() == []
