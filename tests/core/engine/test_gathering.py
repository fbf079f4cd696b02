"""When a step waits for programs that were told of the last one, and when no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pie_core.engine.gathering import Gathering
from pie_core.engine.messages import ForwardDone, Progress, Stepped
from pie_core.ids import RequestId

STEP_S = 0.010


class Clock:
    """What a Gathering uses of an event loop."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, call: Callable[[], None]) -> Any:
        timer = (self.now + delay, call)
        self.timers.append(timer)
        return _Handle(lambda: self.timers.remove(timer) if timer in self.timers else None)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer[0] <= self.now + 1e-9]
        for timer in due:
            self.timers.remove(timer)
            timer[1]()


class _Handle:
    def __init__(self, cancel: Callable[[], None]) -> None:
        self.cancel = cancel


@pytest.fixture
def clock() -> Clock:
    return Clock()


def stepped(count: int) -> Stepped:
    ones = [1] * count
    return Stepped([RequestId(number) for number in range(count)], ones, ones, ones)


def gathering(clock: Clock, gone_on: list[float]) -> Gathering:
    """One that knows how long steps take, while the driver has begun with another."""
    loop: Any = clock
    made = Gathering(loop, lambda: gone_on.append(clock.now))
    made.step_begun()
    clock.wait(STEP_S)
    made.step_ended()
    return made


def test_nobody_is_waited_for_who_was_told_nothing(clock: Clock) -> None:
    made = gathering(clock, [])
    assert not made.holds_back()
    made.told([Progress([RequestId(1)], [1], [1], [1])])
    assert not made.holds_back(), "generations go on by themselves"


def test_a_step_waits_until_all_have_asked_again(clock: Clock) -> None:
    made = gathering(clock, [])
    made.told([stepped(2), ForwardDone(RequestId(9), [1], [], 1, 1)])
    for asked in (1, 1):
        assert made.holds_back()
        made.asked(asked)
    assert made.holds_back()
    assert made.is_on
    made.asked(1)
    assert not made.holds_back()
    assert not clock.timers


def test_it_goes_on_without_those_who_do_not_ask_in_half_a_step(clock: Clock) -> None:
    gone_on: list[float] = []
    made = gathering(clock, gone_on)
    made.told([stepped(2)])
    made.asked(1)
    begun_at = clock.now
    assert made.holds_back()
    clock.wait(STEP_S / 2)
    assert gone_on == [pytest.approx(begun_at + STEP_S / 2)]
    assert not made.holds_back()


def test_nobody_is_waited_for_late_in_a_step_or_if_steps_are_short(clock: Clock) -> None:
    made = gathering(clock, [])
    clock.wait(0.45 * STEP_S)
    made.told([stepped(2)])
    assert not made.holds_back()
    for _ in range(50):
        clock.wait(0.001)
        made.step_ended()
    made.told([stepped(2)])
    assert not made.holds_back()


def test_the_end_of_a_step_begins_anew(clock: Clock) -> None:
    gone_on: list[float] = []
    made = gathering(clock, gone_on)
    made.told([stepped(2)])
    assert made.holds_back()
    made.step_ended()
    assert not made.is_on
    assert not made.holds_back()
    clock.wait(STEP_S)
    assert gone_on == []


def test_on_a_real_loop_the_timer_calls_back() -> None:
    async def main() -> None:
        gone_on = asyncio.Event()
        made = Gathering(asyncio.get_running_loop(), gone_on.set)
        made.step_begun()
        await asyncio.sleep(0.02)
        made.step_ended()
        made.told([stepped(1)])
        assert made.holds_back()
        await asyncio.wait_for(gone_on.wait(), 10)

    asyncio.run(main())


def test_behind_a_long_step_it_waits_for_half_of_a_short_one(clock: Clock) -> None:
    gone_on: list[float] = []
    made = gathering(clock, gone_on)
    clock.wait(10 * STEP_S)
    made.step_ended()
    clock.wait(STEP_S)
    made.step_ended()
    made.told([stepped(2)])
    begun_at = clock.now
    assert made.holds_back()
    clock.wait(STEP_S / 2)
    assert gone_on == [pytest.approx(begun_at + STEP_S / 2)]
