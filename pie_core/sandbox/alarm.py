"""An alarm that rings for a waiting thread every few milliseconds while it is set, and that wakes nobody to be set.

A thread that sleeps and wakes by itself asks for Python's lock each time, and the event loop stands still until it has
had it: up to 200 us, a hundred times a second.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from typing import Protocol


class Alarm(Protocol):
    def set(self) -> None:
        """It rings from now on."""

    def clear(self) -> None:
        """It rings no more."""

    def wait(self) -> None:
        """Until it rings; for one thread."""

    def ring(self) -> None:
        """Once, at once."""

    def close(self) -> None:
        """Nobody waits for it any more."""


class TimerAlarm:
    """A timer of the Linux kernel, set without giving Python's lock away."""

    def __init__(self, every_s: float) -> None:
        libc = ctypes.PyDLL(None, use_errno=True)
        self._file = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC)
        if self._file < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"timerfd_create gives no timer of the kernel: {os.strerror(number)}")
        seconds, nanoseconds = divmod(round(every_s * 1e9), 10**9)
        self._every = ctypes.byref(_Times(seconds, nanoseconds, seconds, nanoseconds))
        self._once, self._never = ctypes.byref(_Times(0, 0, 0, 1)), ctypes.byref(_Times())
        self._set_time = libc.timerfd_settime
        self._set_time.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

    def set(self) -> None:
        self._set_time(self._file, 0, self._every, None)

    def clear(self) -> None:
        self._set_time(self._file, 0, self._never, None)

    def wait(self) -> None:
        os.read(self._file, 8)

    def ring(self) -> None:
        self._set_time(self._file, 0, self._once, None)

    def close(self) -> None:
        os.close(self._file)


class _Times(ctypes.Structure):
    """`struct itimerspec`: the period, and the time to the first ring; all 0 is never."""

    _fields_ = (
        ("period_s", ctypes.c_long),
        ("period_ns", ctypes.c_long),
        ("first_s", ctypes.c_long),
        ("first_ns", ctypes.c_long),
    )


IDLE_RINGS = 20


class SleepingAlarm:
    """Where there is no such timer: it goes on ringing for a while, for setting it anew wakes the thread."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._is_set = False
        self._idle = 0
        self._awake = threading.Event()

    def set(self) -> None:
        self._is_set = True
        if not self._awake.is_set():
            self._awake.set()

    def clear(self) -> None:
        self._is_set = False

    def wait(self) -> None:
        self._idle = 0 if self._is_set else self._idle + 1
        if self._idle > IDLE_RINGS:
            self._rest()
        self._awake.wait()
        time.sleep(self._every_s)

    def ring(self) -> None:
        self.set()

    def close(self) -> None:
        """There is nothing to free."""

    def _rest(self) -> None:
        self._idle = 0
        self._awake.clear()
        if self._is_set:  # between the last look and the clear
            self._awake.set()


def alarm_every(every_s: float) -> Alarm:
    return TimerAlarm(every_s) if sys.platform == "linux" else SleepingAlarm(every_s)
