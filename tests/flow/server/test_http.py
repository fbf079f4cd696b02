"""The HTTP side under requests that are not as they should be: each is answered, and the server goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from tests.flow.server.conftest import Pie
from tests.flow.server.wire import close_code, frame, raw_socket

OnServer = Callable[..., Any]


async def status_of(pie: Pie, request: bytes) -> int:
    """Of what comes back for these bytes; 0 if the connection just ends."""
    host, port = pie.server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        async with asyncio.timeout(10):
            line = await reader.readline()
        return int(line.split()[1]) if line else 0
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(b"nonsense\r\n\r\n", 400, id="no request"),
        pytest.param(
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, id="TLS on a port without"
        ),
        pytest.param(b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 400, id="a version of the future"),
        pytest.param(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nA B: x\r\n\r\n", 400, id="a bad header name"
        ),
        pytest.param(
            b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, id="a long path"
        ),
        pytest.param(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n",
            400,
            id="a long header",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            id="two lengths",
        ),
        pytest.param(
            b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400, id="a bad length"
        ),
        pytest.param(
            b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
            405,
            id="a wrong method",
        ),
        pytest.param(b"GET /%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, id="an unknown path"),
        pytest.param(b"GET /v1/models HTTP/1.1\r\nHost: evil.example.org\r\n\r\n", 403, id="a rebound name"),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            400,
            id="half a handshake",
        ),
    ],
)
def test_a_request_that_is_wrong_is_refused(on_server: OnServer, request_: bytes, status: int) -> None:
    async def scenario(pie: Pie) -> None:
        assert await status_of(pie, request_) == status
        async with aiohttp.ClientSession(pie.server.url) as http, http.get("/health") as answer:
            assert (answer.status, await answer.json()) == (200, {"status": "ok"})

    on_server(scenario)


def test_nonsense_takes_one_line_of_the_log(on_server: OnServer, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(pie: Pie) -> None:
        request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        host, port = pie.server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        assert b"200" in await reader.readline()
        writer.write(b"nonsense\r\n\r\n")
        await reader.read()
        writer.close()

    on_server(scenario)
    (record,) = [each for each in caplog.records if each.name == "pie_core.server.web"]
    assert record.exc_info is None
    assert "\n" not in record.getMessage()


def test_who_does_not_answer_pings_is_gone(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with raw_socket(pie.server.socket_url) as (reader, writer):
            writer.write(frame(9, b"still alive"))
            async with asyncio.timeout(10):
                assert await close_code(reader) in (0, 1006)

    on_server(scenario, server="ping_interval_s: 0.1")
