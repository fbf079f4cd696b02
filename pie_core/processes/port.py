"""The EnginePort over a stream: whatever is behind it may be lost and come back, and nothing is answered twice.

Whoever has a request open when the engine is lost gets EngineLost, and so does whoever uses what was in it: contexts
and requests from before are known by their numbers, so those that come over one port must grow.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from pie_core.engine.messages import (
    BreakOff,
    Command,
    Event,
    EventSink,
    Failed,
    ForkContext,
    Generated,
    ModelInfo,
)
from pie_core.errors import EngineLost
from pie_core.ids import ContextId, RequestId

_log = logging.getLogger(__name__)

Transmit = Callable[[list[Command]], None]


class StreamPort:
    """Used on one event loop. `begin` and `lose` say whether an engine is behind it; until the first, none is."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._loop = asyncio.get_running_loop()
        self._sink: EventSink = _nobody
        self._transmit: Transmit
        self._info: ModelInfo
        self._open: set[RequestId] = set()
        self._outbox: list[Command] = []
        self._refused: list[Event] = []
        self._flush_is_due = False
        self._lost: EngineLost | None = EngineLost(f"model {model!r}: its engine is still being loaded")
        self._newest_context, self._newest_request = ContextId(0), RequestId(0)
        self._past_contexts, self._past_requests = (
            ContextId(0),
            RequestId(0),
        )  # the newest that went with an engine
        self._past_forks: set[ContextId] = set()

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def is_ready(self) -> bool:
        """False from the loss of an engine until the next one has loaded the model."""
        return self._lost is None

    def listen(self, sink: EventSink) -> None:
        self._sink = sink

    def send(self, command: Command) -> None:
        request: RequestId | None = getattr(command, "request", None)
        context: ContextId = getattr(command, "context", ContextId(0))
        if request is not None:
            self._open.add(request)
            self._newest_request = max(self._newest_request, request)
        self._newest_context = max(self._newest_context, context)
        error = self._lost or self._loss_of_past(command, context)
        if error is None:
            self._outbox.append(command)
        elif request is not None:
            self._refused.append(_failed(request, error))
        else:
            return
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    # ---- what is behind it

    def begin(self, info: ModelInfo, transmit: Transmit) -> None:
        """An engine takes commands by `transmit` from now on; what was before is lost."""
        self._info = info
        self._transmit = transmit
        self._past_contexts, self._past_requests = self._newest_context, self._newest_request
        self._past_forks.clear()
        self._lost = None

    def lose(self, error: EngineLost) -> None:
        """Ends every open request, and each that comes until the next `begin`, with this error."""
        self._lost = error
        self._outbox.clear()
        self._refused.clear()
        self._deliver([_failed(request, error) for request in sorted(self._open)])

    def take(self, events: Sequence[Event]) -> None:
        """What the engine has answered."""
        if self._lost is None:
            self._deliver(events)

    def _flush(self) -> None:
        self._flush_is_due = False
        refused, self._refused = self._refused, []
        outbox, self._outbox = self._outbox, []
        if outbox:
            self._transmit(outbox)
        self._deliver(refused)

    def _deliver(self, events: Sequence[Event]) -> None:
        if events:
            self._open.difference_update(each.request for each in events if _is_final(each))
            self._sink(events)

    # ---- what went with an engine before

    def _loss_of_past(self, command: Command, context: ContextId) -> EngineLost | None:
        if self._is_past(context):
            return self._gone(f"context {context}")
        if isinstance(command, ForkContext) and self._is_past(command.source):
            self._past_forks.add(context)
            return self._gone(f"context {command.source}")
        if isinstance(command, BreakOff) and command.generation <= self._past_requests:
            return self._gone(f"generation {command.generation}")
        return None

    def _is_past(self, context: ContextId) -> bool:
        return 0 < context <= self._past_contexts or context in self._past_forks

    def _gone(self, what: str) -> EngineLost:
        return EngineLost(
            f"model {self.model!r}: {what} was lost with an engine process that ended; open a new context"
        )


def _failed(request: RequestId, error: EngineLost) -> Failed:
    return Failed(request=request, code=error.code, message=str(error))


def _is_final(event: Event) -> bool:
    return not isinstance(event, Generated) or event.finish is not None


def _nobody(events: Sequence[Event]) -> None:
    _log.warning("%d events of an engine reached nobody: listen was not called", len(events))
