"""The EnginePort of an engine in a process of its own; when that process is lost, another takes its place.

send ─► outbox ─► one frame a turn ─► engine process ─► one frame a step ─► sink
"""

from __future__ import annotations

import asyncio
import logging

from pie_core.contracts.driver import Progress, ProgressCallback
from pie_core.engine.messages import Command
from pie_core.errors import EngineLost, LoadError, PieError, error_from_code
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
from pie_core.processes.pauses import Pauses
from pie_core.processes.port import StreamPort

_log = logging.getLogger(__name__)

_MODULE = "pie_core.processes.engine"
_CLOSING_S = 12.0  # its driver may take ten


class RemotePort(StreamPort):
    """`await RemotePort.start(…)` returns once the model is loaded."""

    def __init__(self, asked: LoadModel, progress: ProgressCallback) -> None:
        super().__init__(asked.model)
        self._asked = asked
        self._progress = progress
        self._child: Child | None = None
        self._loaded: asyncio.Future[Loaded] = self._loop.create_future()
        self._pauses = Pauses()
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
    def pid(self) -> int | None:
        """Of the engine process, if there is one."""
        return None if self._child is None else self._child.pid

    @property
    def listens_at(self) -> str | None:
        """The socket by which other processes use the same engine."""
        return self._asked.listen_at

    async def close(self) -> None:
        """Ends every request with EngineLost and the process with its model; a second time does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self.lose(EngineLost("the engine was closed"))
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait((self._restarting,))
        child, self._child = self._child, None
        if child is not None:
            await child.end(_CLOSING_S)

    def _hear(self, message: FromEngine) -> None:
        match message:
            case Events(events):
                self.take(events)
            case Loading(label, done, total, unit):
                self._progress(Progress(label, done, total, unit))
            case Loaded() if not self._loaded.done():
                self._loaded.set_result(message)
            case NotLoaded(code, text) if not self._loaded.done():
                self._loaded.set_exception(error_from_code(code, text))
            case Broken():
                self._replace("broke")

    # ---- one process after another

    async def _launch(self) -> None:
        self._loaded = self._loop.create_future()
        child = Child(_MODULE, FromEngine, self._hear, self._has_died)
        await child.start()
        self._child = child
        try:
            child.send(self._asked)
            loaded = await self._loaded
        except BaseException:
            self._child = None
            await child.end(0)
            raise

        def transmit(commands: list[Command]) -> None:
            child.send(Commands(commands))

        child.deadline_s = loaded.turn_deadline_s
        self._pauses.begin()
        self.begin(loaded.info, transmit)

    def _has_died(self, reason: str) -> None:
        if not self._loaded.done():
            problem = (
                f"model {self.model!r}: its engine process {self.pid} {reason} while it loaded the model"
            )
            self._loaded.set_exception(LoadError(problem))
        else:
            self._replace(reason)

    def _replace(self, reason: str) -> None:
        if not self.is_ready:
            return
        loss = f"model {self.model!r}: its engine process {self.pid} {reason}"
        _log.error("%s; it is started again", loss)
        self.lose(
            EngineLost(
                f"{loss}; its contexts are gone, and it is started again: `/ready` tells when it is back"
            )
        )
        self._restarting = self._loop.create_task(self._restart())

    async def _restart(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end(0)
        while not self.is_ready:
            await asyncio.sleep(self._pauses.next_s())
            await self._try_again()

    async def _try_again(self) -> None:
        try:
            await self._launch()
        except (PieError, OSError) as error:
            _log.error("model %r could not be loaded again: %s", self.model, error)
        else:
            self.restarts += 1
            _log.warning("model %r is loaded again, in process %d", self.model, self.pid)
