"""Who waits for the driver, so that the event loop need not: a thread, or the loop itself by asking again and again.

A driver that can say whether a step is over (`DriverCapabilities.can_poll`) is asked in every turn of the loop while it
has steps. That costs a processor, as a thread that waits for a device does, but nobody is woken when a step ends:
a thread that takes the result, hands over Python's lock and wakes a loop that sleeps costs 50 to 250 us a step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from time import perf_counter
from typing import Protocol, cast

from pie_core.contracts.driver import Driver, PolledDriver
from pie_core.contracts.forward import ForwardResult
from pie_core.ids import Ticket

_log = logging.getLogger(__name__)

LOOK_S = 20e-6  # how long the driver is asked before others have their turn
PATIENCE_S = 10.0  # with a driver that shall end

Collected = Callable[[Ticket, ForwardResult | Exception], None]


class Collector(Protocol):
    """Calls `collected` on the event loop with what each ticket gave, in their order."""

    def collect(self, ticket: Ticket) -> None: ...

    def rest(self) -> None:
        """Nobody wants to be told any more."""

    async def stop(self) -> None:
        """Closes the driver once it is idle; one that hangs is left behind."""


def collector_of(driver: Driver, loop: asyncio.AbstractEventLoop, collected: Collected) -> Collector:
    if driver.capabilities.can_poll:
        return Poller(cast(PolledDriver, driver), loop, collected)
    return Waiter(driver, loop, collected)


class Poller:
    """Asks the driver in every turn of the loop."""

    def __init__(self, driver: PolledDriver, loop: asyncio.AbstractEventLoop, collected: Collected) -> None:
        self._driver = driver
        self._loop = loop
        self._collected = collected
        self._tickets: deque[Ticket] = deque()
        self._due: asyncio.Handle | None = None
        self._rests = self._stopped = False

    def collect(self, ticket: Ticket) -> None:
        self._tickets.append(ticket)
        if self._due is None:
            self._due = self._loop.call_soon(self._look)

    def rest(self) -> None:
        self._rests = True

    async def stop(self) -> None:
        if not self._stopped:
            self._rests = self._stopped = True
            closing = threading.Thread(target=self._close, name="pie-close", daemon=True)
            closing.start()
            await _ended(closing, self._driver)

    def _close(self) -> None:
        for ticket in self._tickets:
            outcome_of(self._driver, ticket)
        self._driver.close()

    def _look(self) -> None:
        self._due = None
        if self._rests:
            return
        try:
            if self._is_done(self._tickets[0]):
                ticket = self._tickets.popleft()
                self._collected(ticket, outcome_of(self._driver, ticket))
        finally:
            if self._tickets and self._due is None:
                self._due = self._loop.call_soon(self._look)

    def _is_done(self, ticket: Ticket) -> bool:
        is_done, end = self._driver.is_done, perf_counter() + LOOK_S
        try:
            while not is_done(ticket):
                if perf_counter() > end:
                    return False
        except Exception:  # collecting the ticket tells what is wrong
            _log.exception("driver %r cannot say whether a step is over", self._driver.capabilities.driver)
        return True


class Waiter:
    """One thread that waits for the driver."""

    def __init__(self, driver: Driver, loop: asyncio.AbstractEventLoop, collected: Collected) -> None:
        self._driver = driver
        self._loop = loop
        self._collected = collected
        self._tickets: SimpleQueue[Ticket | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pie-collect", daemon=True)
        self._thread.start()
        self._stopped = False

    def collect(self, ticket: Ticket) -> None:
        self._tickets.put(ticket)

    def rest(self) -> None:
        """The thread waits on: what it brings is ignored."""

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._tickets.put(None)
        if await _ended(self._thread, self._driver):
            self._driver.close()

    def _run(self) -> None:
        while (ticket := self._tickets.get()) is not None:
            outcome = outcome_of(self._driver, ticket)
            try:
                self._loop.call_soon_threadsafe(self._collected, ticket, outcome)
            except RuntimeError:  # the event loop is closed: nobody is left to tell
                return


async def _ended(thread: threading.Thread, driver: Driver) -> bool:
    await asyncio.to_thread(thread.join, PATIENCE_S)
    if thread.is_alive():
        _log.warning("driver %r hangs and is left behind", driver.capabilities.driver)
    return not thread.is_alive()


def outcome_of(driver: Driver, ticket: Ticket) -> ForwardResult | Exception:
    """What collecting the ticket gives or raises: the engine ends the passes of the step with it."""
    try:
        return driver.collect(ticket)
    except Exception as error:
        return error
