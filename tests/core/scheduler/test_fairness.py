"""Turns of passes and turns of columns are the same turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from pie_core.scheduler.fairness import in_turns, turn_order


@dataclass(frozen=True)
class Owner:
    tenant: int
    process: int


@dataclass(frozen=True, eq=False)
class Waiting:
    priority: int
    context: Owner


def order_of(waiting: Sequence[Waiting], since: Sequence[int]) -> list[int]:
    priority, tenant, process = (
        np.array(values, np.int32)
        for values in (
            [each.priority for each in waiting],
            [each.context.tenant for each in waiting],
            [each.context.process for each in waiting],
        )
    )
    order: list[int] = turn_order(priority, tenant, process, np.array(since, np.int64)).tolist()
    return order


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 2), st.integers(0, 3)), max_size=20))
def test_columns_take_the_turns_that_passes_would_take(keys: list[tuple[int, int, int]]) -> None:
    """A process belongs to one tenant."""
    waiting = [Waiting(priority, Owner(tenant, 4 * tenant + process)) for priority, tenant, process in keys]
    expected: list[Any] = list(in_turns(cast("list[Any]", waiting)))
    found = order_of(waiting, list(range(10, 10 + len(waiting))))
    assert [waiting[each] for each in found] == expected


def test_whoever_waits_longest_comes_first_among_equals() -> None:
    waiting = [Waiting(0, Owner(0, process)) for process in range(4)]
    assert order_of(waiting, [7, 3, 9, 1]) == [3, 1, 0, 2]


def test_one_program_with_many_has_not_more_turns() -> None:
    waiting = [Waiting(0, Owner(0, 0)) for _ in range(3)] + [Waiting(0, Owner(0, 1)), Waiting(0, Owner(1, 2))]
    assert order_of(waiting, [0, 1, 2, 3, 4]) == [0, 4, 3, 1, 2]


def test_higher_priorities_come_before_everybody() -> None:
    waiting = [Waiting(0, Owner(0, 0)), Waiting(2, Owner(0, 0)), Waiting(1, Owner(1, 1))]
    assert order_of(waiting, [0, 1, 2]) == [1, 2, 0]
