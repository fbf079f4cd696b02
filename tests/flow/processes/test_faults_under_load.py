"""Processes that are killed or stopped while many programs compute: who had to do with them is told by type within a
second, everybody else gets the tokens that are due, and another process takes the place.

A second is counted in the turns that this process got: on a machine that is busy elsewhere it may last longer.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from pie_core.errors import EngineLost, PieError, WorkerLost
from pie_core.ids import ModelName
from pie_core.testing.recording_client import RecordingClient
from tests.flow.conftest import Pie, StartPie
from tests.flow.processes.test_engine_process import until

pytestmark = pytest.mark.slow

DUMMY = ModelName("dummy")
MODEL = """
models:
  - name: dummy
    replicas: {replicas}
    driver: {{type: dummy, options: {{step_ms: 2.0}}}}
"""

WORKS = """
    from inferlet import Context, Model, Sampler, runtime, session

    async def main(input):
        context = Context(Model.load(runtime.models()[0]))
        context.append([40, 41, 42])
        session.send("begun")
        await session.receive()
        tokens = []
        while len(tokens) < 400:
            tokens += await context.generate(Sampler.argmax(), max_tokens=8, auto_flush=False).collect_tokens()
            session.send(str(len(tokens)))
            context.append([43])
        return tokens
"""

SIGNALS = pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=lambda each: each.name)
_TURN_S = 0.01
_A_SECOND = 100  # turns


class Load:
    """Programs that compute, all the same."""

    def __init__(self, pie: Pie, count: int) -> None:
        self._clients = [RecordingClient() for _ in range(count)]
        self._states = [pie.state(client) for client in self._clients]
        self._tasks = [asyncio.create_task(pie.run(WORKS, state)) for state in self._states]

    async def is_on(self) -> None:
        """Returns when each has drawn some tokens."""
        await until(lambda: all(client.messages for client in self._clients))
        for state in self._states:
            state.messages.put("go")
        await until(lambda: all(len(client.messages) > 1 for client in self._clients))

    @property
    def ended(self) -> int:
        return sum(task.done() for task in self._tasks)

    async def outcomes(self) -> tuple[list[PieError], list[list[int]]]:
        """What failed, and what the others return."""
        found = await asyncio.gather(*self._tasks, return_exceptions=True)
        failed = [each for each in found if isinstance(each, PieError)]
        return failed, [each for each in found if isinstance(each, list)]


async def undisturbed(pie: Pie) -> list[int]:
    """What a program of the load returns."""
    client = RecordingClient()
    state = pie.state(client)
    state.messages.put("go")
    tokens: list[int] = await pie.run(WORKS, state)
    return tokens


async def turns_until(holds: Callable[[], bool]) -> int:
    turns = 0
    while not holds():
        await asyncio.sleep(_TURN_S)
        turns += 1
    return turns


@SIGNALS
def test_a_worker_that_is_lost_under_load(start_pie: StartPie, end: signal.Signals) -> None:
    async def main() -> None:
        async with start_pie(MODEL.format(replicas=1), ", workers: 3") as pie:
            load = Load(pie, 24)
            await load.is_on()
            lost = pie.app.worker_pids[1]
            os.kill(lost, end)
            assert await turns_until(lambda: load.ended == 8) <= _A_SECOND
            assert pie.app.has_engine(DUMMY)
            failed, returned = await load.outcomes()
            assert [type(error) for error in failed] == [WorkerLost] * 8
            assert all(f"worker process {lost}, which " in str(error) for error in failed)
            await until(lambda: len(pie.app.worker_pids) == 3)
            assert pie.app.worker_restarts == 1
            expected = await undisturbed(pie)
            assert returned == [expected] * 16
            await pie.check_nothing_is_left()

    asyncio.run(main())


@SIGNALS
@pytest.mark.parametrize("workers", [0, 2])
def test_an_engine_that_is_lost_under_load(start_pie: StartPie, end: signal.Signals, workers: int) -> None:
    async def main() -> None:
        async with start_pie(MODEL.format(replicas=2), f", workers: {workers}") as pie:
            load = Load(pie, 24)
            await load.is_on()
            lost = pie.app.replicas(DUMMY)[0].pid
            assert lost is not None
            os.kill(lost, end)
            assert await turns_until(lambda: load.ended == 12) <= _A_SECOND
            assert pie.app.has_engine(DUMMY), "the other replica goes on"
            failed, returned = await load.outcomes()
            assert [type(error) for error in failed] == [EngineLost] * 12
            await until(lambda: all(replica.is_ready for replica in pie.app.replicas(DUMMY)))
            assert [replica.restarts for replica in pie.app.replicas(DUMMY)] == [1, 0]
            found: list[Any] = await asyncio.gather(*(undisturbed(pie) for _ in range(4)))
            assert returned == [found[0]] * 12
            assert found == [found[0]] * 4

    asyncio.run(main())
