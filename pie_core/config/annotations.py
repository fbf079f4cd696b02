"""What a section's annotations say: its keys, their types in words, their help and their defaults."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import annotated_types
from pydantic.fields import FieldInfo

from pie_core.config.places import KeyPath


@dataclass(frozen=True, slots=True)
class Expects:
    """Put into Annotated: how to name a type whose own annotation would not tell ('a name or a list of them')."""

    words: str


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a section."""

    name: str
    type: object
    help: str
    default: object
    required: bool


def is_section(hint: object) -> bool:
    return dataclasses.is_dataclass(_bare(hint))


def keys_of(hint: object) -> list[str]:
    section = _bare(hint)
    return [field.name for field in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []


def settings_of(cls: type[Any]) -> list[Setting]:
    """The keys of a section in the order of its file."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return [_setting(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _setting(field: dataclasses.Field[Any], hint: object) -> Setting:
    required = field.default is field.default_factory is dataclasses.MISSING
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return Setting(field.name, hint, _help(field, hint), None if required else default, required)


def _help(field: dataclasses.Field[Any], hint: object) -> str:
    """A plugin's options may say it as field(metadata={"help": ...}) and so do without pydantic."""
    texts = [
        extra.description for extra in _extras(hint) if isinstance(extra, FieldInfo) and extra.description
    ]
    return texts[0] if texts else str(field.metadata.get("help", ""))


def key_paths(cls: type[Any]) -> Iterator[KeyPath]:
    """Every key below `cls`; the items of a list appear as its item 0."""
    for setting in settings_of(cls):
        yield (setting.name,)
        item = item_type(setting.type)
        inner, prefix = (setting.type, (setting.name,)) if item is None else (item, (setting.name, 0))
        if is_section(inner):
            yield from ((*prefix, *path) for path in key_paths(_bare(inner)))


def item_type(hint: object) -> object | None:
    """X of tuple[X, ...] and list[X]; None for all else."""
    bare = _bare(hint)
    return typing.get_args(bare)[0] if typing.get_origin(bare) in (tuple, list) else None


def type_at(cls: object, path: KeyPath) -> object:
    """The annotation that governs `path`, or Any where none does."""
    hint: object = cls
    for key in path:
        hint = _step(hint, key)
    return hint


def _step(hint: object, key: str | int) -> object:
    bare = _bare(hint)
    if dataclasses.is_dataclass(bare) and isinstance(bare, type):
        return typing.get_type_hints(bare, include_extras=True).get(str(key), Any)
    if isinstance(key, int) and item_type(hint) is not None:
        return item_type(hint)
    steps = [_step(arm, key) for arm in _arms(bare)]
    return next((step for step in steps if step is not Any), Any)


def _bare(hint: object) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _extras(hint: object) -> tuple[Any, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()


def _arms(bare: object) -> tuple[object, ...]:
    return typing.get_args(bare) if typing.get_origin(bare) in (Union, types.UnionType) else ()


_WORDS: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
    Any: "a value",
}


def expected(hint: object) -> str:
    """A type in words: 'a whole number from 1 to 65535', 'text or null', 'one of cpu, cuda'."""
    for extra in _extras(hint):
        if isinstance(extra, Expects):
            return extra.words
    bare = _bare(hint)
    if arms := _arms(bare):
        bounds = _bounds(hint)
        words = [expected(arm) + (bounds if arm in (int, float) else "") for arm in arms]
        return " or ".join(words)
    return f"{_base_words(bare)}{_bounds(hint)}"


def _base_words(bare: Any) -> str:
    if bare in _WORDS:
        return _WORDS[bare]
    origin = typing.get_origin(bare)
    if origin is Literal:
        return f"one of {', '.join(map(str, typing.get_args(bare)))}"
    if origin in (tuple, list):
        return f"a list, each item {expected(typing.get_args(bare)[0])}"
    if dataclasses.is_dataclass(bare) or (
        isinstance(origin or bare, type) and issubclass(origin or bare, Mapping)
    ):
        return "a section of keys"
    return str(getattr(bare, "__name__", bare))


def _bounds(hint: object) -> str:
    limits: dict[str, Any] = {}
    for extra in _extras(hint):
        for rule in extra.metadata if isinstance(extra, FieldInfo) else [extra]:
            limits |= _limits(rule)
    return _range_words(limits)


def _limits(rule: object) -> dict[str, Any]:
    match rule:
        case annotated_types.Ge(ge):
            return {"least": ge}
        case annotated_types.Le(le):
            return {"most": le}
        case annotated_types.Gt(gt):
            return {"above": gt}
        case annotated_types.Lt(lt):
            return {"below": lt}
        case annotated_types.MinLen(length):
            return {"length": length}
    pattern = getattr(rule, "pattern", None)
    return {"pattern": pattern} if pattern else {}


def _range_words(limits: dict[str, Any]) -> str:
    if "least" in limits and "most" in limits:
        return f" from {limits.pop('least')} to {limits.pop('most')}"
    words = {
        "least": " of at least {}",
        "most": " of at most {}",
        "above": " above {}",
        "below": " below {}",
        "length": " (not empty)" if limits.get("length") == 1 else " (at least {} long)",
        "pattern": " that matches {}",
    }
    return " and".join(words[name].format(limit) for name, limit in limits.items())
