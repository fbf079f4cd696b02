"""The EnginePort over a stream: whatever is behind it may be lost and come back, and nothing is answered twice.

Whoever has a request open when the engine is lost gets EngineLost, and so does whoever uses what was in it: contexts
and requests from before are known by their numbers, so those that come over one port must be of one row that grows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from pie_core.engine.messages import (
    BreakOff,
    Command,
    CreateContext,
    Event,
    EventSink,
    Failed,
    ForkContext,
    ModelInfo,
    Steps,
    ended_by,
    opened_by,
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
        self._info: ModelInfo | None = None
        self._open: set[RequestId] = set()
        self._outbox: list[Command] = []
        self._build_last: Callable[[], Command | None] | None = None
        self._due_flush: asyncio.Handle | None = None
        self._lost: EngineLost | None = EngineLost(f"model {model!r}: its engine is still being loaded")
        self._newest = 0  # number of a context or request
        self._past = 0  # the newest that went with an engine
        self._past_forks: set[ContextId] = set()

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None, "nobody is served by an engine that has never been there"
        return self._info

    @property
    def is_ready(self) -> bool:
        """False from the loss of an engine until the next one has loaded the model."""
        return self._lost is None

    @property
    def has_been_ready(self) -> bool:
        return self._info is not None

    def listen(self, sink: EventSink) -> None:
        self._sink = sink

    def send(self, command: Command) -> None:
        self._outbox.append(command)
        self._schedule_flush()

    def send_last(self, build: Callable[[], Command | None]) -> None:
        self._build_last = build
        self._schedule_flush()

    def _schedule_flush(self) -> None:
        if self._due_flush is None:
            self._due_flush = self._loop.call_soon(self._flush)

    def step_now(self, context: ContextId, token: int) -> tuple[int, int] | None:
        """What an engine knows in another process is known here once it tells."""
        return None

    def hurry(self) -> None:
        if self._due_flush is not None:
            self._due_flush.cancel()
            self._flush()

    # ---- what is behind it

    def begin(self, info: ModelInfo, transmit: Transmit) -> None:
        """An engine takes commands by `transmit` from now on; what was before is lost."""
        self._flush()
        self._info = info
        self._transmit = transmit
        self._past = self._newest
        self._past_forks.clear()
        self._lost = None

    def lose(self, error: EngineLost) -> None:
        """Ends every open request, and each that comes until the next `begin`, with this error."""
        self._lost = error
        self._take_outbox()
        self._deliver([_failed(request, error) for request in sorted(self._open)])

    def take(self, events: Sequence[Event]) -> None:
        """What the engine has answered."""
        if self._lost is None:
            self._deliver(events)

    def _flush(self) -> None:
        """All that was sent in one turn of the event loop."""
        self._due_flush = None
        if self._lost is not None:
            self.lose(self._lost)
            return
        commands, refused = self._take_outbox(), list[Event]()
        if self._past:
            commands = [kept for each in commands if (kept := self._of_now(each, refused)) is not None]
        if commands:
            self._transmit(commands)
        self._deliver(refused)

    def _take_outbox(self) -> list[Command]:
        outbox, self._outbox = self._outbox, []
        build, self._build_last = self._build_last, None
        if build is not None and (last := build()) is not None:
            outbox.append(last)
        opened = opened_by(outbox)
        self._open.update(opened)
        created = [each.context for each in outbox if isinstance(each, CreateContext | ForkContext)]
        self._newest = max(self._newest, max(opened, default=0), max(created, default=0))
        return outbox

    def _deliver(self, events: Sequence[Event]) -> None:
        if events:
            self._open.difference_update(ended_by(events))
            self._sink(events)

    # ---- what went with an engine before

    def _of_now(self, command: Command, refused: list[Event]) -> Command | None:
        """The command, or what is left of it without what went with an engine; None: nothing."""
        if type(command) is Steps:
            return self._steps_of_now(command, refused)
        error = self._loss_of_past(command)
        if error is None:
            return command
        refused += [_failed(request, error) for request in opened_by((command,))]
        return None

    def _steps_of_now(self, steps: Steps, refused: list[Event]) -> Steps | None:
        if not any(map(self._is_past, steps.contexts)):
            return steps
        kept = []
        for request, context, token in zip(steps.requests, steps.contexts, steps.tokens, strict=True):
            if self._is_past(context):
                refused.append(_failed(request, self._gone(f"context {context}")))
            else:
                kept.append((request, context, token))
        return Steps(*map(list, zip(*kept, strict=True))) if kept else None

    def _loss_of_past(self, command: Command) -> EngineLost | None:
        context: ContextId | None = getattr(command, "context", None)
        if context is not None and self._is_past(context):
            return self._gone(f"context {context}")
        if isinstance(command, ForkContext) and self._is_past(command.source):
            self._past_forks.add(command.context)
            return self._gone(f"context {command.source}")
        if isinstance(command, BreakOff) and command.generation <= self._past:
            return self._gone(f"generation {command.generation}")
        return None

    def _is_past(self, context: ContextId) -> bool:
        return context <= self._past or context in self._past_forks

    def _gone(self, what: str) -> EngineLost:
        return EngineLost(
            f"model {self.model!r}: {what} was lost with an engine process that ended; open a new context"
        )


def _failed(request: RequestId, error: EngineLost) -> Failed:
    return Failed(request=request, code=error.code, message=str(error))


def _nobody(events: Sequence[Event]) -> None:
    _log.warning("%d events of an engine reached nobody: listen was not called", len(events))
