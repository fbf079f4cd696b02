"""Several engines of one model: programs are spread over them, snapshots are found at each, a loss concerns its own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from pie_core.engine.messages import Event, ReadStatus, Status
from pie_core.errors import NotFound
from pie_core.host_api.engine_client import EngineClient
from pie_core.ids import ModelName
from pie_core.testing.recording_client import RecordingClient
from tests.flow.conftest import Pie, StartPie
from tests.flow.processes.test_engine_process import ANSWERS, GOES_ON, until

pytestmark = pytest.mark.slow

DUMMY = ModelName("dummy")
TWO_REPLICAS = """
models:
  - name: dummy
    replicas: 2
    driver: {type: dummy, options: {step_ms: 2.0}}
"""

Scenario = Callable[[Pie], Coroutine[Any, Any, None]]
OnReplicas = Callable[..., None]


@pytest.fixture(params=["", ", workers: 2"], ids=["here", "workers"])
def on_replicas(request: pytest.FixtureRequest, start_pie: StartPie) -> OnReplicas:
    """Runs a scenario on a fresh pie with two replicas of its model, programs here or in workers."""

    def run(scenario: Scenario, models: str = TWO_REPLICAS) -> None:
        async def main() -> None:
            async with start_pie(models, request.param) as pie:
                await scenario(pie)
                await nothing_is_left(pie)

        asyncio.run(main())

    return run


async def statuses(pie: Pie) -> list[Status]:
    return [await status_of(engine) for engine in pie.app.models[DUMMY].engines]


async def status_of(engine: EngineClient) -> Status:
    answer: asyncio.Future[Status] = asyncio.get_running_loop().create_future()

    def finish(event: Event) -> None:
        assert isinstance(event, Status)
        answer.set_result(event)

    engine.request(lambda request: ReadStatus(request=request), finish)
    return await answer


async def nothing_is_left(pie: Pie) -> None:
    assert pie.app.live_guests == 0
    for engine in pie.app.models[DUMMY].engines:
        while (status := await status_of(engine)).running:
            pass  # asking goes by the loop, so everything else goes on
        assert status.contexts == status.waiting == 0
        assert engine.open_requests == 0


WAITS = """
    from inferlet import Context, Model, runtime, session

    async def main(input):
        context = Context(Model.load(runtime.models()[0]))
        context.append([40, 41, 42])
        await context.flush()
        session.send("begun")
        fork = context.fork()
        await session.receive()
        fork.append([43])
        await fork.flush()
"""


async def begun(pie: Pie, source: str, count: int) -> tuple[list[asyncio.Task[Any]], list[Any], list[Any]]:
    """Programs that have begun: their tasks, clients and states."""
    clients = [RecordingClient() for _ in range(count)]
    states = [pie.state(client) for client in clients]
    running = [asyncio.create_task(pie.run(source, state)) for state in states]
    await until(lambda: all(client.messages for client in clients))
    return running, clients, states


def test_programs_are_spread_over_the_replicas_and_stay_where_they_are(on_replicas: OnReplicas) -> None:
    async def scenario(pie: Pie) -> None:
        running, _, states = await begun(pie, WAITS, 8)
        assert [status.contexts for status in await statuses(pie)] == [8, 8]  # each with its fork
        for state in states:
            state.messages.put("go on")
        await asyncio.gather(*running)

    on_replicas(scenario)


def test_replicas_give_the_tokens_that_one_engine_gives(on_replicas: OnReplicas, start_pie: StartPie) -> None:
    async def answers(pie: Pie) -> list[Any]:
        return await asyncio.gather(*(pie.run(ANSWERS, token=token) for token in range(8)))

    async def alone() -> list[Any]:
        async with start_pie() as pie:
            return await answers(pie)

    expected = asyncio.run(alone())

    async def scenario(pie: Pie) -> None:
        assert await answers(pie) == expected

    on_replicas(scenario)


SAVES = """
    from inferlet import Context, Model, runtime

    async def main(input):
        context = Context(Model.load(runtime.models()[0]))
        context.append(input["tokens"])
        await context.flush()
        context.save("shelf")
