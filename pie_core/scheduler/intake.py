"""What the contexts were asked to do, in order: each does one thing at a time, the next when the last has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pie_core.engine.context import Context
from pie_core.engine.messages import Answer, Command, DropContext, Failed, ForkContext
from pie_core.errors import PieError
from pie_core.ids import RequestId

Perform = Callable[[Context, Any], None]


class Intake:
    """Queues of commands, one per context; `performers` carry a command out or raise a PieError.

    `discarded` is told of every command that was not carried out.
    """

    def __init__(
        self,
        performers: Mapping[type, Perform],
        emit: Callable[[Answer], None],
        discarded: Callable[[Command, PieError], None],
    ) -> None:
        self._performers = performers
        self._emit = emit
        self._discarded = discarded
        self._ready: dict[Context, None] = {}  # contexts that may have something to begin
        self.queued: dict[RequestId, Context] = {}

    def add(self, context: Context, command: Command) -> None:
        request = request_of(command)
        if request is not None:
            self.queued[request] = context
        context.waiting.append(command)
        self._ready[context] = None

    def wake(self, context: Context) -> None:
        if context.waiting:
            self._ready[context] = None

    def advance(self) -> bool:
        """Begins everything that need not wait for an earlier command of its context; whether there was any."""
        begun = bool(self._ready)
        while self._ready:
            context = next(iter(self._ready))
            del self._ready[context]
            while context.waiting and not context.busy and not context.unborn:
                self._begin(context, self._pop(context))
        return begun

    def cancel(self, request: RequestId, error: PieError) -> None:
        """Takes a queued request out and answers it; what was queued behind it was meant to follow it."""
        context = self.queued[request]
        place = next(i for i, each in enumerate(context.waiting) if request_of(each) == request)
        behind = [context.waiting.pop() for _ in range(len(context.waiting) - place)]
        behind.reverse()
        self._discard(context, behind[0], error)
        context.waiting.extend(behind[1:])
        self.fail_behind(context, error, start=place)

    def fail_behind(self, context: Context, error: PieError, start: int = 0) -> None:
        """A command failed: those queued behind it on its context were meant to follow it and fail too."""
        cause = following(error)
        kept = [context.waiting.popleft() for _ in range(start)]
        while context.waiting:
            command = self._pop(context)
            if isinstance(command, DropContext):
                kept.append(command)
            else:
                self._discard(context, command, cause)
        context.waiting.extend(kept)
        self.wake(context)

    def fail_all(self, context: Context, error: PieError) -> None:
        while context.waiting:
            self._discard(context, self._pop(context), error)

    def _pop(self, context: Context) -> Command:
        command = context.waiting.popleft()
        request = request_of(command)
        if request is not None:
            self.queued.pop(request, None)
        return command

    def _begin(self, context: Context, command: Command) -> None:
        request = request_of(command)
        try:
            if request is not None and context.fault is not None:
                raise self._taken_fault(context)
            self._performers[type(command)](context, command)
        except PieError as error:
            self._discard(context, command, error)
            if request is None and not isinstance(command, ForkContext):
                context.fault = error
            else:
                self.fail_behind(context, error)

    def _taken_fault(self, context: Context) -> PieError:
        fault = context.fault
        assert fault is not None
        if not context.lost:
            context.fault = None
        return fault

    def _discard(self, context: Context, command: Command, error: PieError) -> None:
        request = request_of(command)
        if request is not None:
            self.queued.pop(request, None)
            self._emit(Failed(request=request, code=error.code, message=str(error)))
        self._discarded(command, error)


def request_of(command: Command) -> RequestId | None:
    return getattr(command, "request", None)


def following(error: PieError) -> PieError:
    """What those behind a failed command are told: the same kind of error, once removed."""
    text = str(error)
    prefix = "an earlier request on this context failed: "
    return error if text.startswith(prefix) else type(error)(prefix + text)
