"""The asyncio loop of a program: everything it waits for becomes one `poll.wait` call of the host.

One turn: run what is ready; if nothing is, suspend the whole program in `poll.wait` until a pollable is ready or
the next timer is due. Threads do not exist in a guest, so nothing here is locked.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import sys
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextvars import Context
from pathlib import PurePath
from types import FrameType
from typing import Any, TypeVar, TypeVarTuple, Unpack

from wit_world.imports import poll

from inferlet.errors import Deadlock, Unsupported

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NANOSECONDS = 1_000_000_000


class PollLoop(asyncio.AbstractEventLoop):
    """An event loop over the host's pollables and its clock."""

    def __init__(self) -> None:
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._live_timers = 0
        self._timers_made = 0
        self._waiters: dict[asyncio.Future[None], poll.Pollable] = {}
        self._running = False
        self._stopping = False
        self._closed = False
        self._debug = False
        self._exception_handler: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object] | None = None
        self._task_factory: Any = None
        self._generators: set[AsyncGenerator[Any, Any]] = set()

    # Waiting for the host

    def readiness(self, pollable: poll.Pollable) -> asyncio.Future[None]:
        """A future that is done once the pollable is ready; it takes the pollable over."""
        future = self.create_future()
        self._waiters[future] = pollable
        return future

    def is_alone(self) -> bool:
        """True if the running task is the only thing that could happen: no other callback, timer or wait."""
        if self._ready or self._live_timers:
            return False
        return not self._waiters or all(future.done() for future in self._waiters)

    def _run_once(self) -> None:
        if not self._ready:
            self._wait()
        self._start_due_timers()
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if not handle.cancelled():
                handle._run()

    def _wait(self) -> None:
        self._forget_cancelled()
        futures = list(self._waiters)
        timeout_ns = self._time_to_next_timer()
        if not futures and timeout_ns is None:
            raise Deadlock(_who_waits(self))
        for index in poll.wait([self._waiters[future] for future in futures], timeout_ns):
            _drop(self._waiters.pop(futures[index]))
            if not futures[index].done():
                futures[index].set_result(None)

    def _forget_cancelled(self) -> None:
        for future in [future for future in self._waiters if future.done()]:
            _drop(self._waiters.pop(future))

    # Timers

    def time(self) -> float:
        return poll.now_ns() / NANOSECONDS

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        timer._scheduled = True  # type: ignore[attr-defined]
        self._timers_made += 1
        self._live_timers += 1
        heapq.heappush(self._timers, (when, self._timers_made, timer))
        return timer

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        if handle._scheduled:  # type: ignore[attr-defined]
            self._live_timers -= 1

    def _next_timer(self) -> float | None:
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def _time_to_next_timer(self) -> int | None:
        when = self._next_timer()
        return None if when is None else max(0, math.ceil((when - self.time()) * NANOSECONDS))

    def _start_due_timers(self) -> None:
        if not self._live_timers:
            return
        now = self.time()
        while (when := self._next_timer()) is not None and when <= now:
            timer = heapq.heappop(self._timers)[2]
            timer._scheduled = False  # type: ignore[attr-defined]
            self._live_timers -= 1
            self._ready.append(timer)

    # Callbacks, futures, tasks

    def call_soon(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        if self._task_factory is not None:
            task: asyncio.Task[Any] = self._task_factory(self, coro, **options)
            return task
        return asyncio.Task(coro, loop=self, **options)

    def set_task_factory(self, factory: Any) -> None:
        self._task_factory = factory

    def get_task_factory(self) -> Any:
        return self._task_factory

    def run_in_executor(
        self, executor: Any, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        raise Unsupported("threads: a program runs on one; call the function directly")

    # Running

    def run_until_complete(self, future: Any) -> Any:
        self._refuse_if_unusable()
        task = asyncio.ensure_future(future, loop=self)
        try:
            with _Hooks(self):
                while not task.done():
                    self._run_once()
        except BaseException:
            if task.done() and not task.cancelled():
                task.exception()  # SystemExit comes both ways; asyncio would report the task's as forgotten
            raise
        return task.result()

    def run_forever(self) -> None:
        self._refuse_if_unusable()
        with _Hooks(self):
            while not self._stopping:
                self._run_once()
        self._stopping = False

    def _refuse_if_unusable(self) -> None:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        if self._running or asyncio._get_running_loop() is not None:
            raise RuntimeError("This event loop is already running: use `await` inside a coroutine")

    def stop(self) -> None:
        self._stopping = True

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        for pollable in self._waiters.values():
            _drop(pollable)
        self._waiters.clear()
        self._ready.clear()
        self._timers.clear()
        self._live_timers = 0
        self._closed = True

    async def shutdown_asyncgens(self) -> None:
        generators = list(self._generators)
        self._generators.clear()
        await asyncio.gather(*(generator.aclose() for generator in generators), return_exceptions=True)

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncio calls it so
        """There is none."""

    def _generator_finalizer(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._generators.discard(generator)
        if not self._closed:
            self.create_task(_close(generator))

    # Errors nobody awaited

    def set_exception_handler(
        self, handler: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object] | None
    ) -> None:
        self._exception_handler = handler

    def get_exception_handler(
        self,
    ) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object] | None:
        return self._exception_handler

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self._exception_handler is not None:
            self._exception_handler(self, context)
        else:
            self.default_exception_handler(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        print(context.get("message", "Unhandled error in the event loop"), file=sys.stderr)
        error = context.get("exception")
        if error is not None:
            traceback.print_exception(error, file=sys.stderr)

    def get_debug(self) -> bool:
        return self._debug

    def set_debug(self, enabled: bool) -> None:
        self._debug = enabled


class _Hooks:
    """Makes a loop the running one, and remembers the asynchronous generators that start on it."""

    def __init__(self, loop: PollLoop) -> None:
        self._loop = loop

    def __enter__(self) -> None:
        self._old = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(self._loop._generators.add, self._loop._generator_finalizer)
        self._loop._running = True
        asyncio._set_running_loop(self._loop)

    def __exit__(self, *_: object) -> None:
        asyncio._set_running_loop(None)
        self._loop._running = False
        sys.set_asyncgen_hooks(*self._old)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on a loop of its own, and cancels what it leaves behind."""
    loop = PollLoop()  # type: ignore[abstract]  # sockets, signals and processes: a guest has none
    try:
        result: T = loop.run_until_complete(coroutine)
        return result
    finally:
        _cancel_the_rest(loop)
        loop.close()


def _cancel_the_rest(loop: PollLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(_settled(tasks))
    if loop._generators:
        loop.run_until_complete(loop.shutdown_asyncgens())


async def _settled(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def _close(generator: AsyncGenerator[Any, Any]) -> None:
    await generator.aclose()


def _drop(pollable: poll.Pollable) -> None:
    pollable.__exit__(None, None, None)


def _who_waits(loop: PollLoop) -> str:
    tasks = [task for task in asyncio.all_tasks(loop) if not task.done()]
    places = "; ".join(sorted(_place(task) for task in tasks))
    return f"nothing can wake this program up: every task waits for another one ({places})"


def _place(task: asyncio.Task[Any]) -> str:
    """The task's name and its innermost line that is neither asyncio's nor the SDK's."""
    frames = [
        frame
        for frame in _frames(task.get_coro())
        if not frame.f_code.co_filename.startswith(_NOT_THE_PROGRAM)
    ]
    if not frames:
        return task.get_name()
    return f"{task.get_name()} at {frames[-1].f_code.co_filename}:{frames[-1].f_lineno} in {frames[-1].f_code.co_name}"


def _frames(awaited: Any) -> list[FrameType]:
    frames = []
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        frames.append(frame)
        awaited = awaited.cr_await
    return frames


_NOT_THE_PROGRAM = tuple(str(PurePath(file).parent) for file in (asyncio.__file__, __file__))
