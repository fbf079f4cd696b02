"""Models being served and their tokenizers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any

from wit_world.imports import model as bindings

from inferlet import runtime
from inferlet.errors import NotFound, not_in_this_version
from inferlet.host import call


class Tokenizer:
    """Text to token ids and back, as the checkpoint defines it."""

    __slots__ = ("_handle",)

    def __init__(self, handle: bindings.Tokenizer) -> None:
        self._handle = handle

    def encode(self, text: str) -> list[int]:
        return list(call(self._handle.encode, text))

    def decode(self, tokens: Iterable[int]) -> str:
        return call(self._handle.decode, list(tokens))

    def vocabs(self) -> tuple[list[int], list[bytes]]:
        """All token ids, and the bytes of each."""
        entries = json.loads(self._handle.vocabulary())
        return [entry[0] for entry in entries], [base64.b64decode(entry[1]) for entry in entries]

    def split_regex(self) -> str:
        """The regular expression that splits text before merging; empty where there is none."""
        return self._handle.split_regex()

    def special_tokens(self) -> tuple[list[int], list[bytes]]:
        """Ids of the special tokens, and the bytes of each."""
        entries = json.loads(self._handle.special_tokens())
        return [entry[0] for entry in entries], [entry[1].encode() for entry in entries]


class Model:
    """One served model."""

    __slots__ = ("_described", "_handle", "_tokenizer")

    def __init__(self, handle: bindings.Model) -> None:
        self._handle = handle
        self._described: dict[str, Any] | None = None
        self._tokenizer: Tokenizer | None = None

    @staticmethod
    def load(name: str | None = None) -> Model:
        """The model of this name, or the default one."""
        return Model(call(bindings.Model.load, name or _default_name()))

    @property
    def name(self) -> str:
        return self._handle.name()

    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._handle.tokenizer())
        return self._tokenizer

    def describe(self) -> dict[str, Any]:
        """What the host says about it: vocab_size, max_model_len, page_size, architecture, driver, …"""
        if self._described is None:
            self._described = json.loads(self._handle.describe())
        return dict(self._described)

    def default_system_speculation(self) -> bool:
        """Whether the engine drafts tokens by itself for greedy generations."""
        return False

    def speak(self, text: str) -> Any:
        raise not_in_this_version("Model.speak")

    def __repr__(self) -> str:
        return f"Model({self.name!r})"


def _default_name() -> str:
    names = runtime.models()
    if not names:
        raise NotFound("this server serves no model")
    return names[0]
