"""wasi:clocks: the wall clock, and a monotonic clock whose waits are timers of the event loop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pie_core.host_api.poll import NS, Pollable, Timer
from pie_core.sandbox.hosting import Interface

if TYPE_CHECKING:
    from pie_core.sandbox.guest import Guest

WIT = """
package wasi:clocks@0.2.0;

interface monotonic-clock {
  use wasi:io/poll@0.2.0.{pollable};
  type instant = u64;
  type duration = u64;
  now: func() -> instant;
  resolution: func() -> duration;
  subscribe-instant: func(when: instant) -> pollable;
  subscribe-duration: func(when: duration) -> pollable;
}

interface wall-clock {
  record datetime { seconds: u64, nanoseconds: u32 }
  now: func() -> datetime;
  resolution: func() -> datetime;
}
"""

monotonic_clock = Interface("monotonic-clock", "wasi:clocks")
wall_clock = Interface("wall-clock", "wasi:clocks")


@monotonic_clock.function("now")
def now(guest: Guest) -> int:
    return time.monotonic_ns()


@monotonic_clock.function("resolution")
def resolution(guest: Guest) -> int:
    return 1


@monotonic_clock.function("subscribe-instant")
def subscribe_instant(guest: Guest, when: int) -> Pollable:
    return Timer(when - time.monotonic_ns())


@monotonic_clock.function("subscribe-duration")
def subscribe_duration(guest: Guest, duration: int) -> Pollable:
    return Timer(duration)


@wall_clock.function("now")
def wall_now(guest: Guest) -> tuple[int, int]:
    return divmod(time.time_ns(), NS)


@wall_clock.function("resolution")
def wall_resolution(guest: Guest) -> tuple[int, int]:
    return (0, 1)
