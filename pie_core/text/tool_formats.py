"""How families of models write tool calls: the markers around one, and how what stands between is read.

A reader gets the text behind the opening marker and whether the closing one was there. It raises ValueError for
text that is no complete call. Where a family writes values without types (XML style, GLM), a value that is JSON
counts as that, anything else as text: "5" is the number. Templates of the XML style write True, False and None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_JSON_QUOTES = r"\\.|\""
_NUMBERED_NAME = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?")
_BRACKET = re.compile(r"\s*[\[{]")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call as the model wrote it; the arguments are a JSON object."""

    name: str
    arguments: dict[str, Any]
    id: str = ""  # where the family writes one

    @classmethod
    def of(cls, name: object, arguments: object, id_: object = "") -> ToolCall:
        """Arguments may be missing, or themselves be written as a JSON string."""
        if isinstance(arguments, str):
            arguments = _json(arguments)
        if arguments is None:
            arguments = {}
        if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
            raise ValueError(f"a call is a name and an object of arguments, not {name!r} and {arguments!r}")
        return cls(name.strip(), arguments, id_.strip() if isinstance(id_, str) else "")

    def to_json(self) -> str:
        value = {"name": self.name, "arguments": self.arguments} | ({"id": self.id} if self.id else {})
        text = json.dumps(value, ensure_ascii=False)
        # A lone surrogate has no UTF-8 form: then everything beyond ASCII is escaped.
        return text if text.encode("utf-8", "replace").decode() == text else json.dumps(value)


Reader = Callable[[str, bool], list[ToolCall]]


@dataclass(frozen=True, slots=True)
class ToolMarkers:
    """One way of writing calls. Markers inside quotes are text; a call without closing marker ends with its turn."""

    opening: str
    closing: str | None
    read: Reader
    quotes: str = (
        _JSON_QUOTES  # a regular expression of what begins or ends quoted text, and of what is escaped
    )
    quotes_in_json_only: bool = False  # the text is JSON or something else, as its first character says
    only_first: bool = False  # only as the very beginning of a turn


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """What one family writes; `signs` show it in a template or among the tokens."""

    name: str
    signs: tuple[str, ...]
    markers: tuple[ToolMarkers, ...]
    section: str = ""  # what opens a list of calls
    has_numbered_ids: bool = False  # "functions.name:0" and so on through a conversation

    @property
    def call_ends(self) -> tuple[str, ...]:
        return tuple(markers.closing for markers in self.markers if markers.closing is not None)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _json(text: str) -> Any:
    return _JSON.decode(text)


def _json_values(text: str) -> Iterator[Any]:
    """JSON values one behind the other, with white space, commas or semicolons between."""
    place = _skip(text, 0)
    while place < len(text):
        value, place = _JSON.raw_decode(text, place)
        yield value
        place = _skip(text, place)


def _skip(text: str, place: int) -> int:
    while place < len(text) and (text[place].isspace() or text[place] in ",;"):
        place += 1
    return place


