"""The worker's end of an EnginePort: numbers the requests, and turns each answer into the Pending that waits for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

from pie_core.engine.messages import (
    Cancel,
    Command,
    EnginePort,
    Event,
    Failed,
    Generated,
    ModelInfo,
    one_by_one,
)
from pie_core.errors import error_from_code
from pie_core.ids import ContextId, RequestId
from pie_core.sandbox.hosting import Pending

T = TypeVar("T")
EventHandler = Callable[[Event], None]


class EngineClient:
    """One per engine and worker; used on the event loop's thread."""

    def __init__(self, port: EnginePort, first: int = 1) -> None:
        """Ids are counted from `first`: several clients of one engine have ranges of their own."""
        self._port = port
        self._numbers = itertools.count(first)
        self._handlers: dict[RequestId, EventHandler] = {}
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
        return len(self._handlers)

    def new_context_id(self) -> ContextId:
        return ContextId(next(self._numbers))

    def send(self, command: Command) -> None:
        """A command that needs no answer."""
        self._port.send(command)

    def request(
        self,
        build: Callable[[RequestId], Command],
        finish: Callable[[Event], T],
        on_failure: Callable[[], None] = lambda: None,
    ) -> Pending[T]:
        """Sends what `build` makes of a fresh request id; `finish` turns the answer into the pending's value.

        Abandoning the pending cancels the request; `on_failure` is called when it fails, cancelled or not.
        """
        request = RequestId(next(self._numbers))
        pending: Pending[T] = Pending(lambda: self._port.send(Cancel(request)))

        def handle(event: Event) -> None:
            if isinstance(event, Failed):
                on_failure()
                pending.fail(error_from_code(event.code, event.message))
            else:
                pending.resolve(finish(event))

        self._handlers[request] = handle
        self._port.send(build(request))
        return pending

    def stream(self, build: Callable[[RequestId], Command], handle: EventHandler) -> RequestId:
        """Like request, for answers of many events: `handle` gets each of them."""
        request = RequestId(next(self._numbers))
        self._handlers[request] = handle
        self._port.send(build(request))
        return request

    def _receive(self, events: Sequence[Event]) -> None:
        for event in (answer for each in events for answer in one_by_one(each)):
            if isinstance(event, Generated) and event.finish is None:
                self._handlers[event.request](event)
            else:
                self._handlers.pop(event.request)(event)
