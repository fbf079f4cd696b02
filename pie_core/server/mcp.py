"""MCP servers that a client runs and offers to its programs: requests travel to the client, answers come back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from pie_core.errors import Disconnected, LimitExceeded, McpRefused, NotFound, ProtocolError, Unsupported
from pie_core.ids import ProcessId
from pie_core.naming import unknown
from pie_core.server.messages import McpRequest, McpResponse, RegisterMcpServer

MAX_SERVERS = 64
TIMEOUT_S = 120.0


class McpServers:
    """Those of one connection."""

    def __init__(self, send: Callable[[McpRequest], None]) -> None:
        self._send = send
        self._offered: dict[str, RegisterMcpServer] = {}
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._numbers = itertools.count(1)

    @property
    def names(self) -> list[str]:
        return list(self._offered)

    def register(self, offered: RegisterMcpServer) -> None:
        """Raises Unsupported: only servers that the client itself runs are relayed to."""
        if offered.transport != "stdio":
            raise Unsupported(
                f"the MCP transport {offered.transport!r} is not relayed; expected 'stdio': the client runs the server"
            )
        if offered.name not in self._offered and len(self._offered) >= MAX_SERVERS:
            raise LimitExceeded(f"this connection offers {MAX_SERVERS} MCP servers, no more are taken")
        self._offered[offered.name] = offered

    async def call(self, process: ProcessId, server: str, method: str, params: str) -> str:
        """The JSON result. Raises NotFound, McpRefused, Disconnected, or LimitExceeded when no answer comes."""
        if server not in self._offered:
            raise NotFound(
                f"{unknown('MCP server', server, self._offered)} (it is not registered by the client)"
            )
        corr_id = next(self._numbers)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[corr_id] = answer
        self._send(
            McpRequest(corr_id=corr_id, process_id=process, server_name=server, method=method, params=params)
        )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await answer
        except TimeoutError:
            raise LimitExceeded(
                f"the MCP server {server!r} has not answered {method} in {TIMEOUT_S:g} s"
            ) from None
        finally:
            del self._waiting[corr_id]

    def answered(self, response: McpResponse) -> None:
        """Raises ProtocolError for an answer that nobody waits for."""
        answer = self._waiting.get(response.corr_id)
        if answer is None or answer.done():
            raise ProtocolError(f"no mcp_request {response.corr_id} waits for an answer")
        if response.ok:
            answer.set_result(response.result)
        else:
            answer.set_exception(McpRefused(response.result))

    def close(self) -> None:
        """The client is gone."""
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(Disconnected("the client that runs the MCP server has disconnected"))
