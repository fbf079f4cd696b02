"""Models and tokenizers by their older names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from inferlet import chat, runtime
from inferlet.errors import not_in_this_version
from inferlet.legacy.context import Context
from inferlet.model import Model as EngineModel
from inferlet.model import Tokenizer as EngineTokenizer


def get_auto_model() -> Model:
    """The default model."""
    return Model(EngineModel.load())


def get_model(name: str) -> Model:
    return Model(EngineModel.load(name))


def get_all_models() -> list[str]:
    """Names of the models being served."""
    return runtime.models()


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, tokenizer: EngineTokenizer) -> None:
        self._tokenizer = tokenizer

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def detokenize(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode(tokens)

    def get_vocabs(self) -> tuple[list[int], list[bytes]]:
        return self._tokenizer.vocabs()


class Model:
    """One served model."""

    def __init__(self, model: EngineModel) -> None:
        self._model = model

    def get_name(self) -> str:
        return self._model.name

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer(self._model.tokenizer())

    def get_kv_page_size(self) -> int:
        size: int = self._model.describe()["page_size"]
        return size

    def eos_tokens(self) -> list[list[int]]:
        """Token sequences that end an assistant's turn."""
        return [[token] for token in chat.stop_tokens(self._model)]

    def create_context(self) -> Context:
        return Context.on(self._model)

    def get_prompt_template(self) -> NoReturn:
        raise not_in_this_version("Model.get_prompt_template: the host renders the template")

    def create_queue(self) -> NoReturn:
        raise not_in_this_version("Model.create_queue")
