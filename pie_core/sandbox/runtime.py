"""Everything that the guests of one event loop share: engine, linker, compiler, pump and epoch ticker."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from pie_core.sandbox.aot_cache import AotCache
from pie_core.sandbox.call_rate import Bucket, CallRate
from pie_core.sandbox.compilation import CompileLimits, Compiler
from pie_core.sandbox.converters import Converters
from pie_core.sandbox.fibers import EngineOptions, Fiber, epoch_incrementer, new_engine
from pie_core.sandbox.guest import CurrentGuest, Guest
from pie_core.sandbox.hosting import GuestState, Interface
from pie_core.sandbox.limits import Limits
from pie_core.sandbox.linker import HostLinker
from pie_core.sandbox.pump import Pump, Ticker
from pie_core.sandbox.quick_calls import RECORD as QUICK_RECORD
from pie_core.sandbox.quick_calls import QuickCalls, Serve
from pie_core.sandbox.selftest import self_test, try_quick_calls

if TYPE_CHECKING:
    from pie_core.sandbox.program import Program

SLICE_TICKS = 1  # of the epoch, which advances only when a guest has run for one to two ticks of the clock


class Runtime:
    """Use it from one thread, the event loop's. Without `cache_folder` nothing compiled is kept."""

    def __init__(
        self,
        interfaces: Iterable[Interface],
        cache_folder: Path | None = None,
        options: EngineOptions | None = None,
        compile_limits: CompileLimits | None = None,
        quick_calls: Path | None = None,
    ) -> None:
        """`quick_calls` is the library of that name, if it was built."""
        self_test()
        self.options = options or EngineOptions()
        self.engine = new_engine(self.options)
        self.current = CurrentGuest()
        self.guests: set[Guest] = set()
        self._calls_of_ended = 0
        self._tenants: WeakValueDictionary[str, Bucket] = WeakValueDictionary()
        self._closed = False
        if quick_calls is not None:
            try_quick_calls(quick_calls)
        self._quick = None if quick_calls is None else QuickCalls(quick_calls)
        self.linker = HostLinker(interfaces, self.current, self._quick)
        self.compiler = Compiler(
            self.engine, self.options, AotCache(cache_folder), compile_limits or CompileLimits()
        )
        self.ticker = Ticker(epoch_incrementer(self.engine))
        self.pump = Pump(self.ticker)

    @property
    def converters(self) -> Converters:
        return self.linker.converters

    @property
    def live_guests(self) -> int:
        return len(self.guests)

    @property
    def resumes(self) -> int:
        """How often guests were resumed, since the start."""
        return self.pump.resumes

    @property
    def host_calls(self) -> int:
        """Calls of host functions by all guests, since the start."""
        return self._calls_of_ended + sum(guest.calls_made for guest in self.guests)

    def forget(self, guest: Guest) -> None:
        """It has ended."""
        self.guests.discard(guest)
        self._calls_of_ended += guest.calls_made

    def call_rate(self, limits: Limits, state: GuestState) -> CallRate:
        """What counts the calls of a new guest; those of a tenant share a bucket."""
        program = None if limits.calls_per_second is None else Bucket(limits.calls_per_second)
        shared = limits.tenant_calls_per_second
        tenant = None if shared is None else self._tenants.setdefault(state.tenant, Bucket(shared))
        return CallRate(program, tenant)

    def new_fiber(self, program: Program, limits: Limits) -> Fiber:
        if self._closed:
            raise RuntimeError(f"a guest of {program.name!r} was started in a runtime that is closed")
        memory_bytes = limits.memory_bytes
        if self._quick is None:
            return Fiber(self.engine, program.linker, memory_bytes, SLICE_TICKS)
        return Fiber(
            self.engine,
            program.linker,
            memory_bytes,
            SLICE_TICKS,
            QUICK_RECORD(),
            self._quick.poll,
            self._quick.answer,
        )

    def served(self, number: int) -> Serve:
        """The host function that was noted down under this number."""
        assert self._quick is not None
        return self._quick.served[number]

    def close(self) -> None:
        """Ends every guest and the ticker's thread."""
        self._closed = True
        for guest in list(self.guests):
            guest.close()
        self.ticker.stop()


def install_interrupt(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> Callable[[], None]:
    """Ctrl-C calls `callback` in the loop, at any moment, also while a guest spins. Returns what undoes it.

    Required while guests run in the main thread: Python's own handler raises KeyboardInterrupt between any two
    bytecodes, also inside a host function, where it would have to cross wasmtime's frames. This one only leaves a
    note for the loop, which gets its turn after the current slice.
    """
    loop.add_signal_handler(signal.SIGINT, callback)

    def remove() -> None:
        loop.remove_signal_handler(signal.SIGINT)

    return remove
