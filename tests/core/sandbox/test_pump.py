"""Whatever guests do and whenever they are ended, each call ends once and nothing is left."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.errors import Cancelled
from pie_core.sandbox import pump as pump_module
from pie_core.sandbox.alarm import SleepingAlarm
from pie_core.sandbox.guest import Guest
from pie_core.sandbox.program import Program
from pie_core.sandbox.pump import Pump, Ticker
from pie_core.sandbox.runtime import Runtime
from tests.core.sandbox.scenarios import State, drive
from tests.core.sandbox.test_guest import echo, sleeper, spinner

HOUR = 3600 * 10**9

kinds = st.sampled_from(["echo", "nap", "sleep", "spin"])
# (kind of guest, after how many turns of the loop it is ended; never if none)
plans = st.lists(st.tuples(kinds, st.none() | st.integers(0, 12)), min_size=1, max_size=8)


@settings(max_examples=12, deadline=None)
@given(plans)
def test_every_call_ends_once_whatever_is_cancelled_when(plan: list[tuple[str, int | None]]) -> None:
    async def scenario(runtime: Runtime) -> None:
        wasm = {"echo": echo(), "nap": sleeper(1000), "sleep": sleeper(HOUR), "spin": spinner()}
        programs = {kind: await Program.load(runtime, wasm[kind]) for kind, _ in plan}
        states = [State(f"{index} {kind}") for index, (kind, _) in enumerate(plan)]
        guests = [programs[kind].start(state) for (kind, _), state in zip(plan, states, strict=True)]
        tasks = [asyncio.ensure_future(guest.call("run", guest.name)) for guest in guests]
        await asyncio.gather(*(end(guest, turns) for guest, (_, turns) in zip(guests, plan, strict=True)))
        await finish(guests, tasks, plan)
        check(await asyncio.gather(*tasks, return_exceptions=True), plan, states)

    drive(scenario)


async def end(guest: Guest, turns: int | None) -> None:
    for _ in range(turns or 0):
        await asyncio.sleep(0)
    if turns is not None:
        guest.cancel(Cancelled("as planned"))


async def finish(guests: list[Guest], tasks: list[Any], plan: list[tuple[str, int | None]]) -> None:
    """Those that end by themselves do; then the others are ended."""
    await asyncio.wait_for(
        asyncio.gather(
            *(task for task, (kind, _) in zip(tasks, plan, strict=True) if kind in ("echo", "nap")),
            return_exceptions=True,
        ),
        timeout=30,
    )
    for guest in guests:
        guest.close()


def check(results: list[Any], plan: list[tuple[str, int | None]], states: list[State]) -> None:
    for result, (kind, turns), state in zip(results, plan, states, strict=True):
        assert state.closed == 1
        if kind in ("sleep", "spin") or isinstance(result, Exception):
            assert isinstance(result, Cancelled)
            assert turns is not None or kind in ("sleep", "spin")
        else:
            assert result == state.name


class Turn:
    """A guest that only counts its turns."""

    def __init__(self, turns: int, order: list[Turn]) -> None:
        self.left = turns
        self.order = order

    def resume(self) -> bool:
        self.order.append(self)
        self.left -= 1
        return self.left > 0


def test_those_that_spin_take_turns_behind_those_that_were_woken() -> None:
    async def scenario() -> list[str]:
        ticker = Ticker(lambda: None)
        pump = Pump(ticker)
        order: list[Turn] = []
        first, second, woken = Turn(3, order), Turn(3, order), Turn(1, order)
        pump.wake(first)
        pump.wake(second)
        await asyncio.sleep(0)
        pump.wake(woken)
        for _ in range(10):
            await asyncio.sleep(0)
        ticker.stop()
        assert pump.resumes == 7
        return [{first: "first", second: "second", woken: "woken"}[turn] for turn in order]

    names = asyncio.run(scenario())
    assert names[:5] == ["first", "second", "first", "woken", "second"]
    assert sorted(names) == ["first"] * 3 + ["second"] * 3 + ["woken"]


def pumped(scenario: Callable[[Pump], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        ticker = Ticker(lambda: None)
        try:
            await scenario(Pump(ticker))
        finally:
            ticker.stop()

    asyncio.run(main())


class Asker:
    """A guest that calls `asks` whenever it is resumed."""

    def __init__(self, asks: Callable[[], object]) -> None:
        self.asks = asks

    def resume(self) -> bool:
        self.asks()
        return False


def test_those_who_are_ready_run_at_once_where_that_is_asked_for() -> None:
    async def scenario(pump: Pump) -> None:
        order: list[Turn] = []
        spinning, woken = Turn(3, order), Turn(1, order)
        pump.wake(spinning)
        pump.run()
        pump.wake(woken)
        pump.run()
        assert order == [spinning, woken], "one that spins waits for its turn of the loop"
        for _ in range(5):
            await asyncio.sleep(0)
        assert order == [spinning, woken, spinning, spinning]

    pumped(scenario)


def test_what_guests_ask_for_goes_out_once_all_have_had_their_say_and_the_answer_resumes_them() -> None:
    async def scenario(pump: Pump) -> None:
        said: list[str] = []

        def answer() -> None:
            said.append("answered")
            pump.wake(Asker(lambda: said.append("resumed")))
            pump.run()  # from within: no guest is resumed on top of another

        first = Asker(lambda: said.append(f"first {pump.afterwards(answer)}"))
        pump.wake(first)
        pump.wake(Asker(lambda: said.append("second")))
        pump.run()
        assert said == ["first True", "second", "answered", "resumed"]
        assert not pump.afterwards(answer), "nobody is being resumed"

    pumped(scenario)


def test_guests_that_are_answered_at_once_again_and_again_leave_the_loop_its_turns() -> None:
    async def scenario(pump: Pump) -> None:
        turns = 0

        def ask() -> None:
            pump.afterwards(lambda: pump.wake(Asker(ask)))

        pump.wake(Asker(ask))
        while turns < 3:
            await asyncio.sleep(0)
            turns += 1
        assert pump.resumes > 3

    pumped(scenario)


@pytest.fixture(params=["timer", "sleeping"])
def any_alarm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's timer, and what stands in for it elsewhere."""
    if request.param == "sleeping":
        monkeypatch.setattr(pump_module, "alarm_every", SleepingAlarm)
    elif sys.platform != "linux":
        pytest.skip("only Linux has such timers")


