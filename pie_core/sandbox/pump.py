"""The pump resumes every runnable guest on the event loop's thread, in slices that leave the loop its turns.

A host result makes a guest runnable; one callback of the loop then resumes all that are. A guest that runs on without
suspending is interrupted by the epoch ticker, gives way, and continues one slice at a time behind the others.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

SLICE_S = 0.005
TICK_S = 0.005
IDLE_TICKS = 20


class Runnable(Protocol):
    """A guest, as the pump sees it."""

    def resume(self) -> bool:
        """Runs until it suspends or ends (False) or is interrupted and wants to go on (True).

        Raises nothing but KeyboardInterrupt and the like.
        """


class Pump:
    """Belongs to one event loop; `resumes` counts."""

    def __init__(self, ticker: Ticker, slice_s: float = SLICE_S) -> None:
        self.resumes = 0
        self._ready: deque[Runnable] = deque()
        self._spinning: deque[Runnable] = deque()
        self._scheduled = False
        self._ticker = ticker
        self._slice_s = slice_s

    def wake(self, guest: Runnable) -> None:
        """Resumes the guest in the loop's next turn."""
        self._ready.append(guest)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._drain)

    def _drain(self) -> None:
        ready, now = self._ready, time.perf_counter
        end = now() + self._slice_s
        self._ticker.start_ticking()
        try:
            while ready:
                self._run(ready.popleft())
                if now() > end:
                    break
            if self._spinning:
                self._run(self._spinning.popleft())
        finally:
            self._ticker.may_rest()
            self._scheduled = bool(ready or self._spinning)
            if self._scheduled:
                asyncio.get_running_loop().call_soon(self._drain)

    def _run(self, guest: Runnable) -> None:
        self.resumes += 1
        if guest.resume():
            self._spinning.append(guest)


class Ticker:
    """A thread that advances the epoch every few milliseconds while guests run, and sleeps while none does.

    The event loop cannot do it: it stands still while a guest runs. The thread needs the interpreter's lock only for
    the increment itself.
    """

    def __init__(self, increment: Callable[[], None], tick_s: float = TICK_S) -> None:
        self.ticks = 0
        self._increment = increment
        self._tick_s = tick_s
        self._busy = False
        self._awake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="pie-epochs", daemon=True)
        self._thread.start()

    def start_ticking(self) -> None:
        """Guests are about to run."""
        self._busy = True
        if not self._awake.is_set():
            self._awake.set()

    def may_rest(self) -> None:
        """No guest runs now; the thread sleeps after a while without any."""
        self._busy = False

    def stop(self) -> None:
        """Ends the thread; the engine may be freed afterwards."""
        self._stopped = True
        self._awake.set()
        self._thread.join()

    def _run(self) -> None:
        idle = 0
        while not self._stopped:
            self._awake.wait()
            time.sleep(self._tick_s)
            self._increment()
            self.ticks += 1
            idle = 0 if self._busy else idle + 1
            if idle > IDLE_TICKS:
                self._rest()

    def _rest(self) -> None:
        self._awake.clear()
        if self._busy or self._stopped:  # they came between the last look and the clear
            self._awake.set()
