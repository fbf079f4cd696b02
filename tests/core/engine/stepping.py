"""An engine on the dummy driver, driven by hand: commands in, steps run until nothing moves, answers looked up.

Every message is encoded and decoded on its way, so nothing passes here that could not cross between two processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import ForwardBatch, ForwardResult
from pie_core.engine.engine import Engine
from pie_core.engine.messages import (
    Command,
    CreateContext,
    Event,
    Failed,
    ForkContext,
    Forward,
    ForwardDone,
    Generate,
    Generated,
    ReadStatus,
    ReadTokens,
    Sample,
    SamplerSpec,
    Status,
    Step,
    Stepped,
    Steps,
    Tokens,
    ended_by,
    one_by_one,
    opened_by,
)
from pie_core.engine.options import EngineOptions
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant, Ticket
from pie_core.testing.batch_checks import broken_promises
from pie_plugins.drivers.dummy.driver import DummyDriver
from pie_plugins.drivers.dummy.options import DummyOptions, check_options

VOCAB = 97
GREEDY = SamplerSpec()
RANDOM = SamplerSpec(temperature=1.0)

E = TypeVar("E")


def dummy(vocab_size: int = VOCAB, **options: Any) -> DummyDriver:
    options = {"num_pages": 64, "page_size": 4, "max_model_len": 512, **options}
    return DummyDriver(check_options(DummyOptions(**options)), vocab_size)


def through_codec(message: Any, kind: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind)


def with_checks(driver: Driver) -> Driver:
    """No batch breaks a promise."""
    submit = driver.submit

    def checked(batch: ForwardBatch) -> Ticket:
        broken = broken_promises(batch, driver.capabilities.cache)
        assert not broken, broken
        return submit(batch)

    setattr(driver, "submit", checked)  # noqa: B010 - a method, to the type checker
    return driver


class SteppedEngine:
    """Contexts 1, 2, … belong to process "p" of tenant "t" unless said otherwise; requests are numbered from 1."""

    def __init__(self, driver: Driver | None = None, **options: Any) -> None:
        self.driver = with_checks(driver or dummy())
        self.now = 0.0
        self.engine = Engine(self.driver, EngineOptions(**options), "m", lambda: self.now, lambda: self.now)
        self.events: dict[int, list[Event]] = {}
        self.in_flight: deque[Ticket] = deque()
        self._requests = 0
        self._stepping: set[RequestId] = set()  # asked for by steps, and answered as such

    def new_request(self) -> RequestId:
        self._requests += 1
        return RequestId(self._requests)

    def send(self, *commands: Command) -> None:
        for each in commands:
            if isinstance(each, Step | Steps):
                self._stepping.update(opened_by([each]))
        self.engine.handle([through_codec(each, Command) for each in commands])
        self._take_events()

    def start(self) -> bool:
        """Submits one step; whether there was one to submit."""
        ticket = self.engine.start_step()
        self._take_events()
        if ticket is not None:
            self.in_flight.append(ticket)
        return ticket is not None

    def finish(self) -> None:
        """Collects the oldest step and brings its outcome back."""
        ticket = self.in_flight.popleft()
        outcome: ForwardResult | Exception
        try:
            outcome = self.driver.collect(ticket)
        except Exception as error:
            outcome = error
        self.engine.finish_step(ticket, outcome)
        self._take_events()

    def run(self) -> None:
        """Steps until nothing moves."""
        while self.start() or self.in_flight:
            while self.start():
                pass
            if self.in_flight:
                self.finish()

    def run_until_answered(self, request: RequestId) -> None:
        """Steps until the request has its answer; what runs ahead may still be in flight."""
        while not self.is_answered(request):
            while self.start():
                pass
            if self.in_flight:
                self.finish()
            else:
                assert self.is_answered(request), f"request {request} is stuck"

    def is_answered(self, request: RequestId) -> bool:
        events = self.events.get(request, [])
        return any(not isinstance(each, Generated) or each.finish is not None for each in events[-1:])

    def _take_events(self) -> None:
        for event in self.engine.take_events():
            if isinstance(event, ForwardDone | Stepped):
                is_stepped = isinstance(event, Stepped)
                assert all((request in self._stepping) == is_stepped for request in ended_by([event])), event
            for answer in one_by_one(through_codec(event, Event)):
                self.events.setdefault(answer.request, []).append(answer)

    # ---- answers

    def final(self, request: RequestId, kind: type[E]) -> E:
        """The one final event of a request, which must be of this kind."""
        finals = [
            event
            for event in self.events.get(request, [])
            if not isinstance(event, Generated) or event.finish is not None
        ]
        assert len(finals) == 1, f"request {request} was answered by {finals}"
        assert isinstance(finals[0], kind), finals[0]
        return finals[0]

    def generated(self, request: RequestId) -> list[int]:
        return [
            token
            for event in self.events.get(request, [])
            if isinstance(event, Generated)
            for token in event.tokens
        ]

    # ---- common commands

    def create(self, context: int, process: str = "p", tenant: str = "t", seed: int = 7) -> None:
        self.send(CreateContext(ContextId(context), ProcessId(process), Tenant(tenant), seed))

    def fork(self, source: int, context: int) -> None:
        self.send(ForkContext(ContextId(context), ContextId(source)))

    def submit(self, context: int, tokens: Sequence[int], **fields: Any) -> RequestId:
        request = self.new_request()
        self.send(Forward(request=request, context=ContextId(context), tokens=tuple(tokens), **fields))
        return request

    def forward(self, context: int, tokens: Sequence[int], **fields: Any) -> ForwardDone:
        request = self.submit(context, tokens, **fields)
        self.run()
        return self.final(request, ForwardDone)

    def refused(self, context: int, tokens: Sequence[int] = (1,), **fields: Any) -> Failed:
        request = self.submit(context, tokens, **fields)
        self.run()
        return self.final(request, Failed)

    def draw(self, context: int, tokens: Sequence[int], sampler: SamplerSpec = GREEDY) -> int:
        """Feeds tokens and draws the next."""
        return self.forward(context, tokens, samples=(Sample(len(tokens) - 1, sampler),)).tokens[0]

    def begin_generation(
        self,
        context: int,
        tokens: Sequence[int],
        max_tokens: int,
        sampler: SamplerSpec = GREEDY,
        stop_tokens: Sequence[int] = (),
        **fields: Any,
    ) -> RequestId:
        request = self.new_request()
        self.send(
            Generate(
                request=request,
                context=ContextId(context),
                tokens=tuple(tokens),
                sampler=sampler,
                stop_tokens=tuple(stop_tokens),
                max_tokens=max_tokens,
                **fields,
            )
        )
        return request

    def generate(
        self,
        context: int,
        tokens: Sequence[int],
        max_tokens: int,
        sampler: SamplerSpec = GREEDY,
        stop_tokens: Sequence[int] = (),
    ) -> list[int]:
        request = self.begin_generation(context, tokens, max_tokens, sampler, stop_tokens)
        self.run()
        self.final(request, Generated)
        return self.generated(request)

    def history(self, context: int) -> list[int]:
        request = self.new_request()
        self.send(ReadTokens(request=request, context=ContextId(context)))
        self.run()
        return self.final(request, Tokens).tokens

    def status(self) -> Status:
        request = self.new_request()
        self.send(ReadStatus(request=request))
        return self.final(request, Status)

    def all_pages_are_free(self) -> bool:
        status = self.status()
        return status.free_pages == status.total_pages
