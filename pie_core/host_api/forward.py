"""One forward pass: described by calls, submitted as one message, answered through a pending pass."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable, Sequence

import msgspec

from pie_core.contracts.forward import ProbeKind
from pie_core.engine.messages import Event, Forward, ForwardDone, Probe, Sample, SamplerSpec
from pie_core.errors import InvalidRequest
from pie_core.host_api.context import HostContext
from pie_core.host_api.guest_state import ProgramState
from pie_core.host_api.poll import NS, Pollable
from pie_core.host_api.program_trace import ProgramTrace, until_done
from pie_core.ids import RequestId
from pie_core.sandbox.hosting import Interface, Pending

interface = Interface("forward")


class HostSampler:
    """A sampler that the guest sets up once and uses for many passes."""

    __slots__ = ("spec",)

    def __init__(self) -> None:
        self.spec = SamplerSpec()

    def change(self, **values: object) -> None:
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidRequest(f"sampler {name} is {value}: expected a finite number")
        self.spec = msgspec.structs.replace(self.spec, **values)


class HostPass:
    """A pass under construction."""

    __slots__ = (
        "allow_speculation",
        "context",
        "logit_mask",
        "masks",
        "masks_attention_only",
        "num_drafts",
        "positions",
        "priority",
        "probes",
        "samples",
        "submitted",
        "timeout_s",
        "tokens",
        "trace",
    )

    def __init__(self, context: HostContext) -> None:
        self.context = context
        self.tokens: list[int] = []
        self.positions: list[int] | None = None
        self.masks: tuple[tuple[int, ...], ...] = ()
        self.masks_attention_only = False
        self.logit_mask: tuple[int, ...] | None = None
        self.samples: list[Sample] = []
        self.probes: list[Probe] = []
        self.num_drafts = 0
        self.allow_speculation = True
        self.timeout_s: float | None = None
        self.priority: int | None = None
        self.submitted = False
        self.trace: str | None = None

    def check_open(self) -> None:
        if self.submitted:
            raise InvalidRequest(
                f"this pass of {len(self.tokens)} tokens was executed already; make a new one"
            )

    def add(self, tokens: Sequence[int], positions: Sequence[int] | None) -> None:
        """Positions are written down only once a pass has explicit ones: the engine knows the others."""
        if self.num_drafts:
            raise InvalidRequest(
                f"drafts come last: the pass has {self.num_drafts}; add these {len(tokens)} tokens before input-drafts"
            )
        if positions is not None and self.positions is None:
            start = self.context.rows.next
            self.positions = list(range(start, start + len(self.tokens)))
        if self.positions is not None:
            start = self.positions[-1] + 1 if self.positions else self.context.rows.next
            self.positions.extend(range(start, start + len(tokens)) if positions is None else positions)
        self.tokens.extend(tokens)

    @property
    def repeatable(self) -> SamplerSpec | None:
        """The sampler, if this does what a turn of a loop does: tokens that follow, and one drawn behind the last."""
        plain = len(self.samples) == 1 and self.samples[0].row == len(self.tokens) - 1
        extras = bool(self.masks or self.probes or self.num_drafts)
        asked = (self.positions, self.logit_mask, self.timeout_s, self.priority)
        if not plain or extras or any(each is not None for each in asked) or not self.allow_speculation:
            return None
        return self.samples[0].sampler

    def message(self, request: RequestId) -> Forward:
        return Forward(
            request=request,
            context=self.context.id,
            tokens=tuple(self.tokens),
            positions=None if self.positions is None else tuple(self.positions),
            masks=self.masks,
            logit_mask=self.logit_mask,
            samples=tuple(self.samples),
            probes=tuple(self.probes),
            num_drafts=self.num_drafts,
            pass_speculation=self.allow_speculation,
            timeout_s=self.timeout_s,
            priority=self.priority,
            trace=self.trace,
            masks_attention_only=self.masks_attention_only,
        )


class PendingPass:
    """A submitted pass, and what it gave."""

    __slots__ = ("done",)

    def __init__(self, done: Pending[ForwardDone] | Pending[int]) -> None:
        """An int is the token that a turn drew."""
        self.done = done

    def tokens(self) -> Pending[list[int]]:
        return self.done.map(_tokens_of)

    def close(self) -> None:
        """The guest dropped the handle: a pass that is under way still writes its rows."""

    def probe_values(self, index: int) -> tuple[list[int], bytes]:
        if not self.done.done:
            raise InvalidRequest(f"the pass has not finished: call tokens() before its probe {index}")
        given = self.done.result()
        probes = [] if isinstance(given, int) else given.probes
        if index >= len(probes):
            raise InvalidRequest(f"there is no probe {index}: the pass has {len(probes)}")
        return probes[index].token_ids, probes[index].values


def seconds(duration_ns: int) -> float:
    """A time limit that a program gave. Raises InvalidRequest."""
    if duration_ns == 0:
        raise InvalidRequest("a time limit of 0 ns leaves no time at all; expected more")
    return duration_ns / NS


def _tokens_of(given: ForwardDone | int) -> list[int]:
    return [given] if isinstance(given, int) else given.tokens


interface.resource("sampler", HostSampler)
interface.resource("forward-pass", HostPass)
interface.resource("pending-pass", PendingPass)


@interface.function("[constructor]sampler")
def new_sampler(guest: ProgramState) -> HostSampler:
    return HostSampler()


@interface.function("sampler.temperature")
def temperature(guest: ProgramState, sampler: HostSampler, value: float) -> None:
    sampler.change(temperature=value)


@interface.function("sampler.top-k")
def top_k(guest: ProgramState, sampler: HostSampler, value: int) -> None:
    sampler.change(top_k=value)


@interface.function("sampler.top-p")
def top_p(guest: ProgramState, sampler: HostSampler, value: float) -> None:
    sampler.change(top_p=value)


@interface.function("sampler.min-p")
def min_p(guest: ProgramState, sampler: HostSampler, value: float) -> None:
    sampler.change(min_p=value)


@interface.function("sampler.penalties")
def penalties(
    guest: ProgramState, sampler: HostSampler, repetition: float, presence: float, frequency: float
) -> None:
    sampler.change(repetition=repetition, presence=presence, frequency=frequency)


@interface.function("sampler.logit-bias")
def logit_bias(guest: ProgramState, sampler: HostSampler, tokens: list[int], values: list[float]) -> None:
    if len(tokens) != len(values):
        raise InvalidRequest(
            f"logit bias names {len(tokens)} tokens and {len(values)} values: expected one each"
        )
    for token, value in zip(tokens, values, strict=True):
        if not math.isfinite(value):
            raise InvalidRequest(
                f"logit bias of token {token} is {value}, which is not finite; to forbid a token use a logit mask"
            )
    sampler.change(bias_tokens=tuple(tokens), bias_values=tuple(values))


@interface.function("sampler.seed")
def seed(guest: ProgramState, sampler: HostSampler, value: int) -> None:
    sampler.change(seed=value)


@interface.function("[constructor]forward-pass")
def new_pass(guest: ProgramState, context: HostContext) -> HostPass:
    return HostPass(context)


@interface.function("forward-pass.input")
def input_(guest: ProgramState, forward: HostPass, tokens: list[int]) -> None:
    forward.check_open()
    forward.add(tokens, None)


@interface.function("forward-pass.input-at")
def input_at(guest: ProgramState, forward: HostPass, tokens: list[int], positions: list[int]) -> None:
    forward.check_open()
    if len(tokens) != len(positions):
        raise InvalidRequest(
            f"input-at got {len(tokens)} tokens and {len(positions)} positions: expected one each"
        )
    forward.add(tokens, positions)


@interface.function("forward-pass.input-drafts")
def input_drafts(guest: ProgramState, forward: HostPass, tokens: list[int]) -> None:
    forward.check_open()
    forward.add(tokens, None)
    forward.num_drafts = len(tokens)


@interface.function("forward-pass.attention-mask")
def attention_mask(guest: ProgramState, forward: HostPass, rows: list[list[int]]) -> None:
    forward.check_open()
    forward.masks = tuple(tuple(row) for row in rows)


@interface.function("forward-pass.mask-attention-layers-only")
def mask_attention_layers_only(guest: ProgramState, forward: HostPass) -> None:
    forward.check_open()
    forward.masks_attention_only = True


@interface.function("forward-pass.logit-mask")
def logit_mask(guest: ProgramState, forward: HostPass, runs: list[int]) -> None:
    forward.check_open()
    forward.logit_mask = tuple(runs)


@interface.function("forward-pass.sample")
def sample(guest: ProgramState, forward: HostPass, rows: list[int], sampler: HostSampler) -> None:
    forward.check_open()
    forward.samples.extend(Sample(row, sampler.spec) for row in rows)


def _probe(forward: HostPass, probe: Probe) -> None:
    forward.check_open()
    forward.probes.append(probe)


@interface.function("forward-pass.probe-logits")
def probe_logits(guest: ProgramState, forward: HostPass, row: int) -> None:
    _probe(forward, Probe(row, ProbeKind.LOGITS))


@interface.function("forward-pass.probe-distribution")
def probe_distribution(guest: ProgramState, forward: HostPass, row: int, temperature: float, k: int) -> None:
    _probe(forward, Probe(row, ProbeKind.DISTRIBUTION, temperature, k))


@interface.function("forward-pass.probe-logprobs")
def probe_logprobs(guest: ProgramState, forward: HostPass, row: int, tokens: list[int]) -> None:
    _probe(forward, Probe(row, ProbeKind.LOGPROBS, tokens=tuple(tokens)))


@interface.function("forward-pass.probe-entropy")
def probe_entropy(guest: ProgramState, forward: HostPass, row: int) -> None:
    _probe(forward, Probe(row, ProbeKind.ENTROPY))


@interface.function("forward-pass.probe-hidden")
def probe_hidden(guest: ProgramState, forward: HostPass, row: int) -> None:
    _probe(forward, Probe(row, ProbeKind.HIDDEN))


@interface.function("forward-pass.pass-speculation")
def pass_speculation(guest: ProgramState, forward: HostPass, allowed: bool) -> None:
    forward.allow_speculation = allowed


@interface.function("forward-pass.timeout-ns")
def timeout_ns(guest: ProgramState, forward: HostPass, duration: int) -> None:
    forward.check_open()
    forward.timeout_s = seconds(duration)


@interface.function("forward-pass.priority")
def priority(guest: ProgramState, forward: HostPass, value: int) -> None:
    forward.check_open()
    forward.priority = guest.allowed_priority(value)


@interface.function("forward-pass.execute")
def execute(guest: ProgramState, forward: HostPass) -> PendingPass:
    forward.check_open()
    forward.submitted = True
    context = forward.context
    context.check_usable()
    sampler = forward.repeatable
    if sampler is not None and len(forward.tokens) == 1 and context.repeats == sampler:
        return PendingPass(context.turn(forward.tokens[0], is_awaited=False))
    given = forward.tokens[: len(forward.tokens) - forward.num_drafts]

    def finish(event: Event) -> ForwardDone:
        assert isinstance(event, ForwardDone)
        context.settled(event.length)
        context.note_fed(given + (event.tokens[:-1] if forward.num_drafts else []))
        return event

    context.submitted(len(forward.tokens), forward.positions)
    if sampler is not None:
        context.may_repeat(sampler)
    if guest.trace is not None and len(forward.tokens) > 1:  # a span for each prompt, not for each token
        return _traced(guest.trace, forward, finish)
    return PendingPass(context.model.engine.request(forward.message, finish, context.failed))


def _traced(trace: ProgramTrace, forward: HostPass, finish: Callable[[Event], ForwardDone]) -> PendingPass:
    span = trace.begin("forward", {"pie.tokens.fed": len(forward.tokens)})
    forward.trace = span.traceparent
    done = forward.context.model.engine.request(forward.message, finish, forward.context.failed)
    until_done(span, done)
    return PendingPass(done)


@interface.function("pending-pass.pollable")
def pollable(guest: ProgramState, pending: PendingPass) -> Pollable:
    return Pollable.of(pending.done)


@interface.function("pending-pass.cancel", suspends=True)
def cancel(guest: ProgramState, pending: PendingPass) -> Pending[bool]:
    pending.done.cancel()
    return pending.done.undone()


@interface.function("pending-pass.tokens", suspends=True)
def tokens(guest: ProgramState, pending: PendingPass) -> Pending[list[int]]:
    return pending.tokens()


@interface.function("pending-pass.probe")
def probe(guest: ProgramState, pending: PendingPass, index: int) -> tuple[list[int], list[float]]:
    token_ids, values = pending.probe_values(index)
    return token_ids, list(struct.unpack(f"<{len(values) // 4}f", values))


@interface.function("pending-pass.probe-bytes")
def probe_bytes(guest: ProgramState, pending: PendingPass, index: int) -> str:
    _, values = pending.probe_values(index)
    return base64.b64encode(values).decode("ascii")


@interface.function("step", suspends=True)
def step(guest: ProgramState, context: HostContext, token: int, sampler: HostSampler) -> Pending[int] | int:
    if context.repeats is sampler.spec or context.repeats == sampler.spec:
        return context.step(token)
    context.check_usable()

    def build(request: RequestId) -> Forward:
        return Forward(
            request=request, context=context.id, tokens=(token,), samples=(Sample(0, sampler.spec),)
        )

    def finish(event: Event) -> int:
        assert isinstance(event, ForwardDone)
        context.settled(event.length)
        context.note_fed([token])
        return event.tokens[0]

    context.submitted(1)
    context.may_repeat(sampler.spec)
    return context.model.engine.request(build, finish, context.failed)
