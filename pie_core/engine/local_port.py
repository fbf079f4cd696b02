"""The EnginePort of one process: the engine runs on the worker's event loop, and a collector waits for the driver.

    send ─► inbox ─┐                        ┌─► sink (all events of a turn in one call)
                   ▼                        │
    event loop:   turn: handle ─► start_step ─► …          collector (engine.collectors):  driver.collect ─┐
                   ▲                                                                                       │
                   └───────────── finish_step ◄────────────────────────────────────────────────────────────┘

A turn runs after those who were called back by the sink have had their say, so a step holds the next passes of all of
them: in the loop's next turn, or within the sink when they say that they have had it (`hurry`). A step of generations,
or of programs that enough runs ahead of, is followed at once. Programs of other processes answer a little later: while
the driver is busy, a step waits for them, too (`engine.gathering`).

Whatever breaks the engine itself ends every open request with EngineLost, and those sent later too.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from pie_core.contracts.forward import ForwardResult
from pie_core.engine.collectors import collector_of
from pie_core.engine.engine import Engine
from pie_core.engine.gathering import Gathering
from pie_core.engine.messages import (
    Command,
    DropContext,
    Event,
    EventSink,
    Failed,
    ModelInfo,
    ended_by,
    opened_by,
)
from pie_core.errors import EngineLost
from pie_core.ids import ContextId, RequestId, Ticket

_log = logging.getLogger(__name__)


class LocalPort:
    """Used on one event loop, on which it must have been made."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._collector = collector_of(engine.driver, self._loop, self._collected)
        self._inbox: list[Command] = []
        self._build_last: Callable[[], Command | None] | None = None
        self._outbox: list[Event] = []
        self._sink: EventSink = _nobody
        self._open: set[RequestId] = set()
        self._due_turn: asyncio.Handle | None = None
        self._turns = 0
        self._alarm: asyncio.TimerHandle | None = None
        self._tickets: deque[Ticket] = deque()  # at the driver, oldest first
        self._due_at = 0.0  # when the oldest of them hangs
        self._step_timer: asyncio.TimerHandle | None = None
        self._lost: EngineLost | None = None
        self._gathering = Gathering(self._loop, self._schedule_turn)

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    @property
    def is_ready(self) -> bool:
        """False once the engine is lost."""
        return self._lost is None

    def listen(self, sink: EventSink) -> None:
        self._sink = sink

    def send(self, command: Command) -> None:
        self._inbox.append(command)
        self._schedule_turn()

    def send_last(self, build: Callable[[], Command | None]) -> None:
        self._build_last = build
        self._schedule_turn()

    def step_now(self, context: ContextId, token: int) -> tuple[int, int] | None:
        if self._inbox or self._lost is not None:
            return None
        found = self._engine.step_now(context, token)
        if found is not None:
            self._schedule_turn()  # what ran ahead is to be followed
        return found

    def hurry(self) -> None:
        if self._due_turn is not None:
            self._due_turn.cancel()
            self._turn()

    def send_all(self, commands: Sequence[Command]) -> None:
        """In this order."""
        self._inbox += commands
        self._schedule_turn()

    async def close(self) -> None:
        """Ends every request with EngineLost and frees the model; a second time does nothing."""
        if self._lost is None:
            self._lose(EngineLost("the engine was closed"))
        else:
            self._fail_open(self._lost)
        self._flush()
        await self._collector.stop()

    def _schedule_turn(self) -> None:
        if self._due_turn is None:
            self._due_turn = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Takes what was sent, starts what can be started, tells what happened."""
        self._due_turn = None
        self._turns += 1
        if self._lost is None:
            try:
                self._run_engine()
            except Exception as error:  # an engine that broke must not be silent
                _log.exception("engine of model %r broke", self.info.name)
                self._lose(_lost_by(self.info.name, error))
        else:
            self._fail_open(self._lost)
        self._flush()

    def _run_engine(self) -> None:
        self._handle_inbox()
        self._start_steps()
        self._outbox += self._engine.take_events()
        self._set_alarm()

    def _start_steps(self) -> None:
        if self._tickets and self._gathering.holds_back():
            return
        while (ticket := self._engine.start_step()) is not None:
            self._watch(ticket)
            self._collector.collect(ticket)

    def _handle_inbox(self) -> None:
        self._engine.handle(self._take_inbox())

    def _take_inbox(self) -> list[Command]:
        inbox, self._inbox = self._inbox, []
        build, self._build_last = self._build_last, None
        if build is not None and (last := build()) is not None:
            inbox.append(last)
        opened = opened_by(inbox)
        dropped = sum(type(each) is DropContext for each in inbox)
        self._gathering.asked(len(opened) + dropped)  # whoever ends asks no more
        self._open.update(opened)
        return inbox

    def _collected(self, ticket: Ticket, outcome: ForwardResult | Exception) -> None:
        """On the event loop: a step has ended. Its events go out, and a turn follows what they bring about.

        A step is followed at once if all that it computed may go on by itself, generations or programs that enough runs
        ahead of: the driver works on the next while they hear of the last.
        """
        if self._lost is not None:
            return
        if isinstance(outcome, EngineLost):  # the driver's device is gone, and every context with it
            self._lose(outcome)
            self._flush()
            return
        self._tickets.popleft()
        is_late = self._gathering.is_on and not self._tickets
        self._gathering.step_ended()
        self._watch_oldest()
        try:
            self._handle_inbox()  # what was sent before the step was known to have ended comes before its end
            self._engine.finish_step(ticket, outcome)
            if is_late or not self._engine.awaits_programs:
                self._start_steps()
        except Exception as error:  # as in _turn
            _log.exception("engine of model %r broke", self.info.name)
            self._lose(_lost_by(self.info.name, error))
        else:
            self._outbox += self._engine.take_events()
        turns = self._turns
        self._flush()
        if self._turns == turns:  # and no program that was told of it has asked for more
            self._schedule_turn()

    def _flush(self) -> None:
        events, self._outbox = self._outbox, []
        if events:
            self._open.difference_update(ended_by(events))
            self._gathering.told(events)
            self._sink(events)

    # ---- what time brings

    def _set_alarm(self) -> None:
        """A turn for what happens though nobody has sent anything: a request's time is over."""
        if self._alarm is not None:
            self._alarm.cancel()
        seconds = self._engine.wakes_in_s
        self._alarm = None if seconds is None else self._loop.call_later(seconds, self._schedule_turn)

    def _watch(self, ticket: Ticket) -> None:
        """The driver's deadline for a step counts from the end of the step before."""
        self._tickets.append(ticket)
        if len(self._tickets) == 1:
            self._gathering.step_begun()
            self._watch_oldest()

    def _watch_oldest(self) -> None:
        """Its deadline counts from now. A timer that is set already finds that out when it ends: steps are many."""
        self._due_at = self._loop.time() + self._engine.driver.capabilities.step_deadline_s
        if self._step_timer is None and self._tickets:
            self._step_timer = self._loop.call_at(self._due_at, self._look_at_oldest)

    def _look_at_oldest(self) -> None:
        self._step_timer = None
        if not self._tickets:
            return
        if self._loop.time() < self._due_at:
            self._step_timer = self._loop.call_at(self._due_at, self._look_at_oldest)
        else:
            self._hangs(self._tickets[0], self._engine.driver.capabilities.step_deadline_s)

    def _hangs(self, ticket: Ticket, deadline_s: float) -> None:
        driver = self._engine.driver.capabilities.driver
        self._lose(
            EngineLost(
                f"model {self.info.name!r}: driver {driver!r} has not finished step {ticket} in {deadline_s:g} s, "
                "the deadline it declares"
            )
        )
        self._flush()

    # ---- the end

    def _lose(self, error: EngineLost) -> None:
        self._lost = error
        self._outbox += self._engine.take_events()
        if self._alarm is not None:
            self._alarm.cancel()
        self._tickets.clear()
        self._collector.rest()
        self._gathering.end()
        if self._step_timer is not None:
            self._step_timer.cancel()
        self._fail_open(error)

    def _fail_open(self, error: EngineLost) -> None:
        self._take_inbox()
        for request in sorted(self._open.difference(ended_by(self._outbox))):
            self._outbox.append(Failed(request=request, code=error.code, message=str(error)))


def _nobody(events: Sequence[Event]) -> None:
    _log.warning("%d events of an engine reached nobody: listen was not called", len(events))


def _lost_by(model: str, error: Exception) -> EngineLost:
    return EngineLost(
        f"model {model!r}: its engine broke and lost all contexts: {type(error).__name__}: {error}"
    )
