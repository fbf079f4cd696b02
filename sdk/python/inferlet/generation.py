"""Generation: a decoding loop, stepped here token by token or handed to the engine as a whole.

`collect_tokens`, `collect_text`, `stream` and `stream_tokens` need no code of the program per token, so the engine
runs their loop (EngineLoop) and this side is resumed per chunk. Iterating the generator gives one GenStep per
pass, run from here. Both draw the same tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypedDict

from wit_world.imports import context as context_bindings
from wit_world.imports import forward as forward_bindings
from wit_world.imports import generate as bindings

from inferlet import chat
from inferlet.errors import DeadlineExceeded, InferletError, InvalidRequest, not_in_this_version
from inferlet.forward import Output, ProbeHandle, SampleHandle, schedule
from inferlet.host import alone, call, drop, finish, running_loop
from inferlet.sample import Probe, Sampler

if TYPE_CHECKING:
    from inferlet.context import Context

TO_THE_END = 0  # of the model's length, as the host's `max-tokens` counts


class GenerateOptions(TypedDict, total=False):
    """Keyword options of `Context.generate`; those after `priority` belong to later versions."""

    max_tokens: int | None
    stop: Iterable[int] | None
    logit_mask: Sequence[int] | None
    timeout: float | None
    priority: int | None
    constrain: Any
    speculator: Any
    system_speculation: bool | None
    adapter: Any
    zo_seed: int | None
    horizon: int | None
    rebid_each_step: bool


class EngineLoop:
    """One generation that the engine runs, and how much of it the program has consumed."""

    def __init__(
        self,
        context: context_bindings.Context,
        sampler: Sampler,
        max_tokens: int,
        stop: Iterable[int],
        timeout: float | None = None,
        priority: int | None = None,
        whole: bool = False,
    ) -> None:
        """`whole`: nobody looks at tokens before the end, so the engine tells of none."""
        self._generation: bindings.Generation | None = bindings.Generation(context, sampler.handle())
        self._whole = whole
        if whole:
            call(self._generation.whole)
        self._halted_with: list[int] = []
        call(self._generation.max_tokens, max_tokens)
        call(self._generation.stop_tokens, list(stop))
        schedule(self._generation, timeout, priority)
        call(self._generation.start)
        self._waiting: asyncio.Future[None] | None = None
        self.consumed = 0
        self.finish_reason: str | None = None
        self.interrupted = False

    async def next(self) -> list[int] | None:
        """Tokens that are there by now, at least one; None after the end, and when it was broken off meanwhile."""
        if self._generation is not None and not alone():
            self._waiting = running_loop().readiness(self._generation.pollable())
            await self._waiting
        if self._generation is None:
            return self.take_rest() or None
        try:
            tokens = call(self._generation.next)
        except InferletError:
            self._close("failed")
            raise
        if tokens is None:
            self._close(self._generation.finish_reason())
            return None
        self.consumed += len(tokens)
        return list(tokens)

    def interrupt(self) -> None:
        """The context is needed as the program knows it: stops here, to be taken up again from there."""
        self.interrupted = self._generation is not None
        self.break_off()

    def break_off(self) -> None:
        """Ends it early; the context keeps only what was consumed. Of a whole, what there is by now is."""
        if self._generation is not None:
            try:
                if self._whole:
                    self._halted_with = list(call(self._generation.halt))
                    self.consumed += len(self._halted_with)
                else:
                    call(self._generation.break_off, self.consumed)
            finally:
                self._close("cancelled")

    def take_rest(self) -> list[int]:
        """What a whole had generated when it was broken off; once."""
        rest, self._halted_with = self._halted_with, []
        return rest

    def _close(self, reason: str) -> None:
        self.finish_reason = reason
        if self._generation is not None:
            drop(self._generation)
            self._generation = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class Generator:
    """A generation that is set up, and then either collected, streamed or stepped."""

    __slots__ = (
        "_context",
        "_deadline",
        "_finish_reason",
        "_generated",
        "_logit_mask",
        "_max_tokens",
        "_priority",
        "_sampler",
        "_step_probes",
        "_stop",
        "_timeout",
    )

    def __init__(
        self,
        context: Context,
        sampler: Sampler,
        *,
        max_tokens: int | None = None,
        stop: Iterable[int] | None = None,
        logit_mask: Sequence[int] | None = None,
        timeout: float | None = None,
        priority: int | None = None,
        **later: Any,
    ) -> None:
        _refuse_options_of_later_versions(later)
        self._context = context
        self._sampler = sampler
        self._stop = set(stop or ())
        self._logit_mask = None if logit_mask is None else list(logit_mask)
        self._step_probes: list[tuple[int, Probe]] = []
        self._generated = 0
        self._finish_reason: str | None = None
        self._timeout = timeout
        self._deadline: float | None = None
        self._priority = priority
        self._max_tokens: int | None = None
        if max_tokens is not None:
            self.max_tokens(max_tokens)

    # Set-up

    def max_tokens(self, count: int) -> Generator:
        """Ends after this many tokens."""
        if count < 0:
            raise InvalidRequest(f"max_tokens is {count}, expected 0 or more")
        self._max_tokens = count
        return self

    def stop(self, tokens: Iterable[int]) -> Generator:
        """Ends at any of these tokens, which do not become part of the text; replaces earlier ones."""
        self._stop = set(tokens)
        return self

    def add_stop(self, tokens: Iterable[int] | int) -> Generator:
        """More tokens to end at."""
        self._stop |= {tokens} if isinstance(tokens, int) else set(tokens)
        return self

    def timeout(self, seconds: float) -> Generator:
        """How long all of it may take, waiting included; beyond, DeadlineExceeded is raised."""
        self._timeout = seconds
        return self

    def priority(self, value: int) -> Generator:
        """Instead of the context's; see `Context.set_priority`."""
        self._priority = value
        return self

    def probe_each_step(self, index: int, probe: Probe) -> ProbeHandle:
        """Attaches a probe to every step, at this input row of it."""
        self._step_probes.append((index, probe))
        return ProbeHandle(len(self._step_probes) - 1, probe.kind)

    def disable_system_speculation(self) -> Generator:
        """The engine drafts nothing by itself in this version."""
        return self

    def constrain(self, constraint: Any) -> Generator:
        raise not_in_this_version("Generator.constrain")

    def horizon(self, count: int) -> Generator:
        raise not_in_this_version("Generator.horizon")

    def adapter(self, adapter: Any) -> Generator:
        raise not_in_this_version("Generator.adapter")

    def zo_seed(self, seed: int) -> Generator:
        raise not_in_this_version("Generator.zo_seed")

    # State

    @property
    def context(self) -> Context:
        return self._context

    @property
    def tokens_generated(self) -> int:
        return self._generated

    @property
    def is_done(self) -> bool:
        return self._finish_reason is not None or self._remaining() == 0

    @property
    def finish_reason(self) -> str | None:
        """One of "stop", "length" and "cancelled"; None while it goes on."""
        return "length" if self._finish_reason is None and self._remaining() == 0 else self._finish_reason

    def fork(self) -> Context:
        """A branch of the context as it is now."""
        return self._context.fork()

    def save(self, name: str) -> None:
        self._context.save(name)

    def snapshot(self) -> str:
        return self._context.snapshot()

    def _remaining(self) -> int | None:
        return None if self._max_tokens is None else self._max_tokens - self._generated

    def _time_left(self) -> float | None:
        """Of its time limit, which begins with its first pass."""
        if self._timeout is None:
            return None
        now = running_loop().time()
        if self._deadline is None:
            self._deadline = now + self._timeout
        if self._deadline <= now and self._timeout > 0:
            raise DeadlineExceeded(f"the generation took longer than its {self._timeout} s")
        return self._deadline - now

    # Step by step

    def __aiter__(self) -> AsyncIterator[GenStep]:
        return self

    async def __anext__(self) -> GenStep:
        if self.is_done:
            raise StopAsyncIteration
        return GenStep(self)

    def accept(self, tokens: Iterable[int]) -> list[int]:
        """Takes tokens that the program chose itself (after `clear_sampler`); returns those that were kept."""
        kept = self._until_the_end(list(tokens))
        self._generated += len(kept)
        self._context.stage(kept)
        return kept

    def _until_the_end(self, tokens: list[int]) -> list[int]:
        for index, token in enumerate(tokens):
            if self._remaining() == index:
                self._finish_reason = "length"
                return tokens[:index]
            if token in self._stop:
                self._finish_reason = "stop"
                return tokens[:index]
        return tokens

    # As a whole

    async def collect_tokens(self) -> list[int]:
        """All tokens to the end."""
        return [token async for chunk in TokenStream(self, whole=True) for token in chunk]

    async def collect_text(self) -> str:
        """The text to the end, or to the end of the assistant's turn."""
        return "".join([piece async for piece in TextStream(self, whole=True)])

    async def collect_json(self, *, schema: str | None = None, parse: Any = None) -> Any:
        raise not_in_this_version("Generator.collect_json")

    def stream_tokens(self) -> TokenStream:
        """Tokens as they come, in chunks whose sizes depend on timing."""
        return TokenStream(self)

    def stream(self) -> TextStream:
        """Text as it comes, in pieces whose sizes depend on timing."""
        return TextStream(self)

    def _needs_steps(self) -> bool:
        return bool(self._step_probes) or self._logit_mask is not None

    async def _step_chunk(self) -> list[int] | None:
        return None if self.is_done else (await GenStep(self).execute()).tokens

    def _took(self, chunk: list[int]) -> list[int]:
        self._generated += len(chunk)
        return chunk

    def _start_engine_loop(self, whole: bool) -> EngineLoop:
        remaining = self._remaining()
        return self._context.start_engine_loop(
            self._sampler,
            TO_THE_END if remaining is None else remaining,
            self._stop,
            self._time_left(),
            self._priority,
            whole,
        )


