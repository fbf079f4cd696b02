"""The EnginePort of an engine in a process of its own; when that process is lost, another takes its place.

    send ─► outbox ─► one frame a turn ─► engine process ─► one frame a step ─► sink

Whoever has a request open when the process dies or hangs gets EngineLost, and so does whoever uses what was in it:
contexts and requests from before are known by their numbers, so those that come over a port must grow.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from pie_core.contracts.driver import Progress, ProgressCallback
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
from pie_core.errors import EngineLost, LoadError, PieError, error_from_code
from pie_core.ids import ContextId, RequestId
from pie_core.processes.child import Child
from pie_core.processes.messages import (
    Broken,
    Commands,
    Events,
    FromEngine,
    Loaded,
    Loading,
    LoadModel,
    NotLoaded,
)

_log = logging.getLogger(__name__)

_MODULE = "pie_core.processes.engine"
_STABLE_S = 60.0  # a process that lived so long is replaced at once
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 30.0
_CLOSING_S = 12.0  # its driver may take ten


class RemotePort:
    """Used on one event loop. `await RemotePort.start(…)` returns once the model is loaded."""

    def __init__(self, asked: LoadModel, progress: ProgressCallback) -> None:
        self._asked = asked
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._sink: EventSink = _nobody
        self._open: set[RequestId] = set()
        self._outbox: list[Command] = []
        self._refused: list[Event] = []
        self._flush_is_due = False
        self._child: Child | None = None
        self._loaded: asyncio.Future[Loaded] = self._loop.create_future()
        self._info: ModelInfo
        self._lost: EngineLost | None = EngineLost(f"model {asked.model!r}: its engine is still being loaded")
        self._newest_context, self._newest_request = ContextId(0), RequestId(0)
        self._past_contexts, self._past_requests = (
            ContextId(0),
            RequestId(0),
        )  # the newest that went with an engine
        self._past_forks: set[ContextId] = set()
        self._ready_since = 0.0
        self._pause_s = 0.0
        self._restarting: asyncio.Task[None] | None = None
        self._is_closed = False
        self.restarts = 0

    @classmethod
    async def start(cls, asked: LoadModel, progress: ProgressCallback) -> RemotePort:
        """Raises what loading fails with; no process is left then."""
        port = cls(asked, progress)
        await port._launch()
        return port

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def is_ready(self) -> bool:
        """False from the loss of an engine until the next one has loaded the model."""
        return self._lost is None

    @property
    def pid(self) -> int | None:
        """Of the engine process, if there is one."""
        return None if self._child is None else self._child.pid

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

    async def close(self) -> None:
        """Ends every request with EngineLost and the process with its model; a second time does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._lose(EngineLost("the engine was closed"))
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait((self._restarting,))
        child, self._child = self._child, None
        if child is not None:
            await child.end(_CLOSING_S)

    # ---- to and from the process

    def _flush(self) -> None:
        self._flush_is_due = False
        refused, self._refused = self._refused, []
        outbox, self._outbox = self._outbox, []
        if outbox and self._child is not None:
            self._child.send(Commands(outbox))
        self._deliver(refused)

    def _take(self, message: FromEngine) -> None:
        match message:
            case Events(events) if self._lost is None:
                self._deliver(events)
            case Loading(label, done, total, unit):
                self._progress(Progress(label, done, total, unit))
            case Loaded() if not self._loaded.done():
                self._loaded.set_result(message)
            case NotLoaded(code, text) if not self._loaded.done():
                self._loaded.set_exception(error_from_code(code, text))
            case Broken():
                self._replace("broke")

    def _deliver(self, events: Sequence[Event]) -> None:
        if events:
            self._open.difference_update(each.request for each in events if _is_final(each))
            self._sink(events)

    def _loss_of_past(self, command: Command, context: ContextId) -> EngineLost | None:
        """What the command names may have gone with an engine before this one."""
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
            f"model {self._asked.model!r}: {what} was lost with an engine process that ended; open a new context"
        )

    # ---- one process after another

    async def _launch(self) -> None:
        self._loaded = self._loop.create_future()
        child = Child(_MODULE, FromEngine, self._take, self._has_died)
        await child.start()
        self._child = child
        try:
            child.send(self._asked)
            loaded = await self._loaded
        except BaseException:
            self._child = None
            await child.end(0)
            raise
        self._begin(child, loaded)

    def _begin(self, child: Child, loaded: Loaded) -> None:
        child.deadline_s = loaded.turn_deadline_s
        self._info = loaded.info
        self._past_contexts, self._past_requests = self._newest_context, self._newest_request
        self._past_forks.clear()
        self._ready_since = self._loop.time()
        self._lost = None

    def _has_died(self, reason: str) -> None:
        if not self._loaded.done():
            problem = f"model {self._asked.model!r}: its engine process {self.pid} {reason} while it loaded the model"
            self._loaded.set_exception(LoadError(problem))
        else:
            self._replace(reason)

    def _replace(self, reason: str) -> None:
        if self._lost is not None:
            return
        loss = f"model {self._asked.model!r}: its engine process {self.pid} {reason}"
        _log.error("%s; it is started again", loss)
        self._lose(
            EngineLost(
                f"{loss}; its contexts are gone, and it is started again: `/ready` tells when it is back"
            )
        )
        self._restarting = self._loop.create_task(self._restart())

    def _lose(self, error: EngineLost) -> None:
        self._lost = error
        self._outbox.clear()
        self._refused.clear()
        self._deliver([_failed(request, error) for request in sorted(self._open)])

    async def _restart(self) -> None:
        child, self._child = self._child, None
        lived_s = self._loop.time() - self._ready_since
        self._pause_s = 0.0 if lived_s > _STABLE_S else self._pause_s
        if child is not None:
            await child.end(0)
        while self._lost is not None:
            await self._pause()
            await self._try_again()

    async def _pause(self) -> None:
        """Longer each time, so that an engine that cannot live does not keep the machine busy."""
        pause_s, self._pause_s = self._pause_s, min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
        await asyncio.sleep(pause_s)

    async def _try_again(self) -> None:
        try:
            await self._launch()
        except (PieError, OSError) as error:
            _log.error("model %r could not be loaded again: %s", self._asked.model, error)
        else:
            self.restarts += 1
            _log.warning("model %r is loaded again, in process %d", self._asked.model, self.pid)


def _failed(request: RequestId, error: EngineLost) -> Failed:
    return Failed(request=request, code=error.code, message=str(error))


def _is_final(event: Event) -> bool:
    return not isinstance(event, Generated) or event.finish is not None


def _nobody(events: Sequence[Event]) -> None:
    _log.warning("%d events of an engine reached nobody: listen was not called", len(events))
