"""An engine that records spans of the requests that carry a trace: how long they queued, were prefilled and decoded.

Only where spans are exported; elsewhere the plain Engine runs, and nothing of this costs anything. A span says what the
steps in its time were like by the difference of the engine's counters, so no step is looked at for its sake.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import ForwardResult
from pie_core.engine.engine import Engine
from pie_core.engine.messages import (
    Command,
    Event,
    Failed,
    Forward,
    ForwardDone,
    Generate,
    Generated,
    one_by_one,
)
from pie_core.engine.options import EngineOptions
from pie_core.ids import RequestId, Ticket
from pie_core.scheduler.request import Generation
from pie_core.telemetry.tracing import Attributes, Span, Tracing


@dataclass(frozen=True, slots=True)
class Counters:
    """The engine's, at one moment."""

    steps: int
    passes: int
    schedule_s: float
    driver_s: float
    deliver_s: float


@dataclass(slots=True)
class TracedRequest:
    """One that is not answered; `phase` is the part of it that runs."""

    whole: Span
    phase: Span
    since: Counters
    is_queued: bool = True
    generation: Generation | None = None  # until its first token


class TracedEngine(Engine):
    """Use it as an Engine."""

    def __init__(
        self,
        driver: Driver,
        options: EngineOptions,
        model_name: str,
        tracing: Tracing,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(driver, options, model_name, clock, wall_clock)
        self._tracing = tracing
        self._traced: dict[RequestId, TracedRequest] = {}

    def handle(self, commands: Iterable[Command]) -> None:
        commands = list(commands)
        for command in commands:
            if isinstance(command, Forward | Generate) and command.trace is not None:
                self._begin(command, command.trace)
        super().handle(commands)

    def start_step(self) -> Ticket | None:
        ticket = super().start_step()
        if ticket is not None and any(each.is_queued for each in self._traced.values()):
            self._leave_queue(ticket)
        return ticket

    def finish_step(self, ticket: Ticket, outcome: ForwardResult | Exception) -> None:
        super().finish_step(ticket, outcome)
        for traced in self._traced.values():
            if traced.generation is not None and traced.generation.first_at is not None:
                traced.generation = None
                self._turn_to("decode", traced)

    def take_events(self) -> list[Event]:
        events = super().take_events()
        if self._traced:
            for event in events:
                for answer in one_by_one(event):
                    self._follow(answer)
        return events

    # ---- one request

    def _begin(self, command: Forward | Generate, parent: str) -> None:
        kind = "generate" if isinstance(command, Generate) else "forward"
        asked: Attributes = {"pie.model": self.info.name, "pie.tokens.fed": len(command.tokens)}
        whole = self._tracing.start(f"engine.{kind}", parent, asked)
        self._traced[command.request] = TracedRequest(
            whole, self._tracing.start("queue", whole.traceparent), self._counters()
        )

    def _leave_queue(self, ticket: Ticket) -> None:
        """Those of which this step computes the first rows."""
        for chunk in self._loop.in_flight[ticket].chunks:
            request = chunk.running.request
            traced = None if request is None else self._traced.get(request)
            if traced is not None and traced.is_queued:
                traced.is_queued, traced.generation = False, chunk.running.generation
                self._turn_to("prefill", traced)

    def _follow(self, event: Event) -> None:
        traced = (
            self._traced.get(event.request) if isinstance(event, Failed | ForwardDone | Generated) else None
        )
        if traced is None:
            return
        assert isinstance(event, Failed | ForwardDone | Generated)
        if isinstance(event, Generated) and event.finish is None:
            return
        del self._traced[event.request]
        if isinstance(event, Failed):
            traced.whole.fail(event.code, event.message)
        elif isinstance(event, Generated):
            assert event.finish is not None
            traced.whole.note({"pie.finish_reason": event.finish, "pie.context.rows": event.length})
        else:
            traced.whole.note({"pie.context.rows": event.length})
        self._end_phase(traced)
        traced.whole.end()

    def _turn_to(self, name: str, traced: TracedRequest) -> None:
        self._end_phase(traced)
        traced.phase = self._tracing.start(name, traced.whole.traceparent)
        traced.since = self._counters()

    def _end_phase(self, traced: TracedRequest) -> None:
        now, then = self._counters(), traced.since
        steps, passes = now.steps - then.steps, now.passes - then.passes
        traced.phase.note(
            {
                "pie.steps": steps,
                "pie.batch.mean": passes / steps if steps else 0.0,
                "pie.schedule_s": now.schedule_s - then.schedule_s,
                "pie.driver_s": now.driver_s - then.driver_s,
                "pie.deliver_s": now.deliver_s - then.deliver_s,
            }
        )
        traced.phase.end()

    def _counters(self) -> Counters:
        loop = self._loop
        return Counters(loop.steps, loop.passes, self._schedule_s, loop.busy_s, self._deliver_s)


def engine_of(driver: Driver, options: EngineOptions, model_name: str, tracing: Tracing | None) -> Engine:
    """The plain one, unless spans are exported."""
    if tracing is None:
        return Engine(driver, options, model_name)
    return TracedEngine(driver, options, model_name, tracing)
