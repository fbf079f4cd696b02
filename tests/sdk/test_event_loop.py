"""The event loop: everything asyncio offers waits through one `poll.wait`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from inferlet.errors import Deadlock, Unsupported
from inferlet.event_loop import PollLoop, run

from tests.sdk.fake_host import World


def test_sleep_takes_the_hosts_time(world: World) -> None:
    async def main() -> str:
        await asyncio.sleep(2.5)
        return "done"

    assert run(main()) == "done"
    assert world.now == 2_500_000_000


def test_sleeps_overlap(world: World) -> None:
    async def main() -> None:
        await asyncio.gather(*(asyncio.sleep(seconds) for seconds in (3, 1, 2)))

    run(main())
    assert world.now == 3_000_000_000


def test_timers_start_in_the_order_of_their_times_and_then_of_their_making() -> None:
    order: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        when = loop.time() + 1
        loop.call_at(when, order.append, "second")
        loop.call_at(when, order.append, "third")
        loop.call_at(when - 0.5, order.append, "first")
        loop.call_at(when - 0.7, order.append, "never").cancel()
        await asyncio.sleep(2)

    run(main())
    assert order == ["first", "second", "third"]


def test_wait_for_gives_up_at_its_time(world: World) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.5)

    run(main())
    assert world.now == 500_000_000


def test_an_asyncio_timeout_cancels_what_it_guards() -> None:
    async def main() -> bool:
        try:
            async with asyncio.timeout(0.1):
                await asyncio.sleep(10)
        except TimeoutError:
            return True
        return False

    assert run(main())


def test_queues_events_and_task_groups_connect_tasks() -> None:
    async def main() -> list[int]:
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)
        finished = asyncio.Event()
        received: list[int] = []

        async def produce() -> None:
            for number in range(5):
                await queue.put(number)
            finished.set()

        async def consume() -> None:
            while not (finished.is_set() and queue.empty()):
                received.append(await queue.get())

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            group.create_task(consume())
        return received

    assert run(main()) == [0, 1, 2, 3, 4]


def test_a_failing_task_of_a_group_cancels_the_others() -> None:
    cancelled: list[str] = []

    async def sleeper() -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            cancelled.append("sleeper")
            raise

    async def failing() -> None:
        await asyncio.sleep(1)
        raise ValueError("no")

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(sleeper())
            group.create_task(failing())

    with pytest.raises(ExceptionGroup):
        run(main())
    assert cancelled == ["sleeper"]


def test_waiting_for_nothing_is_a_deadlock_that_names_the_places() -> None:
    async def main() -> None:
        await asyncio.Queue[int]().get()

    with pytest.raises(Deadlock, match=r"Task-\d+ at .*test_event_loop.py:\d+ in main|in get"):
        run(main())


def test_tasks_left_behind_are_cancelled_at_the_end() -> None:
    ended: list[str] = []

    async def forgotten() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.append("forgotten")

    async def main() -> None:
        task = asyncio.create_task(forgotten())
        await asyncio.sleep(0)
        assert not task.done()

    run(main())
    assert ended == ["forgotten"]


def test_an_asynchronous_generator_left_behind_is_closed() -> None:
    ended: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            ended.append("numbers")

    async def main() -> None:
        kept = numbers()
        assert await anext(kept) == 1
        globals()["_kept"] = kept

    run(main())
    assert ended == ["numbers"]
    del globals()["_kept"]


def test_an_error_nobody_awaited_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(0.1)

    run(main())
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_loop_cannot_run_inside_another() -> None:
    async def inner() -> None:
        """Never starts."""

    async def main() -> None:
        coroutine = inner()
        try:
            with pytest.raises(RuntimeError, match="already running"):
                PollLoop().run_until_complete(coroutine)  # type: ignore[abstract]
        finally:
            coroutine.close()

    run(main())


def test_threads_are_refused() -> None:
    async def main() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(Unsupported, match="threads"):
        run(main())
