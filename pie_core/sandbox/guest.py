"""One running program: its fiber, its handles, what it waits for, and why it ended.

idle -- call --> running <--> suspended in a host function
                    |    <--> spinning (interrupted by the epoch, continued slice by slice)
                    +--> idle again, or ended: trap, exit, deadline, cancel, close
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pie_core.errors import (
    Cancelled,
    DeadlineExceeded,
    GuestError,
    GuestTrap,
    ProgramError,
    error_from_code,
)
from pie_core.sandbox import traps
from pie_core.sandbox.converters import Refused
from pie_core.sandbox.fibers import GuestStopped
from pie_core.sandbox.handles import Handles
from pie_core.sandbox.hosting import GuestState, Pending
from pie_core.sandbox.limits import Limits
from pie_core.sandbox.pump import TICK_S
from pie_core.sandbox.quick_calls import ARGUMENTS, CALLED
from pie_core.sandbox.wasi.streams import ByteSource, OutputBudget

if TYPE_CHECKING:
    from pie_core.sandbox.program import Program
    from pie_core.sandbox.runtime import Runtime

log = logging.getLogger(__name__)

Complete = Callable[[int, Pending[Any], Any], None]  # (address of the result, what is pending, the guest)


class CurrentGuest:
    """Which guest of a runtime is being polled; host functions learn from it on whose behalf they are called."""

    __slots__ = ("guest", "interrupt")

    def __init__(self) -> None:
        self.guest: Guest | None = None
        self.interrupt: BaseException | None = (
            None  # a KeyboardInterrupt that must not cross wasmtime's frames
        )


class Guest:
    """Made by Program.start. Everything here runs on the event loop's thread."""

    __slots__ = (
        "_call",
        "_complete",
        "_component",
        "_cpu_s",
        "_current",
        "_done",
        "_end_error",
        "_exit_status",
        "_export",
        "_fiber",
        "_instantiated",
        "_largest",
        "_pending",
        "_poll",
        "_program",
        "_rate",
        "_record",
        "_results",
        "_runtime",
        "_spinning",
        "_stop",
        "_ticker",
        "_ticks",
        "_wake",
        "_wall",
        "calls_left",
        "context",
        "context_argument",
        "continuation",
        "ended",
        "flag",
        "handles",
        "limits",
        "output",
        "state",
        "stdin",
    )

    def __init__(
        self, runtime: Runtime, program: Program, state: GuestState, limits: Limits, stdin: ByteSource | None
    ) -> None:
        self.state = state
        self.limits = limits
        self.handles = Handles(limits.max_handles)
        self.output = OutputBudget(limits.output_bytes)
        self.stdin = stdin if stdin is not None else ByteSource.empty()
        self.ended = False
        self.calls_left = 0  # of the host, before the rate is looked at
        self._rate = runtime.call_rate(limits, state)
        self._runtime = runtime
        self._program = program
        self._fiber = runtime.new_fiber(program, limits)
        self.context = self._fiber.context
        self.context_argument = self._fiber.context_argument
        self.continuation = self._fiber.continuation
        self.flag = self._fiber.flag
        self._poll = self._fiber.poll_call
        self._record = self._fiber.record
        self._current = runtime.current
        self._wake: Callable[[], None] = partial(runtime.pump.wake, self)
        self._instantiated = False
        self._spinning = False
        self._cpu_s = 0.0
        self._ticker = runtime.ticker
        self._ticks = self._ticker.ticks
        self._pending: Pending[Any] | None = None
        self._complete: Complete | None = None
        self._results = 0
        self._largest = 0
        self._stop: BaseException | None = None
        self._exit_status: int | None = None
        self._end_error: BaseException | None = None
        self._done: asyncio.Future[Any] | None = None
        self._call: tuple[str, tuple[Any, ...]] = ("", ())
        self._wall: asyncio.TimerHandle | None = None
        runtime.guests.add(self)

    @property
    def name(self) -> str:
        return self.state.name

    async def call(self, name: str, *arguments: Any) -> Any:
        """Calls an export and returns its value; None if the program ended itself with exit(0).

        Raises what the export gave as its error, GuestTrap, DeadlineExceeded, LimitExceeded, or the error of cancel().
        Cancelling the awaiting task cancels the guest.
        """
        self._check_idle(name)
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        self._call = (name, arguments)
        if self._wall is None and self.limits.wall_seconds is not None:
            self._wall = loop.call_later(self.limits.wall_seconds, self._wall_ended)
        self._begin()
        try:
            return await self._done
        except asyncio.CancelledError:
            self.cancel(Cancelled(f"{self.name}: whoever awaited {name} was cancelled"))
            raise

    def cancel(self, error: BaseException | None = None) -> None:
        """Ends the guest, suspended or spinning: its call raises `error`, its handles are closed, its store freed."""
        if self.ended:
            return
        error = error if error is not None else Cancelled(f"{self.name} was cancelled")
        if self._current.guest is self:
            self._stop = error  # its own host function asked: take effect once the fiber is off the stack
        else:
            self._end(error)

    def close(self) -> None:
        """Frees everything; a call in progress is cancelled. Safe to call twice."""
        self.cancel(Cancelled(f"{self.name} was closed"))

    async def __aenter__(self) -> Guest:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def _check_idle(self, name: str) -> None:
        if self.ended:
            raise GuestError(
                f"{self.name} has ended and cannot be called ({name}): {self._end_error or 'it exited'}"
            )
        if self._done is not None:
            raise RuntimeError(
                f"{self.name}: {name} was called while {self._call[0]} is running: a guest does one at a time"
            )
        self._program.export(name)

    # --- being driven by the pump ------------------------------------------------------------------------------

    def resume(self) -> bool:
        """The pump's turn; see pump.Runnable. Every token comes this way, so it calls nothing that it need not."""
        pending, poll = self._pending, self._poll
        if pending is not None:
            if not pending.done:
                return False
            self._pending = None
            if self._largest and type(pending.value) is int and 0 <= pending.value <= self._largest:
                self._record[ARGUMENTS] = pending.value
                poll = self._fiber.answer_call
            else:
                try:
                    self._complete(self._results, pending, self)  # type: ignore[misc]  # it came with the pending
                except BaseException as error:  # told to the guest already where it has a way to learn it
                    return self._stopped(self._stop or traps.host_failure(error))
                self.flag.value = 1
        elif not self._fiber.in_call:
            return False
        if self._ticks != self._ticker.ticks:
            self._refresh_deadline()
        current = self._current
        current.guest = self
        done = self._timed_poll() if self._spinning else poll(self._fiber.future)
        current.guest = None
        if self._record is not None and self._record[CALLED] and self._stop is None:
            return self._serve()
        if self._pending is not None and self._stop is None:
            self._spinning = False
            return False
        return self._came_back(done)

    def _serve(self) -> bool:
        """A call that was only noted down (quick_calls): it is served now, off the guest's stack."""
        self._spinning = False
        current = self._current
        current.guest = self
        try:
            is_answered = self._runtime.served(self._record[CALLED])(self, self._record)
        except BaseException as error:  # told to the guest already where it has a way to learn it
            return self._stopped(self._stop or traps.host_failure(error))
        finally:
            current.guest = None
        if self._stop is not None:
            return self._stopped(self._stop)
        if is_answered:
            self.flag.value = 1
            self._runtime.pump.wake(self)
        return False

    def _came_back(self, done: bool) -> bool:
        """It does not wait for anything: it was stopped, its call has ended, or its slice is over."""
        if self._stop is not None:
            return self._stopped(self._stop)
        if done:
            self._call_ended()
            return False
        return self._may_go_on()

    def _refresh_deadline(self) -> None:
        self._ticks = self._ticker.ticks
        self._fiber.refresh_deadline()

    def _timed_poll(self) -> bool:
        start = time.thread_time()
        done = self._fiber.poll()
        self._cpu_s += time.thread_time() - start
        return done

    def _may_go_on(self) -> bool:
        """Interrupted by the epoch: goes on unless its CPU time is used up."""
        if not self._spinning:
            self._spinning = True
            self._cpu_s = TICK_S  # the first slice was not measured, to keep the clock off the fast path
        if self._cpu_s <= self.limits.cpu_seconds_per_resume:
            return True
        self._end(
            DeadlineExceeded(
                f"{self.name} ran for {self._cpu_s:.2f} s of CPU time without waiting for anything; "
                f"limits.cpu_seconds_per_resume is {self.limits.cpu_seconds_per_resume}"
            )
        )
        return False

    def _stopped(self, error: BaseException) -> bool:
        self._end(error)
        interrupt, self._runtime.current.interrupt = self._runtime.current.interrupt, None
        if interrupt is not None:
            raise interrupt
        return False

    def _wall_ended(self) -> None:
        self.cancel(
            DeadlineExceeded(f"{self.name} ran longer than limits.wall_seconds = {self.limits.wall_seconds}")
        )

    # --- being called by host functions ------------------------------------------------------------------------

    def suspend(self, pending: Pending[Any], complete: Complete, results: int, largest: int = 0) -> None:
        """The result of a suspending host function comes later: `complete` will write it.

        A number of up to `largest` is written by quick_calls.
        """
        self._largest = largest
        self._pending = pending
        self._complete = complete
        self._results = results
        pending.on_done(self._wake)

    def grant_calls(self) -> None:
        """Its portion of calls is used up: the next one, or LimitExceeded; a call that is refused does not count."""
        owed = -self.calls_left
        self.calls_left += 1
        self.calls_left = self._rate.more(owed)

    @property
    def calls_made(self) -> int:
        """How often it has called the host, but for calls in excess that were forgiven."""
        return self._rate.granted - self.calls_left

    def fail(self, error: BaseException) -> None:
        """A host function that has no way to report an error failed: the guest ends with it."""
        if self._stop is None and self._exit_status is None:
            self._stop = traps.host_failure(error)

    def exit(self, status: int) -> None:
        """The program asked to end; the host function that says so must trap."""
        self._exit_status = status

    # --- beginning and ending ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        try:
            if self._instantiated:
                self._begin_call()
            else:
                self._fiber.begin_instantiate(self._program.component)
        except GuestStopped as error:
            self._end(ProgramError(f"{self.name}: {error}"))
        except (
            Exception
        ) as error:  # arguments that do not fit the export: the caller's fault, told to the caller
            self._end(error)
        self._runtime.pump.wake(self)

    def _begin_call(self) -> None:
        name, arguments = self._call
        export = self._program.export(name)
        self._fiber.begin_call(
            name,
            len(export.kinds),
            lambda address: export.write(address, arguments, self),
            export.read is not None,
        )

    def _call_ended(self) -> None:
        try:
            self._fiber.end_call()
        except GuestStopped as error:
            self._end(self._reason(error))
            return
        if not self._instantiated:
            self._instantiated = True
            self._begin()
            return
        self._give_result()

    def _give_result(self) -> None:
        export = self._program.export(self._call[0])
        done, self._done = self._done, None
        assert done is not None
        try:
            value = None if export.read is None else export.read(self._fiber.result, self)
            _settle(done, value, error_from_code(*value.payload) if isinstance(value, Refused) else None)
        except Exception as error:
            _settle(
                done, None, GuestTrap(f"{self.name} returned what {self._call[0]} cannot return: {error}")
            )
        self._fiber.clear_result()

    def _reason(self, error: GuestStopped) -> BaseException | None:
        if self._exit_status is not None:
            return traps.exited(self.name, self._exit_status)
        if not self._instantiated:
            return traps.not_started(self.name, str(error), self.limits)
        return traps.explain(self.name, str(error), self.limits, self._runtime.options)

    def _end(self, error: BaseException | None) -> None:
        """The one way out. No error: the program ended itself."""
        if self.ended:
            return
        self.ended = True
        self._end_error = error
        self._wake = _stay_asleep  # and nothing is left that refers to itself
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.abandon()
        if self._wall is not None:
            self._wall.cancel()
        self._fiber.close()
        self.handles.sweep()
        self._close_state()
        self._runtime.forget(self)
        done, self._done = self._done, None
        if done is not None:
            _settle(done, None, error)

    def _close_state(self) -> None:
        try:
            self.state.close()
        except Exception:  # the guest is gone either way
            log.exception("closing the state of %s", self.name)


def _stay_asleep() -> None:
    """What a guest that has ended was waiting for has come."""


def _settle(done: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(value)
    else:
        done.set_exception(error)
