"""Clients that break the rules: each is told by type, and soon; nobody else notices, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import msgspec
import pytest
from blake3 import blake3

from pie_core.client import Client
from pie_core.server import messages as m
from tests.flow.server.conftest import Pie
from tests.flow.server.wire import close_code, frame, raw_socket, sample, until, wire

OnServer = Callable[..., Any]

WAITS = """
    from inferlet import session

    async def main(input):
        while (message := await session.receive()) is not None:
            session.send(message)
"""
FLOODS = """
    from inferlet import session

    async def main(input):
        for number in range(input["messages"]):
            session.send(str(number) + " " * input["padding"])
        return "said it all"
"""
PARAMETERS = 'messages = {type = "int"}\npadding = {type = "int", optional = true, default = 0}'


@asynccontextmanager
async def a_neighbour(pie: Pie) -> AsyncIterator[None]:
    """A client whose program answers before, and in time after."""
    pie.install("waits", WAITS)
    async with pie.client(username="neighbour") as client:
        process = await client.launch("waits")
        events = aiter(process)
        for said in ("before", "after"):
            await process.signal(said)
            async with asyncio.timeout(10):
                assert (await anext(events)).value == said
            if said == "before":
                yield
        await process.close_input()
        await process.result()


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        pytest.param(frame(3, b"x"), 1002, id="an opcode that does not exist"),
        pytest.param(frame(2, b"x", head=0xF0), 1002, id="reserved bits"),
        pytest.param(frame(0, b"x"), 1002, id="a continuation of nothing"),
        pytest.param(frame(9, b"x", head=0x00), 1002, id="a control frame in parts"),
        pytest.param(frame(9, b"x" * 126), 1002, id="a control frame that is too long"),
        pytest.param(frame(2, b"x", length=2**63), 1009, id="a length of 2^63"),
        pytest.param(frame(2, b"x", length=2**64 - 1), 1009, id="a length of 2^64 - 1"),
        pytest.param(frame(2, b"x", length=(8 << 20) + 1), 1009, id="a message that will be too long"),
        pytest.param(frame(1, b"\xff\xff"), 1007, id="text that is not UTF-8"),
        pytest.param(frame(1, b"{}"), 1003, id="text"),
        pytest.param(frame(9, b"") * 400, 1008, id="a flood of pings"),
        pytest.param(frame(10, b"") * 400, 1008, id="a flood of pongs"),
    ],
)
def test_a_bad_frame_closes_its_connection_with_a_code(on_server: OnServer, sent: bytes, code: int) -> None:
    async def scenario(pie: Pie) -> None:
        async with a_neighbour(pie), raw_socket(pie.server.socket_url) as (reader, writer):
            writer.write(sent)
            async with asyncio.timeout(10):
                assert await close_code(reader) == code

    on_server(scenario)


def test_an_unmasked_frame_harms_nobody(on_server: OnServer) -> None:
    """aiohttp reads it like any other; masks protect proxies from clients, not servers."""

    async def scenario(pie: Pie) -> None:
        async with a_neighbour(pie), raw_socket(pie.server.socket_url) as (reader, writer):
            writer.write(frame(1, b"x", masked=False))
            async with asyncio.timeout(10):
                assert await close_code(reader) == 1003

    on_server(scenario)


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"", "not"),
        (b"\xc1", "not"),
        (msgspec.msgpack.encode([1, 2]), "not"),
        (b"\x81" * 100_000, "not"),
        (b"\xdf\xff\xff\xff\xff", "not"),
        (msgspec.msgpack.encode({"type": "ping"})[:-2], "not"),
        (msgspec.msgpack.encode({"type": 7, "corr_id": 1}), "not"),
        (
            msgspec.msgpack.encode({"type": "no_such"}),
            "unknown message type 'no_such'; known are add_program",
        ),
        (msgspec.msgpack.encode({"type": "ping", "corr_id": -1}), "ping: Expected"),
        (msgspec.msgpack.encode({"type": "ping", "corr_id": 2**32}), "ping: Expected"),
        (msgspec.msgpack.encode({"type": "ping", "corr_id": "1"}), "ping: Expected"),
        (msgspec.msgpack.encode({"type": "ping", "corr_id": 0, "extra": 1}), "unknown field `extra`"),
        (msgspec.msgpack.encode({"type": "launch_process", "corr_id": 0}), "missing required field"),
    ],
)
def test_a_message_that_cannot_be_read_is_refused_and_the_connection_goes_on(
    on_server: OnServer, sent: bytes, says: str
) -> None:
    async def scenario(pie: Pie) -> None:
        async with wire(pie.server.socket_url, "alice") as connection:
            await connection.send(sent)
            answer = await connection.receive()
            assert (answer["type"], answer["ok"], answer["error_code"]) == ("response", False, "protocol")
            assert says in answer["result"]
            assert (await connection.ask("ping"))["result"] == "Pong"

    on_server(scenario)


def test_a_wrong_field_is_answered_with_the_number_of_its_message(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with wire(pie.server.socket_url, "alice") as connection:
            for kind in m.REQUESTS:
                await connection.send({**sample(kind, corr_id=9), "no_such_field": None})
                answer = await connection.receive()
                assert (answer["corr_id"], answer["error_code"]) == (9, "protocol"), kind

    on_server(scenario)


def test_too_many_messages_are_refused_by_type_until_the_rate_is_kept(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with a_neighbour(pie), wire(pie.server.socket_url, "alice") as connection:
            for number in range(1, 61):
                await connection.send({"type": "ping", "corr_id": number})
            answers = [await connection.response(number) for number in range(1, 61)]
            assert [answer["ok"] for answer in answers[:10]] == [True] * 10
            assert {answer.get("error_code") for answer in answers} == {None, "limit-exceeded"}

    on_server(scenario, server="requests_per_s: 10")


def test_who_does_not_log_in_is_sent_away(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with wire(pie.server.socket_url) as connection:
            code, last = await connection.closing()
            assert last is not None
            assert (code, last["corr_id"], last["error_code"]) == (1008, 0, "unauthenticated")

    on_server(scenario, server="login_s: 0.05")


def test_who_connects_and_says_nothing_is_sent_away(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        host, port = pie.server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ")  # and never the rest
        async with asyncio.timeout(10):
            with suppress(ConnectionResetError):  # or an end without a word
                assert await reader.read() == b""
        writer.close()

    on_server(scenario, server="login_s: 0.05")


def test_an_idle_connection_is_closed_and_a_busy_one_is_not(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("waits", WAITS)
        async with pie.client(username="busy") as busy:
            process = await busy.launch("waits")
            async with wire(pie.server.socket_url, "alice") as connection:
                code, last = await connection.closing()
                assert last is not None
                assert (code, last["error_code"], "server.idle_s" in last["result"]) == (
                    1008,
                    "unavailable",
                    True,
                )
            await process.close_input()
            assert await process.result() is None

    on_server(scenario, server="idle_s: 0.2")


def test_one_connection_too_many_is_refused_and_the_others_stay(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with wire(pie.server.socket_url, "a") as first, wire(pie.server.socket_url, "b") as second:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                async with wire(pie.server.socket_url):
                    pass
            assert refusal.value.status == 503
            for connection in (first, second):
                assert (await connection.ask("ping"))["ok"]

    on_server(scenario, server="max_connections: 2")


@asynccontextmanager
async def _deaf(pie: Pie) -> AsyncIterator[None]:
    """A socket with a small buffer that has launched a flood of messages and will never read them."""
    host, port = pie.server.url.removeprefix("http://").split(":")
    with socket.socket() as deaf:
        await _launch_a_flood(deaf, (host, int(port)))
        yield


async def _launch_a_flood(deaf: socket.socket, address: tuple[str, int]) -> None:
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(deaf, address)
    handshake = (
        "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    await loop.sock_sendall(deaf, handshake.encode())
    assert b" 101 " in await loop.sock_recv(deaf, 4096)
    for message in (
        {"type": "auth_identify", "corr_id": 1, "username": "alice"},
        {
            "type": "launch_process",
            "corr_id": 2,
            "inferlet": "floods",
            "input": '{"messages": 3000, "padding": 2000}',
            "capture_outputs": True,
        },
    ):
        await loop.sock_sendall(deaf, frame(2, msgspec.msgpack.encode(message)))


def test_a_client_that_never_reads_is_detached_and_its_process_goes_on(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("floods", FLOODS, parameters=PARAMETERS)
        async with a_neighbour(pie), _deaf(pie), pie.client() as client:
            listed: list[dict[str, Any]] = []

            async def is_detached() -> bool:
                listed[:] = await client.processes(include_ended=True)
                return bool(listed) and not listed[0]["attached"]

            await until(is_detached)
            (process,) = listed
            assert process["program"] == "floods"
            again = await client.attach(process["id"])
            events = [event async for event in again]
            assert events[-1].value == "said it all"
            # The first ones went to the deaf client, many were dropped while nobody was attached: all are counted.
            assert events[0].dropped > 0
            seqs = [event.seq for event in events]
            assert seqs == list(range(seqs[0], 3002))

    on_server(scenario, server="slow_client_s: 0.2, buffered_events: 100")


def test_a_slow_client_holds_its_program_back_and_gets_everything(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("floods", FLOODS, parameters=PARAMETERS)
        async with a_neighbour(pie), wire(pie.server.socket_url, "alice") as connection:
            launch = {"inferlet": "floods", "input": '{"messages": 500}', "capture_outputs": True}
            assert (await connection.ask("launch_process", **launch))["ok"]
            heard: list[dict[str, Any]] = []
            while not heard or heard[-1]["event"] == "message":
                heard.append(await connection.receive())
                await asyncio.sleep(0)
            assert [event["seq"] for event in heard] == list(range(1, 502))
            assert not any("dropped" in event for event in heard)

    on_server(scenario, server="buffered_events: 10")


def test_a_client_that_vanishes_leaves_its_process_for_the_next(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with a_neighbour(pie):
            async with raw_socket(pie.server.socket_url) as (reader, writer):
                writer.write(
                    frame(
                        2,
                        msgspec.msgpack.encode({"type": "auth_identify", "corr_id": 1, "username": "alice"}),
                    )
                )
                launch = {**sample(m.LaunchProcess, 2), "inferlet": "waits"}
                writer.write(frame(2, msgspec.msgpack.encode(launch)))
                await reader.read(1)
                async with pie.client() as client:
                    await until(lambda: _has_process(client, attached=True))
                writer.transport.abort()  # no close frame, no goodbye
            async with pie.client() as client:
                await until(lambda: _has_process(client, attached=False))
                process = await client.attach((await client.processes())[0]["id"])
                await process.signal("still there?")
                assert (await anext(aiter(process))).value == "still there?"
                await process.close_input()
                await process.result()

    on_server(scenario)


async def _has_process(client: Client, attached: bool) -> bool:
    return [each["attached"] for each in await client.processes()] == [attached]


# ---- uploads


def chunk(content: bytes, index: int, total: int, corr_id: int = 1, **changes: Any) -> dict[str, Any]:
    data = content[index * m.CHUNK_BYTES : (index + 1) * m.CHUNK_BYTES]
    fields = {"program_hash": blake3(content).hexdigest(), "chunk_index": index, "total_chunks": total}
    return {**sample(m.AddProgram, corr_id), **fields, "chunk_data": data, **changes}


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"program_hash": "f" * 64}, "invalid-request", "has the BLAKE3 hash"),
        ({"chunk_index": 1, "total_chunks": 2}, "invalid-request", "whose chunk 0 has not come"),
        ({"chunk_index": 5, "total_chunks": 2}, "invalid-request", "whose chunk 0 has not come"),
        ({"total_chunks": 2}, "invalid-request", "all but the last have"),
        ({"total_chunks": 2**32 - 1}, "limit-exceeded", "runtime.max_program_bytes"),
        ({"program_hash": "xyz"}, "protocol", "program_hash"),
        ({"chunk_data": b"x" * (m.CHUNK_BYTES + 1)}, "protocol", "chunk_data"),
        ({}, "program", ""),
    ],
)
def test_an_upload_that_is_not_right_is_refused(
    on_server: OnServer, changes: dict[str, Any], code: str, says: str
) -> None:
    async def scenario(pie: Pie) -> None:
        async with wire(pie.server.socket_url, "alice") as connection:
            await connection.send(chunk(b"not a program", 0, 1, **changes))
            answer = await connection.response(1)
            assert (answer["ok"], answer["error_code"]) == (False, code)
            assert says in answer["result"]
            assert (await connection.ask("ping"))["ok"]
            assert pie.store.installed() == []

    on_server(scenario)


def test_a_truncated_upload_goes_on_over_another_connection(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        content = os.urandom(2 * m.CHUNK_BYTES + 5)
        digest = blake3(content).hexdigest()
        async with wire(pie.server.socket_url, "alice") as connection:
            await connection.send(chunk(content, 0, 3))
            await connection.send(chunk(content, 1, 3))
            assert (await connection.ask("resume_upload", program_hash=digest))["result"] == "2"
        async with wire(pie.server.socket_url, "bob") as other:
            assert (await other.ask("resume_upload", program_hash=digest))["result"] == "0"
        async with wire(pie.server.socket_url, "alice") as connection:
            assert (await connection.ask("resume_upload", program_hash=digest))["result"] == "2"
            await connection.send(chunk(content, 2, 3, corr_id=5))
            answer = await connection.response(5)
            assert answer["error_code"] == "program"  # it came whole, and random bytes are no program
            assert (await connection.ask("resume_upload", program_hash=digest))["result"] == "0"

    on_server(scenario)


def test_an_upload_that_fails_on_its_way_is_answered_once(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        content = os.urandom(4 * m.CHUNK_BYTES)
        async with wire(pie.server.socket_url, "alice") as connection:
            for index in (0, 2, 3):  # chunk 1 is missing
                await connection.send(chunk(content, index, 4))
            await connection.send({"type": "ping", "corr_id": 9})
            answers = [await connection.receive(), await connection.receive()]
            assert [(each["corr_id"], each["ok"]) for each in answers] == [(1, False), (9, True)]

    on_server(scenario)


def test_requests_without_a_number_are_answered_only_if_they_fail(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with wire(pie.server.socket_url, "alice") as connection:
            await connection.send({"type": "signal_process", "process_id": "nobody", "message": "hello"})
            answer = await connection.receive()
            assert (answer["corr_id"], answer["error_code"]) == (0, "not-found")

    on_server(scenario)


def test_what_pie_0_4_has_and_this_version_has_not_is_refused_by_type(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        missing: list[type[m.Request]] = [m.LaunchDaemon, m.SubmitWorkflow]
        missing += [m.CancelWorkflow, m.AttachWorkflow, m.DetachWorkflow]
        async with wire(pie.server.socket_url, "alice") as connection:
            for kind in missing:
                await connection.send(sample(kind))
                assert (await connection.response(7))["error_code"] == "unsupported"
            refused = await connection.ask("launch_daemon", port=8080, inferlet="shop", input="{}")
            assert "as shop would on 8080" in refused["result"]
            await connection.send({**sample(m.LaunchProcess), "token_budget": 5})
            assert (await connection.response(7))["error_code"] == "unsupported"

    on_server(scenario)


def test_a_protocol_of_the_future_is_refused(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with wire(pie.server.socket_url) as connection:
            answer = await connection.ask("hello", protocol=2)
            assert (answer["error_code"], answer["result"]) == (
                "unsupported",
                "this server speaks protocol 1, the client asked for 2",
            )

    on_server(scenario)
