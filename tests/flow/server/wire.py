"""A client that says just what a test wants, well-formed or not."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from pie_core.server import messages as m

VALUES: dict[str, Any] = {
    "protocol": m.PROTOCOL,
    "username": "alice",
    "signature": "AAAA",
    "token": "pie-wrong",
    "subject": "model_status",
    "record": "",
    "name": "text-completion",
    "version": "1.0.0",
    "program_hash": "0" * 64,
    "file_hash": "0" * 64,
    "manifest": "",
    "force_overwrite": False,
    "chunk_index": 0,
    "total_chunks": 1,
    "chunk_data": b"x",
    "inferlet": "helloworld",
    "input": "{}",
    "inputs": ["{}"],
    "capture_outputs": True,
    "port": 8080,
    "process_id": "0123456789abcdef",
    "message": "hello",
    "transport": "stdio",
    "ok": True,
    "result": "{}",
    "json": "{}",
    "workflow_id": "1",
}


def sample(kind: type[m.Request], corr_id: int = 7) -> dict[str, Any]:
    """A well-formed message of this type."""
    required = [
        field.name for field in msgspec.structs.fields(kind) if field.required and field.name != "corr_id"
    ]
    return {"type": m.wire_name(kind), "corr_id": corr_id, **{name: VALUES[name] for name in required}}


class Wire:
    """One WebSocket, spoken by hand."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def send(self, message: dict[str, Any] | bytes) -> None:
        await self.socket.send_bytes(
            message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        )

    async def receive(self) -> dict[str, Any]:
        """The next message. Fails if the server closes instead."""
        frame = await self.socket.receive()
        assert frame.type is aiohttp.WSMsgType.BINARY, (frame, self.socket.close_code)
        return dict(msgspec.msgpack.decode(frame.data))

    async def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The response to a message; events in between are passed over."""
        await self.send({"type": kind, "corr_id": 1, **fields})
        return await self.response(1)

    async def response(self, corr_id: int) -> dict[str, Any]:
        while (message := await self.receive()).get("corr_id") != corr_id or message["type"] != "response":
            pass
        return message

    async def closing(self) -> tuple[int | None, dict[str, Any] | None]:
        """The close code, and the last message before it."""
        last = None
        while (frame := await self.socket.receive()).type is aiohttp.WSMsgType.BINARY:
            last = dict(msgspec.msgpack.decode(frame.data))
        return self.socket.close_code, last

    async def log_in(self, user: str = "alice") -> None:
        assert (await self.ask("auth_identify", username=user))["ok"]


@asynccontextmanager
async def wire(url: str, user: str | None = None, **options: Any) -> AsyncIterator[Wire]:
    async with aiohttp.ClientSession() as http, http.ws_connect(url, **options) as socket:
        connection = Wire(socket)
        if user is not None:
            await connection.log_in(user)
        yield connection


@asynccontextmanager
async def raw_socket(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Behind the handshake: every byte of a frame is the test's own."""
    host, port = url.removeprefix("ws://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(
            f"GET / HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        assert b" 101 " in (await reader.readuntil(b"\r\n\r\n")).splitlines()[0]
        yield reader, writer
    finally:
        writer.close()


def frame(
    opcode: int, payload: bytes, *, head: int = 0x80, masked: bool = True, length: int | None = None
) -> bytes:
    """A frame whose header need not tell the truth."""
    declared = len(payload) if length is None else length
    mask = os.urandom(4) if masked else b""
    bit = 0x80 if masked else 0
    if declared < 126:
        size = bytes([bit | declared])
    elif declared < 1 << 16:
        size = bytes([bit | 126]) + struct.pack(">H", declared)
    else:
        size = bytes([bit | 127]) + struct.pack(">Q", declared)
    body = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload)) if masked else payload
    return bytes([head | opcode]) + size + mask + body


async def close_code(reader: asyncio.StreamReader) -> int:
    """Of the close frame that comes, whatever comes before it; 0 if the connection just ends."""
    while True:
        try:
            head = await reader.readexactly(2)
            length = head[1] & 0x7F
            if length == 126:
                length = struct.unpack(">H", await reader.readexactly(2))[0]
            elif length == 127:
                length = struct.unpack(">Q", await reader.readexactly(8))[0]
            payload = await reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0
        if head[0] & 0x0F == 8:
            return int(struct.unpack(">H", payload[:2])[0])


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Asks the server now and then; the test's own timeout is the limit."""
    while True:
        if await holds():
            return
        await asyncio.sleep(0.01)
