"""Programs whose model runs in a process of its own: same answers, and a typed error when that process is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pie_core.ids import ModelName
from pie_core.testing.recording_client import RecordingClient
from tests.flow.conftest import Pie, StartPie
from tests.system import children_of

pytestmark = pytest.mark.slow

IN_A_PROCESS = ", engine_process: true"

ANSWERS = """
    from inferlet import Context, Model, Sampler, runtime

    async def main(input):
        context = Context(Model.load(runtime.models()[0]))
        context.append([40, 41, input["token"]])
        return await context.generate(Sampler.argmax(), max_tokens=20, auto_flush=False).collect_tokens()
"""

GOES_ON = """
    from inferlet import Context, Model, Sampler, runtime, session

    async def main(input):
        model = Model.load(runtime.models()[0])
        context = Context(model)
        context.append([40, 41, 42])
        session.send("begun")
        try:
            while True:
                await context.generate(Sampler.argmax(), max_tokens=8, auto_flush=False).collect_tokens()
                context.append([43])
        except Exception as error:
            session.send(str(error))
        assert await session.receive() == "the engine is back"
        try:
            context.append([43])
            await context.flush()
        except Exception as error:
            session.send(str(error))
        fresh = Context(model)
        fresh.append([40])
        return await fresh.generate(Sampler.argmax(), max_tokens=4, auto_flush=False).collect_tokens()
"""

DUMMY_OF_2_MS = """
models:
  - name: dummy
    driver: {type: dummy, options: {step_ms: 2.0}}
"""


def engine_pid(pie: Pie, model: str = "dummy") -> int:
    pid = pie.app.engine_pid(ModelName(model))
    assert pid is not None
    return pid


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - other processes bring it about
        await asyncio.sleep(0.005)


def test_programs_get_the_same_tokens_from_an_engine_in_another_process(start_pie: StartPie) -> None:
    async def answers(runtime: str) -> list[Any]:
        async with start_pie(runtime=runtime) as pie:
            found = await asyncio.gather(*(pie.run(ANSWERS, token=token) for token in range(8)))
            await pie.check_nothing_is_left()
            return list(found)

    assert asyncio.run(answers(IN_A_PROCESS)) == asyncio.run(answers(""))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=lambda each: each.name)
def test_programs_learn_that_their_engine_is_lost_and_go_on_with_the_next(
    start_pie: StartPie, end: signal.Signals
) -> None:
    async def main() -> None:
        async with start_pie(DUMMY_OF_2_MS, IN_A_PROCESS) as pie:
            clients = [RecordingClient() for _ in range(8)]
            states = [pie.state(client) for client in clients]
            running = [asyncio.create_task(pie.run(GOES_ON, state)) for state in states]
            await until(lambda: all(client.messages for client in clients))
            lost = engine_pid(pie)
            os.kill(lost, end)
            await until(lambda: all(len(client.messages) > 1 for client in clients))
            await until(lambda: pie.app.has_engine(ModelName("dummy")))
            for state in states:
                state.messages.put("the engine is back")
            answers = await asyncio.gather(*running)
            for client in clients:
                _, first, second = client.messages
                assert f"its engine process {lost} " in first
                assert "was lost with an engine process that ended" in second
            assert answers[0] == answers[7]
            assert len(answers[0]) == 4
            await pie.check_nothing_is_left()

    asyncio.run(main())


def test_a_model_whose_engine_lives_goes_on_while_another_one_is_lost(start_pie: StartPie) -> None:
    models = "models:\n" + "".join(f"  - {{name: {name}, driver: {{type: dummy}}}}\n" for name in "ab")

    async def main() -> None:
        async with start_pie(models, IN_A_PROCESS) as pie:
            before = await pie.run(ANSWERS, token=1)
            alive, lost = engine_pid(pie, "a"), engine_pid(pie, "b")
            os.kill(lost, signal.SIGKILL)
            assert await pie.run(ANSWERS, token=1) == before
            await until(lambda: pie.app.engine_pid(ModelName("b")) not in (lost, None))
            await until(lambda: pie.app.has_engine(ModelName("b")))
            assert engine_pid(pie, "a") == alive

    asyncio.run(main())


# ---- pie run

BUSY = """
    from inferlet import Context, Model, Sampler, runtime

    async def main(input):
        print("ready", flush=True)
        while True:
            ctx = Context(Model.load(runtime.models()[0]))
            ctx.append([40, 41, 42])
            await ctx.generate(Sampler.argmax(), max_tokens=50, auto_flush=False).collect_tokens()
"""


@pytest.fixture(params=[(", engine_process: true", 1), (", workers: 2", 3)], ids=["engine", "workers"])
def processes(request: pytest.FixtureRequest) -> tuple[str, int]:
    """What is configured, and how many processes it starts."""
    found: tuple[str, int] = request.param
    return found


@pytest.fixture
def home(tmp_path: Path, request: pytest.FixtureRequest, processes: tuple[str, int]) -> Path:
    """A PIE_HOME so configured."""
    cache = Path(request.config.cache.mkdir("aot"))
    runtime = f"runtime: {{program_cache: '{cache}'{processes[0]}}}\n"
    (tmp_path / "config.yaml").write_text(DUMMY_OF_2_MS + runtime)
    (tmp_path / "busy.py").write_text(textwrap.dedent(BUSY))
    return tmp_path


def start_busy(home: Path) -> subprocess.Popen[str]:
    """A `pie run` that has begun to work."""
    pie = subprocess.Popen(
        [sys.executable, "-m", "pie_core", "run", str(home / "busy.py")],
        env={**os.environ, "PIE_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert pie.stdout is not None
    if pie.stdout.readline() != "ready\n":
        pytest.fail(f"pie run did not begin: {pie.communicate()[1]}")
    return pie


def wait_for_the_end_of(pids: set[int]) -> None:
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_signal_to_pie_run_ends_its_processes(
    home: Path, processes: tuple[str, int], number: signal.Signals
) -> None:
    with start_busy(home) as pie:
        started = children_of(pie.pid)
        assert len(started) == processes[1]
        pie.send_signal(number)
        _, complaint = pie.communicate(timeout=60)
    assert pie.returncode == 128 + number
    assert "Traceback" not in complaint
    wait_for_the_end_of(started)


def test_no_process_outlives_a_pie_that_is_killed(home: Path, processes: tuple[str, int]) -> None:
    with start_busy(home) as pie:
        started = children_of(pie.pid)
        pie.kill()
        pie.communicate(timeout=60)
    assert len(started) == processes[1]
    wait_for_the_end_of(started)
