"""An engine that records spans computes what the plain one does, and ends every span that it begins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from pie_core.engine.engine import Engine
from pie_core.engine.messages import Cancel, EndProcess, Event, Failed
from pie_core.engine.options import EngineOptions
from pie_core.engine.traced_engine import TracedEngine, engine_of
from pie_core.ids import ProcessId
from pie_core.telemetry.tracing import Attributes, Kind
from tests.core.engine.stepping import SteppedEngine, dummy

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@dataclass
class FakeSpan:
    name: str
    parent: str | None
    traceparent: str
    notes: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    ends: int = 0
    is_recorded: bool = True

    def note(self, attributes: Attributes) -> None:
        self.notes |= attributes

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        raise AssertionError("an engine tells of phases, not of events")

    def fail(self, code: str, message: str) -> None:
        self.error = code

    def end(self, at_ns: int | None = None) -> None:
        self.ends += 1


@dataclass
class FakeTracing:
    spans: list[FakeSpan] = field(default_factory=list)

    def start(
        self,
        name: str,
        parent: str | None,
        attributes: Attributes | None = None,
        kind: Kind = "internal",
        at_ns: int | None = None,
    ) -> FakeSpan:
        self.spans.append(FakeSpan(name, parent, f"{name} {len(self.spans)}", dict(attributes or {})))
        return self.spans[-1]

    async def close(self) -> None:
        """Nothing is left."""

    def names(self) -> list[str]:
        return [span.name for span in self.spans]

    def check_all_ended_once(self) -> None:
        assert [span.name for span in self.spans if span.ends != 1] == []


class TracedSteps(SteppedEngine):
    """Every request carries a trace."""

    def __init__(self, **options: Any) -> None:
        super().__init__(dummy(), **options)
        self.tracing = FakeTracing()
        self.engine = TracedEngine(
            self.driver, EngineOptions(**options), "m", self.tracing, lambda: self.now, lambda: self.now
        )

    def begin_generation(self, *arguments: Any, **named: Any) -> Any:
        return super().begin_generation(*arguments, **{"trace": TRACE, **named})


def told(engine: SteppedEngine) -> dict[int, list[Event]]:
    for context in (1, 2):
        engine.create(context)
    engine.begin_generation(1, [1, 2, 3], 9)
    engine.submit(2, [4, 5, 6, 7])
    engine.run()
    engine.begin_generation(2, [8], 3)
    engine.run()
    return engine.events


@pytest.mark.parametrize("depth", [0, 2])
def test_it_answers_as_the_plain_engine_does(depth: int) -> None:
    assert told(TracedSteps(speculation_depth=depth)) == told(SteppedEngine(dummy(), speculation_depth=depth))


def test_a_generation_has_its_phases_and_what_steps_were_like() -> None:
    engine = TracedSteps(max_in_flight=1)
    engine.create(1)
    engine.begin_generation(1, [1, 2, 3], 5)
    engine.run()
    whole, queue, prefill, decode = engine.tracing.spans
    assert engine.tracing.names() == ["engine.generate", "queue", "prefill", "decode"]
    assert whole.parent == TRACE
    assert {each.parent for each in (queue, prefill, decode)} == {whole.traceparent}
    assert whole.notes == {
        "pie.model": "m",
        "pie.tokens.fed": 3,
        "pie.finish_reason": "length",
        "pie.context.rows": 8,
    }
    steps = [span.notes["pie.steps"] for span in (queue, prefill, decode)]
    assert steps == [0, 1, 4]
    assert decode.notes["pie.batch.mean"] == 1
    assert prefill.notes["pie.schedule_s"] >= 0 < prefill.notes["pie.deliver_s"]
    engine.tracing.check_all_ended_once()


def test_a_pass_ends_with_its_prefill() -> None:
    engine = TracedSteps()
    engine.create(1)
    engine.forward(1, [1, 2, 3], trace=TRACE)
    assert engine.tracing.names() == ["engine.forward", "queue", "prefill"]
    engine.tracing.check_all_ended_once()


def test_requests_without_a_trace_have_no_spans() -> None:
    engine = TracedSteps()
    engine.create(1)
    engine.forward(1, [1, 2, 3])
    engine.begin_generation(1, [4], 3, trace=None)
    engine.run()
    assert engine.tracing.spans == []


def test_every_way_to_end_ends_the_spans() -> None:
    engine = TracedSteps(max_in_flight=1)
    for context in (1, 2, 3):
        engine.create(context, process=f"p{context}")
    refused = engine.submit(1, [10_000], trace=TRACE)
    engine.run()
    cancelled = engine.begin_generation(1, [1], 9)
    engine.send(Cancel(cancelled))
    running = engine.begin_generation(2, [1], 50)
    engine.start()
    engine.finish()
    engine.start()
    engine.send(EndProcess(ProcessId("p2")))
    missing = engine.submit(9, [1], trace=TRACE)
    engine.run()
    errors = [span.error for span in engine.tracing.spans if span.name.startswith("engine.")]
    assert errors == ["invalid-request", "cancelled", "cancelled", "not-found"]
    for request in (refused, cancelled, running, missing):
        assert isinstance(engine.events[request][-1], Failed)
    engine.tracing.check_all_ended_once()


def test_only_who_exports_spans_gets_an_engine_that_records_them() -> None:
    assert type(engine_of(dummy(), EngineOptions(), "m", None)) is Engine
    assert type(engine_of(dummy(), EngineOptions(), "m", FakeTracing())) is TracedEngine
