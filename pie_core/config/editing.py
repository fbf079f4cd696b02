"""Changing one key of a configuration file in its text, so that comments and order stay as they are."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

import yaml

from pie_core.config.annotations import expected, type_at
from pie_core.config.document import JsonValue, compose, parse_document
from pie_core.config.loading import parse_config
from pie_core.config.places import KeyPath, dotted
from pie_core.config.tree import Config
from pie_core.errors import ConfigError

_KEY = re.compile(r"[^.\[\]\s]+(\.[^.\[\]\s]+|\[\d+\])*")
_STEP = re.compile(r"[^.\[\]]+")


def parse_key(text: str) -> KeyPath:
    """models[0].driver.type, or models.0.driver.type, as the path it means."""
    if not _KEY.fullmatch(text):
        raise ConfigError(
            f"`{text}` is not a key; write it like `runtime.memory_mb` or `models[0].driver.type`"
        )
    return tuple(int(step) if step.isdigit() else step for step in _STEP.findall(text))


def set_in_file(file: Path, key: str, value: str) -> None:
    """Sets one key, or changes nothing if the file would not be a good configuration afterwards."""
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        changed = set_in_text(text, parse_key(key), value, str(file))
        parse_config(changed, f"{file} (with {key}: {value})", file.absolute().parent)
        _replace(file, changed)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be changed: {error}") from error


def set_in_text(text: str, path: KeyPath, value: str, source: str) -> str:
    """`text` with the value at `path` replaced or added; `value` is YAML, plain text included."""
    wanted = _yaml_value(value, type_at(Config, path), source)
    root = compose(text, source)
    node, depth = _deepest(root, path)
    if depth == len(path) and node is not None:
        return _replaced(text, node, wanted)
    if any(isinstance(key, int) for key in path[depth:]):
        raise ConfigError(f"{source}: {dotted(path)}: the list has no such item; add it in an editor")
    if node is None or _is_null(node):
        return _begun(text, node, path[depth:], wanted)
    if not isinstance(node, yaml.MappingNode) or (node.flow_style and node.value):
        raise ConfigError(
            f"{source}: {dotted(path)}: {dotted(path[:depth])} is written in one line; edit it there"
        )
    return _added(text, node, path[depth:], wanted)


def _yaml_value(value: str, hint: object, source: str) -> str:
    """`value` as one line of YAML; where text is wanted, what YAML would read as something else is quoted."""
    words = expected(hint)
    try:
        data = parse_document(f"[{value}]", source).data
    except ConfigError:
        data = [value]
    found = data[0] if isinstance(data, list) and len(data) == 1 else value
    is_wanted_null = found is None and "null" in words
    if words.startswith(("text", "a path")) and not is_wanted_null:
        found = value
    return _one_line(found)


def _one_line(data: JsonValue) -> str:
    plain = isinstance(data, str) and _reads_as_itself(data)
    return str(data) if plain else json.dumps(data, ensure_ascii=False)


def _reads_as_itself(text: str) -> bool:
    """Whether `text` needs no quotes, even between braces."""
    try:
        return parse_document(f"{{key: {text}}}", "value").data == {"key": text}
    except ConfigError:
        return False


def _deepest(node: yaml.Node | None, path: KeyPath) -> tuple[yaml.Node | None, int]:
    """The last node on the way to `path` that exists, and how many keys of the way it took."""
    for depth, key in enumerate(path):
        below = _child(node, key)
        if below is None:
            return node, depth
        node = below
    return node, len(path)


def _child(node: yaml.Node | None, key: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for name, value in node.value if name.value == str(key)), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        item: yaml.Node = node.value[key]
        return item
    return None


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")


def _replaced(text: str, node: yaml.Node, value: str) -> str:
    start, end = node.start_mark.index, node.end_mark.index
    if not isinstance(node, yaml.ScalarNode):
        end = start + len(text[start:end].rstrip())  # the mark stands where the next key begins
    head = text[:start].rstrip() if text[:start].rstrip().endswith(":") else text[:start]
    return f"{head}{' ' if head.endswith(':') else ''}{value}{text[end:]}"


def _begun(text: str, node: yaml.Node | None, path: KeyPath, value: str) -> str:
    """Writes the first keys of an empty file, or of a heading with nothing below it."""
    if node is None:
        return f"{_ended(text)}{_nested(path, value, 0)}"
    at = node.end_mark.index
    line_start = text.rfind("\n", 0, node.start_mark.index) + 1
    indent = len(text[line_start:]) - len(text[line_start:].lstrip(" -")) + 2
    heading, rest = text[: node.start_mark.index].rstrip(" "), text[at:]
    line_end = rest.find("\n")
    tail, following = (rest, "") if line_end < 0 else (rest[:line_end], rest[line_end + 1 :])
    return f"{heading}{tail.rstrip()}\n{_nested(path, value, indent)}{following}"


def _added(text: str, node: yaml.MappingNode, path: KeyPath, value: str) -> str:
    if not node.value:  # `{}`
        flow = "{" + ": {".join(str(key) for key in path) + f": {value}" + "}" * len(path)
        return f"{text[: node.start_mark.index]}{flow}{text[node.end_mark.index :]}"
    last = node.value[-1][1]
    at = text.find("\n", last.end_mark.index - (last.end_mark.column == 0))
    head, tail = (_ended(text), "") if at < 0 else (text[: at + 1], text[at + 1 :])
    return f"{head}{_nested(path, value, node.value[0][0].start_mark.column)}{tail}"


def _nested(path: KeyPath, value: str, indent: int) -> str:
    lines = [f"{' ' * (indent + 2 * level)}{key}:" for level, key in enumerate(path)]
    return "\n".join(lines) + f" {value}\n"


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else f"{text}\n"


def _replace(file: Path, text: str) -> None:
    """Writes beside the file and renames, so that a full disk leaves the old one whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    target = file.resolve()
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
