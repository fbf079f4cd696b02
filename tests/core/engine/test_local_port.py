"""The engine on an event loop: turns, the collector thread, and how everything ends."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from pie_core.contracts.driver import DriverCapabilities
from pie_core.contracts.forward import ForwardBatch, ForwardResult
from pie_core.engine import collectors
from pie_core.engine.engine import Engine
from pie_core.engine.local_port import LocalPort
from pie_core.engine.messages import (
    BreakOff,
    CreateContext,
    DropContext,
    EnginePort,
    Event,
    Failed,
    Forward,
    ForwardDone,
    Generate,
    Generated,
    ReadStatus,
    Sample,
    SamplerSpec,
    Status,
    one_by_one,
)
from pie_core.engine.options import EngineOptions
from pie_core.errors import EngineLost, ForwardError
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant, Ticket
from pie_plugins.drivers.dummy.driver import DummyDriver
from tests.core.engine.codec_port import CodecPort
from tests.core.engine.stepping import SteppedEngine, dummy


class Listener:
    """Keeps what arrives, and lets a test wait for the end of a request."""

    def __init__(self) -> None:
        self.batches: list[Sequence[Event]] = []
        self.events: dict[int, list[Event]] = defaultdict(list)
        self._arrived = asyncio.Event()

    def __call__(self, events: Sequence[Event]) -> None:
        self.batches.append(events)
        for event in (answer for each in events for answer in one_by_one(each)):
            self.events[event.request].append(event)
        self._arrived.set()

    async def arrival(self, request: int, count: int) -> None:
        """Returns when a request has had so many events."""
        while len(self.events[request]) < count:
            self._arrived.clear()
            await asyncio.wait_for(self._arrived.wait(), 10)

    async def final(self, request: int) -> Event:
        while True:
            last = self.events[request][-1] if self.events[request] else None
            if last is not None and (not isinstance(last, Generated) or last.finish is not None):
                return last
            self._arrived.clear()
            await asyncio.wait_for(self._arrived.wait(), 10)


@asynccontextmanager
async def opened(driver: DummyDriver, **options: Any) -> AsyncIterator[tuple[CodecPort, Listener, Engine]]:
    engine, listener = Engine(driver, EngineOptions(**options), "m"), Listener()
    port = CodecPort(LocalPort(engine))
    port.listen(listener)
    try:
        yield port, listener, engine
    finally:
        await port.close()


def create(port: EnginePort, context: int) -> None:
    port.send(CreateContext(ContextId(context), ProcessId("p"), Tenant("t"), 7))


def forward(port: EnginePort, request: int, context: int, *tokens: int) -> None:
    samples = (Sample(len(tokens) - 1, SamplerSpec()),)
    port.send(Forward(RequestId(request), ContextId(context), tokens, samples=samples))


def generate(port: EnginePort, request: int, context: int, count: int) -> None:
    port.send(Generate(RequestId(request), ContextId(context), (context,), SamplerSpec(), (), count))


def test_passes_and_generations_answer_as_the_stepped_engine_does() -> None:
    async def run() -> None:
        stepped = SteppedEngine()
        async with opened(dummy()) as (port, listener, _):
            for context in range(1, 9):
                create(port, context)
                stepped.create(context)
                generate(port, context, context, 12)
            create(port, 9)
            stepped.create(9)
            forward(port, 9, 9, 1, 2, 3)
            for context in range(1, 9):
                await listener.final(context)
                tokens = [
                    token
                    for event in listener.events[context]
                    if isinstance(event, Generated)
                    for token in event.tokens
                ]
                assert tokens == stepped.generate(context, [context], 12)
            done = await listener.final(9)
            assert isinstance(done, ForwardDone)
            assert done.tokens == [stepped.draw(9, [1, 2, 3])]

    asyncio.run(run())


def test_a_port_that_is_hurried_does_not_wait_for_the_loop() -> None:
    async def run() -> None:
        async with opened(dummy()) as (port, listener, engine):
            port.hurry()
            assert engine._loop.steps == 0, "nothing was sent"
            create(port, 1)
            forward(port, 1, 1, 1, 2, 3)
            port.send(ReadStatus(RequestId(2)))
            assert not listener.batches
            port.hurry()
            (status,) = listener.events[2]
            assert isinstance(status, Status)
            assert status.running + status.waiting == 1
            assert isinstance(await listener.final(1), ForwardDone)

    asyncio.run(run())


def test_events_of_a_step_arrive_in_one_call() -> None:
    async def run() -> None:
        async with opened(dummy()) as (port, listener, _):
            for context in range(1, 5):
                create(port, context)
                generate(port, context, context, 3)
            for context in range(1, 5):
                await listener.final(context)
            told = [[answer for each in batch for answer in one_by_one(each)] for batch in listener.batches]
            assert list(map(len, told)) == [4, 4, 4]

    asyncio.run(run())


def test_the_next_step_waits_for_those_who_answer_at_once() -> None:
    """Guests that the sink resumes send their next passes before the next step is laid out."""

    async def run() -> None:
        async with opened(dummy(), speculation_depth=0) as (port, listener, _):
            rounds = dict.fromkeys(range(1, 7), 0)

            def resume(events: Sequence[Event]) -> None:
                listener(events)
                for event in (answer for each in events for answer in one_by_one(each)):
                    context = event.request % 10
                    rounds[context] += 1
                    if rounds[context] < 5:
                        forward(port, event.request + 10, context, rounds[context])

            port.listen(resume)
            for context in rounds:
                create(port, context)
                forward(port, context, context, 1)
            for context in rounds:
                await listener.final(40 + context)
            port.send(ReadStatus(RequestId(1000)))
            rounds[0] = 99
            status = await listener.final(1000)
            assert isinstance(status, Status)
            assert (status.steps, status.tokens) == (5, 30)

    asyncio.run(run())


def test_the_driver_goes_on_while_programs_hear_of_the_tokens_of_their_generations() -> None:
    async def run() -> None:
        driver = CountingDriver(dummy())
        at_work: list[int] = []
        async with opened(driver) as (port, listener, _):

            def hear(events: Sequence[Event]) -> None:
                listener(events)
                at_work.append(driver.submitted - len(at_work) - 1)

            port.listen(hear)
            create(port, 1)
            generate(port, 1, 1, 4)
            await listener.final(1)
        assert at_work == [2, 2, 1, 0]

    asyncio.run(run())


@pytest.mark.parametrize(("depth", "expected"), [(0, 0), (1, 1), (2, 2), (4, 2)])
def test_the_driver_has_its_next_step_before_programs_that_enough_runs_ahead_of_hear_of_the_last(
    depth: int, expected: int
) -> None:
    async def run() -> None:
        driver = CountingDriver(dummy())
        at_work: list[int] = []
        async with opened(driver, speculation_depth=depth) as (port, listener, engine):

            def resume(events: Sequence[Event]) -> None:
                listener(events)
                at_work.append(driver.submitted - engine._loop.steps)
                for event in (answer for each in events for answer in one_by_one(each)):
                    if isinstance(event, ForwardDone) and event.request < 12:
                        forward(port, event.request + 1, 1, *event.tokens)

            port.listen(resume)
            create(port, 1)
            forward(port, 1, 1, 5)
            await listener.final(12)
        assert at_work[2:10] == [expected] * 8

    asyncio.run(run())


def test_a_break_sent_before_the_end_was_known_comes_before_the_end() -> None:
    async def run() -> None:
        async with opened(dummy(step_ms=20.0)) as (port, listener, _):
            create(port, 1)
            generate(port, 1, 1, 2)
            await listener.arrival(1, 1)
            await asyncio.sleep(0)
            time.sleep(0.1)  # noqa: ASYNC251 - the last step ends while the event loop does not look
            port.send(BreakOff(RequestId(2), RequestId(1), 1))
            await listener.final(2)
            final = await listener.final(1)
            assert isinstance(final, Generated)
            assert (final.finish, final.length) == ("cancelled", 2)

    asyncio.run(run())


def test_the_event_loop_runs_while_the_driver_works() -> None:
    async def run() -> None:
        async with opened(dummy(step_ms=100.0)) as (port, listener, _):
            create(port, 1)
            forward(port, 1, 1, 5)
            ticks = 0
            while not listener.events[1]:
                await asyncio.sleep(0.005)
                ticks += 1
            assert ticks > 3

    asyncio.run(run())


def test_a_driver_that_is_asked_needs_no_thread() -> None:
    """The loop asks it, and has its other turns all the same."""

    async def run() -> None:
        stepped = SteppedEngine()
        stepped.create(1)
        async with opened(dummy(step_ms=5.0, polled=True)) as (port, listener, _):
            create(port, 1)
            generate(port, 1, 1, 12)
            ticks = 0
            while len(listener.events[1]) < 12:
                await asyncio.sleep(0.001)
                ticks += 1
            assert [each.tokens[0] for each in listener.events[1] if isinstance(each, Generated)] == (
                stepped.generate(1, [1], 12)
            )
            assert ticks > 12
            assert not [thread for thread in threading.enumerate() if thread.name == "pie-collect"]

    asyncio.run(run())


def test_a_driver_that_is_asked_is_closed_once_it_is_idle() -> None:
    async def run() -> None:
        driver = dummy(step_ms=30.0, polled=True)
        async with opened(driver) as (port, listener, _):
            create(port, 1)
            generate(port, 1, 1, 0)
            await listener.arrival(1, 2)
            await port.close()
            assert not driver._open, "collected before the driver was closed"
            with pytest.raises(ForwardError, match="closed"):
                driver.collect(Ticket(0))

    asyncio.run(run())


def test_a_driver_that_cannot_answer_is_waited_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bool:
        raise RuntimeError("no device")

    async def run() -> None:
        monkeypatch.setattr(DummyDriver, "is_done", broken)
        async with opened(dummy(polled=True, step_ms=5.0)) as (port, listener, _):
            create(port, 1)
            forward(port, 1, 1, 3)
            assert isinstance(await listener.final(1), ForwardDone)

    asyncio.run(run())
    assert "cannot say whether a step is over" in caplog.text


def test_a_driver_that_is_never_done_is_left_behind(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectors, "PATIENCE_S", 0.05)

    async def run() -> None:
        driver = SlowDriver(dummy(polled=True))
        looks = itertools.count()
        monkeypatch.setattr(DummyDriver, "is_done", lambda *_: next(looks) < 0)
        async with opened(driver) as (port, listener, _):
            create(port, 1)
            forward(port, 1, 1, 3)
            failed = await listener.final(1)
            assert isinstance(failed, Failed)
            assert "has not finished step 0 in 0.05 s" in failed.message
            seen = next(looks)
            await asyncio.sleep(0.01)
            assert next(looks) == seen + 1, "it is not asked any more"
            await port.close()
            assert "hangs and is left behind" in caplog.text
            driver.let_go.set()

    asyncio.run(run())


def test_closing_ends_every_request_and_the_driver() -> None:
    async def run() -> None:
        driver = dummy(step_ms=30.0)
        async with opened(driver) as (port, listener, _):
            create(port, 1)
            generate(port, 1, 1, 0)
            forward(port, 2, 1, 5)
            await listener.arrival(1, 2)
            await port.close()
            await port.close()
            for request in (1, 2):
                failed = await listener.final(request)
                assert isinstance(failed, Failed)
                assert failed.code == "engine-lost"
            forward(port, 3, 1, 5)
            late = await listener.final(3)
            assert isinstance(late, Failed)
            assert late.code == "engine-lost"
            with pytest.raises(ForwardError, match="closed"):
                driver.collect(Ticket(0))
            assert not [thread for thread in threading.enumerate() if thread.name == "pie-collect"]

    asyncio.run(run())


def test_an_engine_that_breaks_ends_every_request_loudly(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with opened(dummy()) as (port, listener, engine):
            create(port, 1)
            generate(port, 1, 1, 0)
            await asyncio.sleep(0.02)

            def break_down(*_: object) -> None:
                raise ZeroDivisionError("a bug of ours")

            monkeypatch.setattr(engine, "finish_step", break_down)
            failed = await listener.final(1)
            assert isinstance(failed, Failed)
            assert failed.code == "engine-lost"
            assert "ZeroDivisionError: a bug of ours" in failed.message
            forward(port, 2, 1, 3)
            assert isinstance(await listener.final(2), Failed)

    asyncio.run(run())
    assert "engine of model 'm' broke" in caplog.text


class CountingDriver(DummyDriver):
    def __init__(self, working: DummyDriver) -> None:
        self.__dict__ = working.__dict__
        self.submitted = 0

    def submit(self, batch: ForwardBatch) -> Ticket:
        self.submitted += 1
        return super().submit(batch)


class SlowDriver(DummyDriver):
    """Declares a short deadline and hangs until it is let go."""

    def __init__(self, working: DummyDriver, deadline_s: float = 0.05, *, hangs: bool = True) -> None:
        self.__dict__ = working.__dict__
        self.deadline_s = deadline_s
        self.let_go = threading.Event()
        if not hangs:
            self.let_go.set()

    @property
    def capabilities(self) -> DriverCapabilities:
        return replace(self._capabilities, step_deadline_s=self.deadline_s)

    def collect(self, ticket: Ticket) -> ForwardResult:
        self.let_go.wait(10)
        return super().collect(ticket)


def test_a_driver_that_hangs_loses_the_engine_at_its_deadline() -> None:
    async def run() -> None:
        driver = SlowDriver(dummy())
        async with opened(driver) as (port, listener, _):
            create(port, 1)
            forward(port, 1, 1, 3)
            failed = await listener.final(1)
            assert isinstance(failed, Failed)
            assert failed.code == "engine-lost"
            assert "has not finished step 0 in 0.05 s" in failed.message
            driver.let_go.set()

    asyncio.run(run())


class LostDriver(DummyDriver):
    """Its device faults under the first step."""

    def __init__(self, working: DummyDriver) -> None:
        self.__dict__ = working.__dict__

    def collect(self, ticket: Ticket) -> ForwardResult:
        super().collect(ticket)
        raise EngineLost("the GPU faulted")


def test_a_driver_whose_device_is_gone_loses_the_engine() -> None:
    async def run() -> None:
        async with opened(LostDriver(dummy())) as (port, listener, _):
            create(port, 1)
            for request in (1, 2):
                forward(port, request, 1, 3)
                failed = await listener.final(request)
                assert isinstance(failed, Failed)
                assert (failed.code, failed.message) == ("engine-lost", "the GPU faulted")
            assert not port.is_ready

    asyncio.run(run())


class RaisingDriver(DummyDriver):
    def __init__(self, working: DummyDriver) -> None:
        self.__dict__ = working.__dict__

    def submit(self, batch: ForwardBatch) -> Ticket:
        raise RuntimeError("no device")


def test_a_step_that_fails_ends_its_requests_only() -> None:
    async def run() -> None:
        async with opened(RaisingDriver(dummy())) as (port, listener, _):
            create(port, 1)
            for request in (1, 2):
                forward(port, request, 1, 3)
                failed = await listener.final(request)
                assert isinstance(failed, Failed)
                assert (failed.code, failed.message) == ("forward", "RuntimeError: no device")

    asyncio.run(run())


def test_a_request_ends_when_its_time_is_over_though_nothing_else_happens() -> None:
    async def run() -> None:
        driver = SlowDriver(dummy(), deadline_s=10.0)
        async with opened(driver, request_timeout_s=0.05) as (port, listener, _):
            create(port, 1)
            forward(port, 1, 1, 3)
            failed = await listener.final(1)
            assert isinstance(failed, Failed)
            assert failed.code == "deadline-exceeded"
            driver.let_go.set()

    asyncio.run(run())


def test_a_step_that_waits_for_another_does_not_hang() -> None:
    """The deadline of a queued step counts from the end of the one before it."""

    async def run() -> None:
        async with opened(SlowDriver(dummy(step_ms=60.0), deadline_s=0.1, hangs=False)) as (
            port,
            listener,
            _,
        ):
            create(port, 1)
            generate(port, 1, 1, 3)
            assert isinstance(await listener.final(1), Generated)

    asyncio.run(run())


async def _loop_of(port: CodecPort, listener: Listener, context: int, thinks_s: float) -> None:
    """A program of another process, that asks for its next pass a while after it has the last."""
    token = 1
    for number in range(20):
        request = 100 * context + number
        forward(port, request, context, token)
        done = await listener.final(request)
        assert isinstance(done, ForwardDone)
        (token,) = done.tokens
        await asyncio.sleep(thinks_s)


def test_programs_that_answer_one_after_the_other_share_their_steps() -> None:
    async def run() -> None:
        async with opened(dummy(step_ms=40.0)) as (port, listener, engine):
            contexts = range(1, 4)
            for context in contexts:
                create(port, context)
            await asyncio.gather(
                *(_loop_of(port, listener, context, 0.002 * context) for context in contexts)
            )
            assert engine._loop.steps <= 25, "20 are needed; split for good, they would be 30"

    asyncio.run(run())


def test_programs_that_end_are_not_waited_for() -> None:
    async def run() -> None:
        async with opened(dummy(step_ms=60.0)) as (port, listener, engine):
            for context in (1, 2):
                create(port, context)
                forward(port, context, context, 1)
            done = await listener.final(1)
            assert isinstance(done, ForwardDone)
            forward(port, 3, 1, *done.tokens)
            await asyncio.sleep(0.005)
            assert len(engine._loop.in_flight) == 1, "the step behind waits for what program 2 asks for"
            port.send(DropContext(ContextId(2)))
            await asyncio.sleep(0.005)
            assert len(engine._loop.in_flight) == 2

    asyncio.run(run())
