"""The decoding loop inside the engine, seen from the program: it starts, is read in chunks, and ends or is broken off.

    new ── start ──► running ── next … ──► ended ── the end was read, or break-off ──► settled

Once settled, the tokens that the program took are part of its context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pie_core.engine.messages import Answer, BreakOff, Event, Failed, Generate, Generated
from pie_core.errors import InvalidRequest, PieError, error_from_code
from pie_core.host_api.context import HostContext
from pie_core.host_api.forward import HostSampler, seconds
from pie_core.host_api.guest_state import ProgramState
from pie_core.host_api.poll import Pollable
from pie_core.host_api.program_trace import TracedStream
from pie_core.ids import RequestId
from pie_core.sandbox.hosting import Interface, Pending
from pie_core.text.chat import Transcript

T = TypeVar("T")

interface = Interface("generate")


class HostGeneration:
    """One generation of one context."""

    def __init__(self, context: HostContext, sampler: HostSampler) -> None:
        self.context = context
        self.sampler = sampler
        self.whole = False
        self.max_tokens = 0
        self.stop_tokens: tuple[int, ...] = ()
        self.timeout_s: float | None = None
        self.priority: int | None = None
        self.finish_reason = ""
        self._request: RequestId | None = None
        self._tokens: list[int] = []  # all generated so far
        self._taken = 0  # how many of them the program has
        self._base = 0  # rows of the context before the first generated token
        self._rows = 0  # rows of the context at the last event
        self._arrival: Pending[None] = Pending()
        self._error: PieError | None = None
        self._settled = False
        self._before: Transcript | None = None  # the transcript as it was, and the one that was drained
        self._fed: Transcript | None = None

    def check_new(self) -> None:
        if self._request is not None:
            raise InvalidRequest(
                f"this generation was started already (request {self._request}); make a new one"
            )

    def start(self) -> None:
        """Feeds the buffer and generates. Raises InvalidRequest when there is nothing to continue from."""
        self.check_new()
        self.context.check_usable()
        self.context.check_unmanaged()
        if not self.context.transcript.pending_tokens():
            self.context.take_back()  # a flushed context goes on from its last token
        tokens = tuple(self.context.transcript.pending_tokens())
        self._before = self.context.transcript.fork()
        self.context.transcript.drain()
        self._fed = self.context.transcript
        self.context.submitted(len(tokens))
        self._base = self._rows = self.context.rows.length
        trace = self.context.guest.trace
        span = None if trace is None else trace.begin("generate", {"pie.tokens.fed": len(tokens)})

        def build(request: RequestId) -> Generate:
            return Generate(
                request=request,
                context=self.context.id,
                tokens=tokens,
                sampler=self.sampler.spec,
                stop_tokens=self.stop_tokens,
                max_tokens=self.max_tokens,
                timeout_s=self.timeout_s,
                priority=self.priority,
                trace=None if span is None else span.traceparent,
                whole=self.whole,
            )

        stream = self if span is None else TracedStream(span, self)
        self._request = self.context.model.engine.stream(build, stream)

    def arrival(self) -> Pending[None]:
        """Done while there is something to take: tokens, the end, or an error."""
        self._check_started()
        return self._arrival

    def take(self) -> list[int] | None:
        """All tokens that have arrived; None at the end. Raises what ended the generation."""
        if self._taken < len(self._tokens):
            new = self._tokens[self._taken :]
            self._taken = len(self._tokens)
            if not self._is_over:
                self._arrival = Pending()
            return new
        if self._error is not None:
            raise self._error
        self._settle()
        return None

    def break_off(self, consumed: int) -> Pending[None]:
        """Keeps `consumed` generated tokens."""
        self._check_started()
        if consumed > self._taken:
            raise InvalidRequest(
                f"cannot keep {consumed} generated tokens: the program has taken {self._taken}"
            )
        if self._settled or self._error is not None:
            return Pending.of(None)
        del self._tokens[consumed:]
        self._taken = consumed
        if self._is_over:
            self._cut()
        self._settled = True
        return self._send_break(consumed, lambda _: None)

    def halt(self) -> Pending[list[int]]:
        """Keeps all that was generated until now, and gives what the program has not taken of it."""
        self._check_started()
        if self._is_over or self._settled:
            return Pending.of(self._rest())
        return self._send_break(None, lambda _: self._rest())

    def _rest(self) -> list[int]:
        if self._error is not None:
            raise self._error
        rest = self._tokens[self._taken :]
        self._taken = len(self._tokens)
        self._settle()
        return rest

    def _send_break(self, consumed: int | None, finish: Callable[[Event], T]) -> Pending[T]:
        generation = self._request
        assert generation is not None
        return self.context.model.engine.request(
            lambda request: BreakOff(request=request, generation=generation, consumed=consumed), finish
        )

    def close(self) -> None:
        """The program dropped its handle: what it has not taken never happened."""
        if self._request is not None:
            self.break_off(self._taken)

    @property
    def _is_over(self) -> bool:
        return bool(self.finish_reason) or self._error is not None

    def _check_started(self) -> None:
        if self._request is None:
            raise InvalidRequest("this generation was not started: call start first")

    def drew(self, token: int, length: int) -> None:
        """The engine: one token more."""
        if not self._settled:  # after a break-off, tokens that were under way do not count
            self._tokens.append(token)
        self._rows = length
        if not self._arrival.done:
            self._arrival.resolve(None)

    def hear(self, event: Answer) -> None:
        """The engine: tokens, the end, or what it failed with."""
        if isinstance(event, Failed):
            self._error = error_from_code(event.code, event.message)
            self.context.failed()
            self._restore_buffer()
        elif isinstance(event, Generated):
            self._progress(event)
        if not self._arrival.done:
            self._arrival.resolve(None)

    def _restore_buffer(self) -> None:
        """Nothing of it was written, so what it was to feed waits again."""
        if self._before is not None and self.context.transcript is self._fed:
            self.context.transcript = self._before

    def _progress(self, event: Generated) -> None:
        if not self._settled:
            self._tokens.extend(event.tokens)
        self._rows = event.length
        if event.finish is not None:
            self.finish_reason = event.finish
            self.context.settled(event.length)
            if self._settled:
                self._hand_over()

    def _settle(self) -> None:
        if not self._settled:
            self._settled = True
            self._hand_over()

    def _cut(self) -> None:
        """Breaks off what has already ended: the engine drops the rows past the kept tokens, and so does the mirror."""
        self._rows = min(self._rows, self._base + len(self._tokens))
        self.context.keep(self._rows)
        self._settle()

    def _hand_over(self) -> None:
        written = self._rows - self._base
        self.context.transcript.note_generated(self._tokens[:written])
        self.context.transcript.append(self._tokens[written:])


interface.resource("generation", HostGeneration)


@interface.function("[constructor]generation")
def new_generation(guest: ProgramState, context: HostContext, sampler: HostSampler) -> HostGeneration:
    return HostGeneration(context, sampler)


@interface.function("generation.max-tokens")
def max_tokens(guest: ProgramState, generation: HostGeneration, count: int) -> None:
    generation.check_new()
    generation.max_tokens = count


@interface.function("generation.stop-tokens")
def stop_tokens(guest: ProgramState, generation: HostGeneration, tokens: list[int]) -> None:
    generation.check_new()
    generation.stop_tokens = tuple(tokens)


@interface.function("generation.timeout-ns")
def timeout_ns(guest: ProgramState, generation: HostGeneration, duration: int) -> None:
    generation.check_new()
    generation.timeout_s = seconds(duration)


@interface.function("generation.priority")
def priority(guest: ProgramState, generation: HostGeneration, value: int) -> None:
    generation.check_new()
    generation.priority = guest.allowed_priority(value)


@interface.function("generation.whole")
def whole(guest: ProgramState, generation: HostGeneration) -> None:
    generation.check_new()
    generation.whole = True


@interface.function("generation.start")
def start(guest: ProgramState, generation: HostGeneration) -> None:
    generation.start()


@interface.function("generation.pollable")
def pollable(guest: ProgramState, generation: HostGeneration) -> Pollable:
    return Pollable.of(generation.arrival())


@interface.function("generation.next", suspends=True)
def next_(guest: ProgramState, generation: HostGeneration) -> Pending[list[int] | None]:
    return generation.arrival().map(lambda _: generation.take())


@interface.function("generation.finish-reason")
def finish_reason(guest: ProgramState, generation: HostGeneration) -> str:
    return generation.finish_reason


@interface.function("generation.break-off", suspends=True)
def break_off(guest: ProgramState, generation: HostGeneration, consumed: int) -> Pending[None]:
    return generation.break_off(consumed)


@interface.function("generation.halt", suspends=True)
def halt(guest: ProgramState, generation: HostGeneration) -> Pending[list[int]]:
    return generation.halt()
