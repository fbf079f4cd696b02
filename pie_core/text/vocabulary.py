"""What a tokenizer asks of the library that reads its file: ids for text, and the bytes of each id."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pie_core.errors import LoadError
from pie_core.text.templates import read_json


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that stands for itself in text and is never produced by merging."""

    id: int
    text: str
    control: bool  # False: part of the text (user-defined), True: steers the model


class Vocabulary(Protocol):
    """One loaded tokenizer file."""

    @property
    def added(self) -> Mapping[int, SpecialToken]: ...
    @property
    def size(self) -> int: ...
    @property
    def separator(self) -> bytes:
        """What stands between any two tokens of a text."""

    @property
    def leading_space(self) -> bool:
        """Whether a space in front of the text belongs to the tokenizer, not to the text."""

    @property
    def split_regex(self) -> str: ...

    def encode(self, text: str, add_special: bool) -> list[int]: ...
    def token_id(self, text: str) -> int | None: ...
    def token_text(self, index: int) -> str: ...
    def token_bytes(self, index: int) -> bytes:
        """The bytes of a token that is not an added one; none where the vocabulary has a gap."""


def by_id(tokens: Iterable[SpecialToken]) -> dict[int, SpecialToken]:
    return {token.id: token for token in tokens}


def declared_tokens(directory: Path) -> list[SpecialToken]:
    """What tokenizer_config.json and the older added_tokens.json add to the vocabulary of a tokenizer file."""
    older = read_json(directory / "added_tokens.json")
    path = directory / "tokenizer_config.json"
    newer = read_json(path).get("added_tokens_decoder") or {}
    try:
        tokens = [SpecialToken(int(index), str(text), control=False) for text, index in older.items()]
        for index, entry in newer.items():
            tokens.append(SpecialToken(int(index), str(entry["content"]), bool(entry.get("special", False))))
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise LoadError(f"{path}: added_tokens_decoder maps no ids to tokens: {exc!r}") from exc
    return tokens


def tokenizer_library(name: str, path: Path) -> Any:
    """An optional library, imported when a checkpoint needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise LoadError(
            f"{path}: reading this tokenizer needs the library {name}, which is not installed: "
            "pip install 'pie-core[tokenizers]'"
        ) from exc
