"""Tool calls in a model's own format, as they come. Describing tools to a model is not in this version yet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from wit_world.imports import chat as bindings

from inferlet.decoding import EventQueue
from inferlet.errors import not_in_this_version
from inferlet.host import call
from inferlet.model import Model


class Event:
    """What a batch of tokens meant; match on these classes."""

    @dataclass(frozen=True, slots=True)
    class Idle:
        """Nothing of a tool call."""

    @dataclass(frozen=True, slots=True)
    class Start:
        """A tool call begins, or a list of them."""

    @dataclass(frozen=True, slots=True)
    class Call:
        """A whole tool call; the arguments are a JSON object."""

        name: str
        arguments: str

    @dataclass(frozen=True, slots=True)
    class Invalid:
        """What began like a tool call and is none: malformed, or cut off by the turn's end."""

        text: str


AnyEvent = Event.Idle | Event.Start | Event.Call | Event.Invalid


class Decoder:
    """Finds tool calls in generated tokens, whatever borders the batches have; a stop token ends an open one."""

    __slots__ = ("_handle", "_queue")

    def __init__(self, model: Model) -> None:
        self._handle = call(bindings.Decoder.create, model._handle, "tools")
        self._queue = EventQueue(final=None)

    def feed(self, tokens: Iterable[int]) -> AnyEvent:
        """One event for this batch; with several, the others come with the next batches, also empty ones."""
        event = self._queue.next(call(self._handle.feed, list(tokens)))
        if event is None:
            return Event.Idle()
        if event.kind == "start":
            return Event.Start()
        return Event.Invalid(event.text) if event.kind == "invalid" else _call(event.text)

    def reset(self) -> None:
        self._handle.reset()
        self._queue.clear()


def _call(text: str) -> Event.Call:
    value = json.loads(text)
    return Event.Call(value["name"], json.dumps(value["arguments"], ensure_ascii=False))


def equip_prefix(model: Model, tools: Sequence[str | dict[str, Any]]) -> NoReturn:
    raise not_in_this_version("tools.equip_prefix")


def answer_prefix(model: Model, name: str, value: Any) -> NoReturn:
    raise not_in_this_version("tools.answer_prefix")


def native_matcher(model: Model, tools: Sequence[str | dict[str, Any]]) -> NoReturn:
    raise not_in_this_version("tools.native_matcher")
