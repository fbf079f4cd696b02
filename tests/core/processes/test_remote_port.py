"""An engine in a process of its own: it answers as one in this process does, and may die, stop, hang or not load."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from pie_core.contracts.driver import Progress
from pie_core.engine.messages import (
    BreakOff,
    DropContext,
    Event,
    Failed,
    ForkContext,
    ForwardDone,
    Generated,
    ReadStatus,
    Status,
    Steps,
)
from pie_core.engine.options import EngineOptions
from pie_core.errors import ConfigError, EngineLost, LoadError, PluginError
from pie_core.ids import ContextId, RequestId
from pie_core.processes.messages import LoadModel
from pie_core.processes.remote_port import RemotePort
from tests.core.engine.stepping import VOCAB, SteppedEngine
from tests.core.engine.test_local_port import Listener, create, forward, generate
from tests.core.processes import faulty_driver as faulty
from tests.system import children_of, sockets_and_pipes

pytestmark = pytest.mark.slow

# Those of the engine in `stepping`, so that the two can be compared.
OPTIONS = {"vocab_size": VOCAB, "num_pages": 64, "page_size": 4, "max_model_len": 512}


def asked(driver: str = "dummy", **options: Any) -> LoadModel:
    return LoadModel(
        model="m",
        driver=driver,
        path=None,
        device="cpu",
        driver_options={**OPTIONS, **options},
        engine_options=EngineOptions(),
        log_level=30,
    )


def ignore_progress(_: Progress) -> None:
    """Nobody watches."""


@asynccontextmanager
async def opened(message: LoadModel) -> AsyncIterator[tuple[RemotePort, Listener]]:
    port, listener = await RemotePort.start(message, ignore_progress), Listener()
    port.listen(listener)
    try:
        yield port, listener
    finally:
        await port.close()


@pytest.fixture
def on_engine() -> Callable[..., None]:
    """Runs a scenario on a fresh engine process; no process and no file descriptor is left behind."""

    def run(
        scenario: Callable[[RemotePort, Listener], Coroutine[Any, Any, None]],
        message: LoadModel | None = None,
    ) -> None:
        async def main() -> None:
            files, before = sockets_and_pipes(), children_of()
            async with opened(message or asked()) as (port, listener):
                await scenario(port, listener)
            assert sockets_and_pipes() == files
            assert children_of() == before

        asyncio.run(main())

    return run


async def failure(listener: Listener, request: int) -> str:
    failed = await asyncio.wait_for(listener.final(request), 10)
    assert isinstance(failed, Failed)
    assert failed.code == EngineLost.code
    return failed.message


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - other processes bring it about
        await asyncio.sleep(0.005)


async def is_back(port: RemotePort) -> None:
    await until(lambda: port.is_ready)


def is_restarted(port: RemotePort, times: int) -> bool:
    return port.restarts == times


OnEngine = Callable[..., None]


def test_it_answers_as_an_engine_in_this_process_does(on_engine: OnEngine) -> None:
    async def scenario(port: RemotePort, listener: Listener) -> None:
        stepped = SteppedEngine()
        for context in range(1, 5):
            create(port, context)
            stepped.create(context)
            generate(port, context, context, 12)
        create(port, 9)
        stepped.create(9)
        forward(port, 9, 9, 1, 2, 3)
        for context in range(1, 5):
            await listener.final(context)
            assert generated(listener.events[context]) == stepped.generate(context, [context], 12)
        done = await listener.final(9)
        assert isinstance(done, ForwardDone)
        assert done.tokens == [stepped.draw(9, [1, 2, 3])]

    on_engine(scenario)


def generated(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, Generated) for token in event.tokens]


def test_what_is_sent_in_one_turn_is_one_step_and_one_batch_of_events(on_engine: OnEngine) -> None:
    async def scenario(port: RemotePort, listener: Listener) -> None:
        for context in range(1, 5):
            create(port, context)
            forward(port, context, context, 1)
        for context in range(1, 5):
            await listener.final(context)
        assert [len(batch) for batch in listener.batches] == [4]
        port.send(ReadStatus(RequestId(9)))
        status = await listener.final(9)
        assert isinstance(status, Status)
        assert status.contexts == 4

    on_engine(scenario)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=lambda each: each.name)
def test_an_engine_that_is_lost_answers_everybody_and_is_replaced(
    on_engine: OnEngine, end: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(port: RemotePort, listener: Listener) -> None:
        for context in range(1, 5):
            create(port, context)
            generate(port, context, context, 0)
        for context in range(1, 5):
            await listener.arrival(context, 3)
        lost = port.pid
        assert lost is not None
        os.kill(lost, end)
        for request in range(1, 5):
            message = await failure(listener, request)
            assert f"its engine process {lost} " in message
        assert not port.is_ready
        forward(port, 10, 1, 5)
        await failure(listener, 10)
        await is_back(port)
        assert port.pid != lost
        assert lost not in children_of()
        create(port, 20)
        generate(port, 21, 20, 3)
        await listener.final(21)
        stepped = SteppedEngine()
        stepped.create(20)
        assert generated(listener.events[21]) == stepped.generate(20, [20], 3)

    on_engine(scenario, asked(step_ms=2.0))
    assert "it is started again" in caplog.text


def test_what_went_with_an_engine_is_lost_and_not_unknown(on_engine: OnEngine) -> None:
    async def scenario(port: RemotePort, listener: Listener) -> None:
        create(port, 1)
        generate(port, 2, 1, 2)
        await listener.final(2)
        assert port.pid is not None
        os.kill(port.pid, signal.SIGKILL)
        await until(lambda: not port.is_ready)
        create(port, 3)
        await is_back(port)
        forward(port, 10, 1, 5)
        assert "context 1 was lost" in await failure(listener, 10)
        forward(port, 11, 3, 5)
        assert "context 3 was lost" in await failure(listener, 11)
        port.send(BreakOff(RequestId(12), RequestId(2), 1))
        assert "generation 2 was lost" in await failure(listener, 12)
        port.send(ForkContext(ContextId(13), ContextId(1)))
        forward(port, 14, 13, 5)
        assert "context 13 was lost" in await failure(listener, 14)
        port.send(DropContext(ContextId(1)))
        create(port, 15)
        forward(port, 16, 15, 5)
        assert isinstance(await listener.final(16), ForwardDone)

    on_engine(scenario)


def test_steps_of_many_contexts_lose_those_that_went_with_an_engine_only(on_engine: OnEngine) -> None:
    async def scenario(port: RemotePort, listener: Listener) -> None:
        create(port, 1)
        forward(port, 2, 1, 5)
        await listener.final(2)
        assert port.pid is not None
        os.kill(port.pid, signal.SIGKILL)
        await until(lambda: not port.is_ready)
        await is_back(port)
        create(port, 3)
        forward(port, 4, 3, 5)
        await listener.final(4)
        requests, contexts = [RequestId(10), RequestId(11)], [ContextId(1), ContextId(3)]
        port.send(Steps(requests, contexts, [6, 6]))
        assert "context 1 was lost" in await failure(listener, 10)
        stepped = SteppedEngine()
        stepped.create(3)
        stepped.draw(3, [5])
        done = await listener.final(11)
        assert isinstance(done, ForwardDone)
        assert done.tokens == [stepped.draw(3, [6])]

    on_engine(scenario)


def test_an_engine_is_replaced_each_time_it_is_lost(on_engine: OnEngine) -> None:
    async def scenario(port: RemotePort, listener: Listener) -> None:
        for times in (1, 2):
            assert port.pid is not None
            os.kill(port.pid, signal.SIGKILL)
            await until(partial(is_restarted, port, times))
        create(port, 1)
        forward(port, 2, 1, 5)
        assert isinstance(await listener.final(2), ForwardDone)

    on_engine(scenario)


def test_a_slow_step_is_waited_for(on_engine: OnEngine) -> None:
    """Ten times the period of the heartbeat: slow is not dead."""

    async def scenario(port: RemotePort, listener: Listener) -> None:
        create(port, 1)
        forward(port, 2, 1, 5)
        assert isinstance(await listener.final(2), ForwardDone)
        assert port.restarts == 0

    on_engine(scenario, asked(step_ms=2000.0))


def test_closing_answers_everybody(on_engine: OnEngine) -> None:
    async def scenario(port: RemotePort, listener: Listener) -> None:
        create(port, 1)
        generate(port, 2, 1, 0)
        await listener.arrival(2, 1)
        await port.close()
        await port.close()
        assert "closed" in await failure(listener, 2)
        forward(port, 3, 1, 5)
        assert "closed" in await failure(listener, 3)

    on_engine(scenario)


def test_closing_while_an_engine_is_replaced_leaves_nothing(on_engine: OnEngine) -> None:
    async def scenario(port: RemotePort, listener: Listener) -> None:
        assert port.pid is not None
        os.kill(port.pid, signal.SIGKILL)
        await until(lambda: not port.is_ready and port.pid is not None)

    on_engine(scenario)


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        (asked("nonesuch"), PluginError, "unknown driver 'nonesuch'"),
        (asked(step_ms=-1.0), LoadError, "option step_ms is -1.0"),
        (asked(unknown_option=1), ConfigError, "unknown_option"),
    ],
)
def test_what_cannot_be_loaded_is_a_typed_error(
    message: LoadModel, error: type[Exception], text: str
) -> None:
    before = children_of()
    with pytest.raises(error, match=text):
        asyncio.run(RemotePort.start(message, ignore_progress))
    assert children_of() == before


def test_a_start_that_is_given_up_leaves_no_process() -> None:
    async def main() -> None:
        starting = asyncio.ensure_future(RemotePort.start(asked(), ignore_progress))
        await until(lambda: bool(children_of() - before))
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    before, files = children_of(), sockets_and_pipes()
    asyncio.run(main())
    assert children_of() == before
    assert sockets_and_pipes() == files


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (faulty.HANG_IN_COLLECT, "has not finished step 0 in 0.7 s"),
        (faulty.HANG_IN_SUBMIT, "has been at one turn of its event loop for"),
        (faulty.EXIT, "ended with exit status 7"),
    ],
    ids=["hang in collect", "hang in submit", "exit"],
)
def test_a_driver_that_hangs_or_ends_its_process_is_loaded_again(
    on_engine: OnEngine, faulty_driver: str, token: int, text: str
) -> None:
    async def scenario(port: RemotePort, listener: Listener) -> None:
        create(port, 1)
        forward(port, 2, 1, token)
        assert text in await failure(listener, 2)
        await until(partial(is_restarted, port, 1))
        create(port, 3)
        forward(port, 4, 3, 5)
        assert isinstance(await listener.final(4), ForwardDone)

    on_engine(scenario, asked(faulty_driver))


def test_an_event_loop_that_a_driver_holds_up_is_waited_for(on_engine: OnEngine, faulty_driver: str) -> None:
    async def scenario(port: RemotePort, listener: Listener) -> None:
        create(port, 1)
        forward(port, 2, 1, faulty.SLOW_SUBMIT)
        assert isinstance(await listener.final(2), ForwardDone)
        assert port.restarts == 0

    on_engine(scenario, asked(faulty_driver))


def test_a_time_in_which_we_did_not_run_is_not_held_against_the_engine(on_engine: OnEngine) -> None:
    async def scenario(port: RemotePort, listener: Listener) -> None:
        time.sleep(1.0)  # noqa: ASYNC251 - this event loop hangs, the engine does not
        await asyncio.sleep(0.3)
        create(port, 1)
        forward(port, 2, 1, 5)
        assert isinstance(await listener.final(2), ForwardDone)
        assert port.restarts == 0

    on_engine(scenario)
