"""Byte streams between a guest and its host: standard input, and standard output with its budget."""

from __future__ import annotations

from collections.abc import Callable

from pie_core.errors import LimitExceeded
from pie_core.host_api.poll import Pollable
from pie_core.sandbox.hosting import Pending

CHUNK = 1 << 20  # the most that one write takes; a write of more is told how much was taken
READ_CHUNK = 64 * 1024  # the most that one read gives


class ByteSource:
    """What a guest reads as standard input; the host feeds and ends it."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._closed = False
        self._listeners: list[Callable[[], None]] = []

    @classmethod
    def empty(cls) -> ByteSource:
        """At its end from the start."""
        source = cls()
        source.end()
        return source

    @property
    def readable(self) -> bool:
        """A read would give bytes or the end."""
        return bool(self._bytes) or self._closed

    @property
    def at_end(self) -> bool:
        return self._closed and not self._bytes

    def feed(self, data: bytes) -> None:
        if self._closed:
            raise ValueError(f"a ByteSource was fed {len(data)} bytes after end()")
        self._bytes += data
        self._tell()

    def end(self) -> None:
        """No more will come; what was fed can still be read. (Not close: that is a guest dropping its handle.)"""
        self._closed = True
        self._tell()

    def read(self, count: int) -> bytes:
        """Up to `count` bytes that are there now."""
        taken = bytes(self._bytes[: min(count, READ_CHUNK)])
        del self._bytes[: len(taken)]
        return taken

    def on_readable(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back once readable; the function returned takes that back."""
        if self.readable:
            callback()
        else:
            self._listeners.append(callback)
        return lambda: self._listeners.remove(callback) if callback in self._listeners else None

    def _tell(self) -> None:
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener()


class Readable(Pollable):
    """Ready whenever its source can be read: unlike other pollables it can cease to be."""

    __slots__ = ("_source",)

    def __init__(self, source: ByteSource) -> None:
        super().__init__(Pending())
        self._source = source

    def ready(self) -> bool:
        return self._source.readable

    def on_ready(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._source.on_readable(callback)


class OutputBudget:
    """How much a guest may still print; stdout and stderr share it."""

    __slots__ = ("_left", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._left = limit

    def spend(self, count: int) -> int:
        """How many of `count` bytes fit."""
        granted = min(count, self._left)
        self._left -= granted
        return granted

    def exceeded(self) -> LimitExceeded:
        return LimitExceeded(f"the program printed more than limits.output_bytes = {self._limit} bytes")


class OutputStream:
    """One of a guest's outputs: hands everything to its sink at once, and waits when the sink asks for it."""

    __slots__ = ("_budget", "_sink", "_waiting")

    def __init__(self, sink: Callable[[bytes], Pending[None] | None], budget: OutputBudget) -> None:
        self._sink = sink
        self._budget = budget
        self._waiting: Pending[None] | None = None

    @property
    def allowance(self) -> int:
        """How much may be written now."""
        return CHUNK if self._waiting is None or self._waiting.done else 0

    def write(self, data: bytes) -> None:
        """Raises LimitExceeded behind the part that still fitted."""
        granted = self._budget.spend(len(data))
        if granted:
            self._waiting = self._sink(data if granted == len(data) else data[:granted])
        if granted < len(data):
            raise self._budget.exceeded()

    def drained(self) -> Pending[None]:
        """Done when the sink takes more."""
        return self._waiting if self._waiting is not None else Pending.of(None)
