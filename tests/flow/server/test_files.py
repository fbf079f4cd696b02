"""Files in both directions: whole, in order, checked, and bounded."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from pie_core.errors import LimitExceeded
from pie_core.server import messages as m
from tests.flow.server.conftest import Pie
from tests.flow.server.wire import sample, wire

OnServer = Callable[..., Any]

REVERSES = """
    from inferlet import session

    async def main(input):
        while (content := await session.receive_file()) is not None:
            session.send_file(content[::-1])
"""


def test_files_go_both_ways_whatever_their_size(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("reverses", REVERSES)
        files = [b"", b"x", os.urandom(m.CHUNK_BYTES), os.urandom(2 * m.CHUNK_BYTES + 1)]
        async with pie.client() as client:
            process = await client.launch("reverses")
            events = aiter(process)
            for content in files:
                await process.send_file(content)
                event = await anext(events)
                assert (event.kind, event.value) == ("file", content[::-1])
            await process.close_input()
            await process.result()

    on_server(scenario)


def test_a_file_that_is_too_large_is_refused_before_it_is_sent(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("reverses", REVERSES)
        async with pie.client() as client:
            process = await client.launch("reverses")
            with pytest.raises(LimitExceeded, match=r"server\.max_file_bytes"):
                await process.send_file(bytes(3 * m.CHUNK_BYTES))
            await process.send_file(b"small")
            assert (await anext(aiter(process))).value == b"llams"
            await process.close_input()
            await process.result()

    on_server(scenario, server="max_file_bytes: 300000")


def test_a_file_with_a_wrong_hash_reaches_nobody(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("reverses", REVERSES)
        async with wire(pie.server.socket_url, "alice") as connection:
            launched = await connection.ask(
                "launch_process", inferlet="reverses", input="{}", capture_outputs=True
            )
            for corr_id in (0, 5):  # told in both cases, as Pie 0.4's clients send none
                await connection.send({**sample(m.TransferFile, corr_id), "process_id": launched["result"]})
                answer = await connection.response(corr_id)
                assert (answer["error_code"], "BLAKE3" in answer["result"]) == ("invalid-request", True)
            await connection.ask("close_input", process_id=launched["result"])
            assert (await connection.receive())["event"] == "return"

    on_server(scenario)


def test_a_message_that_is_too_long_is_refused(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("reverses", REVERSES)
        async with pie.client() as client:
            process = await client.launch("reverses")
            with pytest.raises(LimitExceeded, match=r"server\.max_message_bytes"):
                await process.signal("x" * 1001)
            await process.close_input()
            await process.result()

    on_server(scenario, server="max_message_bytes: 1000")


def test_unread_files_are_bounded_in_number_and_bytes(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install(
            "sleeps", "from inferlet import session\nasync def main(input):\n    await session.receive()\n"
        )
        async with pie.client() as client:
            process = await client.launch("sleeps")
            for _ in range(3):
                await process.send_file(bytes(100_000))
            with pytest.raises(LimitExceeded, match="300000 bytes of files unread"):
                await process.send_file(b"x")
            await process.close_input()
            await process.result()

    on_server(scenario, server="max_file_bytes: 300000")
