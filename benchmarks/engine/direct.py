"""An engine without guests, ports and processes: commands go in, steps run at once. For what the engine alone costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pie_core.contracts.driver import Driver, DriverRequest
from pie_core.contracts.forward import ForwardBatch
from pie_core.engine.engine import Engine
from pie_core.engine.messages import (
    Command,
    CreateContext,
    Event,
    Failed,
    ForkContext,
    Forward,
    ReadStatus,
    Sample,
    SamplerSpec,
    Status,
)
from pie_core.engine.options import EngineOptions
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant, Ticket
from pie_core.plugins import load_plugins

PROCESS, TENANT = ProcessId("benchmark"), Tenant("t")
GREEDY = SamplerSpec()


class DirectEngine:
    def __init__(self, options: EngineOptions, **driver: Any) -> None:
        declaration = load_plugins().driver("dummy")
        chosen = {"vocab_size": 512, "interpret": False, "max_batch_requests": 1024, "max_model_len": 65536}
        self.driver: Driver = declaration.load(
            DriverRequest(None, "cpu", declaration.options(**{**chosen, **driver}), {}, {})
        )
        self.engine = Engine(self.driver, options, "dummy")
        self.batches: list[ForwardBatch] = []  # if somebody watches
        self.events: list[Event] = []
        self._numbers = 0

    def watch(self) -> None:
        """Keeps every batch from now on."""
        submit = self.driver.submit

        def kept(batch: ForwardBatch) -> Ticket:
            self.batches.append(batch)
            return submit(batch)

        setattr(self.driver, "submit", kept)  # noqa: B010 - a method is replaced on purpose

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def create(self) -> ContextId:
        context = ContextId(self.number())
        self.engine.handle([CreateContext(context, PROCESS, TENANT, seed=context)])
        return context

    def fork(self, source: ContextId) -> ContextId:
        child = ContextId(self.number())
        self.engine.handle([ForkContext(child, source)])
        return child

    def forward(self, context: ContextId, tokens: tuple[int, ...], *, sampled: bool = True) -> Forward:
        samples = (Sample(len(tokens) - 1, GREEDY),) if sampled else ()
        return Forward(RequestId(self.number()), context, tokens, samples=samples)

    def run(self, *commands: Command) -> list[Event]:
        """Hands the commands over and runs steps until nothing is left to do."""
        self.engine.handle(commands)
        while (ticket := self.engine.start_step()) is not None:
            self.engine.finish_step(ticket, self.driver.collect(ticket))
        events = self.engine.take_events()
        for event in events:
            if isinstance(event, Failed):
                raise SystemExit(f"a request failed: {event}")
        return events

    def ask(self, build: Callable[[RequestId], Command]) -> Event:
        return self.run(build(RequestId(self.number())))[-1]

    def status(self) -> Status:
        found = self.ask(lambda request: ReadStatus(request=request))
        assert isinstance(found, Status)
        return found
