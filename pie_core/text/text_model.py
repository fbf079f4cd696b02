"""Everything about text of one loaded checkpoint: its tokenizer, chat template, stop tokens and decoders."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pie_core.errors import InvalidRequest, LoadError, PieError, Unsupported
from pie_core.text.call_ids import fresh_id
from pie_core.text.chat import Transcript
from pie_core.text.decoders import ChatDecoder, ReasoningDecoder, ReasoningMarkers, find_reasoning_markers
from pie_core.text.gguf_metadata import GgufMetadata, read_gguf_metadata
from pie_core.text.parts import ROLES, ResultPart, Turn, read_tools
from pie_core.text.templates import (
    ChatTemplate,
    TemplateSource,
    read_json,
    template_from_directory,
    template_from_file,
    template_from_gguf,
)
from pie_core.text.tokenizer import Tokenizer, load_tokenizer
from pie_core.text.tool_calls import ToolDecoder, find_tool_format
from pie_core.text.tool_formats import ToolFormat
from pie_core.text.turns import TemplateTurns

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GGUF_NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # the format's own spelling
    "pad_token": "padding_token_id",
}
_GGUF_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True)
class TextModel:
    """Built once per checkpoint and shared by all its contexts."""

    tokenizer: Tokenizer
    template: ChatTemplate
    eos_tokens: tuple[int, ...]  # as the checkpoint's own files list them

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """What ends an assistant's turn: the checkpoint's list, and the token that its template ends turns with."""
        end = self._end_of_turn()
        return tuple(dict.fromkeys([*self.eos_tokens, *([] if end is None else [end])]))

    @cached_property
    def reasoning_markers(self) -> ReasoningMarkers:
        return find_reasoning_markers(self.tokenizer, self.template.source.text, self._cue_text())

    @cached_property
    def tool_format(self) -> ToolFormat:
        source = self.template.source
        return find_tool_format(self.tokenizer, source.text, source.origin)

    @cached_property
    def known_tool_format(self) -> ToolFormat | None:
        try:
            return self.tool_format
        except Unsupported:
            return None

    def transcript(self, now: datetime | None = None, variables: dict[str, Any] | None = None) -> Transcript:
        return Transcript(self, now, variables)

    def turn_tokens(self, role: str, text: str = "") -> list[int]:
        """One turn as the template writes it on its own; also "cue" and "seal"."""
        turns = self._turns()
        if role == "cue":
            return self.tokenizer.encode(turns.cue)
        if role == "seal":
            return self.tokenizer.encode(turns.seal)
        if role not in ROLES:
            raise InvalidRequest(f"unknown role {role!r}; expected one of {', '.join(ROLES)}, cue, seal")
        return self.tokenizer.encode(turns.alone(Turn.of(role, text)))

    def tool_tokens(self, tools: str) -> list[int]:
        """What describes tools to the model at the beginning of a conversation; `tools` is JSON."""
        return self.tokenizer.encode(self._turns().tools_alone(read_tools(tools)))

    def result_tokens(self, name: str, content: str) -> list[int]:
        """A tool's answer as the template writes it on its own, behind a turn that called the tool."""
        call_id = fresh_id((), name, self.known_tool_format)
        return self.tokenizer.encode(self._turns().alone(Turn("tool", (ResultPart(name, content, call_id),))))

    def decoder(self, kind: str) -> ChatDecoder | ReasoningDecoder | ToolDecoder:
        """A decoder of what the model writes, by name: "chat", "reasoning" or "tools"."""
        if kind == "chat":
            return ChatDecoder(self.tokenizer, self.stop_tokens)
        if kind == "reasoning":
            return ReasoningDecoder(self.tokenizer, self.reasoning_markers, self.stop_tokens)
        if kind == "tools":
            return ToolDecoder(self.tokenizer, self.tool_format, self.stop_tokens)
        raise InvalidRequest(f"unknown decoder {kind!r}; expected 'chat', 'reasoning' or 'tools'")

    def _turns(self) -> TemplateTurns:
        return TemplateTurns(self.template, self.tokenizer.added_texts)

    def _end_of_turn(self) -> int | None:
        try:
            seal = self.tokenizer.encode(self._turns().seal)
        except PieError:  # a template that cannot render a plain question and answer has no end to find
            return None
        return next((index for index in seal if self.tokenizer.is_control(index)), None)

    def _cue_text(self) -> str:
        try:
            return self._turns().cue
        except PieError:  # as above; markers are then found by the vocabulary alone
            return ""


