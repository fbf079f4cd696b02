"""What stands after `--` -> the input of a program.

--max-tokens 5 --greedy -t 0.5 --name=pie some text
{"max_tokens": 5, "greedy": true, "t": 0.5, "name": "pie", "_positional": ["some", "text"]}

What an argument looks like decides its type, unless the program's manifest says that a parameter is text or a list.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pie_core.cli.outcomes import UsageProblem

POSITIONAL = "_positional"

_MAX_DIGITS = 300  # longer digit strings are identifiers, not numbers
_INT = re.compile(r"[-+]?\d+")
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_NAME = re.compile(r"--?([A-Za-z_][\w.-]*)(?:=(.*))?", re.DOTALL)


def program_input(
    given: str | None, arguments: Sequence[str], types: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The object of `--input` with the arguments laid over it; `types` are those of the program's parameters."""
    return {**_parsed_input(given), **trailing_arguments(arguments, types)}


def trailing_arguments(arguments: Sequence[str], types: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A name takes the next argument unless that is a name too; alone it is true. Repeated, it makes a list."""
    declared = types or {}
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            _add_positional(found, rest)
            break
        match = _NAME.fullmatch(argument)
        if match is None:
            _add_positional(found, [argument])
        else:
            key = match[1].replace("-", "_")
            _add(found, key, _value_of(match[2], rest, declared.get(key) == "string"))
    return {key: _as_declared(value, declared.get(key)) for key, value in found.items()}


def typed(text: str) -> int | float | bool | str:
    """A whole number, a number, true or false, or text, in this order."""
    if _INT.fullmatch(text) and len(text) <= _MAX_DIGITS:
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _value_of(attached: str | None, rest: list[str], is_text: bool) -> int | float | bool | str:
    if attached is None and rest and rest[0] != "--" and not _NAME.fullmatch(rest[0]):
        attached = rest.pop(0)
    if attached is None:
        return True
    return attached if is_text else typed(attached)


def _as_declared(value: object, kind: str | None) -> object:
    """A list of one item cannot be told from the item alone."""
    return [value] if kind == "list" and not isinstance(value, list) else value


def _add(found: dict[str, Any], key: str, value: object) -> None:
    if key not in found:
        found[key] = value
    elif isinstance(found[key], list):
        found[key].append(value)
    else:
        found[key] = [found[key], value]


def _add_positional(found: dict[str, Any], arguments: Sequence[str]) -> None:
    found.setdefault(POSITIONAL, []).extend(typed(argument) for argument in arguments)


def _parsed_input(given: str | None) -> dict[str, Any]:
    """JSON text, or @FILE that holds it."""
    if given is None:
        return {}
    text = _file_text(given[1:]) if given.startswith("@") else given
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UsageProblem(
            f'--input is not JSON: {error}; write it like --input \'{{"prompt": "Hello"}}\''
        ) from None
    if not isinstance(data, dict):
        raise UsageProblem(
            f"--input must be a JSON object, so that a program can look up its keys; found {text[:60]}"
        )
    return data


def _file_text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageProblem(f"--input @{name} cannot be read: {error}") from None
