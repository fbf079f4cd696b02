"""Programs launched, heard, spoken to and ended over a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pie_core.errors import Cancelled, LimitExceeded, NotFound
from tests.flow.server.conftest import Pie, StartServer

OnServer = Callable[..., Any]

ECHO = """
    from inferlet import session

    async def main(input):
        print("ready")
        while (message := await session.receive()) is not None:
            session.send(message.upper())
        return {"heard": True}
"""


def test_a_program_streams_its_events_and_its_return_value_comes_last(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            process = await client.launch("text-completion", {"prompt": "The capital", "max_tokens": 4})
            events = [event async for event in process]
            assert events[-1].kind == "return"
            assert await process.result() == events[-1].value
            assert [event.seq for event in events] == list(range(1, len(events) + 1))

    on_server(scenario)


def test_messages_go_both_ways_until_the_input_is_closed(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("echo", ECHO)
        async with pie.client() as client:
            process = await client.launch("echo")
            await process.signal("one")
            await process.signal("two")
            await process.close_input()
            events = [(event.kind, event.value) async for event in process]
            assert events == [
                ("stdout", "ready\n"),
                ("message", "ONE"),
                ("message", "TWO"),
                ("return", {"heard": True}),
            ]
            with pytest.raises(NotFound, match="has ended"):
                await process.signal("three")

    on_server(scenario)


def test_a_terminated_process_ends_with_a_typed_error(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("echo", ECHO)
        async with pie.client() as client:
            process = await client.launch("echo@1.0.0")
            await process.terminate()
            with pytest.raises(Cancelled, match="its client ended it"):
                await process.result()

    on_server(scenario)


def test_a_launch_gives_a_priority_up_to_what_the_server_grants(start_server: StartServer) -> None:
    source = """
        from inferlet import runtime

        def main(input):
            return runtime.priority()
    """

    async def scenario() -> None:
        async with start_server(server="max_priority: 3") as pie:
            pie.install("priority", source)
            async with pie.client() as client:
                given = [
                    await (await client.launch("priority", priority=each)).result() for each in (3, 0, -8)
                ]
                assert given == [3, 0, -8]
                many = await client.launch_many("priority", [{}, {}], priority=2)
                assert [await each.result() for each in many] == [2, 2]
                with pytest.raises(LimitExceeded, match=r"priority 4 is more than 3.*server\.max_priority"):
                    await client.launch("priority", priority=4)

    asyncio.run(scenario())


def test_children_are_processes_of_the_same_user_that_clients_find_and_end(start_server: StartServer) -> None:
    parent = """
        from inferlet import InferletError, launch, session

        async def main(input):
            child = launch(input["program"], {"n": 1})
            session.send(child.pid)
            try:
                return await child
            except InferletError as error:
                return error.code
    """
    waits = """
        from inferlet import session

        async def main(input):
            return {"heard": await session.receive(), "input": input}
    """

    async def scenario() -> None:
        async with start_server(server="max_processes_per_user: 3") as pie:
            pie.install("parent", parent, parameters="extra = true\n[capabilities]\nchildren = 1")
            pie.install("waits", waits, parameters="extra = true")
            async with pie.client() as client, pie.client(username="bob") as bob:
                first = await client.launch("parent", {"program": "waits"})
                pid = (await anext(aiter(first))).value
                assert {each["id"]: each["program"] for each in await client.processes()} == {
                    first.id: "parent",
                    pid: "waits",
                }
                with pytest.raises(NotFound):
                    await bob.attach(pid)
                child = await client.attach(pid)
                await child.signal("hello")
                assert await first.result() == {"heard": "hello", "input": {"n": 1}}

                second = await client.launch("parent", {"program": "waits"})
                await (await client.attach((await anext(aiter(second))).value)).terminate()
                assert await second.result() == "cancelled"

                third = await client.launch("parent", {"program": "parent"})
                assert (
                    await third.result() == "guest"
                )  # a KeyError of the child: its own input lacks `program`
            await pie.server.stop(0)
            await pie.server.all_left()

    asyncio.run(scenario())
