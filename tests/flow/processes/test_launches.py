"""Programs in workers launch programs, which may run in other workers: as in one process, whatever dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.flow.conftest import Pie, StartPie
from tests.flow.processes.test_engine_process import DUMMY_OF_2_MS
from tests.flow.test_children import ECHO, FAILS, FOREVER, MANY, NESTS, PRELUDE, Install, install

__all__ = ["install"]

pytestmark = pytest.mark.slow

Scenario = Callable[[Pie], Coroutine[Any, Any, None]]


def on_workers(start_pie: StartPie, scenario: Scenario, runtime: str = "") -> None:
    async def main() -> None:
        async with start_pie(DUMMY_OF_2_MS, f", workers: 2{runtime}") as pie:
            await scenario(pie)
            assert pie.app.live_guests == 0

    asyncio.run(main())


OUTCOMES = (
    PRELUDE
    + """
async def main(input):
    cancelled = launch("forever")
    cancelled.cancel()
    refusals = []
    for program, given in (("nonesuch", {}), ("echo", "[1]")):
        try:
            launch(program, given)
        except errors.InferletError as error:
            refusals.append(error.code)
    values = await asyncio.gather(*(launch("echo", {"n": n}) for n in range(8)))
    assert {value["user"] for value in values} == {"alice"}
    outcomes = await asyncio.gather(*map(outcome, (cancelled, launch("fails"))))
    return [value["input"]["n"] for value in values], outcomes, refusals
"""
)


def test_children_run_anywhere_and_their_outcomes_come_back(start_pie: StartPie, install: Install) -> None:
    for name, source in (("echo", ECHO), ("forever", FOREVER), ("fails", FAILS)):
        install(name, source)
    install("nests", NESTS, "[capabilities]\nchildren = 1\n")

    async def scenario(pie: Pie) -> None:
        values, outcomes, refusals = await pie.run(OUTCOMES)
        assert values == list(range(8))
        assert outcomes == ["cancelled", "guest"]
        assert refusals == ["not-found", "invalid-request"]
        nested = PRELUDE + 'async def main(input):\n    return await launch("nests", {"left": 3})\n'
        assert await pie.run(nested) == [3, 2, 1]
        answers = await pie.run(
            PRELUDE + 'async def main(input):\n    return await launch("launch-caller", {"max_tokens": 4})\n'
        )
        assert len(answers) == 3
        await pie.check_nothing_is_left()

    on_workers(start_pie, scenario)


def test_limits_on_children_hold_over_all_workers(start_pie: StartPie, install: Install) -> None:
    install("forever", FOREVER)

    async def scenario(pie: Pie) -> None:
        staying = asyncio.create_task(pie.run(MANY, stay=True))
        await pie.until(lambda _: pie.app.live_guests == 5)
        started, message, _ = await pie.run(MANY)
        assert started == 2
        assert "runtime.children_per_tenant" in message
        staying.cancel()
        await asyncio.wait([staying])
        assert pie.app.live_guests == 4  # its children go on
        await pie.app.launches.close()

    on_workers(start_pie, scenario, ", children_per_program: 4, children_per_tenant: 6")


def test_a_worker_that_dies_takes_its_own_children_and_no_others_along(
    start_pie: StartPie, install: Install
) -> None:
    install("forever", FOREVER)
    source = (
        PRELUDE
        + """
async def main(input):
    children = [launch("forever") for _ in range(3)]
    outcomes = [asyncio.create_task(outcome(child)) for child in children]
    done, left = await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
    for child in children:
        child.cancel()
    await asyncio.wait(outcomes)
    return sorted(each.result() for each in outcomes)
"""
    )

    async def scenario(pie: Pie) -> None:
        running = asyncio.create_task(pie.run(source))
        await pie.until(lambda _: pie.app.live_guests == 4)
        workers = pie.app._workers
        assert workers is not None
        (other,) = (each for each in workers._workers if all(run.state.depth for run in each.runs.values()))
        assert len(other.runs) == 2
        os.kill(other.pid, signal.SIGKILL)
        assert await running == ["cancelled", "worker-lost", "worker-lost"]

    on_workers(start_pie, scenario)
