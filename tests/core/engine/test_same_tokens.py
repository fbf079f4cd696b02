"""Random programs of passes, generations, forks, truncations and snapshots over several contexts give the same tokens
as a plain sequential replay, whatever the batch limits, page size, chunking, cache groups and what runs ahead; and
leak no page."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis.strategies as st
from hypothesis import event, given, settings

from pie_core.engine.messages import (
    Ack,
    BreakOff,
    Cancel,
    DeleteSnapshot,
    DropContext,
    EndProcess,
    EvictRows,
    Failed,
    ForwardDone,
    Generated,
    OpenSnapshot,
    PinRows,
    Sample,
    SamplerSpec,
    SaveSnapshot,
    SnapshotOpened,
    TruncateContext,
)
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant
from tests.core.engine.plain_replay import PlainContext, PlainReplay, Runs
from tests.core.engine.stepping import VOCAB, SteppedEngine, dummy

SAMPLERS = (
    SamplerSpec(),
    SamplerSpec(temperature=1.0),
    SamplerSpec(temperature=0.7, top_k=9, top_p=0.9, seed=5),
    SamplerSpec(temperature=1.3, min_p=0.02, repetition=1.4, presence=0.3, frequency=0.2),
    SamplerSpec(bias_tokens=(3, 4), bias_values=(30.0, -1.0)),
)
GROUPS = (("paged",), ("latent", "window"), ("state",), ("paged", "window", "state"))

tokens_st = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=11)
number = st.integers(0, 99)


@dataclass(frozen=True)
class Op:
    """One command of a program; numbers are taken modulo whatever they choose from."""

    kind: str
    context: int
    tokens: list[int]
    sampler: SamplerSpec
    a: int
    b: int
    steps: int  # how far the engine runs before the next command


ops_st = st.builds(
    Op,
    kind=st.sampled_from(
        [
            *["forward", "generate"] * 3,
            *["loop"] * 3,
            "fork",
            "fork",
            "evict",
            "evict",
            *["again"] * 3,
            "truncate",
            "save",
            "open",
            "break",
            "cancel",
            "drop",
            "create",
        ]
    ),
    context=number,
    tokens=tokens_st,
    sampler=st.sampled_from(SAMPLERS),
    a=number,
    b=number,
    steps=st.integers(0, 3),
)


def some_of(row: int, op: Op) -> Runs:
    """A mask that shows a stretch somewhere, the row itself, and rows still to come."""
    hidden, shown = op.a % (row + 1), 1 + op.b % 9
    return (hidden, shown) if hidden + shown > row else (hidden, shown, row - hidden - shown, 1 + op.b % 3)


@dataclass
class Machine:
    """Runs a program on an engine and notes what a replay has to do and to find."""

    engine: SteppedEngine
    replay: PlainReplay
    masks: bool
    patient: bool  # every command is over before the next: pages are scarce, so any of them may fail
    plain: dict[int, PlainContext] = field(default_factory=dict)
    snapshots: dict[str, PlainContext] = field(default_factory=dict)
    checks: list[Any] = field(default_factory=list)  # what to replay once the engine is done, in order
    last_context: int = 0

    def perform(self, op: Op) -> None:
        live = sorted(self.plain)
        if not live or (op.kind == "create" and len(live) < 5):
            self.create(op.a)
        else:
            perform = {"create": self.forward, "break": self.break_}.get(op.kind) or getattr(self, op.kind)
            perform(live[op.context % len(live)], op)
        if self.patient:
            self.engine.run()
            self.catch_up()
        else:
            self.run_some(op.steps)

    def run_some(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.start()
            if len(self.engine.in_flight) > 1 or (steps > 1 and self.engine.in_flight):
                self.engine.finish()

    def catch_up(self) -> None:
        """The replay does what the engine has done, and compares."""
        self.engine.run()
        checks, self.checks = self.checks, []
        for check in checks:
            check()

    def new_context(self) -> int:
        self.last_context += 1
        return self.last_context

    def create(self, seed: int) -> None:
        context = self.new_context()
        self.engine.create(context, seed=seed)
        self.plain[context] = PlainContext(seed)

    def forward(self, context: int, op: Op) -> None:
        count = len(op.tokens)
        positions = None if op.a % 3 else tuple((op.b + 7 * row) % 60 for row in range(count))
        logit_mask = (op.b % 50, 30) if op.a % 5 == 0 else None
        rows = sorted({op.a % count, op.b % count, count - 1})[op.a % 2 :]
        asked = [(row, op.sampler) for row in rows for _ in range(1 + op.b % 2)]
        plain = self.plain[context]
        if self.patient or (self.masks and op.b % 2):
            self.catch_up()
        length = len(plain.tokens)
        masks: tuple[Runs, ...] = ()
        if self.masks and op.b % 2:
            masks = tuple(some_of(length + row, op) for row in range(count))
        request = self.engine.submit(
            context,
            op.tokens,
            positions=positions,
            masks=masks,
            logit_mask=logit_mask,
            samples=tuple(Sample(row, spec) for row, spec in asked),
        )

        def check() -> None:
            if self.failed(request):
                return
            base = len(plain.tokens)
            plain.extend(op.tokens, positions, masks)
            expected = self.replay.draw(plain, [(base + row, spec) for row, spec in asked], logit_mask)
            done = self.engine.final(request, ForwardDone)
            assert done.tokens == expected
            assert (done.length, done.position) == (len(plain.tokens), plain.position)

        self.checks.append(check)

    def failed(self, request: RequestId) -> bool:
        """Whether memory ran out (only where it is scarce) or the request was cancelled."""
        last = self.engine.events[request][-1]
        if not isinstance(last, Failed):
            return False
        event(f"failed: {last.code}")
        assert last.code == "cancelled" or (
            self.patient and last.code in ("out-of-pages", "limit-exceeded")
        ), last
        self.engine.final(request, Failed)
        return True

    def generate(self, context: int, op: Op, stop_early: bool = False) -> RequestId:
        stops = (op.b, op.b + 1, op.b + 2) if op.a % 2 else ()
        limit = 1 + op.a % 12
        request = self.engine.begin_generation(context, op.tokens, limit, op.sampler, stops)
        plain = self.plain[context]
        if not stop_early:
            self.checks.append(lambda: self.check_generation(plain, request, op, limit, stops))
        return request

    def check_generation(
        self, plain: PlainContext, request: RequestId, op: Op, limit: int, stops: tuple[int, ...]
    ) -> None:
        if self.failed(request):
            return
        plain.extend(op.tokens)
        expected = self.replay.generate(plain, op.sampler, limit, stops)
        final = self.engine.final(request, Generated)
        assert self.engine.generated(request) == expected
        assert final.finish == ("length" if len(expected) == limit else "stop")
        assert (final.length, final.position) == (len(plain.tokens), plain.position)

    def loop(self, context: int, op: Op) -> None:
        """The explicit loop, with a pass now and then that is not what anybody would have guessed."""
        self.catch_up()
        plain, tokens = self.plain[context], op.tokens
        for turn in range(1 + op.a % 7):
            other = turn == op.b % 8
            sampler = SAMPLERS[op.b % len(SAMPLERS)] if other else op.sampler
            samples = (Sample(len(tokens) - 1, sampler),)
            speculate = op.b % 9 != turn
            request = self.engine.submit(context, tokens, samples=samples, pass_speculation=speculate)
            self.engine.run_until_answered(request)
            if self.failed(request):
                return
            plain.extend(tokens)
            drawn = self.engine.final(request, ForwardDone).tokens
            assert drawn == self.replay.draw(plain, [(len(plain.tokens) - 1, sampler)])
            tokens = [op.a % VOCAB] if other and op.a % 2 else drawn
            self.run_some(op.steps)

    def fork(self, context: int, op: Op) -> None:
        if len(self.plain) >= 6:
            return
        child = self.new_context()
        self.engine.fork(context, child)
        parent = self.plain[context]
        placeholder = PlainContext(0)
        self.plain[child] = placeholder

        def copy() -> None:
            made = parent.child()
            for name in ("stream", "tokens", "positions", "masks", "pinned", "since"):
                setattr(placeholder, name, getattr(made, name))

        self.checks.append(copy)
        for writer in (child, context) if op.b % 2 else (context, child):  # both write to the page they share
            self.forward(writer, op)

    def truncate(self, context: int, op: Op) -> None:
        self.catch_up()
        plain = self.plain[context]
        length = op.a % (len(plain.tokens) + 1)
        self.engine.send(TruncateContext(ContextId(context), length))
        self.checks.append(lambda: plain.truncate(length))
        self.forward(context, op)

    def again(self, context: int, op: Op) -> None:
        """Another context is asked for what one had computed, or nearly."""
        self.catch_up()
        tokens = self.plain[context].tokens[: op.a] + op.tokens[: op.b % 3]
        if not tokens or len(self.plain) >= 6:
            return
        self.create(op.b)
        for twin in (self.last_context, context):
            self.generate(twin, replace(op, tokens=tokens))

    def evict(self, context: int, op: Op) -> None:
        """Pins a little, evicts some, and goes on from what is left."""
        self.catch_up()
        if not self.masks:
            return
        plain = self.plain[context]
        length = len(plain.tokens)
        start, pinned = op.a % (length + 1), min(op.b % 4, length)
        stop = min(start + op.b % 20, length)
        self.engine.send(PinRows(ContextId(context), 0, pinned))
        self.engine.send(EvictRows(ContextId(context), start, stop))
        plain.pinned |= set(range(pinned))
        plain.evict(start, stop)
        self.generate(context, op)

    def save(self, context: int, op: Op) -> None:
        name, request = f"s{op.a % 3}", self.engine.new_request()
        self.engine.send(SaveSnapshot(request, ContextId(context), name, b"x%d" % op.b))
        self.catch_up()
        if not self.failed(request):
            self.engine.final(request, Ack)
            self.snapshots[name] = self.plain[context].child()

    def open(self, context: int, op: Op) -> None:
        if not self.snapshots or len(self.plain) >= 6:
            return
        name = sorted(self.snapshots)[op.a % len(self.snapshots)]
        child, request = self.new_context(), self.engine.new_request()
        take = op.b % 2 == 0
        self.engine.send(OpenSnapshot(request, ContextId(child), ProcessId("p"), Tenant("t"), name, take))
        opened = self.engine.final(request, SnapshotOpened)
        self.plain[child] = self.snapshots[name].child()
        assert (opened.length, opened.position) == (len(self.plain[child].tokens), self.plain[child].position)
        self.forward(child, op)
        if take:
            del self.snapshots[name]

    def break_(self, context: int, op: Op) -> None:
        self.catch_up()
        request = self.generate(context, op, stop_early=True)
        self.run_some(op.a % 9)
        consumed = op.b % (len(self.engine.generated(request)) + 1)
        breaking = self.engine.new_request()
        self.engine.send(BreakOff(breaking, request, consumed))
        self.engine.run()
        if self.failed(request):
            return
        self.engine.final(breaking, Ack)
        self.engine.final(request, Generated)
        plain = self.plain[context]
        plain.extend(op.tokens)
        kept = self.replay.generate(plain, op.sampler, consumed, ())
        assert kept == self.engine.generated(request)[:consumed]

    def cancel(self, context: int, op: Op) -> None:
        self.catch_up()
        request = self.generate(context, op)
        self.run_some(op.b % 7)
        self.engine.send(Cancel(request))
        self.catch_up()

    def drop(self, context: int, op: Op) -> None:
        self.engine.send(DropContext(ContextId(context)))
        del self.plain[context]

    def finish(self) -> None:
        self.catch_up()
        for context, plain in self.plain.items():
            assert self.engine.history(context) == plain.tokens
        self.engine.send(EndProcess(ProcessId("p")))
        for name in self.snapshots:
            request = self.engine.new_request()
            self.engine.send(DeleteSnapshot(request, Tenant("t"), name))
            self.engine.final(request, Ack)
        assert self.engine.all_pages_are_free()
        assert self.engine.status().swapping.bytes == 0
        status = self.engine.status()
        assert (status.contexts, status.waiting, status.running) == (0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(
    program=st.lists(ops_st, min_size=1, max_size=14),
    groups=st.sampled_from(GROUPS),
    page_size=st.integers(1, 6),
    window=st.integers(1, 9),
    num_pages=st.sampled_from([40, 400]),
    num_host_pages=st.sampled_from([0, 8, 1000]),
    max_batch_tokens=st.sampled_from([1, 3, 8, 64]),
    max_batch_requests=st.sampled_from([1, 2, 64]),
    max_in_flight=st.integers(1, 3),
    speculation_depth=st.integers(0, 4),
    without=st.sampled_from([(), (), ("ticket-tokens",)]),
    checkpoint_tokens=st.integers(1, 9),
)
def test_any_program_gives_the_tokens_of_a_plain_replay_and_leaks_nothing(
    program: list[Op],
    groups: tuple[str, ...],
    page_size: int,
    window: int,
    num_pages: int,
    num_host_pages: int,
    max_batch_tokens: int,
    max_batch_requests: int,
    max_in_flight: int,
    speculation_depth: int,
    without: tuple[str, ...],
    checkpoint_tokens: int,
) -> None:
    model: dict[str, Any] = {"groups": groups, "window": window}
    engine = SteppedEngine(
        dummy(
            **model,
            page_size=page_size,
            num_pages=num_pages,
            num_host_pages=num_host_pages,
            max_in_flight=3,
            without=without,
        ),
        max_batch_tokens=max_batch_tokens,
        max_batch_requests=max_batch_requests,
        max_in_flight=max_in_flight,
        speculation_depth=speculation_depth,
        checkpoint_tokens=checkpoint_tokens,
    )
    replay = PlainReplay(dummy(**model, page_size=64, num_pages=64))
    machine = Machine(engine, replay, masks="state" not in groups, patient=num_pages < 100)
    for op in program:
        machine.perform(op)
    machine.finish()
