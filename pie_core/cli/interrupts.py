"""Runs the one coroutine of a command so that signals cancel it, at any moment and without a traceback."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

from pie_core.cli.outcomes import Interrupted

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 3  # this signal in a row ends the process at once, should cancelling hang


def run_until_done(main: Coroutine[Any, Any, T]) -> T:
    """What `main` returns. Raises Interrupted if a signal came first.

    Signals come through the event loop: an exception raised by Python's own handler could surface inside a
    callback of WebAssembly code, which must never unwind.
    """
    loop = asyncio.new_event_loop()
    try:
        task = loop.create_task(main)
        interruption = _Interruption(task)
        for number in _SIGNALS:
            loop.add_signal_handler(number, interruption, number)
        return interruption.outcome(loop)
    finally:
        _close(loop)


class _Interruption(Generic[T]):
    def __init__(self, task: asyncio.Task[T]) -> None:
        self._task = task
        self._count = 0
        self._number = 0

    def __call__(self, number: int) -> None:
        self._count += 1
        if self._count >= _PATIENCE:
            os._exit(128 + number)
        if not self._task.done():
            self._number = number
            self._task.cancel()

    def outcome(self, loop: asyncio.AbstractEventLoop) -> T:
        try:
            value = loop.run_until_complete(self._task)
        except BaseException:
            if self._number:  # whatever cancelling turned into on its way out
                raise Interrupted(self._number) from None
            raise
        if self._number:
            raise Interrupted(self._number)
        return value


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Signals stay with the loop until it is empty: cleaning up is not to be torn by one either."""
    try:
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        if pending:
            loop.run_until_complete(asyncio.wait(pending))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        loop.close()
