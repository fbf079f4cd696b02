"""Typed messages over a stream socket: four bytes of length, then MessagePack."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import msgspec

T = TypeVar("T")

_LENGTH_BYTES = 4
MAX_FRAME_BYTES = (1 << 32) - 1


class FrameStream(asyncio.Protocol, Generic[T]):
    """One end. `take` gets each message, `ended` is called once, when no more will come."""

    def __init__(self, kind: object, take: Callable[[T], None], ended: Callable[[], None]) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(cast(type[T], kind))
        self._encoder = msgspec.msgpack.Encoder()
        self._take = take
        self._ended = ended
        self._received = bytearray()
        self._transport: asyncio.WriteTransport

    async def open(self, end: socket.socket) -> None:
        """Takes the connected socket over."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=end)

    def send(self, message: msgspec.Struct) -> None:
        """Never blocks; what the other side does not read yet is kept. Nothing happens after the end."""
        content = self._encoder.encode(message)
        if len(content) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(content)} bytes; at most {MAX_FRAME_BYTES} fit into a frame")
        if not self._transport.is_closing():
            self._transport.write(len(content).to_bytes(_LENGTH_BYTES, "little") + content)

    def finish(self) -> None:
        """Sends what is still to be sent, then ends the stream."""
        self._transport.close()

    def abort(self) -> None:
        """Ends the stream at once."""
        self._transport.abort()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        start = 0
        while (stop := self._end_of_frame(start)) is not None:
            content = memoryview(self._received)[start + _LENGTH_BYTES : stop]
            message = self._decoder.decode(content)
            content.release()
            self._take(message)
            start = stop
        del self._received[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self._ended()

    def _end_of_frame(self, start: int) -> int | None:
        """Where the frame that begins at `start` ends; None: it is not here as a whole."""
        body = start + _LENGTH_BYTES
        if len(self._received) < body:
            return None
        stop = body + int.from_bytes(self._received[start:body], "little")
        return stop if stop <= len(self._received) else None