class TokenStream:
    """Tokens of a generation, chunk by chunk.

    Ending it early keeps what was handed out and drops the rest. So does using the context meanwhile; the stream then
    goes on from what the context holds. `whole`: nobody looks at a chunk before the end; what there is when it ends
    early counts as handed out.
    """

    def __init__(self, generator: Generator, whole: bool = False) -> None:
        self._generator = generator
        self._whole = whole
        self._engine_loop: EngineLoop | None = None

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> list[int]:
        try:
            chunk = await (
                self._generator._step_chunk() if self._generator._needs_steps() else self._next_of_engine()
            )
        except BaseException:
            self.close()
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def _next_of_engine(self) -> list[int] | None:
        while not self._is_over():
            if self._engine_loop is None or self._engine_loop.interrupted:
                self._engine_loop = self._generator._start_engine_loop(self._whole)
            chunk = await self._engine_loop.next()
            if chunk is not None:
                return self._generator._took(chunk)
        return None

    def _is_over(self) -> bool:
        """Also notes why: the generator's own reasons come first."""
        engine_loop, generator = self._engine_loop, self._generator
        if engine_loop is None or engine_loop.interrupted:
            return generator.is_done
        if engine_loop.finish_reason is not None and generator._finish_reason is None:
            generator._finish_reason = engine_loop.finish_reason
        return engine_loop.finish_reason is not None

    def give_back(self, count: int) -> None:
        """Counts the last `count` tokens as not consumed."""
        self._generator._generated -= count
        if self._engine_loop is not None:
            self._engine_loop.consumed -= count

    def close(self, reason: str = "cancelled") -> None:
        """Ends the generation here."""
        if not self._generator.is_done:
            self._generator._finish_reason = reason
        if self._engine_loop is not None:
            self._engine_loop.break_off()
            self._generator._took(self._engine_loop.take_rest())

    async def aclose(self) -> None:
        self.close()

    def __del__(self) -> None:
        # A loop that was left by `break` holds the only reference: the engine need not draw on for nobody.
        if self._engine_loop is not None:
            with suppress(InferletError):
                self._engine_loop.break_off()


