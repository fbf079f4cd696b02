"""The door to the host: calls whose refusals become exceptions, and waiting for what takes time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, Protocol, Self, TypeVar

from componentize_py_types import Err
from wit_world.imports import poll

from inferlet.crossing import check_arguments
from inferlet.errors import InferletError, InvalidRequest, error_from_code
from inferlet.event_loop import NANOSECONDS, PollLoop

P = ParamSpec("P")
T = TypeVar("T")


class Droppable(Protocol):
    """Any resource of the host, as the bindings show it."""

    def __exit__(self, exc_type: None, exc_value: None, traceback: None, /) -> bool | None: ...


class Scoped:
    """What a `with` block holds, and leaves at its end."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        raise NotImplementedError


def call(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls the host and raises its error record as the exception that its code names."""
    check_arguments(function, args)
    try:
        return function(*args, **kwargs)
    except Err as refusal:
        raise error_from_code(refusal.value.code, refusal.value.message) from None


def drop(resource: Droppable) -> None:
    """Gives a handle back now instead of when the garbage collector finds it."""
    resource.__exit__(None, None, None)


def alone() -> bool:
    """True if no other task could run meanwhile, so that one suspending call may replace a wait."""
    return running_loop().is_alone()


async def finish(
    pollable: Callable[[], poll.Pollable], take: Callable[[], T], cancel: Callable[[], object] | None = None
) -> T:
    """Waits until `take` would return at once, then takes; other tasks of the program run meanwhile.

    `cancel` is called when the waiting task is cancelled: nobody wants any more what was asked for.
    """
    loop = running_loop()
    if not loop.is_alone():
        try:
            await loop.readiness(pollable())
        except asyncio.CancelledError:
            if cancel is not None:
                cancel()
            raise
    return call(take)


def nanoseconds(seconds: float) -> int:
    """A time limit as the host takes it. Raises InvalidRequest."""
    if not 0 < seconds < float("inf"):
        raise InvalidRequest(f"a time limit of {seconds} s: expected a number of seconds above 0")
    return max(round(seconds * NANOSECONDS), 1)


def running_loop() -> PollLoop:
    loop = asyncio.get_running_loop()
    if isinstance(loop, PollLoop):
        return loop
    raise InferletError(
        f"this coroutine runs on a {type(loop).__name__}, which cannot wait for the host; "
        "let pie run `main`, or use asyncio.run without a loop of your own"
    )
