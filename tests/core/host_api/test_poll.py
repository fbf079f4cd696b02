"""Pollables, waiting for the first of several, and timers."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.errors import InvalidRequest
from pie_core.host_api import poll
from pie_core.host_api.poll import Pollable, Timer, wait_for
from pie_core.sandbox.hosting import Pending
from tests.core.sandbox.scenarios import State

MS = 1_000_000


def test_a_pollable_is_ready_once_its_pending_is_done_and_stays_so() -> None:
    pending: Pending[int] = Pending()
    pollable, told = Pollable.of(pending), []
    pollable.on_ready(lambda: told.append("kept"))
    pollable.on_ready(lambda: told.append("taken back"))()
    assert not pollable.ready()
    pending.fail(ValueError("a failure is an end too"))
    assert pollable.ready()
    pollable.on_ready(lambda: told.append("at once"))
    assert told == ["kept", "at once"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.data())
def test_wait_gives_exactly_the_indexes_that_are_ready(done: list[bool], data: st.DataObject) -> None:
    pendings: list[Pending[None]] = [Pending.of(None) if ready else Pending() for ready in done]
    waiting = wait_for([Pollable.of(pending) for pending in pendings])
    if any(done):
        assert waiting.result() == [index for index, ready in enumerate(done) if ready]
        return
    assert not waiting.done
    last = data.draw(st.integers(0, len(done) - 1))
    pendings[last].resolve(None)
    assert waiting.result() == [last]
    for pending in pendings:  # the others were let go: completing them disturbs nobody
        if not pending.done:
            pending.resolve(None)
    assert waiting.result() == [last]


def test_an_abandoned_wait_lets_go_of_its_pollables() -> None:
    pending: Pending[None] = Pending()
    waiting = wait_for([Pollable.of(pending)])
    waiting.abandon()
    pending.resolve(None)
    assert not waiting.done


def test_a_wait_ends_at_its_timeout_or_with_the_first_timer() -> None:
    async def scenario() -> None:
        pending: Pending[None] = Pending()
        cases: list[tuple[list[Pollable], int | None, list[int]]] = [
            ([Pollable.of(pending)], 1 * MS, []),
            ([], 1 * MS, []),
            ([Pollable.of(pending), Timer(1 * MS)], None, [1]),
            ([Timer(0), Timer(3600 * 1000 * MS)], None, [0]),
            ([Pollable.of(pending)], 0, []),
        ]
        for pollables, timeout, expected in cases:
            waiting = wait_for(pollables, timeout)
            done = asyncio.Event()
            waiting.on_done(done.set)
            await done.wait()
            assert waiting.result() == expected
            for pollable in pollables:
                pollable.close()

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_timer_beyond_the_range_of_the_clock_is_no_error() -> None:
    async def scenario() -> None:
        timer = Timer((1 << 64) - 1)
        assert not timer.ready()
        timer.close()

    asyncio.run(scenario())


def test_a_dropped_timer_no_longer_runs() -> None:
    async def scenario() -> None:
        timer = Timer(1 * MS)
        timer.close()
        await asyncio.sleep(0.005)
        assert not timer.ready()

    asyncio.run(scenario())


def test_waiting_for_nothing_without_a_timeout_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="would never return: pass either"):
        poll.wait(State(), [], None)


def test_a_pending_is_settled_once_and_hands_its_value_on() -> None:
    pending: Pending[str] = Pending()
    with pytest.raises(RuntimeError, match="before resolve"):
        pending.result()
    pending.resolve("value")
    assert pending.result() == "value"
    with pytest.raises(RuntimeError, match=r"twice: it has 'value' and is given ValueError\('lost'\)"):
        pending.fail(ValueError("lost"))
    assert pending.result() == "value"
    with pytest.raises(RuntimeError, match="twice: it has 'value' and is given 'other'"):
        pending.resolve("other")
    with pytest.raises(ValueError, match="lost"):
        Pending.failed(ValueError("lost")).result()
