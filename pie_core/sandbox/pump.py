"""The pump resumes every runnable guest on the event loop's thread, in slices that leave the loop its turns.

A host result makes a guest runnable; one callback of the loop then resumes all that are, or the one that brought the
results does. A guest that runs on without suspending is interrupted by the epoch ticker, gives way, and continues one
slice at a time behind the others.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from pie_core.sandbox.alarm import alarm_every

SLICE_S = 0.02  # a step's guests are resumed together, also when there are a thousand of them
TICK_S = 0.005


class Runnable(Protocol):
    """A guest, as the pump sees it."""

    def resume(self) -> bool:
        """Runs until it suspends or ends (False) or is interrupted and wants to go on (True).

        Raises nothing but KeyboardInterrupt and the like.
        """


class Pump:
    """Belongs to one event loop."""

    def __init__(self, ticker: Ticker, slice_s: float = SLICE_S) -> None:
        self._ready: deque[Runnable] = deque()
        self._spinning: deque[Runnable] = deque()
        self._afterwards: list[Callable[[], None]] = []
        self._is_scheduled = False
        self._is_running = False
        self._ticker = ticker
        self._slice_s = slice_s

    @property
    def resumes(self) -> int:
        """How often guests were resumed, since the start."""
        return self._ticker.resumes

    def wake(self, guest: Runnable) -> None:
        """Resumes the guest in the loop's next turn, or in the next `run`."""
        self._ready.append(guest)
        if not self._is_scheduled and not self._is_running:
            self._schedule()

    def run(self) -> None:
        """Resumes now whoever is ready, and does what is to be done afterwards."""
        if self._ready and not self._is_running:
            self._drain(spinning=False)

    def afterwards(self, call: Callable[[], None]) -> bool:
        """While guests are being resumed: calls once when all who are ready have had their say; else never (False)."""
        if self._is_running:
            self._afterwards.append(call)
        return self._is_running

    def _schedule(self) -> None:
        self._is_scheduled = True
        asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._is_scheduled = False
        self._drain(spinning=True)

    def _drain(self, *, spinning: bool) -> None:
        self._is_running = True
        self._ticker.start_ticking()
        try:
            self._run_ready(time.perf_counter() + self._slice_s)
            if spinning and self._spinning:
                self._run(self._spinning.popleft())
                self._end_round()
        finally:
            self._is_running = False
            self._ticker.may_rest()
            if (self._ready or self._spinning) and not self._is_scheduled:
                self._schedule()

    def _run_ready(self, end: float) -> None:
        """Round after round: what is done afterwards may make guests ready again."""
        ready, now, ticker = self._ready, time.perf_counter, self._ticker
        while ready:
            ticker.resumes += 1  # as in _run
            guest = ready.popleft()
            if guest.resume():
                self._spinning.append(guest)
            if now() > end:
                break
            if not ready:
                self._end_round()
        self._end_round()

    def _end_round(self) -> None:
        while self._afterwards:
            self._afterwards.pop()()

    def _run(self, guest: Runnable) -> None:
        self._ticker.resumes += 1
        if guest.resume():
            self._spinning.append(guest)


class Ticker:
    """A thread that advances the epoch when one guest has run for a whole tick, and sleeps while none runs.

    The event loop cannot do it: it stands still while a guest runs. Guests that wait for something soon again never see
    the epoch move, so their deadlines stay as they are from one call to the next.
    """

    def __init__(self, increment: Callable[[], None], tick_s: float = TICK_S) -> None:
        self.ticks = 0  # how often the epoch was advanced
        self.resumes = 0  # counted by the pump: while it stands still, one guest runs
        self._increment = increment
        self._alarm = alarm_every(tick_s)
        self._busy = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="pie-epochs", daemon=True)
        self._thread.start()

    def start_ticking(self) -> None:
        """Guests are about to run."""
        self._busy = True
        self._alarm.set()

    def may_rest(self) -> None:
        """No guest runs now."""
        self._busy = False
        self._alarm.clear()

    def stop(self) -> None:
        """Ends the thread; the engine may be freed afterwards."""
        self._stopped = True
        self._alarm.ring()
        self._thread.join()
        self._alarm.close()

    def _run(self) -> None:
        seen = -1
        while not self._stopped:
            self._alarm.wait()
            if self._busy and self.resumes == seen and not self._stopped:
                self._increment()
                self.ticks += 1
            seen = self.resumes
