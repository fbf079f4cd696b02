"""TOML text -> plain data and the line of every key, which the standard library's reader does not tell.

The data come from that reader; a second look over text that it has accepted finds where each key stands. Keys of
inline tables have the line of the table.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pie_core.config.document import Document
from pie_core.config.places import KeyPath, Place
from pie_core.errors import ConfigError

MAX_BYTES = 64 << 10

_SYNTAX_PLACE = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)
_SKIPPED = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)+")
_HEADER = re.compile(r"(\[\[?)((?:\"(?:\\.|[^\"\\])*\"|'[^']*'|[^\]\"'])*)\]\]?")
_KEY = re.compile(r"((?:\"(?:\\.|[^\"\\\n])*\"|'[^'\n]*'|[^=\"'\n])+)=")
# What may stand in a value: strings are whole, so that their brackets and line ends do not count.
_VALUE = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\])*"|\'[^\']*\'|#[^\n]*|[\[{]|[\]}]|\n|[^\n]',
    re.DOTALL,
)


def read_toml(file: Path) -> Document:
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    return decode_toml(raw, str(file))


def decode_toml(raw: bytes, source: str) -> Document:
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_BYTES} bytes; is this the right file?")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{source}:{line}: byte {error.start} is not UTF-8 text; is this a TOML file?"
        ) from None
    return parse_toml(text, source)


def parse_toml(text: str, source: str) -> Document:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_problem(error, source)) from None
    except (RecursionError, ValueError):  # ValueError: a whole number of thousands of digits
        raise ConfigError(f"{source}: nested too deeply, or a number is too long") from None
    place = Place(source, lines=_lines(text.replace("\r\n", "\n")))
    _require_json(data, place)
    return Document(data, place)


def _syntax_problem(error: tomllib.TOMLDecodeError, source: str) -> str:
    match = _SYNTAX_PLACE.fullmatch(str(error))
    if match is None:
        return f"{source}: not TOML: {error}"
    where = f"{source}:{match[2]}:{match[3]}" if match[2] else f"{source}, at its end"
    return f"{where}: not TOML: {match[1]}"


def _lines(text: str) -> dict[KeyPath, int]:
    lines: dict[KeyPath, int] = {(): 1}
    counts: Counter[KeyPath] = Counter()
    table: KeyPath = ()
    for is_header, key, is_item, line in _statements(text):
        path = key if is_header else (*table, *key)
        if is_item:
            counts[path] += 1
            path = (*path, counts[path] - 1)
        if is_header:
            table = path
        for end in range(1, len(path) + 1):
            lines.setdefault(path[:end], line)
    return lines


def _statements(text: str) -> Iterator[tuple[bool, KeyPath, bool, int]]:
    """Of each header and each `key =`: whether it is a header, its key, whether of [[…]], its line."""
    at = _after(_SKIPPED, text, 0)
    while at < len(text):
        line = text.count("\n", 0, at) + 1
        if header := _HEADER.match(text, at):
            yield True, _key(header[2]), header[1] == "[[", line
            at = header.end()
        elif key := _KEY.match(text, at):
            yield False, _key(key[1]), False, line
            at = _end_of_value(text, key.end())
        else:
            return  # text that the reader took and this look does not understand: the lines around it will do
        at = _after(_SKIPPED, text, at)


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def _key(text: str) -> KeyPath:
    """`a."b.c"` -> ("a", "b.c"), read by the reader of TOML itself."""
    data: Any = tomllib.loads(f"{text.strip()} = 0")
    path: KeyPath = ()
    while isinstance(data, dict):
        (name,) = data
        path, data = (*path, name), data[name]
    return path


def _end_of_value(text: str, at: int) -> int:
    depth = 0
    for part in _VALUE.finditer(text, at):
        depth += (part[0] in "[{") - (part[0] in "]}")
        if part[0] == "\n" and depth == 0:
            return part.start()
    return len(text)


def _require_json(value: object, place: Place) -> None:
    """Dates, times and numbers without a value have no place in what we read."""
    if isinstance(value, dict):
        for key, item in value.items():
            _require_json(item, place.at(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _require_json(item, place.at(index))
    elif isinstance(value, float) and not math.isfinite(value):
        raise place.error(f"expected a finite number, but found {value}")
    elif not isinstance(value, bool | int | float | str):
        raise place.error(f"expected text, a number, a list or a table, but found the date or time {value}")
