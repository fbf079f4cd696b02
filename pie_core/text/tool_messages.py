"""How one template wants tool calls and tool results in its messages, found out by rendering a small conversation.

Templates agree on the keys (`tool_calls`, role "tool") and differ in two details: some write arguments that are an
object, some only what is JSON text already; and some look for calls only in messages without content.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pie_core.text.parts import CallPart, ResultPart, TextPart, Turn
from pie_core.text.templates import Message

_NAME, _KEY, _VALUE, _RESULT = "probe_tool", "probe_key", "probe_value", "probe_result"
PROBE_TOOL = {
    "type": "function",
    "function": {"name": _NAME, "description": "", "parameters": {"type": "object", "properties": {}}},
}
PROBE_CALL = CallPart(_NAME, json.dumps({_KEY: _VALUE}), "probe0001")
_PROBE_TURNS = [Turn.of("user", "Question"), Turn("assistant", (PROBE_CALL,))]
_PROBE_RESULT = Turn("tool", (ResultPart(_NAME, _RESULT, PROBE_CALL.id),))


@dataclass(frozen=True, slots=True)
class ToolMessages:
    """A way of putting turns into messages."""

    no_content: str | None = ""  # what stands for the text of a turn that is calls alone
    arguments_are_text: bool = False

    def message(self, turn: Turn) -> Message:
        for result in turn.results:
            named = {"name": result.name, "tool_call_id": result.id}
            return {"role": turn.role, "content": result.content} | named
        if not turn.calls:
            return {"role": turn.role, "content": turn.text}
        calls = [self._call(call) for call in turn.calls]
        return {"role": turn.role, "content": turn.text or self.no_content, "tool_calls": calls}

    def _call(self, call: CallPart) -> dict[str, Any]:
        arguments = call.arguments if self.arguments_are_text else json.loads(call.arguments)
        return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


_WAYS = [ToolMessages(nothing, as_text) for nothing in ("", None) for as_text in (False, True)]
Rendering = Callable[[list[Message]], str | None]  # None where the template refuses


def find_tool_messages(render: Rendering) -> ToolMessages | None:
    """The first way in which the template writes a call as JSON or in a form of its own; None if there is none."""
    return next((way for way in _WAYS if _writes_calls(render, way)), None)


def _writes_calls(render: Rendering, way: ToolMessages) -> bool:
    """Python's own spelling of an object, JSON inside a JSON string or the word None show that it is not meant so."""
    text = render([*map(way.message, _PROBE_TURNS)]) or ""
    wrong = [f"'{_KEY}'", f'\\"{_KEY}', *(["None"] if way.no_content is None else [])]
    is_named = _NAME in text or PROBE_CALL.id in text  # an id may hold the name
    return is_named and _KEY in text and _VALUE in text and not any(sign in text for sign in wrong)


def writes_results(render: Rendering, way: ToolMessages) -> bool:
    return _RESULT in (render([*map(way.message, [*_PROBE_TURNS, _PROBE_RESULT])]) or "")


def with_text(turn: Turn, text: str) -> Turn:
    """The same turn, whose last words are `text`: of its last call, of its result, or of all it says."""
    if turn.calls:
        last = turn.calls[-1]
        marked = CallPart(last.name, json.dumps({"text": text}, ensure_ascii=False), last.id)
        return Turn(turn.role, tuple(marked if part is last else part for part in turn.parts))
    for result in turn.results:
        return Turn(turn.role, (ResultPart(result.name, text, result.id),))
    return Turn(turn.role, (TextPart(text),))