class TextStream:
    """Text of a generation, piece by piece; ends with the assistant's turn."""

    def __init__(self, generator: Generator, whole: bool = False) -> None:
        model = generator.context.model
        self._decoder = chat.Decoder(model)
        self._turn_ends = frozenset(chat.stop_tokens(model))
        # Where the turn may end before the generation does, somebody has to look.
        self._tokens = TokenStream(generator, whole and self._turn_ends <= generator._stop)
        self._ended = False

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> str:
        while not self._ended:
            text = "".join(event.text for event in await self._next_events() if event.kind == "delta")
            if text:
                return text
        raise StopAsyncIteration

    async def _next_events(self) -> list[Any]:
        try:
            tokens = await anext(self._tokens)
        except StopAsyncIteration:  # perhaps in the middle of a character
            self._ended = True
            return self._decoder.unfinished_events()
        return self._decoder.events(self._until_turn_ends(tokens))

    def _until_turn_ends(self, tokens: list[int]) -> list[int]:
        for index, token in enumerate(tokens):
            if token in self._turn_ends:
                self._ended = True
                self._tokens.give_back(len(tokens) - index - 1)
                self._tokens.close("stop")
                return tokens[: index + 1]
        return tokens

    def close(self) -> None:
        """Ends the generation here."""
        self._tokens.close()

    async def aclose(self) -> None:
        self.close()


