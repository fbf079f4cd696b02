"""An MCP server as a child process of the client: JSON-RPC 2.0, one message a line, over its standard streams."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pie_core import __version__
from pie_core.errors import Disconnected, LimitExceeded, McpRefused

VERSION = "2024-11-05"

_MAX_LINE = 16 << 20
_START_S = 30.0
_FAREWELL_S = 2.0


class StdioMcpServer:
    """Made by `start`; `answer` is what `Client.register_mcp_server` wants."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self._name = name
        self._process = process
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, name: str, command: Sequence[str]) -> StdioMcpServer:
        """Starts it and shakes hands. Raises Disconnected if that cannot be done, LimitExceeded if it stays mute."""
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_MAX_LINE
            )
        except OSError as error:
            raise Disconnected(
                f"the MCP server {name!r} cannot be started: {command[0]}: {error.strerror}"
            ) from None
        server = cls(name, process)
        try:
            async with asyncio.timeout(_START_S):
                client = {"name": "pie", "version": __version__}
                await server.answer(
                    "initialize", {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": client}
                )
                await server._send({"method": "notifications/initialized", "params": {}})
        except TimeoutError:
            await server.close()
            raise LimitExceeded(
                f"the MCP server {name!r} has not answered `initialize` in {_START_S:g} s"
            ) from None
        except BaseException:
            await server.close()
            raise
        return server

    async def answer(self, method: str, params: Any) -> Any:
        """The result. Raises McpRefused with the server's error as JSON, Disconnected if it has ended."""
        number = next(self._numbers)
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answered
        try:
            await self._send({"id": number, "method": method, "params": params})
            return await answered
        finally:
            del self._waiting[number]

    async def close(self) -> None:
        """Closes its input, which tells it to end, and ends it if it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reader

    async def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        if self._reader.done():
            raise self._ended()
        with suppress(ConnectionError):  # the reader notices, too, and ends those who wait
            self._process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
            await self._process.stdin.drain()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(ValueError):  # a line beyond the limit: such a server is of no use
            while line := await self._process.stdout.readline():
                self._take(line)
        for answered in self._waiting.values():
            if not answered.done():
                answered.set_exception(self._ended())

    def _take(self, line: bytes) -> None:
        """What is no answer to us (its own requests, notifications, stray output) is passed over."""
        try:
            message = json.loads(line)
            answered = self._waiting.get(message["id"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if answered is None or answered.done():
            return
        if "error" in message:
            answered.set_exception(McpRefused(json.dumps(message["error"])))
        else:
            answered.set_result(message.get("result"))

    def _ended(self) -> Disconnected:
        return Disconnected(f"the MCP server {self._name!r} has ended")
