"""Calls in threads that hold nothing up when the process ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def in_daemon_thread(call: Callable[[], T]) -> T:
    """Like asyncio.to_thread, with a daemon thread: Ctrl-C while a model loads does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_result: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            set_result(value)

    def tell(set_result: Callable[[Any], None], value: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            loop.call_soon_threadsafe(settle, set_result, value)

    def work() -> None:
        try:
            value = call()
        except BaseException as error:  # carried to the loop, which raises it where it is awaited
            tell(future.set_exception, error)
        else:
            tell(future.set_result, value)

    threading.Thread(target=work, name="pie-load", daemon=True).start()
    return await future
