"""The reasoning blocks of models that think before they answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from wit_world.imports import chat as bindings

from inferlet.decoding import EventQueue
from inferlet.host import call
from inferlet.model import Model


class Event:
    """What a batch of tokens meant; match on these classes."""

    @dataclass(frozen=True, slots=True)
    class Idle:
        """Nothing of a reasoning block."""

    @dataclass(frozen=True, slots=True)
    class Start:
        """A block begins."""

    @dataclass(frozen=True, slots=True)
    class Delta:
        """More reasoning text."""

        text: str

    @dataclass(frozen=True, slots=True)
    class End:
        """The block ended; all of its text."""

        text: str


AnyEvent = Event.Idle | Event.Start | Event.Delta | Event.End


class Decoder:
    """Turns generated tokens into reasoning text, whatever borders the batches have."""

    __slots__ = ("_handle", "_queue")

    def __init__(self, model: Model) -> None:
        self._handle = call(bindings.Decoder.create, model._handle, "reasoning")
        self._queue = EventQueue(final="complete")

    def feed(self, tokens: Iterable[int]) -> AnyEvent:
        """One event for this batch; with several, the others come with the next batches, the end at once."""
        event = self._queue.next(call(self._handle.feed, list(tokens)))
        return Event.Idle() if event is None else _event(event)

    def finish(self) -> list[AnyEvent]:
        """Everything that is left when no more tokens come; a block that was cut off ends as it is."""
        return [_event(event) for event in self._queue.rest(self._handle.finish())]

    def reset(self) -> None:
        self._handle.reset()
        self._queue.clear()


def _event(event: bindings.Event) -> AnyEvent:
    if event.kind == "start":
        return Event.Start()
    return Event.End(event.text) if event.kind == "complete" else Event.Delta(event.text)
