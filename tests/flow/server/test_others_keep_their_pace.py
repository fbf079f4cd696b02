"""Programs and clients that wait, or make others wait, cost those beside them nothing: counted, not timed.

What a program takes of its process is how often it is resumed; of a model, the steps and passes it needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest

from pie_core.client import Client
from pie_core.errors import LimitExceeded
from tests.flow.server.conftest import Pie
from tests.flow.server.wire import frame, raw_socket, until

OnServer = Callable[..., Any]

_CHANCE = 30  # a step that ran ahead, an answer in two parts, a socket that takes one more message

MODELS = """
models:
  - {name: first, driver: {type: dummy, options: {step_ms: 1.0}}}
"""

NEIGHBOUR = """
    from inferlet import Context, Model, Sampler, runtime, session

    async def main(input):
        for _ in range(20):
            session.send(await session.receive())
        context = Context(Model.load(runtime.models()[0]))
        context.append([40, 41, 42])
        return await context.generate(Sampler.argmax(), max_tokens=40, auto_flush=False).collect_tokens()
"""

WAITS_FOR_A_MESSAGE = """
    from inferlet import session

    async def main(input):
        session.send("waiting")
        await session.receive()
"""

WAITS_WITH_A_CONTEXT = """
    import asyncio
    from inferlet import Context, Model, runtime, session

    async def main(input):
        context = Context(Model.load(runtime.models()[0]))
        context.append([40, 41, 42])
        await context.flush()
        session.send("waiting")
        await asyncio.gather(session.receive(), session.receive_file())
"""

FLOODS = """
    from inferlet import session

    async def main(input):
        while True:
            session.send("x" * 10_000)
"""

NEVER_READS = """
    import asyncio
    from inferlet import session

    async def main(input):
        session.send("deaf")
        await asyncio.sleep(3600)
"""


async def taken_by_the_neighbour(pie: Pie, client: Client) -> tuple[list[int], int, int, int]:
    """Its tokens, and what it took: resumes, steps, passes."""
    ((before,),) = (await pie.server.service.models.statuses()).values()
    resumes = pie.server.app.runtime.resumes
    process = await client.launch("neighbour")
    events = aiter(process)
    for number in range(20):
        await process.signal(str(number))
        assert (await anext(events)).value == str(number)
    tokens: list[int] = await process.result()
    ((after,),) = (await pie.server.service.models.statuses()).values()
    assert before is not None
    assert after is not None
    return (
        tokens,
        pie.server.app.runtime.resumes - resumes,
        after.steps - before.steps,
        after.passes - before.passes,
    )


def check_pace(alone: tuple[list[int], int, int, int], beside: tuple[list[int], int, int, int]) -> None:
    assert beside[0] == alone[0]
    for what, before, now in zip(("resumes", "steps", "passes"), alone[1:], beside[1:], strict=True):
        assert now <= before + _CHANCE, what


@asynccontextmanager
async def a_neighbour(pie: Pie) -> AsyncIterator[None]:
    """One whose program takes as much of everything inside as before."""
    pie.install("neighbour", NEIGHBOUR)
    async with pie.client(username="neighbour") as client:
        await taken_by_the_neighbour(pie, client)  # the first one loads what all need
        alone = await taken_by_the_neighbour(pie, client)
        yield
        check_pace(alone, await taken_by_the_neighbour(pie, client))


@pytest.mark.slow
@pytest.mark.parametrize("source", [WAITS_FOR_A_MESSAGE, WAITS_WITH_A_CONTEXT], ids=["message", "context"])
def test_a_hundred_programs_that_wait_for_ever_take_nothing_from_others(
    on_server: OnServer, source: str
) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("waits", source)
        async with pie.client() as client, AsyncExitStack() as stack:
            await stack.enter_async_context(a_neighbour(pie))
            waiting = await client.launch_many("waits", [{}] * 100)
            for process in waiting:
                assert (await anext(aiter(process))).value == "waiting"
            await stack.aclose()
            for process in waiting:
                await process.terminate()

    on_server(scenario, models=MODELS)


@pytest.mark.slow
def test_twenty_clients_that_do_not_read_hold_their_own_programs_only(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("floods", FLOODS)
        launch = {
            "type": "launch_process",
            "corr_id": 2,
            "inferlet": "floods",
            "input": "{}",
            "capture_outputs": True,
        }
        async with AsyncExitStack() as stack:
            neighbour = await stack.enter_async_context(AsyncExitStack())
            await neighbour.enter_async_context(a_neighbour(pie))
            for _ in range(20):
                _, writer = await stack.enter_async_context(raw_socket(pie.server.socket_url))
                login = {"type": "auth_identify", "corr_id": 1, "username": "deaf"}
                for message in (login, launch):
                    writer.write(frame(2, msgspec.msgpack.encode(message)))
            watcher = await stack.enter_async_context(pie.client(username="deaf"))

            async def all_are_held() -> bool:
                programs = (await watcher.status()).processes
                return [each.waits_for for each in programs] == ["output"] * 20

            await until(all_are_held)
            await neighbour.aclose()
            assert await all_are_held()
            pie.server.service.processes.terminate_all("the test is over")

    on_server(scenario, models=MODELS, server="slow_client_s: 3600, buffered_events: 50")


@pytest.mark.slow
def test_what_is_sent_to_a_program_that_never_reads_is_bounded(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("deaf", NEVER_READS)
        async with a_neighbour(pie), pie.client() as client:
            process = await client.launch("deaf")
            assert (await anext(aiter(process))).value == "deaf"
            with pytest.raises(LimitExceeded, match="unread"):
                await asyncio.gather(*(process.signal("x" * 1000) for _ in range(3000)))
            await process.terminate()

    on_server(scenario, models=MODELS, server="requests_per_s: 100000")