@pytest.mark.usefixtures("any_alarm")
def test_the_ticker_rests_when_no_guest_runs_and_wakes_when_one_does() -> None:
    ticked, waits = threading.Event(), itertools.count()
    ticker = Ticker(ticked.set, tick_s=0.001)
    wait = ticker._alarm.wait
    ticker._alarm.wait = lambda: (next(waits), wait())[1]  # type: ignore[method-assign]
    try:
        ticker.start_ticking()
        assert ticked.wait(5)
        ticker.may_rest()
        time.sleep(0.1)
        before, ticks = next(waits), ticker.ticks
        time.sleep(0.1)
        assert next(waits) - before == 1, "the thread went on waking up"
        assert ticker.ticks == ticks
        ticked.clear()
        ticker.start_ticking()
        assert ticked.wait(5)
    finally:
        ticker.stop()
    assert not ticker._thread.is_alive()


@pytest.mark.usefixtures("any_alarm")
def test_the_epoch_advances_only_under_a_guest_that_runs_on() -> None:
    advanced = threading.Event()
    ticker = Ticker(advanced.set, tick_s=0.001)
    try:
        ticker.start_ticking()
        begin = time.monotonic()
        while time.monotonic() < begin + 0.05:
            ticker.resumes += 1  # as the pump does for guests that give way at once
        assert ticker.ticks < 10, "a tick in which guests came and went is none of the epoch"
        assert advanced.wait(5), "the last of them did not give way"
    finally:
        ticker.stop()