def _typed(text: str) -> Any:
    """A value written without its type."""
    try:
        value = _json(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value


_PYTHON_VALUES = {"True": True, "False": False, "None": None}


def _python_typed(text: str) -> Any:
    """The same where the family's template writes values as Python does."""
    return _PYTHON_VALUES[text] if text in _PYTHON_VALUES else _typed(text)


def read_json_calls(text: str, closed: bool) -> list[ToolCall]:
    """{"name": …, "arguments": {…}} or with "parameters", also several or a list of them."""
    values = list(_json_values(text))
    listed = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [_json_call(value) for value in listed]


def _json_call(value: Any) -> ToolCall:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    keys = [key for key in ("arguments", "parameters") if isinstance(value, dict) and key in value]
    if not keys:
        raise ValueError(f"a call is an object with a name and arguments, not {value!r}")
    return ToolCall.of(value.get("name"), value[keys[0]], value.get("id"))


def read_tagged_call(text: str, closed: bool) -> list[ToolCall]:
    """Between <tool_call> and </tool_call>: JSON, <function=…>, or a name with <arg_key> and <arg_value>."""
    if _BRACKET.match(text):
        return read_json_calls(text, closed)
    if "<function=" in text:
        return _read_functions(text)
    return _read_argument_pairs(text, closed)


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>\s*", re.DOTALL)
_PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
_INVOKE = re.compile(r'\s*([^"\n]+)">(.*)', re.DOTALL)
_INVOKE_PARAMETER = re.compile(
    r'\s*<｜DSML｜parameter name="([^"\n]+)"(?: string="(true|false)")?>(.*?)</｜DSML｜parameter>\s*',
    re.DOTALL,
)


def _all(pattern: re.Pattern[str], text: str) -> list[tuple[str, ...]]:
    """What the groups found in `text`, which must be nothing but repetitions of the pattern."""
    found, place = [], 0
    while place < len(text):
        match = pattern.match(text, place)
        if match is None:
            raise ValueError(f"unexpected text at character {place}")
        found.append(tuple(group or "" for group in match.groups()))
        place = match.end()
    return found


def _read_functions(text: str) -> list[ToolCall]:
    return [
        ToolCall.of(
            name,
            {
                key.strip(): _python_typed(_without_frame(value))
                for key, value in _all(_PARAMETER, body.strip())
            },
        )
        for name, body in _all(_FUNCTION, text)
    ]


def _without_frame(value: str) -> str:
    """The template puts each value on lines of its own."""
    return value.removeprefix("\n").removesuffix("\n")


def read_function(text: str, closed: bool) -> list[ToolCall]:
    """A <function=…> without <tool_call> around it."""
    return _read_functions(f"<function={text}</function>" if closed else f"<function={text}")


def _read_argument_pairs(text: str, closed: bool) -> list[ToolCall]:
    if not closed:
        raise ValueError(f"no end behind {text!r}: more arguments may have been meant")
    name, key, rest = text.partition("<arg_key>")
    return [ToolCall.of(name, {key.strip(): _typed(value) for key, value in _all(_PAIR, key + rest)})]


def read_separated_call(text: str, closed: bool) -> list[ToolCall]:
    """name<｜tool▁sep｜>{…}, or in older checkpoints function<｜tool▁sep｜>name and the JSON in a fence."""
    head, separator, tail = text.partition("<｜tool▁sep｜>")
    if not separator:
        raise ValueError(f"no <｜tool▁sep｜> in {text!r}")
    if _BRACKET.match(tail):
        return [ToolCall.of(head, _json(tail))]
    name, _, fenced = tail.partition("\n")
    body = fenced.strip().removeprefix("```json").removesuffix("```")
    return [ToolCall.of(name, _json(body))]


def read_invocation(text: str, closed: bool) -> list[ToolCall]:
    """name="…"> and parameters that say whether they are text."""
    match = _INVOKE.fullmatch(text)
    if match is None or not closed:
        raise ValueError(f"expected a name, '\">' and an end: {text!r}")
    found = _all(_INVOKE_PARAMETER, match[2].strip())
    arguments = {key: value if kind == "true" else _typed(value) for key, kind, value in found}
    return [ToolCall.of(match[1], arguments)]


def read_numbered_call(text: str, closed: bool) -> list[ToolCall]:
    """functions.name:0<|tool_call_argument_begin|>{…}."""
    head, separator, arguments = text.partition("<|tool_call_argument_begin|>")
    name = _NUMBERED_NAME.fullmatch(head.strip())
    if not separator or name is None:
        raise ValueError(f"expected functions.NAME:NUMBER<|tool_call_argument_begin|> and JSON, not {text!r}")
    return [ToolCall.of(name[1], _json(arguments), head)]


def read_named_calls(text: str, closed: bool) -> list[ToolCall]:
    """[{…}] as JSON, or name[ARGS]{…} with [CALL_ID] perhaps."""
    if _BRACKET.match(text) and not text.lstrip().startswith("[ARGS]"):
        return read_json_calls(text, closed)
    head, separator, arguments = text.partition("[ARGS]")
    if not separator:
        name, brace, rest = text.partition("{")
        head, arguments = name, brace + rest
    name, _, id_ = head.partition("[CALL_ID]")
    return [ToolCall.of(name, _json(arguments), id_)]


_PYTHON_CALL = re.compile(r"\s*([\w.]+?)(?:\.call)?\((.*)\)\s*", re.DOTALL)
_KEYWORD = re.compile(r"\s*(\w+)\s*=\s*")


def read_python_call(text: str, closed: bool) -> list[ToolCall]:
    """JSON, or name.call(key="value", …)."""
    if _BRACKET.match(text):
        return read_json_calls(text, closed)
    match = _PYTHON_CALL.fullmatch(text)
    if match is None:
        raise ValueError(f"expected JSON or NAME.call(...), not {text!r}")
    arguments, place, inner = {}, 0, match[2]
    while place < len(inner):
        keyword = _KEYWORD.match(inner, place)
        if keyword is None:
            raise ValueError(f"expected KEYWORD=VALUE, not {inner[place:]!r}")
        arguments[keyword[1]], place = _JSON.raw_decode(inner, keyword.end())
        place = _skip(inner, place)
    return [ToolCall.of(match[1], arguments)]


def read_first_object(text: str, closed: bool) -> list[ToolCall]:
    """A turn that is nothing but a JSON call; the marker was its beginning."""
    return read_json_calls('{"name"' + text, closed)


class _Braced:
    """call:name{key:value,…} where `quote` stands around texts and keys may go without quotes."""

    def __init__(self, quote: str) -> None:
        self._quote = quote
        self._plain = re.compile(rf"(?:(?!{re.escape(quote)})[^,:{{}}\[\]])+")

    def read(self, text: str, closed: bool) -> list[ToolCall]:
        name, brace, rest = text.strip().removeprefix("call:").partition("{")
        arguments, place = self._object("{" + rest, 1) if brace else ({}, -1)
        if not brace or rest[place - 1 :].strip():
            raise ValueError(f"expected NAME{{...}} and nothing behind it, not {text!r}")
        return [ToolCall.of(name, arguments)]

    def _object(self, text: str, place: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        while text[place : place + 1] != "}":
            key, place = self._text(text, place)
            if text[place : place + 1] != ":":
                raise ValueError(f"no colon behind the key {key!r}")
            found[key], place = self._value(text, place + 1)
            place = self._next(text, place, "}")
        return found, place + 1

    def _list(self, text: str, place: int) -> tuple[list[Any], int]:
        found: list[Any] = []
        while text[place : place + 1] != "]":
            value, place = self._value(text, place)
            found.append(value)
            place = self._next(text, place, "]")
        return found, place + 1

    def _next(self, text: str, place: int, end: str) -> int:
        if text[place : place + 1] == ",":
            return place + 1
        if text[place : place + 1] != end:
            raise ValueError(f"expected a comma or {end}")
        return place

    def _value(self, text: str, place: int) -> tuple[Any, int]:
        if text.startswith("{", place):
            return self._object(text, place + 1)
        if text.startswith("[", place):
            return self._list(text, place + 1)
        value, end = self._text(text, place)
        return (value if text.startswith(self._quote, place) else _python_typed(value)), end

    def _text(self, text: str, place: int) -> tuple[str, int]:
        if text.startswith(self._quote, place):
            start = place + len(self._quote)
            end = text.find(self._quote, start)
            if end < 0:
                raise ValueError(f"no {self._quote} ends the text {text[start:]!r}")
            return text[start:end], end + len(self._quote)
        match = self._plain.match(text, place)
        if match is None:
            raise ValueError(f"expected a key or a value, not {text[place:]!r}")
        return match[0].strip(), match.end()


def _braced(opening: str, closing: str, quote: str) -> ToolMarkers:
    return ToolMarkers(opening, closing, _Braced(quote).read, quotes=re.escape(quote))


_NOTHING_QUOTED = r"(?!)"

# In the order in which they are looked for: what is said more clearly comes first.
TOOL_FORMATS = (
    ToolFormat(
        "DSML",
        ("｜DSML｜",),
        (
            ToolMarkers(
                '<｜DSML｜invoke name="', "</｜DSML｜invoke>", read_invocation, quotes=_NOTHING_QUOTED
            ),
        ),
        section="<｜DSML｜function_calls>",
    ),
    ToolFormat(
        "DeepSeek",
        ("<｜tool▁call▁begin｜>",),
        (ToolMarkers("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", read_separated_call),),
        section="<｜tool▁calls▁begin｜>",
    ),
    ToolFormat(
        "Kimi",
        ("<|tool_call_begin|>",),
        (ToolMarkers("<|tool_call_begin|>", "<|tool_call_end|>", read_numbered_call),),
        section="<|tool_calls_section_begin|>",
        has_numbered_ids=True,
    ),
    ToolFormat("Gemma", ("<|tool_call>",), (_braced("<|tool_call>", "<tool_call|>", '<|"|>'),)),
    ToolFormat(
        "function_call",
        ("<start_function_call>",),
        (_braced("<start_function_call>", "<end_function_call>", "<escape>"),),
    ),
    ToolFormat("TOOLCALL", ("<TOOLCALL>",), (ToolMarkers("<TOOLCALL>", "</TOOLCALL>", read_json_calls),)),
    ToolFormat("Mistral", ("[TOOL_CALLS]",), (ToolMarkers("[TOOL_CALLS]", None, read_named_calls),)),
    ToolFormat(
        "tool_call",
        ("<tool_call>",),
        (
            ToolMarkers("<tool_call>", "</tool_call>", read_tagged_call, quotes_in_json_only=True),
            ToolMarkers("<function=", "</function>", read_function, quotes=_NOTHING_QUOTED),
        ),
    ),
    ToolFormat(
        "Llama",
        ("<|python_tag|>",),
        (
            ToolMarkers("<|python_tag|>", None, read_python_call),
            ToolMarkers('{"name"', None, read_first_object, only_first=True),
        ),
    ),
)
