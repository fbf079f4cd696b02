"""Programs in worker processes: as in one process for them and their clients, and lost with a typed error at worst."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pie_core.errors import Cancelled, GuestError, WorkerLost
from pie_core.ids import ModelName
from pie_core.testing.recording_client import RecordingClient
from tests.flow.conftest import DUMMY, Pie, StartPie
from tests.flow.processes.test_engine_process import (
    ANSWERS,
    DUMMY_OF_2_MS,
    GOES_ON,
    engine_pid,
    until,
)
from tests.system import children_of, sockets_and_pipes

pytestmark = pytest.mark.slow

Scenario = Callable[[Pie], Coroutine[Any, Any, None]]
OnWorkers = Callable[..., None]


@pytest.fixture
def on_workers(start_pie: StartPie) -> OnWorkers:
    """Runs a scenario on a fresh pie of two workers; no process, file, page or guest is left behind."""

    def run(scenario: Scenario, models: str = DUMMY_OF_2_MS, workers: int = 2) -> None:
        async def main() -> None:
            files, before = sockets_and_pipes(), children_of()
            async with start_pie(models, f", workers: {workers}") as pie:
                await scenario(pie)
                assert pie.app.live_guests == 0
                await pie.check_nothing_is_left()
            assert sockets_and_pipes() == files
            assert children_of() == before

        asyncio.run(main())

    return run


def test_programs_in_workers_get_the_same_tokens(on_workers: OnWorkers, start_pie: StartPie) -> None:
    async def answers(pie: Pie) -> list[Any]:
        return await asyncio.gather(*(pie.run(ANSWERS, token=token) for token in range(8)))

    async def here() -> list[Any]:
        async with start_pie(DUMMY_OF_2_MS) as pie:
            return await answers(pie)

    expected = asyncio.run(here())

    async def scenario(pie: Pie) -> None:
        assert await answers(pie) == expected

    on_workers(scenario)


TALKS = """
    import sys
    from inferlet import session

    async def main(input):
        print("printed")
        print("aside", file=sys.stderr)
        first = await session.receive()
        session.send(first.upper())
        session.send_file((await session.receive_file())[::-1])
        rest = []
        while (message := await session.receive()) is not None:
            rest.append(message)
        return {"rest": rest, "given": input}
"""


def test_everything_that_programs_and_clients_say_crosses(on_workers: OnWorkers) -> None:
    async def scenario(pie: Pie) -> None:
        client = RecordingClient()
        state = pie.state(client)
        running = asyncio.create_task(pie.run(TALKS, state, number=1))
        for message in ("grüß dich", "two", "three"):
            state.messages.put(message)
        state.files.put(bytes(range(256)) * 1000)
        await until(lambda: bool(client.files))
        state.close_input()
        assert await running == {"rest": ["two", "three"], "given": {"number": 1}}
        assert client.stdout == b"printed\n"
        assert client.stderr == b"aside\n"
        assert client.messages == ["GRÜSS DICH"]
        assert client.files == [(bytes(range(256)) * 1000)[::-1]]

    on_workers(scenario)


def test_what_a_program_raises_is_its_clients_error(on_workers: OnWorkers) -> None:
    async def scenario(pie: Pie) -> None:
        with pytest.raises(GuestError, match="ValueError: of its own"):
            await pie.run("async def main(input):\n    raise ValueError('of its own')\n")

    on_workers(scenario)


SPINS = """
    from inferlet import session

    async def main(input):
        session.send("spinning")
        while True:
            pass
"""


def test_a_program_that_is_cancelled_ends_in_its_worker(on_workers: OnWorkers) -> None:
    async def scenario(pie: Pie) -> None:
        for source in (SPINS, GOES_ON):
            client = RecordingClient()
            running = asyncio.create_task(pie.run(source, pie.state(client)))
            await until(lambda client=client: bool(client.messages))  # type: ignore[misc]
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        assert len(await pie.run(ANSWERS, token=3)) == 20

    on_workers(scenario, workers=1)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=lambda each: each.name)
def test_a_worker_that_is_lost_takes_its_programs_only_and_is_replaced(
    on_workers: OnWorkers, end: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(pie: Pie) -> None:
        clients = [RecordingClient() for _ in range(6)]
        states = [pie.state(client) for client in clients]
        running = [asyncio.create_task(pie.run(GOES_ON, state)) for state in states]
        await until(lambda: all(client.messages for client in clients))
        lost, alive = pie.app.worker_pids
        os.kill(lost, end)
        await until(lambda: sum(task.done() for task in running) == 3)
        for task in running:
            if task.done():
                with pytest.raises(
                    WorkerLost, match=f"program 'test-program' ran in worker process {lost}, which "
                ):
                    await task
        await until(lambda: len(pie.app.worker_pids) == 2)
        assert pie.app.worker_pids[0] == alive
        assert lost not in children_of()
        assert "it ran 'test-program' (3); another takes its place" in caplog.text
        assert pie.app.worker_restarts == 1
        found = await asyncio.gather(*(pie.run(ANSWERS, token=token) for token in range(4)))
        assert [len(tokens) for tokens in found] == [20] * 4
        await end_those_that_run(running)

    on_workers(scenario)


async def end_those_that_run(running: list[asyncio.Task[Any]]) -> None:
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=lambda each: each.name)
def test_programs_in_workers_learn_that_their_engine_is_lost(
    on_workers: OnWorkers, end: signal.Signals
) -> None:
    async def scenario(pie: Pie) -> None:
        clients = [RecordingClient() for _ in range(4)]
        states = [pie.state(client) for client in clients]
        running = [asyncio.create_task(pie.run(GOES_ON, state)) for state in states]
        await until(lambda: all(client.messages for client in clients))
        lost, workers = engine_pid(pie), pie.app.worker_pids
        os.kill(lost, end)
        await until(lambda: all(len(client.messages) > 1 for client in clients))
        await until(lambda: pie.app.replicas(ModelName("dummy"))[0].restarts == 1)
        await until(lambda: pie.app.has_engine(ModelName("dummy")))
        for state in states:
            state.messages.put("the engine is back")
        assert [len(tokens) for tokens in await asyncio.gather(*running)] == [4] * 4
        for client in clients:
            assert "its engine process was lost with all contexts" in client.messages[1]
            assert "was lost with an engine process that ended" in client.messages[2]
        assert pie.app.worker_pids == workers

    on_workers(scenario)


def test_a_model_comes_and_goes_while_programs_run(on_workers: OnWorkers) -> None:
    models = DUMMY + "  - {name: other, driver: {type: dummy}}\n"
    asks = "from inferlet import runtime\n\nasync def main(input):\n    return runtime.models()\n"

    async def scenario(pie: Pie) -> None:
        assert await pie.run(asks) == ["dummy", "other"]
        await pie.app.unload_model(ModelName("other"))
        assert await pie.run(asks) == ["dummy"]

    on_workers(scenario, models)


def test_closing_ends_what_runs(start_pie: StartPie) -> None:
    async def main() -> None:
        before = children_of()
        async with start_pie(DUMMY_OF_2_MS, ", workers: 1") as pie:
            client = RecordingClient()
            running = asyncio.create_task(pie.run(GOES_ON, pie.state(client)))
            await until(lambda: bool(client.messages))
        with pytest.raises((WorkerLost, Cancelled)):
            await running
        assert children_of() == before

    asyncio.run(main())
