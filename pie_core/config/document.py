"""YAML text -> plain data and the line of every key.

Stricter than YAML asks for: one document, no duplicate keys, no tags, text keys only, `yes` and `on` are
text, numbers are decimal or 0x, and size, depth and alias expansion are bounded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pie_core.config.places import KeyPath, Place
from pie_core.errors import ConfigError

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 64

_TAG = "tag:yaml.org,2002:"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class _Loader(yaml.SafeLoader):
    """A SafeLoader that knows the scalars of JSON and nothing else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own shape)


_SCALARS = {
    "null": re.compile(r"(~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"([-+]?[0-9]+|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(rf"({_NUMBER.pattern}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"),
    "merge": re.compile(r"<<\Z"),
}
for _name, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, [None])


@dataclass(frozen=True, slots=True)
class Document:
    data: JsonValue
    place: Place


def read_document(file: Path) -> Document:
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"{file}: larger than {MAX_BYTES} bytes: no configuration is; is this the right file?"
        )
    return parse_document(_decode(raw, str(file)), str(file))


def parse_document(text: str, source: str) -> Document:
    node = compose(text, source)
    if node is None:
        return Document({}, Place(source))
    reader = _Reader(source)
    data = reader.value(node, ())
    return Document({} if data is None else data, Place(source, lines=reader.lines))


def compose(text: str, source: str) -> yaml.Node | None:
    """The node tree of `text`, which remembers where each value is written; None for an empty file."""
    try:
        return _Loader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"{source}: character {error.position} is not text; is this a YAML file?"
        ) from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_problem(error, source)) from error
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply; at most {MAX_DEPTH} levels are allowed") from None
    except (ValueError, OverflowError) as error:  # PyYAML lets chr() fail on "\UFFFFFFFF"
        raise ConfigError(f"{source}: not YAML: {error}") from error


def _decode(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{source}:{line}: byte {error.start} is not UTF-8 text; is this a YAML file?"
        ) from error


def _syntax_problem(error: yaml.MarkedYAMLError, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = source if mark is None else f"{source}:{mark.line + 1}:{mark.column + 1}"
    if error.context == "expected a single document in the stream":
        return f"{place}: a second document begins here; a configuration is one document, so remove the `---`"
    context = f" ({error.context})" if error.context else ""
    return f"{place}: not YAML: {error.problem}{context}"


@dataclass(slots=True)
class _Reader:
    """Turns nodes into data, noting lines and refusing what a configuration must not hold."""

    source: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    open_nodes: set[int] = field(default_factory=set)  # the mappings and lists around the current value
    values: int = 0

    def value(self, node: yaml.Node, path: KeyPath) -> JsonValue:
        self.lines.setdefault(path, node.start_mark.line + 1)
        self._count(node, path)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self.open_nodes.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            return self._sequence(node, path)
        finally:
            self.open_nodes.discard(id(node))

    def _place(self, path: KeyPath) -> Place:
        return Place(self.source, path, self.lines)

    def _count(self, node: yaml.Node, path: KeyPath) -> None:
        self.values += 1
        if id(node) in self.open_nodes:
            raise self._place(path).error(
                f"this alias stands within what it repeats, which begins in line {node.start_mark.line + 1}"
            )
        if self.values > MAX_VALUES:
            raise self._place(path).error(f"more than {MAX_VALUES} values once aliases are expanded")
        if len(self.open_nodes) >= MAX_DEPTH:
            raise self._place(path).error(f"nested too deeply; at most {MAX_DEPTH} levels are allowed")

    def _sequence(self, node: yaml.Node, path: KeyPath) -> JsonValue:
        self._require_tag(node, path, "seq")
        return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> JsonValue:
        self._require_tag(node, path, "map")
        own: dict[str, JsonValue] = {}
        merged: dict[str, JsonValue] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged = self._merge(value_node, path) | merged
            else:
                key = self._key(key_node, path, own)
                self.lines[(*path, key)] = key_node.start_mark.line + 1
                own[key] = self.value(value_node, (*path, key))
        return merged | own

    def _merge(self, node: yaml.Node, path: KeyPath) -> dict[str, JsonValue]:
        bases = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, JsonValue] = {}
        for base in bases:
            data = self.value(base, path)
            if not isinstance(data, dict):
                seen = base.value if isinstance(base, yaml.ScalarNode) else "a list"
                raise self._place(path).error(f"`<<` merges mappings, and this is {seen}")
            merged = data | merged
        return merged

    def _key(self, node: yaml.Node, path: KeyPath, taken: dict[str, JsonValue]) -> str:
        line = node.start_mark.line + 1
        place = Place(self.source, path, {path: line})
        if not isinstance(node, yaml.ScalarNode) or node.tag != _TAG + "str":
            seen = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            raise place.error(
                f"a key must be text, and this is {seen}; put it in quotes if it is meant as text"
            )
        if node.value in taken:
            first = self.lines[(*path, node.value)]
            raise place.error(
                f"the key `{node.value}` stands here a second time (first in line {first}); remove one"
            )
        return str(node.value)

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> JsonValue:
        kind = node.tag.removeprefix(_TAG)
        if kind in _SCALARS and not _SCALARS[kind].match(node.value):
            raise self._place(path).error(
                f"the tag `{node.tag}` does not fit `{node.value}`; leave the tag out"
            )
        if kind == "null":
            return None
        if kind == "bool":
            return bool(node.value.lower() == "true")
        if kind == "int":
            return self._integer(node.value, path)
        if kind == "float":
            return self._float(node.value, path)
        self._require_tag(node, path, "str")
        return str(node.value)

    def _integer(self, text: str, path: KeyPath) -> int:
        if len(text) > 40:
            raise self._place(path).error(
                f"this number is too long ({len(text)} characters); put it in quotes if it is meant as text"
            )
        return int(text, 16) if text.startswith("0x") else int(text)

    def _float(self, text: str, path: KeyPath) -> float:
        number = float(text) if _NUMBER.fullmatch(text) else math.inf
        if not math.isfinite(number):
            raise self._place(path).error(f"expected a finite number, but found {text}")
        return number

    def _require_tag(self, node: yaml.Node, path: KeyPath, kind: str) -> None:
        if node.tag != _TAG + kind:
            raise self._place(path).error(
                f"the tag `{node.tag}` is not supported; write the value without it"
            )
