"""What is generated from the typed tree: docs/configuration.md, the template of `pie config init`, the JSON schema."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pie_core.config.annotations import Setting, expected, is_section, item_type, settings_of
from pie_core.config.options import Options
from pie_core.config.tree import DEFAULT_MODEL, Config

_INTRODUCTION = """\
# Configuration

<!-- Generated from pie_core/config/tree.py by `python -m pie_core.config --markdown`; a test compares the two. -->

One YAML file. `pie` reads the file that `-c` names, else `config.yaml` in the folder that the environment
variable `PIE_HOME` names (default `~/.pie`), else it uses the defaults below: the default model, which it fetches
on first use, on the driver `portable`.

The file is read strictly. An unknown key, a wrong type, a value out of range, a key that stands twice or a second
document ends `pie` with exit code 2 and a line for each problem: file, line, key, what was expected and what was
found, and the nearest key that exists. Text is text: `yes`, `on` and `1e3` are not turned into anything else than
what they look like, and relative paths start at the file's folder.

```
pie config init                            write a file with every key, its help and its default
pie config set runtime.memory_mb 1024      change one key; comments stay
pie config show                            what is in force
pie config options portable                the options of a driver
pie config schema > pie.schema.json        for editors
pie check pie.yaml                         try a file without running anything
```

A small file:

```yaml
models:
  - name: qwen
    repo: Qwen/Qwen3-0.6B
    driver:
      type: portable
      device: cpu
```
"""


def markdown() -> str:
    parts = [_INTRODUCTION]
    for title, help_text, section in _sections():
        parts.append(f"## {title}\n\n{help_text}\n\n{_table(section)}")
    return "\n".join(parts)


def _sections() -> Iterator[tuple[str, str, type[Any]]]:
    """Each section with its title, outermost first."""
    pending: list[tuple[str, Setting]] = [("", setting) for setting in settings_of(Config)]
    while pending:
        prefix, setting = pending.pop(0)
        item = item_type(setting.type)
        title, section = (
            (f"{prefix}{setting.name}[]", item) if item else (f"{prefix}{setting.name}", setting.type)
        )
        if is_section(section):
            cls = _class_of(section)
            yield f"`{title}`", inspect.cleandoc(str(cls.__doc__)), cls
            pending = [(f"{title}.", below) for below in settings_of(cls)] + pending


def _class_of(hint: Any) -> type[Any]:
    """The dataclass of a section, whose annotation may carry its help."""
    cls: type[Any] = getattr(hint, "__origin__", hint)
    return cls


def _table(section: type[Any]) -> str:
    rows = ["| key | expected | default | meaning |", "| --- | --- | --- | --- |"]
    for setting in settings_of(section):
        words = "a section, below" if is_section(setting.type) else expected(setting.type)
        rows.append(f"| `{setting.name}` | {words} | {_default(setting)} | {setting.help} |")
    return "\n".join(rows) + "\n"


def option_lines(options: type[Any]) -> list[str]:
    """A driver's options as a commented section of a file, ready to paste under `options:`."""
    return [f"# {setting.help}\n{setting.name}: {_default_text(setting)}" for setting in settings_of(options)]


def _default(setting: Setting) -> str:
    if setting.required:
        return "required"
    return "" if is_section(setting.type) else f"`{_inline(setting.default)}`"


def _default_text(setting: Setting) -> str:
    return (
        f"# required, {expected(setting.type)}"
        if setting.required
        else f"{_inline(setting.default)}  # {expected(setting.type)}"
    )


def _inline(value: object) -> str:
    """A value in one line of YAML."""
    plain = as_data(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def as_data(value: object) -> Any:
    """A tree of settings as plain data, in the shape of the file."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_data(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Options):
        return {key: as_data(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_data(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def template() -> str:
    """A configuration file that changes nothing: every key with its help and its default, commented out."""
    lines = [
        "# The configuration of pie. A line that is commented out shows the default; remove the `# ` to change it.",
        "# `pie check` tries the file, `pie config set KEY VALUE` changes one key.",
    ]
    for setting in settings_of(Config):
        lines += ["", f"# {setting.help}", *_template_lines(setting, 0)]
    return "\n".join(lines) + "\n"


def _template_lines(setting: Setting, depth: int) -> Iterator[str]:
    """A heading stands as it is (nothing below it means the defaults), and so does what has no default."""
    indent = "  " * depth
    item = item_type(setting.type)
    section = item if is_section(item) else setting.type
    if not is_section(section):
        value = DEFAULT_MODEL if setting.required else _inline(setting.default)
        yield f"{'' if setting.required else '# '}{indent}{setting.name}: {value}  # {setting.help}"
        return
    yield f"{indent}{setting.name}:"
    inner = depth + (2 if item else 1)
    below = [line for key in settings_of(_class_of(section)) for line in _template_lines(key, inner)]
    if item is not None:
        below[0] = below[0].replace(f"{indent}    ", f"{indent}  - ", 1)
    yield from below


def json_schema() -> dict[str, Any]:
    """The schema that editors check and complete a configuration with."""
    schema = TypeAdapter(Config).json_schema()
    for section in [schema, *schema.get("$defs", {}).values()]:
        section["additionalProperties"] = False
        for key, rules in section["properties"].items():
            section["properties"][key] = _or_empty(rules)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "pie configuration"}


def _or_empty(rules: dict[str, Any]) -> dict[str, Any]:
    """A section may also be a heading with nothing below it."""
    if "$ref" not in rules:
        return rules
    kept = {key: value for key, value in rules.items() if key != "$ref"}
    return {**kept, "anyOf": [{"$ref": rules["$ref"]}, {"type": "null"}]}
