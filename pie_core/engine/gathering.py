"""Whether the next step should wait for programs that were told of the last one, while the driver has another to do.

Programs of other processes answer some sooner than others. If a step began with the first of them, the rest would be in
the step behind it, and stay there: twice the steps for the same tokens. So it waits until all have asked again, though
for no more than half of what a step usually takes, and the driver is not kept waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from pie_core.engine.messages import Event, ForwardDone, Stepped

_WEIGHT = 0.2  # of the last step, in what one usually takes
_TIMER_S = 0.001  # event loops wait for no less


class Gathering:
    """Counts those who were told and have not asked again; `go_on` is called when it has been long enough."""

    def __init__(self, loop: asyncio.AbstractEventLoop, go_on: Callable[[], None]) -> None:
        self._loop = loop
        self._go_on = go_on
        self._awaited = 0
        self._step_s = 0.0  # usually, from the end of the one before
        self._begun_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_on(self) -> bool:
        """A step waits."""
        return self._timer is not None

    def told(self, events: Sequence[Event]) -> None:
        """Of passes that ended: whoever steps by itself will ask for the next."""
        for event in events:
            if isinstance(event, Stepped):
                self._awaited += len(event.requests)
            elif isinstance(event, ForwardDone):
                self._awaited += 1

    def asked(self, count: int) -> None:
        self._awaited = max(self._awaited - count, 0)

    def step_begun(self) -> None:
        """By a driver that was idle before."""
        self._begun_at = self._loop.time()

    def step_ended(self) -> None:
        """The driver has begun with the next one, if it has one."""
        now = self._loop.time()
        took_s, self._begun_at = now - self._begun_at, now
        usually_s = self._step_s + (took_s - self._step_s) * _WEIGHT
        # It falls at once and rises slowly: behind prompts, which make a step long, the driver must not wait as long.
        self._step_s = min(usually_s, took_s) if self._step_s else took_s
        self.end()

    def holds_back(self) -> bool:
        """Whether a step is to wait; asked while the driver is busy."""
        left_s = self._begun_at + self._step_s / 2 - self._loop.time()
        if not self._awaited or left_s < _TIMER_S:
            self.end()
            return False
        if self._timer is None:
            self._timer = self._loop.call_later(left_s, self._give_up)
        return True

    def end(self) -> None:
        """Nobody is waited for any more."""
        self._awaited = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self.end()
        self._go_on()
