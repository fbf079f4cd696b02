"""The client without await, against a server on another thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pie_core.client import SyncClient
from pie_core.errors import Cancelled, Disconnected, NotFound
from tests.flow.server.conftest import StartServer

ECHO = """
    from inferlet import session

    async def main(input):
        while (message := await session.receive()) is not None:
            session.send(message.upper())
        return {"heard": True}
"""


@pytest.fixture
def url(start_server: StartServer) -> Iterator[str]:
    """Of a running server with the program `echo`."""
    started: list[Any] = []
    is_up, leave = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with start_server() as pie:
            pie.install("echo", ECHO)
            started.extend((pie.server.socket_url, asyncio.get_running_loop()))
            is_up.set()
            await leave.wait()
            await pie.server.all_left()
            await pie.check_nothing_is_left()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    is_up.wait()
    yield started[0]
    started[1].call_soon_threadsafe(leave.set)
    thread.join()


def test_the_same_calls_work_without_await(url: str) -> None:
    with SyncClient(url, username="alice") as client:
        client.ping()
        process = client.launch("echo")
        process.signal("hello")
        process.close_input()
        assert [(event.kind, event.value) for event in process] == [
            ("message", "HELLO"),
            ("return", {"heard": True}),
        ]
        assert process.result() == {"heard": True}
        assert client.run("helloworld") is None
        assert {"name": "echo", "version": "1.0.0"}.items() <= client.programs()[0].items()
        assert [each["name"] for each in client.models()] == ["first", "second"]


def test_errors_are_raised_by_type(url: str) -> None:
    with SyncClient(url, username="alice") as client:
        with pytest.raises(NotFound, match="did you mean `echo`"):
            client.launch("ehco")
        process = client.launch("echo")
        process.terminate()
        with pytest.raises(Cancelled):
            process.result()


def test_a_server_that_is_not_there_is_named() -> None:
    with (
        pytest.raises(Disconnected, match="cannot connect to ws://127"),
        SyncClient("ws://127.0.0.1:1"),
    ):
        pass
