"""Chat conventions of the checkpoint: its template's tokens, and a decoder of what the model writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from wit_world.imports import chat as bindings

from inferlet.decoding import EventQueue
from inferlet.host import call
from inferlet.model import Model


def system(model: Model, message: str) -> list[int]:
    """Tokens of a system turn on its own."""
    return _turn(model, "system", message)


def user(model: Model, message: str) -> list[int]:
    """Tokens of a user's turn on its own."""
    return _turn(model, "user", message)


def assistant(model: Model, message: str) -> list[int]:
    """Tokens of an assistant's turn on its own."""
    return _turn(model, "assistant", message)


def cue(model: Model) -> list[int]:
    """Tokens that open the assistant's turn."""
    return _turn(model, "cue", "")


def seal(model: Model) -> list[int]:
    """Tokens that end the assistant's turn."""
    return _turn(model, "seal", "")


def _turn(model: Model, role: str, text: str) -> list[int]:
    return list(call(bindings.turn_tokens, model._handle, role, text))


def stop_tokens(model: Model) -> list[int]:
    """Token ids that end an assistant's turn."""
    return list(bindings.stop_tokens(model._handle))


class Event:
    """What a batch of tokens meant; match on these classes."""

    @dataclass(frozen=True, slots=True)
    class Idle:
        """Nothing to show yet."""

    @dataclass(frozen=True, slots=True)
    class Delta:
        """More visible text."""

        text: str

    @dataclass(frozen=True, slots=True)
    class Done:
        """The turn ended; all of its text."""

        text: str

    @dataclass(frozen=True, slots=True)
    class Interrupt:
        """A special token that is not text."""

        token: int


AnyEvent = Event.Idle | Event.Delta | Event.Done | Event.Interrupt


class Decoder:
    """Turns generated tokens into visible text, whatever borders the batches have."""

    __slots__ = ("_handle", "_queue")

    def __init__(self, model: Model) -> None:
        self._handle = call(bindings.Decoder.create, model._handle, "chat")
        self._queue = EventQueue(final="done")

    def feed(self, tokens: Iterable[int]) -> AnyEvent:
        """One event for this batch; with several, the others come with the next batches, the end at once."""
        event = self._queue.next(self.events(tokens))
        return Event.Idle() if event is None else _event(event)

    def events(self, tokens: Iterable[int]) -> list[bindings.Event]:
        """Everything that this batch meant, as the host reports it."""
        return call(self._handle.feed, list(tokens))

    def finish(self) -> list[AnyEvent]:
        """Everything that is left when no more tokens come; the last event is Done, with all of the turn's text."""
        return [_event(event) for event in self._queue.rest(self.unfinished_events())]

    def unfinished_events(self) -> list[bindings.Event]:
        """What ends a turn that was cut off, as the host reports it."""
        return self._handle.finish()

    def reset(self) -> None:
        self._handle.reset()
        self._queue.clear()


def _event(event: bindings.Event) -> AnyEvent:
    if event.kind == "interrupt":
        return Event.Interrupt(event.token)
    return Event.Done(event.text) if event.kind == "done" else Event.Delta(event.text)
