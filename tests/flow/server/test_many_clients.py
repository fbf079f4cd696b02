"""A thousand connections and hundreds of programs at once: everybody is served, and nothing stays."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from pie_core.client import Client
from pie_core.errors import LimitExceeded
from tests.flow.server.conftest import Pie
from tests.flow.server.wire import until

OnServer = Callable[..., Any]

CONNECTIONS = 1000


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_thousand_clients_are_served_at_once(on_server: OnServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * CONNECTIONS + 200:
        pytest.skip(f"this process may open {hard} files; {2 * CONNECTIONS + 200} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * CONNECTIONS + 200), hard))

    async def scenario(pie: Pie) -> None:
        async with AsyncExitStack() as stack:
            clients = []
            for number in range(CONNECTIONS):
                client = pie.client(username=f"user-{number % 100}")
                clients.append(await stack.enter_async_context(client))
            assert pie.server.num_connections == CONNECTIONS
            await asyncio.gather(*(client.ping() for client in clients))
            values = await asyncio.gather(
                *(
                    client.run("text-completion", {"prompt": "Hi", "max_tokens": 2})
                    for client in clients[::10]
                )
            )
            assert len(values) == CONNECTIONS // 10
            await asyncio.gather(*(client.ping() for client in clients))

    on_server(scenario)


def test_many_programs_of_one_request_all_return(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install(
            "doubles", "async def main(input):\n    return 2 * input['n']\n", parameters='n = {type = "int"}'
        )
        async with pie.client() as client:
            processes = await client.launch_many("doubles", [{"n": n} for n in range(50)])
            assert [await process.result() for process in processes] == [2 * n for n in range(50)]

    on_server(scenario)


async def _has_two(client: Client) -> bool:
    return len(await client.processes()) == 2


def test_one_program_too_many_starts_none_of_its_request(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install(
            "waits", "from inferlet import session\nasync def main(input):\n    await session.receive()\n"
        )
        async with pie.client() as alice, pie.client(username="bob") as bob:
            kept = await alice.launch_many("waits", [{}, {}])
            with pytest.raises(LimitExceeded, match=r"server\.max_processes_per_user"):
                await alice.launch_many("waits", [{}, {}])
            await until(lambda: _has_two(alice))  # one more was started, and is being ended
            other = await bob.launch_many("waits", [{}, {}])
            with pytest.raises(LimitExceeded, match=r"\(server\.max_processes\)"):
                await bob.launch("waits")
            for process in (*kept, *other):
                await process.close_input()
                await process.result()

    on_server(scenario, server="max_processes: 4, max_processes_per_user: 3")
