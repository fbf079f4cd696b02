"""An EnginePort that encodes and decodes every message, as a port between two processes has to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from pie_core.engine.messages import Command, EnginePort, Event, EventSink, ModelInfo
from pie_core.ids import ContextId

_encode = msgspec.msgpack.encode
_COMMAND: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_EVENTS: msgspec.msgpack.Decoder[list[Event]] = msgspec.msgpack.Decoder(list[Event])


class CodecPort:
    def __init__(self, port: EnginePort) -> None:
        self._port = port

    @property
    def info(self) -> ModelInfo:
        return msgspec.msgpack.decode(_encode(self._port.info), type=ModelInfo)

    @property
    def is_ready(self) -> bool:
        return self._port.is_ready

    def send(self, command: Command) -> None:
        self._port.send(_COMMAND.decode(_encode(command)))

    def send_last(self, build: Callable[[], Command | None]) -> None:
        def encoded() -> Command | None:
            command = build()
            return None if command is None else _COMMAND.decode(_encode(command))

        self._port.send_last(encoded)

    def step_now(self, context: ContextId, token: int) -> tuple[int, int] | None:
        return self._port.step_now(context, token)

    def hurry(self) -> None:
        self._port.hurry()

    def listen(self, sink: EventSink) -> None:
        def decode(events: Sequence[Event]) -> None:
            sink(_EVENTS.decode(_encode(list(events))))

        self._port.listen(decode)

    async def close(self) -> None:
        await self._port.close()