def load_text(
    source: Path | str | GgufMetadata, padded_size: int = 0, chat_template: Path | None = None
) -> TextModel:
    """Reads all about text from a Hugging Face directory, a GGUF file or its header.

    `padded_size` is the model's vocabulary, where that is larger than the tokenizer's; `chat_template` a file that
    takes the place of the checkpoint's own template.
    """
    own = None if chat_template is None else template_from_file(chat_template)
    if isinstance(source, GgufMetadata):
        return _from_gguf(source, padded_size, own)
    path = Path(source)
    if path.is_dir():
        return _from_directory(path, padded_size, own)
    if path.suffix == ".gguf":
        return _from_gguf(read_gguf_metadata(path), padded_size, own)
    raise LoadError(f"{path}: no checkpoint; expected a directory with tokenizer.json, or a .gguf file")


def _from_gguf(metadata: GgufMetadata, padded_size: int, own: TemplateSource | None) -> TextModel:
    tokenizer = load_tokenizer(metadata, padded_size)
    found = {name: _gguf_id(metadata, tokenizer, key) for name, key in _GGUF_NAMED_TOKENS.items()}
    named = {name: tokenizer.token_text(index) for name, index in found.items() if index is not None}
    stops = [_gguf_id(metadata, tokenizer, key) for key in _GGUF_STOPS]
    template = ChatTemplate(own or template_from_gguf(metadata), named)
    return TextModel(tokenizer, template, tuple(dict.fromkeys(stop for stop in stops if stop is not None)))


def _gguf_id(metadata: GgufMetadata, tokenizer: Tokenizer, key: str) -> int | None:
    if f"tokenizer.ggml.{key}" not in metadata.values:
        return None
    index = metadata.integer(f"tokenizer.ggml.{key}")
    if not 0 <= index < tokenizer.size:
        raise LoadError(
            f"{metadata.path}: {key} is {index}, outside the vocabulary of {tokenizer.size} tokens"
        )
    return index


def _from_directory(directory: Path, padded_size: int, own: TemplateSource | None) -> TextModel:
    tokenizer = load_tokenizer(directory, padded_size)
    named = _named_tokens(directory)
    template = ChatTemplate(own or template_from_directory(directory), named)
    return TextModel(tokenizer, template, _eos_tokens(directory, tokenizer, named))


def _named_tokens(directory: Path) -> dict[str, str]:
    """bos_token and the like: in tokenizer_config.json, in older checkpoints only in special_tokens_map.json."""
    entries = read_json(directory / "special_tokens_map.json") | {
        key: value
        for key, value in read_json(directory / "tokenizer_config.json").items()
        if value is not None
    }
    texts = {name: _token_text(entries.get(name)) for name in _NAMED_TOKENS}
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(entry: Any) -> str | None:
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _eos_tokens(directory: Path, tokenizer: Tokenizer, named: dict[str, str]) -> tuple[int, ...]:
    """generation_config.json's list, else config.json's; and the tokenizer's own end token."""
    listed: list[int] = []
    for name in ("generation_config.json", "config.json"):
        entry = read_json(directory / name).get("eos_token_id")
        listed = [
            index for index in (entry if isinstance(entry, list) else [entry]) if isinstance(index, int)
        ]
        if listed:
            break
    own = tokenizer.token_id(named["eos_token"]) if "eos_token" in named else None
    return tuple(dict.fromkeys([*listed, *([] if own is None else [own])]))
