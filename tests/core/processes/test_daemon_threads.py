"""Calls in daemon threads: their results arrive, and they end quietly where nobody waits any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from pie_core.processes.daemon_threads import in_daemon_thread


def test_what_a_call_returns_or_raises_arrives() -> None:
    assert asyncio.run(in_daemon_thread(lambda: 3)) == 3
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_daemon_thread(lambda: 1 // 0))


@pytest.mark.parametrize("end", [lambda: None, lambda: 1 // 0])
def test_a_call_that_ends_after_its_loop_ends_quietly(end: Callable[[], object]) -> None:
    """As when Ctrl-C ends pie while a model loads. A thread that ends otherwise fails the test."""
    has_begun, may_end, threads = threading.Event(), threading.Event(), []

    def work() -> None:
        threads.append(threading.current_thread())
        has_begun.set()
        may_end.wait()
        end()

    async def leave_early() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_daemon_thread(work), 0.01)

    asyncio.run(leave_early())
    has_begun.wait()
    may_end.set()
    threads[0].join()
