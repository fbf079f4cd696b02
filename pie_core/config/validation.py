"""Plain data -> a frozen dataclass, by its annotations; every misfit told with its place and what to write.

A class to be read this way is a dataclass whose fields are annotated with their type and, through
`Annotated[..., Field(...)]` of pydantic, with their bounds and their help. Fields that hang together are
checked in `__post_init__`, which raises `Misfit`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pie_core.config.annotations import expected, is_section, item_type, key_paths, keys_of, type_at
from pie_core.config.places import KeyPath, Place, dotted
from pie_core.errors import ConfigError
from pie_core.naming import nearest

T = TypeVar("T")


class Misfit(ValueError):
    """Raised by a section whose fields do not go together; `path` is the culprit, seen from the section."""

    def __init__(self, problem: str, *path: str | int) -> None:
        super().__init__(problem)
        self.path = path


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def parse(cls: type[T], data: object, place: Place) -> T:
    """`data` as a `cls`, or a ConfigError with one line for each thing that is wrong."""
    section: Any = cls  # type[T] itself is not Hashable to mypy
    try:
        # JSON, because only there pydantic's strict mode makes dataclasses of objects and tuples of arrays.
        parsed: T = _adapter(section).validate_json(json.dumps(data), strict=True, extra="forbid")
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(cls, data, error, place))) from None
    return parsed


def _problems(cls: type[Any], data: object, error: ValidationError, place: Place) -> list[str]:
    """One line for each place, in the order of the file; a union's several complaints count as one."""
    lines: dict[str, int] = {}
    for details in _independent(error):
        culprit, problem = _problem(cls, data, details)
        lines.setdefault(str(place.at(*culprit).error(problem)), place.at(*culprit).line or 0)
    return sorted(lines, key=lambda text: lines[text])


def _independent(error: ValidationError) -> Iterator[dict[str, Any]]:
    """Without the complaint that a list is too short when only its items are wrong."""
    found: list[dict[str, Any]] = [dict(details) for details in error.errors(include_url=False)]
    for details in found:
        place = details["loc"]
        inner = any(other["loc"][: len(place)] == place for other in found if other is not details)
        if details["type"] != "too_short" or not inner:
            yield details


def _problem(cls: type[Any], data: object, details: dict[str, Any]) -> tuple[KeyPath, str]:
    location: KeyPath = details["loc"]
    path, seen = _locate(data, location)
    match details["type"]:
        case "value_error":
            cause = details["ctx"]["error"]
            return (*path, *getattr(cause, "path", ())), str(cause)
        case "extra_forbidden" | "unexpected_keyword_argument":
            return path, _unknown_key(cls, path)
        case "missing" | "missing_argument":
            return path, f"the key `{location[-1]}` is missing: expected {expected(type_at(cls, location))}"
    wanted = type_at(cls, path)
    return path, f"expected {expected(wanted)}, but found {_shown(seen)}{_hint(wanted, seen)}"


def _locate(data: object, location: KeyPath) -> tuple[KeyPath, object]:
    """The longest part of `location` that exists in `data` (pydantic appends names of union arms), and the value."""
    path: KeyPath = ()
    for key in location:
        try:
            data = data[key]  # type: ignore[index]  # a wrong container answers with one of these errors
        except (TypeError, KeyError, IndexError):
            break
        path = (*path, key)
    return path, data


def _unknown_key(cls: type[Any], path: KeyPath) -> str:
    key = str(path[-1])
    section = type_at(cls, path[:-1])
    known = sorted(keys_of(section))
    guess = nearest(key, known)
    if guess is None:
        elsewhere = [dotted(other) for other in key_paths(cls) if other[-1] == key]
        guess = elsewhere[0] if elsewhere else None
    question = f"; did you mean `{guess}`?" if guess else "."
    return f"unknown key{question} Known here: {', '.join(known) if known else 'no keys'}"


def _shown(seen: object) -> str:
    if isinstance(seen, dict):
        return f"a section with the keys {', '.join(seen)}" if seen else "an empty section"
    if isinstance(seen, list):
        return f"a list of {len(seen)}" if seen else "an empty list"
    text = json.dumps(seen, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hint(wanted: object, seen: object) -> str:
    if isinstance(seen, str) and expected(wanted).startswith(("a number", "a whole number", "true or false")):
        return " (remove the quotes)" if _reads_as_scalar(seen) else ""
    if isinstance(seen, bool | int | float) and expected(wanted).startswith("text"):
        return " (put it in quotes)"
    return " (begin each item with `- `)" if isinstance(seen, dict) and "a list" in expected(wanted) else ""


def _reads_as_scalar(text: str) -> bool:
    try:
        return isinstance(json.loads(text), bool | int | float)
    except ValueError:
        return False


def without_empty_headings(hint: object, data: object) -> object:
    """A heading with nothing below it (`server:`) reads as null in YAML; it means the section's defaults."""
    if isinstance(data, list):
        return [without_empty_headings(item_type(hint), item) for item in data]
    if not isinstance(data, dict) or not is_section(hint):
        return data
    typed = [(key, type_at(hint, (key,)), value) for key, value in data.items()]
    return {
        key: without_empty_headings(inner, value)
        for key, inner, value in typed
        if value is not None or not is_section(inner)
    }
