"""The order in which a decoder's events are handed out when one batch of tokens means several."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from wit_world.imports import chat as bindings


class EventQueue:
    """Hands out one event at a time; neighbouring deltas become one, and a final event overtakes all."""

    __slots__ = ("_events", "_final")

    def __init__(self, final: str | None) -> None:
        self._final = final
        self._events: deque[bindings.Event] = deque()

    def next(self, arrived: Iterable[bindings.Event]) -> bindings.Event | None:
        for event in arrived:
            if event.kind == self._final:
                self._events.clear()
                return event
            self._add(event)
        return self._events.popleft() if self._events else None

    def _add(self, event: bindings.Event) -> None:
        if event.kind == "delta" and not event.text:
            return
        last = self._events[-1] if self._events else None
        if last is not None and last.kind == event.kind == "delta":
            self._events[-1] = bindings.Event("delta", last.text + event.text, 0)
        else:
            self._events.append(event)

    def rest(self, arrived: Iterable[bindings.Event]) -> list[bindings.Event]:
        """All that is left, in order."""
        for event in arrived:
            self._add(event)
        left = list(self._events)
        self._events.clear()
        return left

    def clear(self) -> None:
        self._events.clear()
