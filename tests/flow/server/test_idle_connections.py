"""Ten thousand clients that are connected and do nothing: a server keeps them all, and others notice little of it.

pytest -s tests/flow/server/test_idle_connections.py     prints what they cost
"""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pie_core.client import Client
from tests.flow.server.wire import frame
from tests.system import processor_ns

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CONNECTIONS = 10_000
AT_ONCE = 200  # handshakes under way
IDLE_S = 11  # with a ping to every second one, at least
FILES = CONNECTIONS + 500

CONFIG = f"""
models: [{{name: dummy, driver: {{type: dummy, options: {{step_ms: 1.0}}}}}}]
server: {{port: 0, max_connections: {CONNECTIONS + 100}, ping_interval_s: 20}}
auth: {{enabled: false}}
"""

_LOGIN = frame(2, msgspec.msgpack.encode({"type": "auth_identify", "corr_id": 1, "username": "idle"}))
_PONG = frame(10, b"")


class Idle(asyncio.Protocol):
    """Logs in, and then only answers pings."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._transport: asyncio.Transport
        self._handshaken = False
        self.logged_in = asyncio.get_running_loop().create_future()
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(
            f"GET / HTTP/1.1\r\nHost: {self._host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        if not self._handshaken:
            assert data.startswith(b"HTTP/1.1 101"), data
            self._handshaken = True
            self._transport.write(_LOGIN)
        elif data[0] & 0x0F == 2 and not self.logged_in.done():
            self.logged_in.set_result(None)
        elif data[0] & 0x0F == 9:
            self._transport.write(_PONG)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if not self.logged_in.done():
            self.logged_in.set_exception(error or ConnectionError("closed before the login"))

    def close(self) -> None:
        self._transport.abort()


class Crowd:
    """Idle connections to one server."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._room = asyncio.Semaphore(AT_ONCE)
        self.connections: list[Idle] = []

    async def gather(self, count: int) -> None:
        await asyncio.gather(*(self._connect() for _ in range(count)))

    async def _connect(self) -> None:
        async with self._room:
            loop = asyncio.get_running_loop()
            address = f"{self._host}:{self._port}"
            _, idle = await loop.create_connection(lambda: Idle(address), self._host, self._port)
            await idle.logged_in
            self.connections.append(idle)


@contextmanager
def allowed_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES:
        pytest.skip(f"this process may open {hard} files; {FILES} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, FILES), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def served(folder: Path) -> Iterator[tuple[int, str, int]]:
    """A `pie serve`: its process id, host and port."""
    (folder / "config.yaml").write_text(CONFIG)
    server = subprocess.Popen(
        [sys.executable, "-m", "pie_core", "serve"],
        env={**os.environ, "PIE_HOME": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        url = server.stdout.readline().split()[-1]
        assert server.stdout.readline().startswith("ready")
        host, _, port = url.removeprefix("http://").partition(":")
        yield server.pid, host, int(port)
    finally:
        server.terminate()
        server.communicate(timeout=30)


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


async def programs(client: Client, pid: int, count: int) -> float:
    """Milliseconds of the server's processor time for each."""
    begin = processor_ns(pid)
    for _ in range(count):
        await client.run("text-completion", {"prompt": "Hi", "max_tokens": 32})
    return (processor_ns(pid) - begin) / count / 1e6


async def slowest_ping_ms(client: Client) -> float:
    """The third slowest of 300, so that one hiccup of the machine does not count."""
    took = []
    for _ in range(300):
        begin = time.perf_counter()
        await client.ping()
        took.append(time.perf_counter() - begin)
    return sorted(took)[-3] * 1000


async def costs(client: Client, pid: int) -> dict[str, float]:
    return {"program_ms": await programs(client, pid, 20), "ping_p99_ms": await slowest_ping_ms(client)}


def test_ten_thousand_idle_connections_are_kept_and_cost_the_others_little(tmp_path: Path) -> None:
    async def main(pid: int, host: str, port: int) -> dict[str, Any]:
        crowd = Crowd(host, port)
        async with Client(f"ws://{host}:{port}", username="alice") as client:
            await programs(client, pid, 5)
            alone, before = await costs(client, pid), resident_bytes(pid)
            await crowd.gather(CONNECTIONS)
            memory, begin = (resident_bytes(pid) - before) / CONNECTIONS, processor_ns(pid)
            await asyncio.sleep(IDLE_S)
            idle = (processor_ns(pid) - begin) / IDLE_S / 1e9
            beside = await costs(client, pid)
            status = await client.status()
            assert status.connections == CONNECTIONS + 1
            assert all(each.is_open for each in crowd.connections)
        for each in crowd.connections:
            each.close()
        return {
            "alone": alone,
            "beside": beside,
            "bytes": memory,
            "of_a_processor": idle,
            "lag_s": status.loop_lag_s,
        }

    with allowed_files(), served(tmp_path) as (pid, host, port):
        found = asyncio.run(main(pid, host, port))
    print(found)
    assert found["bytes"] < 50_000
    assert found["of_a_processor"] < 0.2
    assert found["beside"]["program_ms"] < 3 * found["alone"]["program_ms"]
