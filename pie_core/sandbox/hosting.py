"""How a module of host functions describes itself to the sandbox.

    interface = Interface("forward")

    @interface.function("step", suspends=True)
    def step(guest: GuestState, context: HostContext, token: int, sampler: HostSampler) -> Pending[int]: ...

    interface.resource("sampler", HostSampler)

The linker reads `functions` and `resources`; nothing here knows wasmtime.

A host function runs on its guest's stack. CPython 3.14 does not bound C recursion there, so what a guest can nest as
deeply as it likes (JSON text to parse, say) is taken apart in a callback of the loop, behind a Pending.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, Protocol, TypeVar

T = TypeVar("T")
V = TypeVar("V")
Host = TypeVar("Host", bound=Callable[..., Any])


class GuestState(Protocol):
    """What the sandbox itself needs of the state that host functions keep for one guest."""

    @property
    def name(self) -> str:
        """Names the guest in logs and errors."""

    @property
    def tenant(self) -> str:
        """With whose guests it shares limits."""

    def write_stdout(self, data: bytes) -> Pending[None] | None:
        """Takes what the guest printed; a Pending holds the guest back until it is resolved."""

    def write_stderr(self, data: bytes) -> Pending[None] | None: ...

    def close(self) -> None:
        """Called once, after the guest's last instruction and after its handles were closed."""


class Pending(Generic[T]):
    """A result that comes later. Used on the event loop's thread only; resolved or failed once."""

    __slots__ = ("_callback", "_callbacks", "abandoned", "done", "error", "on_abandon", "value")

    def __init__(self, on_abandon: Callable[[], None] | None = None) -> None:
        self.done = False
        self.abandoned = False
        self.value: T | None = None
        self.error: BaseException | None = None
        self.on_abandon = on_abandon
        self._callback: Callable[[], None] | None = None
        self._callbacks: list[Callable[[], None]] | None = (
            None  # those after the first, which is alone as a rule
        )

    @classmethod
    def of(cls, value: T) -> Pending[T]:
        """One that is resolved already."""
        pending = cls()
        pending.done = True
        pending.value = value
        return pending

    @classmethod
    def failed(cls, error: BaseException) -> Pending[T]:
        """One that has failed already."""
        pending = cls()
        pending.done = True
        pending.error = error
        return pending

    def resolve(self, value: T) -> None:
        """Hands the value over and runs the callbacks; nothing happens if nobody waits any more."""
        if self.abandoned:
            return
        if self.done:
            self._refuse(value)
        self.value = value
        self.done = True
        first, self._callback = self._callback, None
        if first is not None:
            first()
            if self._callbacks is not None:
                self._call_the_others()

    def _call_the_others(self) -> None:
        callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback()

    def fail(self, error: BaseException) -> None:
        """Like resolve, with the error that the waiter gets instead of a value."""
        if self.abandoned:
            return
        if self.done:
            self._refuse(error)
        self.error = error
        self.resolve(None)  # type: ignore[arg-type]  # nobody sees the value behind an error

    def _refuse(self, given: object) -> NoReturn:
        raise RuntimeError(
            f"a Pending was settled twice: it has {self.error or self.value!r} and is given {given!r}"
        )

    def result(self) -> T:
        """The value, or the error raised."""
        if not self.done:
            raise RuntimeError("Pending.result() was asked before resolve() or fail()")
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # None only where T allows it

    def map(self, convert: Callable[[T], V]) -> Pending[V]:
        """A pending of the converted value; abandoning it leaves this one as it is."""
        mapped: Pending[V] = Pending()

        def forward() -> None:
            try:
                mapped.resolve(convert(self.result()))
            except Exception as error:  # whatever failed is the waiter's answer
                mapped.fail(error)

        self.on_done(forward)
        return mapped

    def on_done(self, callback: Callable[[], None]) -> None:
        """Calls back once when done; at once if it is done already."""
        if self.done:
            callback()
        elif self._callback is None:
            self._callback = callback
        else:
            self._callbacks = [*(self._callbacks or ()), callback]

    def forget(self, callback: Callable[[], None]) -> None:
        """Takes back an on_done; unknown callbacks are ignored."""
        if self._callback == callback:
            self._callback = self._callbacks.pop(0) if self._callbacks else None
        elif self._callbacks is not None and callback in self._callbacks:
            self._callbacks.remove(callback)

    def abandon(self) -> None:
        """Nobody waits any more: later resolve and fail do nothing, and `on_abandon` is told."""
        if self.done or self.abandoned:
            return
        self.abandoned = True
        self._callback = self._callbacks = None
        self._unwanted()

    def cancel(self) -> None:
        """Nobody wants it any more, but somebody waits for its end, which still comes: `on_abandon` is told."""
        if not (self.done or self.abandoned):
            self._unwanted()

    def _unwanted(self) -> None:
        if self.on_abandon is not None:
            self.on_abandon()

    def undone(self) -> Pending[bool]:
        """Whether it failed, once it is over."""
        outcome: Pending[bool] = Pending()
        self.on_done(lambda: outcome.resolve(self.error is not None))
        return outcome


@dataclass(frozen=True, slots=True)
class HostFunction:
    """One registered function; `arrays` asks for number lists as numpy arrays instead of Python lists."""

    name: str
    call: Callable[..., Any]
    suspends: bool
    arrays: bool


class Interface:
    """The Python side of one WIT interface."""

    def __init__(self, name: str, package: str = "inferlet:api") -> None:
        self.name = name
        self.package = package
        self.functions: dict[str, HostFunction] = {}
        self.resources: dict[str, type] = {}

    def function(self, name: str, *, suspends: bool = False, arrays: bool = False) -> Callable[[Host], Host]:
        """Registers `step`, `sampler.top-k` (method or static alike) or `[constructor]sampler`.

        It is called with the guest's state first. A suspending function returns a Pending, or the value itself
        when there is nothing to wait for.
        """

        def register(call: Host) -> Host:
            if name in self.functions:
                raise ValueError(f"{self.package}/{self.name}: the function {name!r} is registered twice")
            self.functions[name] = HostFunction(name, call, suspends, arrays)
            return call

        return register

    def resource(self, name: str, kind: type) -> None:
        """Objects of `kind` are handed to guests as handles of this resource; a dropped handle calls .close()."""
        if name in self.resources:
            raise ValueError(f"{self.package}/{self.name}: the resource {name!r} is registered twice")
        self.resources[name] = kind
