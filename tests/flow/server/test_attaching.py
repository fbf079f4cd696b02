"""Processes outlive connections: what was said meanwhile is there for who attaches, within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pie_core.client import Client, Process
from pie_core.errors import Disconnected, NotFound
from tests.flow.server.conftest import Pie
from tests.flow.server.wire import until

OnServer = Callable[..., Any]

COUNTS = """
    from inferlet import session

    async def main(input):
        for number in range(input["first"]):
            session.send(str(number))
        await session.receive()
        for number in range(input["first"], input["last"]):
            session.send(str(number))
        return "end"
"""
PARAMETERS = 'first = {type = "int"}\nlast = {type = "int"}'


async def said(process: Process, count: int) -> list[str]:
    """So many messages."""
    events = aiter(process)
    return [(await anext(events)).value for _ in range(count)]


async def rest(process: Process) -> list[Any]:
    return [event.value async for event in process]


def cut_off(pie: Pie) -> None:
    """Every connection ends without a word, as in a broken network."""
    for connection in pie.server.connections:
        connection.abort()


def numbers(first: int, last: int) -> list[str]:
    return [str(number) for number in range(first, last)]


def test_what_was_said_while_nobody_was_there_comes_on_attaching(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("counts", COUNTS, parameters=PARAMETERS)
        async with pie.client() as client:
            process = await client.launch("counts", {"first": 3, "last": 6})
            assert await said(process, 3) == numbers(0, 3)
        async with pie.client() as client:
            await client.request("signal_process", process_id=process.id, message="go on")
            await until(lambda: _has_ended(client, process.id))
            again = await client.attach(process.id)
            assert await rest(again) == [*numbers(3, 6), "end"]
            # Once more, all of it, and the end again.
            assert await rest(await client.attach(process.id, after=0)) == [*numbers(0, 6), "end"]
            assert await rest(await client.attach(process.id, after=5)) == ["5", "end"]

    on_server(scenario)


async def _has_ended(client: Client, process_id: str) -> bool:
    return bool((await client.query("process_status", process_id))["state"] == "ended")


def test_what_does_not_fit_is_dropped_from_the_front_and_counted(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("counts", COUNTS, parameters=PARAMETERS)
        async with pie.client() as client:
            process = await client.launch("counts", {"first": 0, "last": 100}, detached=True)
            await client.request("signal_process", process_id=process.id, message="go on")
            await until(lambda: _has_ended(client, process.id))
            again = await client.attach(process.id)
            events = [event async for event in again]
            assert [event.value for event in events] == [*numbers(91, 100), "end"]
            assert [event.dropped for event in events] == [91] + [0] * 9
            assert events[0].seq == 92

    on_server(scenario, server="buffered_events: 10")


def test_the_latest_who_attaches_gets_the_events_and_the_one_before_is_told(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("counts", COUNTS, parameters=PARAMETERS)
        async with pie.client() as first, pie.client() as second:
            process = await first.launch("counts", {"first": 1, "last": 2})
            assert await said(process, 1) == ["0"]
            taken = await second.attach(process.id)
            with pytest.raises(Disconnected, match="another client has attached"):
                await process.result()
            await taken.signal("go on")
            assert await rest(taken) == ["1", "end"]

    on_server(scenario)


def test_a_client_that_loses_its_connection_comes_back_and_misses_nothing(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("counts", COUNTS, parameters=PARAMETERS)
        async with pie.client() as client:
            process = await client.launch("counts", {"first": 50, "last": 100})
            assert await said(process, 50) == numbers(0, 50)
            for _ in range(3):
                cut_off(pie)
                await pie.server.all_left()
                await until(lambda: _answers(client))
            await process.signal("go on")
            assert await rest(process) == [*numbers(50, 100), "end"]

    on_server(scenario)


async def _answers(client: Client) -> bool:
    try:
        await client.ping()
    except Disconnected:
        return False
    return True


def test_a_request_that_the_disconnect_cut_off_fails_with_a_type(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("counts", COUNTS, parameters=PARAMETERS)
        async with pie.client() as client:
            running = asyncio.create_task(
                client.request("run_processes", inferlet="counts", inputs=['{"first": 1, "last": 1}'])
            )
            await until(lambda: _is_running(pie))
            cut_off(pie)
            with pytest.raises(Disconnected):
                await running
            await until(lambda: _is_idle(pie))  # nobody could get its result any more

    on_server(scenario)


async def _is_running(pie: Pie) -> bool:
    return pie.server.service.processes.num_running == 1


async def _is_idle(pie: Pie) -> bool:
    return pie.server.service.processes.num_running == 0


def test_a_process_that_ended_is_forgotten_after_a_while(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            process = await client.launch("helloworld")
            await process.result()
            await until(lambda: _is_forgotten(client))
            with pytest.raises(NotFound):
                await client.attach(process.id)

    on_server(scenario, server="keep_ended_s: 0.1")


async def _is_forgotten(client: Client) -> bool:
    return not await client.processes(include_ended=True)


def test_a_detached_process_goes_on_unheard(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("counts", COUNTS, parameters=PARAMETERS)
        async with pie.client() as client:
            process = await client.launch("counts", {"first": 1, "last": 2})
            assert await said(process, 1) == ["0"]
            await process.detach()
            assert await rest(process) == []
            await process.signal("go on")
            await until(lambda: _has_ended(client, process.id))
            assert await rest(await client.attach(process.id)) == ["1", "end"]

    on_server(scenario)
