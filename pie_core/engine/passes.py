"""The passes that run: begun from commands, moved on by every step, ended by success, failure, cancellation or a break.

A pass that ends otherwise than well leaves its context as it was before it. While the driver still works on a pass that
was ended, its context stays busy and keeps its pages. Passes that nobody has asked for yet are `scheduler.run_ahead`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import nsmallest

from pie_core.engine.context import Context, GenerationEnd
from pie_core.engine.latencies import Latencies
from pie_core.engine.messages import Ack, Answer, BreakOff, Failed, Forward, Generate
from pie_core.errors import InvalidRequest, NotFound, PieError
from pie_core.ids import RequestId
from pie_core.scheduler.admission import Admission
from pie_core.scheduler.cohort import Cohort
from pie_core.scheduler.delivery import continue_generation, forward_done, generated, write_guess
from pie_core.scheduler.intake import following
from pie_core.scheduler.loop import Chunks, Loop
from pie_core.scheduler.request import Generation, Pass
from pie_core.scheduler.run_ahead import RunAhead

# The pass of a context is over; the error if it did not end well.
Ended = Callable[[Context, PieError | None], None]
# A generation has so many more tokens.
Drew = Callable[[RequestId, int], None]


class Passes:
    """Running passes by request; also remembers which context a generation was of, for breaking it off late."""

    def __init__(
        self,
        admission: Admission,
        ahead: RunAhead,
        cohort: Cohort,
        emit: Callable[[Answer], None],
        ended: Ended,
        latencies: Latencies,
        drew: Drew,
        arrivals: Iterator[int],
        endings: Iterator[int],
    ) -> None:
        self._admission = admission
        self._ahead = ahead
        self._cohort = cohort
        self._emit = emit
        self._ended = ended
        self._latencies = latencies
        self._drew = drew
        self._running: dict[RequestId, Pass] = {}
        self._generations: dict[RequestId, Context] = {}  # running ones, and the last of each context
        self._breaks: dict[RequestId, BreakOff] = {}  # by generation: accepted and not yet carried out
        self._arrivals, self._endings = arrivals, endings
        self.loop: Loop  # set by the engine: the loop reports back to `settle`

    def forward(self, context: Context, command: Forward) -> None:
        asked = self._admission.forward(command, context, next(self._arrivals))
        context.sampler = command.samples[0].sampler if asked.predictable else None
        guess = self._ahead.claim(asked)
        self._begin(command.request, asked if guess is None else guess)

    def generate(self, context: Context, command: Generate) -> None:
        self.drop_ahead(context)
        running = self._admission.generate(command, context, next(self._arrivals))
        self.forget_generation(context)
        self._generations[command.request] = context
        assert running.generation is not None
        self._latencies.asked(running.generation)
        self._begin(command.request, running)
        if command.request in self._breaks:
            self._break_now(running)

    def get(self, request: RequestId) -> Pass | None:
        """The running pass; one that the cohort computes has left it."""
        if request not in self._running and (place := self._cohort.place_of(request)) >= 0:
            self._cohort.leave(self._cohort.context_at(place))
        return self._running.get(request)

    def resume(self, running: Pass) -> None:
        """A pass that the cohort computed goes on here."""
        self._running[_request_of(running)] = running
        self.loop.add(running)

    def drop_ahead(self, context: Context) -> None:
        """Forgets what nobody has asked for yet."""
        self._cohort.leave(context)
        self._ahead.drop(context)

    def of(self, context: Context) -> Pass | None:
        return next((each for each in self._running.values() if each.context is context), None)

    def waiting_by_age(self) -> list[Pass]:
        """Oldest first, and those of higher priority before them."""
        return by_age(self.loop.waiting)

    def end(self, running: Pass, error: PieError) -> None:
        """Answers the request with an error and undoes it, now or when the driver is done with it."""
        request = _request_of(running)
        del self._running[request]
        self._emit(Failed(request=request, code=error.code, message=str(error)))
        self.answer_break(request, error)
        self.drop_ahead(running.context)
        self.loop.remove(running)
        if running.in_flight:
            running.ended = error
        else:
            self._leave(running)
        self._ended(running.context, error)

    def end_request(self, request: RequestId, error: PieError) -> None:
        self.end(self._running[request], error)

    def settle(self, chunks: Chunks, causes: Mapping[int, PieError]) -> None:
        """A step is over; `causes` says why some of its chunks failed."""
        for place, chunk in enumerate(chunks):
            running = chunk.running
            running.in_flight -= 1
            if running.dropped:
                continue
            if running.ended is not None:
                self._leave_when_idle(running)
            elif running.request is None:
                self._settle_guess(running, failed=place in causes)
            elif place in causes:
                self.end(running, causes[place])
            else:
                self._move_on(running)

    def _settle_guess(self, guess: Pass, *, failed: bool) -> None:
        """A guess that fails is forgotten: should its pass really come, it will fail by itself."""
        guess.computed = not failed
        if failed:
            self._ahead.drop(guess.context)

    def _leave_when_idle(self, running: Pass) -> None:
        if not running.in_flight:
            self._leave(running)
            self._ended(running.context, None)

    # ---- breaking off

    def context_of_generation(self, generation: RequestId) -> Context | None:
        return self._generations.get(generation)

    def break_off(self, command: BreakOff) -> None:
        """Ends a generation that runs, or one that has yet to begin when it does."""
        running = self._running.get(command.generation)
        if command.generation in self._breaks:
            raise InvalidRequest(f"generation {command.generation} is being broken off already")
        generation = running.generation if running is not None else None
        _kept(command, generation.generated if generation else 0)
        self._breaks[command.generation] = command
        if running is not None and not running.in_flight:
            self._break_now(running)

    def break_off_ended(self, context: Context, command: BreakOff) -> None:
        """The generation was over before it was broken off: what came too much goes."""
        last = context.last_generation
        if last is None or last.request != command.generation:
            raise NotFound(f"generation {command.generation} is over, and its context has moved on")
        kept = _kept(command, last.generated)
        context.rewind(last.start + kept)
        context.last_generation = GenerationEnd(last.request, last.start, kept)
        self._emit(Ack(request=command.request))

    def forget_generation(self, context: Context) -> None:
        if context.last_generation is not None:
            self._generations.pop(context.last_generation.request, None)
            context.last_generation = None

    def _break_now(self, running: Pass) -> None:
        """The context keeps the prompt and what was consumed; rows not written yet are left to the next pass."""
        command, generation = self._breaks.pop(_request_of(running)), running.generation
        assert generation is not None
        self.drop_ahead(running.context)
        generation.generated = _kept(command, generation.generated)
        running.context.rewind(generation.start + generation.generated)
        self._emit(generated(running, 0, "cancelled"))
        self._emit(Ack(request=command.request))
        self._finish(running)

    def answer_break(self, generation: RequestId, error: PieError) -> None:
        """The generation failed; so does breaking it off, if that was asked for."""
        command = self._breaks.pop(generation, None)
        if command is not None:
            cause = following(error)
            self._emit(Failed(request=command.request, code=cause.code, message=str(cause)))

    # ---- one pass

    def _begin(self, request: RequestId, running: Pass) -> None:
        running.context.busy = True
        self._running[request] = running
        if running.computed:
            write_guess(running)
            self._move_on(running)
        elif not running.in_flight:
            self.loop.add(running)

    def _move_on(self, running: Pass) -> None:
        context = running.context
        if running.request in self._breaks and not running.in_flight:
            self._break_now(running)
        elif context.written < context.history.length:
            return  # the rest is in flight, or waits for its turn
        elif running.generation is not None:
            self._take_token(running, running.generation)
        else:
            self._emit(forward_done(running))
            self._finish(running)

    def _take_token(self, running: Pass, generation: Generation) -> None:
        if generation.first_at is None:
            self._latencies.began(generation)
        before = generation.generated
        finish = continue_generation(running, generation)
        self._tell(running, generation.generated - before, finish)
        if finish is not None:
            self._finish(running)
        elif self._cohort.begin(running):
            del self._running[_request_of(running)]
        elif (following := self._ahead.follow(running)) is not None:
            self._running[_request_of(following)] = following
        else:
            running.draw_next()
            self.loop.add(running)

    def end_generation(self, request: RequestId, *, is_stopped: bool) -> None:
        """One that the cohort computed has what it wanted."""
        running = self._running[request]
        self._emit(generated(running, 0 if is_stopped else 1, "stop" if is_stopped else "length"))
        self._finish(running)

    def _tell(self, running: Pass, fresh: int, finish: str | None) -> None:
        assert running.generation is not None
        self._drew(_request_of(running), fresh)
        if finish is not None or not running.generation.whole:
            self._emit(generated(running, fresh, finish))

    def _finish(self, running: Pass) -> None:
        """The pass ended well; its context is free for the next."""
        context, request = running.context, _request_of(running)
        del self._running[request]
        self.loop.remove(running)
        self.forget_generation(context)
        if running.generation is None:
            self._cohort.begin(running)
        else:
            self.drop_ahead(context)
            self._latencies.ended(running.generation)
            start, count = running.generation.start, running.generation.generated
            context.last_generation = GenerationEnd(request, start, count)
        context.busy = False
        context.last_used = next(self._endings)
        self._ended(context, None)

    def _leave(self, running: Pass) -> None:
        context = running.context
        if running.generation is not None:
            self._generations.pop(_request_of(running), None)
        context.rewind(running.base)
        context.busy = False


def by_age(passes: Iterable[Pass]) -> list[Pass]:
    return sorted(passes, key=_age)


def oldest(passes: Iterable[Pass], count: int) -> list[Pass]:
    """So many of them, likewise in order."""
    return nsmallest(count, passes, key=_age)


def _age(each: Pass) -> tuple[int, int]:
    return -each.priority, each.arrival


def _request_of(running: Pass) -> RequestId:
    assert running.request is not None, "nobody has asked for this pass"
    return running.request


def _kept(command: BreakOff, generated_tokens: int) -> int:
    """How many of them the context keeps."""
    if command.consumed is None:
        return generated_tokens
    if not 0 <= command.consumed <= generated_tokens:
        raise InvalidRequest(
            f"generation {command.generation}: cannot keep {command.consumed} tokens of {generated_tokens} generated"
        )
    return command.consumed