class GenStep:
    """The next pass of a generation: add probes or clear the sampler, then execute it."""

    __slots__ = ("_generator", "_probes", "_samples")

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._probes = list(generator._step_probes)
        self._samples = True

    def clear_sampler(self) -> GenStep:
        """Draws no token: choose one from a probe and give it to `Generator.accept`."""
        self._samples = False
        return self

    def probe(self, index: int, probe: Probe) -> ProbeHandle:
        """Attaches a probe to this step, at this input row of it."""
        self._probes.append((index, probe))
        return ProbeHandle(len(self._probes) - 1, probe.kind)

    async def execute(self) -> Output:
        """Runs the pass and counts its token."""
        handle, inputs = self._generator._context.take_inputs()
        try:
            pending, drawn = await self._run(handle, inputs)
        except InferletError:
            self._generator._context.stage(inputs)  # a refused pass leaves everything as it was
            raise
        kept = self._generator.accept(drawn)
        return Output(pending, drawn, kept, SampleHandle(0) if self._samples else None)

    async def _run(
        self, handle: context_bindings.Context, inputs: list[int]
    ) -> tuple[forward_bindings.PendingPass | None, list[int]]:
        if self._is_plain() and len(inputs) == 1 and alone():
            return None, [call(forward_bindings.step, handle, inputs[0], self._generator._sampler.handle())]
        pending = call(self._described(handle, inputs).execute)
        return pending, list(
            await finish(pending.pollable, pending.tokens, lambda: self._cancel(pending, inputs))
        )

    def _cancel(self, pending: forward_bindings.PendingPass, inputs: list[int]) -> None:
        """Nobody waits any more: as if the step had never been, or too late for that."""
        if pending.cancel():
            self._generator._context.stage(inputs)
        else:
            self._generator.accept(call(pending.tokens))

    def _is_plain(self) -> bool:
        generator = self._generator
        plain = self._samples and not self._probes and generator._logit_mask is None
        return plain and generator._timeout is None and generator._priority is None

    def _described(self, handle: context_bindings.Context, inputs: list[int]) -> forward_bindings.ForwardPass:
        described = forward_bindings.ForwardPass(handle)
        call(described.input, inputs)
        if self._samples:
            call(described.sample, [len(inputs) - 1], self._generator._sampler.handle())
        for row, probe in self._probes:
            probe.attach(described, row)
        if self._generator._logit_mask is not None:
            call(described.logit_mask, self._generator._logit_mask)
        schedule(described, self._generator._time_left(), self._generator._priority)
        return described


def _refuse_options_of_later_versions(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in GenerateOptions.__annotations__:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
        if value is not None and value is not False:
            raise not_in_this_version(f"Context.generate({name}=…)")
