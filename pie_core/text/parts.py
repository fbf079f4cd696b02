"""What turns consist of: text, tool calls and tool results; images, audio and video will be parts beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from pie_core.errors import InvalidRequest

ROLES = ("system", "user", "assistant")  # whose turns hold text


class TextPart(msgspec.Struct, frozen=True, tag="text"):
    text: str


class CallPart(msgspec.Struct, frozen=True, tag="call"):
    """The assistant calls a tool; `arguments` is a JSON object."""

    name: str
    arguments: str
    id: str

    @classmethod
    def checked(cls, name: str, arguments: str, id_: str) -> CallPart:
        value = read_json_part("the arguments of a tool call", arguments)
        if not name or not isinstance(value, dict):
            raise InvalidRequest(
                f"tool call {name!r} with arguments {arguments[:80]!r}: expected a name and a JSON object"
            )
        return cls(name, arguments, id_)


class ResultPart(msgspec.Struct, frozen=True, tag="result"):
    """What a tool answered to the call of this id."""

    name: str
    content: str
    id: str


Part = TextPart | CallPart | ResultPart


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says: a role and its parts. A tool's turn is one result."""

    role: str
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, role: str, text: str) -> Turn:
        return cls(role, (TextPart(text),))

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything in it that somebody wrote."""
        return (self.text, *(call.arguments for call in self.calls), *(each.content for each in self.results))

    @property
    def calls(self) -> tuple[CallPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, CallPart))

    @property
    def results(self) -> tuple[ResultPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ResultPart))


def read_tools(text: str) -> list[dict[str, Any]]:
    """Descriptions of tools, {"name", "description", "parameters"}, as templates want them: each in a "function"."""
    tools = read_json_part("a description of tools", text)
    if not isinstance(tools, list):
        raise InvalidRequest(f"a description of tools is {text[:80]!r}; expected a JSON list of functions")
    return [_function(tool) for tool in tools]


def _function(tool: Any) -> dict[str, Any]:
    wrapped = (
        tool if isinstance(tool, dict) and "function" in tool else {"type": "function", "function": tool}
    )
    function = wrapped["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidRequest(
            f"the tool {json.dumps(tool)[:80]} has no name; expected an object with name, description and parameters"
        )
    described = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return wrapped | {"type": "function", "function": {"name": function["name"]} | described | function}


def read_json_part(what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} is no JSON: {text[:80]!r}: {error}") from error
