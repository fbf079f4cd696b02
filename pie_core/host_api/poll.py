"""The one way in which a guest waits: pollables, `wait` over several of them, timers and the clock.

Anything that completes later hands the guest a `Pollable.of(pending)`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from pie_core.errors import InvalidRequest
from pie_core.sandbox.hosting import GuestState, Interface, Pending

interface = Interface("poll")

NS = 1_000_000_000
FOREVER_S = 10 * 365 * 86400.0  # event loops refuse timers beyond their clock's range


class Pollable:
    """Ready once its pending is done. Subclasses with another condition override ready and on_ready."""

    __slots__ = ("_pending",)

    def __init__(self, pending: Pending[Any]) -> None:
        self._pending = pending

    @classmethod
    def of(cls, pending: Pending[Any]) -> Pollable:
        """Ready when `pending` is resolved or failed."""
        return cls(pending)

    def ready(self) -> bool:
        return self._pending.done

    def on_ready(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back once ready (at once if it is); the function returned takes that back."""
        self._pending.on_done(callback)
        return lambda: self._pending.forget(callback)

    def close(self) -> None:
        """The guest dropped its handle; what it stands for goes on."""


class Timer(Pollable):
    """Ready after a duration; dropping it stops the clock."""

    __slots__ = ("_handle",)

    def __init__(self, duration_ns: int) -> None:
        pending: Pending[None] = Pending.of(None) if duration_ns <= 0 else Pending()
        super().__init__(pending)
        self._handle = None if pending.done else _call_later(duration_ns, lambda: pending.resolve(None))

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


class _Wait:
    """One suspended `wait`: the first pollable or the timeout ends it, and every subscription is taken back."""

    __slots__ = ("_cancels", "_pollables", "_timer", "pending")

    def __init__(self, pollables: list[Pollable], timeout_ns: int | None) -> None:
        self.pending: Pending[list[int]] = Pending(self._release)
        self._pollables = pollables
        self._timer = None if timeout_ns is None else _call_later(timeout_ns, self._finish)
        self._cancels: list[Callable[[], None]] = []
        for pollable in pollables:
            self._cancels.append(pollable.on_ready(self._finish))

    def _finish(self) -> None:
        if self.pending.done or self.pending.abandoned:
            return
        self._release()
        self.pending.resolve(ready_indexes(self._pollables))

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for cancel in self._cancels:
            cancel()


def wait_for(pollables: list[Pollable], timeout_ns: int | None = None) -> Pending[list[int]]:
    """The indexes that are ready, as soon as there is one; none when the timeout ends first."""
    ready = ready_indexes(pollables)
    if ready or timeout_ns == 0:
        return Pending.of(ready)
    return _Wait(pollables, timeout_ns).pending


def ready_indexes(pollables: list[Pollable]) -> list[int]:
    return [index for index, pollable in enumerate(pollables) if pollable.ready()]


def _call_later(duration_ns: int, callback: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(min(duration_ns / NS, FOREVER_S), callback)


interface.resource("pollable", Pollable)


@interface.function("pollable.ready")
def ready(guest: GuestState, pollable: Pollable) -> bool:
    return pollable.ready()


@interface.function("wait", suspends=True)
def wait(guest: GuestState, pollables: list[Pollable], timeout_ns: int | None) -> Pending[list[int]]:
    if not pollables and timeout_ns is None:
        raise InvalidRequest(
            "poll.wait without pollables and without a timeout would never return: pass either"
        )
    return wait_for(pollables, timeout_ns)


@interface.function("timer")
def timer(guest: GuestState, duration_ns: int) -> Pollable:
    return Timer(duration_ns)


@interface.function("now-ns")
def now_ns(guest: GuestState) -> int:
    return time.monotonic_ns()
