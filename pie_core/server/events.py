"""What a process says to its client, kept until it is sent and a while longer, within bounds.

     sent, kept for a client that comes back │ not sent yet
    ─────────────────────────────────────────┼──────────────▶ new events
     the first to go                         │ held back or dropped when full

While somebody reads, a full buffer holds the program back: nothing is lost. While nobody does, the oldest events go
and are counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pie_core.sandbox.hosting import Pending

_OVERHEAD = 100  # bytes that an event takes beside its value, about


@dataclass(frozen=True, slots=True)
class ProcessOutput:
    """`kind` is stdout, stderr, message, file, return or error."""

    kind: str
    value: str | bytes
    is_json: bool = False
    error_code: str | None = None

    @property
    def is_last(self) -> bool:
        return self.kind in ("return", "error")

    @property
    def size(self) -> int:
        return len(self.value) + _OVERHEAD


@dataclass(frozen=True, slots=True)
class Numbered:
    """An event in its place; `dropped` is how many were lost before it."""

    seq: int
    output: ProcessOutput
    dropped: int = 0


class EventBuffer:
    """The events of one process. `on_event` is told whenever there is something to take."""

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._sent: deque[Numbered] = deque()
        self._unsent: deque[Numbered] = deque()
        self._bytes = 0
        self._unsent_bytes = 0
        self._last = 0
        self._dropped = 0
        self._held: list[Pending[None]] = []
        self._on_event: Callable[[], None] | None = None

    @property
    def last_seq(self) -> int:
        return self._last

    @property
    def num_bytes(self) -> int:
        """What it takes, sent and unsent."""
        return self._bytes

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    @property
    def is_holding(self) -> bool:
        """The program waits until its reader has caught up."""
        return bool(self._held)

    @property
    def dropped(self) -> int:
        """Events lost since the last one that was taken."""
        return self._dropped

    def put(self, output: ProcessOutput) -> Pending[None] | None:
        """A Pending holds the program back until the reader has caught up."""
        self._last += 1
        self._unsent.append(Numbered(self._last, output))
        self._bytes += output.size
        self._unsent_bytes += output.size
        self._trim()
        if self._on_event is None:
            return None
        self._on_event()
        return self._hold() if self._is_full else None

    def take(self) -> Numbered | None:
        """The next event for the reader."""
        if not self._unsent:
            return None
        event = self._unsent.popleft()
        self._sent.append(event)
        self._unsent_bytes -= event.output.size
        dropped, self._dropped = self._dropped, 0
        if not self._is_full:
            self._release()
        self._trim()
        return Numbered(event.seq, event.output, dropped) if dropped else event

    def attach(self, on_event: Callable[[], None], after: int | None = None) -> None:
        """With `after`, what was sent behind that event is sent again, as far as it is kept."""
        if after is not None:
            self._rewind(after)
        self._on_event = on_event
        if self._unsent:
            on_event()

    def detach(self) -> None:
        self._on_event = None
        self._release()
        self._trim()

    @property
    def _is_full(self) -> bool:
        return len(self._unsent) >= self._max_events or self._unsent_bytes >= self._max_bytes

    def _hold(self) -> Pending[None]:
        held: Pending[None] = Pending()
        self._held.append(held)
        return held

    def _release(self) -> None:
        held, self._held = self._held, []
        for pending in held:
            pending.resolve(None)

    def _rewind(self, after: int) -> None:
        while self._sent and self._sent[-1].seq > after:
            event = self._sent.pop()
            self._unsent.appendleft(event)
            self._unsent_bytes += event.output.size
        while self._unsent and self._unsent[0].seq <= after:  # what the client has, whether we knew it or not
            self._sent.append(self._unsent.popleft())
            self._unsent_bytes -= self._sent[-1].output.size
        first = self._unsent[0].seq if self._unsent else self._last + 1
        self._dropped = max(0, first - after - 1)

    def _trim(self) -> None:
        while self._is_over and self._sent:
            self._bytes -= self._sent.popleft().output.size
        while self._is_over and self._on_event is None and len(self._unsent) > 1:
            lost = self._unsent.popleft().output.size
            self._bytes -= lost
            self._unsent_bytes -= lost
            self._dropped += 1

    @property
    def _is_over(self) -> bool:
        return len(self._sent) + len(self._unsent) > self._max_events or self._bytes > self._max_bytes
