"""Tools: what describes them to a model, the calls that it writes, and the answers, in the model's own format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
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
        """A whole tool call; the arguments are a JSON object. The id is empty where the model wrote none."""

        name: str
        arguments: str
        id: str = ""

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
        return Event.Idle() if event is None else _event(event)

    def finish(self) -> list[AnyEvent]:
        """Everything that is left when no more tokens come: a call that was cut off is one if it is whole."""
        return [_event(event) for event in self._queue.rest(self._handle.finish())]

    def reset(self) -> None:
        self._handle.reset()
        self._queue.clear()


def _event(event: bindings.Event) -> AnyEvent:
    if event.kind == "start":
        return Event.Start()
    return Event.Invalid(event.text) if event.kind == "invalid" else _call(event.text)


def _call(text: str) -> Event.Call:
    value = json.loads(text)
    arguments = json.dumps(value["arguments"], ensure_ascii=False)
    return Event.Call(value["name"], arguments, value.get("id", ""))


Description = str | Mapping[str, Any]  # a function's name, description and parameters, or these as JSON


def descriptions(tools: Sequence[Description]) -> str:
    """A JSON list."""
    return json.dumps([json.loads(tool) if isinstance(tool, str) else tool for tool in tools])


def result_text(value: Any) -> str:
    """What a tool answered, as text: JSON, unless it is text already."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def equip_prefix(model: Model, tools: Sequence[Description]) -> list[int]:
    """Tokens that describe tools at the beginning of a conversation; `Context.equip` works for every template."""
    return list(call(bindings.tool_tokens, model._handle, descriptions(tools)))


def answer_prefix(model: Model, name: str, value: Any) -> list[int]:
    """Tokens of a tool's answer on its own, behind a turn that called it; `Context.tool_result` knows which call."""
    return list(call(bindings.result_tokens, model._handle, name, result_text(value)))


def native_matcher(model: Model, tools: Sequence[str | dict[str, Any]]) -> NoReturn:
    raise not_in_this_version("tools.native_matcher")
