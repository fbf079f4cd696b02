"""MCP servers that a client offers: the relay to it and back. What programs call it with is not there yet."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from pie_core.errors import Disconnected, LimitExceeded, McpRefused, NotFound, RequestError, Unsupported
from pie_core.ids import ProcessId
from tests.flow.server.conftest import Pie
from tests.flow.server.wire import wire

OnServer = Callable[..., Any]

PROCESS = ProcessId("0123456789abcdef")


async def calculator(method: str, params: Any) -> Any:
    if method != "tools/call":
        raise ValueError(f"no method {method}")
    return {"sum": sum(params["numbers"])}


# Adds numbers, says a line that is no JSON first, and ends at the word.
SERVER = """
import json, sys
print("starting up", flush=True)
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    answer = {"jsonrpc": "2.0", "id": message["id"]}
    if message["method"] == "initialize":
        answer["result"] = {"protocolVersion": "2024-11-05", "capabilities": {}}
    elif message["method"] == "add":
        answer["result"] = sum(message["params"])
    elif message["method"] == "end":
        sys.exit(0)
    else:
        answer["error"] = {"code": -32601, "message": "no such method"}
    print(json.dumps(answer), flush=True)
"""


def relay(pie: Pie) -> Any:
    """Of the one connection."""
    (connection,) = pie.server.connections
    return connection.session.mcp


def test_a_call_travels_to_the_client_and_its_answer_back(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            await client.register_mcp_server("calculator", calculator)
            assert json.loads(await client.request("list_mcp_servers")) == ["calculator"]
            answer = await relay(pie).call(PROCESS, "calculator", "tools/call", '{"numbers": [1, 2]}')
            assert json.loads(answer) == {"sum": 3}
            with pytest.raises(RequestError, match="no method nothing"):
                await relay(pie).call(PROCESS, "calculator", "nothing", "{}")
            with pytest.raises(NotFound, match="not registered"):
                await relay(pie).call(PROCESS, "weather", "tools/call", "{}")

    on_server(scenario)


def test_a_client_runs_an_mcp_server_of_its_own(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            await client.register_mcp_server("adds", command=[sys.executable, "-c", SERVER])
            assert await relay(pie).call(PROCESS, "adds", "add", "[1, 2, 3]") == "6"
            with pytest.raises(McpRefused, match="no such method") as refusal:
                await relay(pie).call(PROCESS, "adds", "multiply", "[]")
            assert json.loads(str(refusal.value))["code"] == -32601
            for _ in range(2):
                with pytest.raises(McpRefused, match="has ended"):
                    await relay(pie).call(PROCESS, "adds", "end", "[]")
            for command in (["/no/such/program"], [sys.executable, "-c", ""]):
                with pytest.raises(Disconnected, match="the MCP server 'broken'"):
                    await client.register_mcp_server("broken", command=command)

    on_server(scenario)


def test_what_cannot_be_relayed_is_refused(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            with pytest.raises(Unsupported, match="the MCP transport 'sse' is not relayed"):
                await client.request(
                    "register_mcp_server", name="far", transport="sse", url="http://127.0.0.1:1"
                )
            for number in range(64):
                await client.request("register_mcp_server", name=f"{number}", transport="stdio")
            with pytest.raises(LimitExceeded, match="64 MCP servers"):
                await client.request("register_mcp_server", name="64", transport="stdio")
            await client.request("register_mcp_server", name="0", transport="stdio")  # replaced, not added

    on_server(scenario)


def test_a_client_that_goes_leaves_no_call_waiting(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with wire(pie.server.socket_url, "alice") as connection:
            await connection.ask("register_mcp_server", name="mute", transport="stdio")
            call = asyncio.create_task(relay(pie).call(PROCESS, "mute", "tools/list", "{}"))
            asked = await connection.receive()
            assert (asked["type"], asked["server_name"], asked["method"]) == (
                "mcp_request",
                "mute",
                "tools/list",
            )
            await connection.send(
                {"type": "mcp_response", "corr_id": asked["corr_id"] + 1, "ok": True, "result": ""}
            )
            answer = await connection.receive()
            assert (answer["corr_id"], answer["error_code"]) == (0, "protocol")
        with pytest.raises(Disconnected):
            await call

    on_server(scenario)