"""

OPENS = """
    from inferlet import Context, Model, runtime

    async def main(input):
        model = Model.load(runtime.models()[0])
        open_ = Context.take if input["take"] else Context.open
        context = open_(model, "shelf")
        fork = context.fork()
        fork.append([7])
        await fork.flush()
        return fork.tokens()
"""

DELETES = """
    from inferlet import Context, Model, runtime

    async def main(input):
        Context.delete(Model.load(runtime.models()[0]), "shelf")
"""


def test_a_snapshot_is_found_wherever_it_was_saved(on_replicas: OnReplicas) -> None:
    async def scenario(pie: Pie) -> None:
        for tokens in ([1, 2], [3], [4, 5], [6]):  # at one replica after the other
            await pie.run(SAVES, tokens=tokens)
            found = await asyncio.gather(*(pie.run(OPENS, take=False) for _ in range(4)))
            assert found == [[*tokens, 7]] * 4
        pages = [sum(status.total_pages) - sum(status.free_pages) for status in await statuses(pie)]
        assert sorted(pages) == [0, 1], "only the newest is kept"
        assert await pie.run(OPENS, take=True) == [6, 7]
        with pytest.raises(NotFound, match="no snapshot 'shelf' of tenant 'alice'; there are: none"):
            await pie.run(OPENS, take=False)
        await pie.run(SAVES, tokens=[8])
        await pie.run(DELETES)
        with pytest.raises(NotFound, match="no snapshot 'shelf'"):
            await pie.run(DELETES)
        assert all(status.free_pages == status.total_pages for status in await statuses(pie))

    on_replicas(scenario)


def test_saved_contexts_that_are_kept_on_disk_are_every_replicas(
    on_replicas: OnReplicas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIE_HOME", str(tmp_path))
    models = TWO_REPLICAS + "    persist_snapshots: true\n"

    async def saves(pie: Pie) -> None:
        for tokens in ([1, 2], [3]):
            await pie.run(SAVES, tokens=tokens)
            found = await asyncio.gather(*(pie.run(OPENS, take=False) for _ in range(4)))
            assert found == [[*tokens, 7]] * 4

    async def opens(pie: Pie) -> None:
        assert await pie.run(OPENS, take=False) == [3, 7]
        assert await pie.run(OPENS, take=True) == [3, 7]
        with pytest.raises(NotFound, match="no snapshot 'shelf'"):
            await pie.run(OPENS, take=False)

    on_replicas(saves, models)
    on_replicas(opens, models)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=lambda each: each.name)
def test_a_replica_that_is_lost_takes_its_own_programs_contexts_only(
    on_replicas: OnReplicas, end: signal.Signals
) -> None:
    async def scenario(pie: Pie) -> None:
        running, clients, states = await begun(pie, GOES_ON, 8)
        await asyncio.sleep(0.1)
        lost, alive = pie.app.replicas(DUMMY)
        assert lost.pid is not None
        os.kill(lost.pid, end)
        await until(lambda: sum(len(client.messages) > 1 for client in clients) == 4)
        assert pie.app.has_engine(DUMMY), "the other replica goes on"
        assert len(await pie.run(ANSWERS, token=1)) == 20, "and takes new programs"
        await until(lambda: all(replica.is_ready for replica in pie.app.replicas(DUMMY)))
        restarted, other = pie.app.replicas(DUMMY)
        assert (restarted.restarts, other) == (1, alive)
        assert [len(client.messages) for client in clients].count(1) == 4
        for client, state, task in zip(clients, states, running, strict=True):
            if len(client.messages) > 1:
                assert "its engine process" in client.messages[1]
                state.messages.put("the engine is back")
                assert len(await task) == 4
            else:
                task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    on_replicas(scenario)
