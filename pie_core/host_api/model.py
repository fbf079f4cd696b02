"""Models and their tokenizers."""

from __future__ import annotations

import base64
import json

from pie_core.host_api.guest_state import ProgramState, ServedModel
from pie_core.sandbox.hosting import Interface
from pie_core.text.tokenizer import Tokenizer

interface = Interface("model")
interface.resource("model", ServedModel)
interface.resource("tokenizer", Tokenizer)


@interface.function("model.load")
def load(guest: ProgramState, name: str) -> ServedModel:
    return guest.model(name)


@interface.function("model.name")
def name(guest: ProgramState, model: ServedModel) -> str:
    return model.name


@interface.function("model.describe")
def describe(guest: ProgramState, model: ServedModel) -> str:
    info = model.engine.info
    return json.dumps(
        {
            "vocab_size": info.vocab_size,
            "max_model_len": info.max_model_len,
            "page_size": info.page_size,
            "architecture": info.architecture,
            "driver": info.driver,
            "capabilities": sorted(info.features),
        }
    )


@interface.function("model.tokenizer")
def tokenizer(guest: ProgramState, model: ServedModel) -> Tokenizer:
    return model.text.tokenizer


@interface.function("tokenizer.encode")
def encode(guest: ProgramState, tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


@interface.function("tokenizer.decode")
def decode(guest: ProgramState, tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens)


@interface.function("tokenizer.vocabulary")
def vocabulary(guest: ProgramState, tokenizer: Tokenizer) -> str:
    entries = tokenizer.vocabulary()
    return json.dumps([[token, base64.b64encode(content).decode("ascii")] for token, content in entries])


@interface.function("tokenizer.special-tokens")
def special_tokens(guest: ProgramState, tokenizer: Tokenizer) -> str:
    return json.dumps(tokenizer.special_tokens())


@interface.function("tokenizer.split-regex")
def split_regex(guest: ProgramState, tokenizer: Tokenizer) -> str:
    return tokenizer.split_regex
