"""Whatever programs ask for at the same time, and however steps start, end and fail meanwhile: every token is the one
that its context alone would draw, every request has one answer, and no page is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pie_core.engine.messages import (
    BreakOff,
    Cancel,
    DeleteSnapshot,
    DropContext,
    EndProcess,
    Failed,
    ForkContext,
    Forward,
    ForwardDone,
    Generate,
    Generated,
    OpenSnapshot,
    Sample,
    SamplerSpec,
    SaveSnapshot,
    SetPriority,
    Steps,
    TruncateContext,
)
from pie_core.errors import ForwardError
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant
from pie_core.testing.simulated_programs import Checker, Draw, Shadow
from tests.core.engine.stepping import VOCAB, SteppedEngine, dummy

SAMPLERS = (SamplerSpec(), SamplerSpec(temperature=1.0), SamplerSpec(temperature=0.8, top_k=9, seed=5))
LONGEST = 60
some = st.integers(0, 999)


class Loop:
    """A program with one context: what it has been told, and what it waits for."""

    def __init__(self, context: int, shadow: Shadow) -> None:
        self.context = ContextId(context)
        self.shadow = shadow
        self.request: RequestId | None = None
        self.generates = False
        self.received: list[int] = []
        self.drawn: tuple[int, SamplerSpec] | None = None
        self.settle: Callable[[Any], None] = lambda event: None
        self.may_fail: tuple[str, ...] = ()  # codes of failures that `settle` takes


class Interleavings(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 3, 8]),
        contexts_that_fit=st.sampled_from([2, 3, 40]),
        depth=st.integers(0, 3),
        in_flight=st.integers(1, 3),
        requests=st.sampled_from([1, 2, 64]),
        tokens=st.sampled_from([2, 5, 64]),
        without=st.sampled_from([(), (), ("ticket-tokens",)]),
    )
    def open(
        self,
        page_size: int,
        contexts_that_fit: int,
        depth: int,
        in_flight: int,
        requests: int,
        tokens: int,
        without: tuple[str, ...],
    ) -> None:
        pages = -(-contexts_that_fit * (LONGEST + 12) // page_size)
        self.engine = SteppedEngine(
            dummy(page_size=page_size, num_pages=pages, max_in_flight=3, without=without),
            speculation_depth=depth,
            max_in_flight=in_flight,
            max_batch_requests=requests,
            max_batch_tokens=tokens,
        )
        self.checker = Checker(lambda pages, size: dummy(num_pages=pages, page_size=size))
        self.loops: list[Loop] = []
        self.contexts = 0
        self.crashed = False
        self.snapshots: dict[str, Shadow] = {}
        for _ in range(4):
            self.launch()

    # ---- programs

    def pick(self, number: int, *, idle: bool) -> Loop | None:
        found = [each for each in self.loops if (each.request is None) == idle]
        return found[number % len(found)] if found else None

    @precondition(lambda self: len(self.loops) < 7)
    @rule()
    def launch(self) -> None:
        self.contexts += 1
        self.engine.create(self.contexts, process=f"p{self.contexts % 3}", seed=self.contexts)
        self.loops.append(Loop(self.contexts, Shadow(self.contexts)))

    def ask(
        self,
        loop: Loop,
        settle: Callable[[Any], None],
        *,
        generates: bool = False,
        may_fail: tuple[str, ...] = (),
    ) -> RequestId:
        loop.request, loop.settle, loop.may_fail = self.engine.new_request(), settle, may_fail
        loop.generates, loop.received = generates, []
        return loop.request

    @rule(number=some, tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), sampler=some)
    def prompt(self, number: int, tokens: list[int], sampler: int) -> None:
        loop = self.pick(number, idle=True)
        if loop is None or len(loop.shadow.tokens) > LONGEST - 10:
            return
        spec = SAMPLERS[sampler % len(SAMPLERS)]
        request = self.ask(loop, lambda event: self.fed(loop, tokens, spec, event))
        samples = (Sample(len(tokens) - 1, spec),)
        self.engine.send(Forward(request, loop.context, tuple(tokens), samples=samples))

    @rule(numbers=st.lists(some, min_size=1, max_size=7), other=st.integers(0, 6 * VOCAB))
    def turns(self, numbers: list[int], other: int) -> None:
        """Some go on with their loops; now and then one feeds another token than it drew."""
        chosen = [
            loop
            for place, loop in enumerate(self.loops)
            if place in {number % 7 for number in numbers}
            and loop.request is None
            and loop.drawn is not None
            and len(loop.shadow.tokens) < LONGEST
        ]
        requests, tokens = [], []
        for place, loop in enumerate(chosen):
            assert loop.drawn is not None
            token, spec = loop.drawn
            if place == 0 and other < VOCAB:
                token = other
            requests.append(self.ask_turn(loop, token, spec))
            tokens.append(token)
        self.engine.send(Steps(requests, [each.context for each in chosen], tokens))

    def ask_turn(self, loop: Loop, token: int, spec: SamplerSpec) -> RequestId:
        return self.ask(loop, lambda event: self.fed(loop, [token], spec, event))

    def fed(self, loop: Loop, tokens: list[int], spec: SamplerSpec, done: ForwardDone) -> None:
        shadow = loop.shadow
        shadow.tokens += tokens
        assert (done.length, done.position) == (len(shadow.tokens), len(shadow.tokens))
        shadow.draws.append(Draw(done.length - 1, spec, shadow.epoch, done.tokens[0]))
        loop.drawn = (done.tokens[0], spec)

    @rule(number=some, count=st.integers(1, 12), sampler=some, stop=some, whole=st.booleans())
    def generate(self, number: int, count: int, sampler: int, stop: int, whole: bool) -> None:
        loop = self.pick(number, idle=True)
        if loop is None or len(loop.shadow.tokens) > LONGEST - 14:
            return
        spec, stops = SAMPLERS[sampler % len(SAMPLERS)], (stop % VOCAB, stop % 7) if stop % 3 == 0 else ()
        request = self.ask(
            loop, lambda event: self.generated(loop, stop % VOCAB, spec, event), generates=True
        )
        self.engine.send(Generate(request, loop.context, (stop % VOCAB,), spec, stops, count, whole=whole))

    def generated(self, loop: Loop, first: int, spec: SamplerSpec, done: Generated) -> None:
        shadow = loop.shadow
        shadow.tokens.append(first)
        kept = done.length - len(shadow.tokens)
        assert 0 <= kept <= len(loop.received)
        for token in loop.received[:kept]:
            shadow.draws.append(Draw(len(shadow.tokens) - 1, spec, shadow.epoch, token))
            shadow.tokens.append(token)
        loop.drawn = None

    @rule(number=some)
    def fork(self, number: int) -> None:
        loop = self.pick(number, idle=True)
        if loop is None or len(self.loops) > 8:
            return
        self.contexts += 1
        self.engine.send(ForkContext(ContextId(self.contexts), loop.context))
        self.loops.append(Loop(self.contexts, loop.shadow.child()))

    @rule(number=some)
    def save(self, number: int) -> None:
        loop = self.pick(number, idle=True)
        if loop is None:
            return
        name, saved = f"s{number % 3}", loop.shadow.child()

        def settle(event: Any) -> None:
            if isinstance(event, Failed):
                loop.shadow.children -= 1
            else:
                self.snapshots[name] = saved

        request = self.ask(loop, settle, may_fail=("limit-exceeded",))
        self.engine.send(SaveSnapshot(request, loop.context, name, b""))

    @precondition(lambda self: self.snapshots and len(self.loops) < 8)
    @rule(number=some)
    def open_snapshot(self, number: int) -> None:
        self.engine.run()
        self.hear()
        name = sorted(self.snapshots)[number % len(self.snapshots)]
        self.contexts += 1
        loop = Loop(self.contexts, self.snapshots[name].child())
        self.loops.append(loop)
        request = self.ask(loop, lambda event: None)
        process, tenant = ProcessId("p1"), Tenant("t")
        self.engine.send(OpenSnapshot(request, loop.context, process, tenant, name, take=False))

    @rule(number=some, length=some)
    def truncate(self, number: int, length: int) -> None:
        loop = self.pick(number, idle=True)
        if loop is None:
            return
        self.check(loop)
        length %= len(loop.shadow.tokens) + 1
        loop.shadow.truncate(length)
        loop.drawn = None
        self.engine.send(TruncateContext(loop.context, length))

    @rule(number=some, priority=st.integers(0, 2))
    def set_priority(self, number: int, priority: int) -> None:
        loop = self.pick(number, idle=True)
        if loop is not None:
            self.engine.send(SetPriority(loop.context, priority))

    @rule(number=some)
    def drop(self, number: int) -> None:
        loop = self.pick(number, idle=True)
        if loop is not None:
            self.check(loop)
            self.loops.remove(loop)
            self.engine.send(DropContext(loop.context))

    @rule(number=some)
    def cancel(self, number: int) -> None:
        loop = self.pick(number, idle=False)
        if loop is not None:
            assert loop.request is not None
            self.engine.send(Cancel(loop.request))
            self.hear()

    @rule(number=some, consumed=some)
    def break_off(self, number: int, consumed: int) -> None:
        loop = self.pick(number, idle=False)
        if loop is not None and loop.generates:
            assert loop.request is not None
            loop.generates = False  # once is enough
            kept = consumed % (len(loop.received) + 1) if loop.received or consumed % 2 else None
            self.engine.send(BreakOff(self.engine.new_request(), loop.request, kept))
            self.hear()

    # ---- steps

    @rule()
    def start(self) -> None:
        self.engine.start()

    @rule(fails=st.sampled_from([False] * 9 + [True]))
    def finish(self, fails: bool) -> None:
        if not self.engine.in_flight:
            return
        ticket = self.engine.in_flight.popleft()
        outcome: Any = self.engine.driver.collect(ticket)
        if fails:
            self.crashed, outcome = True, ForwardError("the device failed")
        self.engine.engine.finish_step(ticket, outcome)
        self.engine._take_events()
        self.hear()

    @rule(steps=st.integers(2, 12))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.start()
            self.start()
            self.finish(fails=False)

    @rule()
    def rest(self) -> None:
        """Nobody asks for anything until the driver has nothing to do: whatever can run ahead has."""
        self.engine.run()

    @invariant()
    def hear(self) -> None:
        for loop in self.loops:
            while loop.request is not None and self.engine.events.get(loop.request):
                self.hear_one(loop, self.engine.events[loop.request].pop(0))

    def hear_one(self, loop: Loop, event: Any) -> None:
        if isinstance(event, Generated):
            loop.received += event.tokens
            if event.finish is None:
                return
        if isinstance(event, Failed) and event.code not in loop.may_fail:
            assert event.code == "cancelled" or (self.crashed and event.code == "forward"), event
            loop.drawn = None
        else:
            loop.settle(event)
        loop.request = None

    def check(self, loop: Loop) -> None:
        self.checker.add(f"context {loop.context}", loop.shadow)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run()
        self.hear()
        for loop in self.loops:
            assert loop.request is None, "never answered"
            self.check(loop)
            assert self.engine.history(loop.context) == loop.shadow.tokens
        assert self.checker.wrong_draws() == []
        for name in self.snapshots:
            self.engine.send(DeleteSnapshot(self.engine.new_request(), Tenant("t"), name))
        self.engine.send(*(EndProcess(ProcessId(f"p{number}")) for number in range(3)))
        self.engine.run()
        assert self.engine.all_pages_are_free()
        assert self.engine.status().contexts == 0


Interleavings.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_interleavings = Interleavings.TestCase
