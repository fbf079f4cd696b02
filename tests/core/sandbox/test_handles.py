"""A guest's handles name its own objects, and each object is closed once."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pie_core.errors import LimitExceeded, NotFound
from pie_core.sandbox.handles import Handles

LIMIT = 5


class Thing:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class HandleMachine(RuleBasedStateMachine):
    """Against a plain dict."""

    def __init__(self) -> None:
        super().__init__()
        self.handles = Handles(LIMIT)
        self.held: dict[int, Thing] = {}
        self.given_away: list[Thing] = []
        self.dropped: list[Thing] = []

    @rule()
    def add(self) -> None:
        thing = Thing()
        if len(self.held) == LIMIT:
            with pytest.raises(LimitExceeded):
                self.handles.add(thing)
            return
        number = self.handles.add(thing)
        assert number not in self.held
        self.held[number] = thing

    @rule(number=st.integers(1, 12))
    def take(self, number: int) -> None:
        if number in self.held:
            assert self.handles.take(number) is self.held[number]
            self.given_away.append(self.held.pop(number))
        else:
            with pytest.raises(NotFound):
                self.handles.take(number)

    @rule(number=st.integers(1, 12))
    def drop(self, number: int) -> None:
        self.handles.drop(number)
        if number in self.held:
            self.dropped.append(self.held.pop(number))

    @rule()
    def sweep(self) -> None:
        self.handles.sweep()
        self.dropped.extend(self.held.values())
        self.held.clear()

    @invariant()
    def holds_what_it_should(self) -> None:
        assert len(self.handles) == len(self.held)
        assert all(self.handles.get(number) is thing for number, thing in self.held.items())
        assert all(thing.closed == 0 for thing in [*self.held.values(), *self.given_away])
        assert all(thing.closed == 1 for thing in self.dropped)


TestHandles = HandleMachine.TestCase
TestHandles.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


def test_the_youngest_is_closed_first_and_a_failure_closes_the_others_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    order: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            order.append(self.name)
            if self.name == "middle":
                raise OSError("cannot close")

    handles = Handles(10)
    for name in ("old", "middle", "young"):
        handles.add(Named(name))
    handles.sweep()
    assert order == ["young", "middle", "old"]
    assert "cannot close" in caplog.text
