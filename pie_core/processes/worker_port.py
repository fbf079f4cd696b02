"""A worker's EnginePort: a connection of its own to an engine process that somebody else started and watches."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from pie_core.engine.messages import Command, ModelInfo
from pie_core.errors import EngineLost
from pie_core.processes.frames import FrameStream
from pie_core.processes.messages import Commands, Events, FromEngine, Join, Loaded
from pie_core.processes.port import StreamPort

_RETRY_S = 0.05

ID_BITS = 40  # of a request or context; above them stands whose it is


def first_id(worker: int) -> int:
    """Where the ids of a worker begin: an engine tells by them whom an event is for."""
    return (worker << ID_BITS) + 1


class WorkerPort(StreamPort):
    """Connects again by itself when the engine was lost and is back."""

    def __init__(self, model: str, worker: int, path: str, reached: Callable[[str, int], None]) -> None:
        """`reached` is told the path and the process of each engine that takes us in."""
        super().__init__(model)
        self._worker = worker
        self._path = path
        self._reached = reached
        self._stream: FrameStream[FromEngine] | None = None
        self._joined: asyncio.Future[None] = self._loop.create_future()
        self._reconnecting: asyncio.Task[None] | None = None
        self._is_closed = False

    def expect(self, info: ModelInfo) -> None:
        """What another replica says of the model, as long as this one has not said it itself."""
        if self._info is None:
            self._info = info

    async def connect(self) -> None:
        """Returns once the engine has taken us in; it may be on its way back."""
        while not self.is_ready and not self._is_closed:
            try:
                await self._join()
            except (EngineLost, OSError):
                await asyncio.sleep(_RETRY_S)

    async def close(self) -> None:
        self._is_closed = True
        self.lose(EngineLost("the engine was closed"))
        if self._stream is not None:
            self._stream.abort()

    async def _join(self) -> None:
        self._joined = self._loop.create_future()
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        end.setblocking(False)
        try:
            await self._loop.sock_connect(end, self._path)
            self._stream = FrameStream(FromEngine, self._hear, self._ended)
            await self._stream.open(end)
        except BaseException:
            end.close()
            raise
        self._stream.send(Join(self._worker))
        await self._joined

    def _hear(self, message: FromEngine) -> None:
        match message:
            case Events(events):
                self.take(events)
            case Loaded(info, pid) if not self._is_closed and not self._joined.done():
                self.begin(info, self._transmit_commands)
                self._joined.set_result(None)
                self._reached(self._path, pid)

    def _transmit_commands(self, commands: list[Command]) -> None:
        assert self._stream is not None, "an engine has taken us in"
        self._stream.send(Commands(commands))

    def _ended(self) -> None:
        error = EngineLost(
            f"model {self.model!r}: its engine process was lost with all contexts; `/ready` tells when it is back"
        )
        if not self._joined.done():
            self._joined.set_exception(error)
        elif self.is_ready:
            self.lose(error)
            self._reconnecting = self._loop.create_task(self.connect())
