"""The worker's end of an EnginePort: numbers the requests, and tells whoever waits for an answer.

What stands on the path of every token is as short as it can be: the turns of all loops that one event moved on travel
in one `Steps`, are answered by one `Stepped`, and their programs are resumed before the event loop's next turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

from pie_core.engine.messages import (
    Answer,
    Cancel,
    Command,
    EnginePort,
    Event,
    Failed,
    Generated,
    ModelInfo,
    Progress,
    Stepped,
    Steps,
)
from pie_core.errors import error_from_code
from pie_core.ids import ContextId, RequestId
from pie_core.sandbox.hosting import Pending

T = TypeVar("T")


class Listener(Protocol):
    """Whoever waits for the answers of one request."""

    def hear(self, event: Answer) -> None: ...


class Turn(Listener, Protocol):
    """Waits for the end of one turn of a loop: `hear` brings a failure, `drew` anything else."""

    def drew(self, token: int, length: int) -> None:
        """The token that follows, and how many rows the context has."""


class Stream(Listener, Protocol):
    """Waits for the tokens of a generation."""

    def drew(self, token: int, length: int) -> None:
        """One token more, as often as `hear` brings a Generated that is not the last."""


class Programs(Protocol):
    """Where programs run; `sandbox.pump.Pump` is one."""

    def run(self) -> None:
        """Resumes now whoever has been woken."""

    def afterwards(self, call: Callable[[], None]) -> bool:
        """While programs are being resumed: calls once when all of them have had their say; else never (False)."""


class _Request(Generic[T]):
    """Makes one answer the value of a Pending."""

    __slots__ = ("_finish", "_on_failure", "pending")

    def __init__(
        self, pending: Pending[T], finish: Callable[[Event], T], on_failure: Callable[[], None]
    ) -> None:
        self.pending = pending
        self._finish = finish
        self._on_failure = on_failure

    def hear(self, event: Answer) -> None:
        if isinstance(event, Failed):
            self._on_failure()
            self.pending.fail(error_from_code(event.code, event.message))
        else:
            self.pending.resolve(self._finish(event))

    def drew(self, token: int, length: int) -> None:
        raise AssertionError(
            f"the engine told of token {token} at length {length}, and neither a Step nor a Generate asked for one"
        )


class EngineClient:
    """One per engine and worker; used on the event loop's thread."""

    def __init__(self, port: EnginePort, first: int = 1, programs: Programs | None = None) -> None:
        """Ids are counted from `first`: several clients of one engine have ranges of their own.

        `programs` that wait for this engine are resumed with its answers, not in the event loop's next turn.
        """
        self._port = port
        self.step_now = port.step_now
        self._numbers = cast("Iterator[RequestId]", itertools.count(first))
        self._waiting: dict[RequestId, _Request[Any] | Turn | Stream] = {}
        self._steps: Steps | None = None  # gathered since the port last took what was sent
        self._programs = programs
        self._is_hurrying = programs is None  # what was sent goes out when programs have had their say
        port.listen(self._receive)

    @property
    def info(self) -> ModelInfo:
        return self._port.info

    @property
    def is_ready(self) -> bool:
        """False from the loss of the engine until the next one is there."""
        return self._port.is_ready

    @property
    def open_requests(self) -> int:
        return len(self._waiting)

    def new_context_id(self) -> ContextId:
        return ContextId(next(self._numbers))

    def send(self, command: Command) -> None:
        """A command that needs no answer."""
        if self._steps is not None:  # commands take effect in the order they were sent
            self._port.send(self._steps)
            self._steps = None
        self._port.send(command)
        if not self._is_hurrying:
            self._go_out_afterwards()

    def request(
        self,
        build: Callable[[RequestId], Command],
        finish: Callable[[Event], T],
        on_failure: Callable[[], None] = lambda: None,
    ) -> Pending[T]:
        """Sends what `build` makes of a fresh request id; `finish` turns the answer into the pending's value.

        Abandoning the pending cancels the request; `on_failure` is called when it fails, cancelled or not.
        """
        request = next(self._numbers)
        pending: Pending[T] = Pending(lambda: self.send(Cancel(request)))
        self._waiting[request] = _Request(pending, finish, on_failure)
        self.send(build(request))
        return pending

    def stream(self, build: Callable[[RequestId], Command], listener: Stream) -> RequestId:
        """Like request, for answers of many events."""
        request = next(self._numbers)
        self._waiting[request] = listener
        self.send(build(request))
        return request

    def step(self, context: ContextId, token: int, turn: Turn) -> RequestId:
        """One more turn of a context's loop: a `messages.Step`, sent with those of all others."""
        request = next(self._numbers)
        self._waiting[request] = turn
        steps = self._steps
        if steps is None:
            self._steps = steps = Steps([], [], [])
            self._port.send_last(self._take_steps)
            if not self._is_hurrying:
                self._go_out_afterwards()
        steps.requests.append(request)
        steps.contexts.append(context)
        steps.tokens.append(token)
        return request

    def cancel(self, request: RequestId) -> None:
        """Ends a request that nobody waits for any more."""
        self.send(Cancel(request))

    def _take_steps(self) -> Steps | None:
        steps, self._steps = self._steps, None
        return steps

    def _receive(self, events: Sequence[Event]) -> None:
        waiting = self._waiting
        for event in events:
            if isinstance(event, Stepped):
                for request, token, length in zip(event.requests, event.tokens, event.lengths, strict=True):
                    waiting.pop(request).drew(token, length)
            elif isinstance(event, Progress):
                for request, token, length in zip(event.requests, event.tokens, event.lengths, strict=True):
                    waiting[request].drew(token, length)
            elif isinstance(event, Generated) and event.finish is None:
                waiting[event.request].hear(event)
            else:
                waiting.pop(event.request).hear(event)
        if self._programs is not None:
            self._programs.run()

    def _go_out_afterwards(self) -> None:
        assert self._programs is not None
        self._is_hurrying = self._programs.afterwards(self._hurry)

    def _hurry(self) -> None:
        self._is_hurrying = False
        self._port.hurry()
