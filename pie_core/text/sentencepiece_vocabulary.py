"""SentencePiece models (`tokenizer.model`), encoded by the library sentencepiece around the added tokens."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from pie_core.errors import LoadError
from pie_core.text.templates import read_json
from pie_core.text.vocabulary import SpecialToken, by_id, declared_tokens, tokenizer_library


class SentencePieceVocabulary:
    """One model with the tokens that the checkpoint adds to it; `before` and `after` enclose a whole text."""

    separator = b""
    split_regex = ""

    def __init__(
        self, processor: Any, declared: list[SpecialToken], before: list[int], after: list[int]
    ) -> None:
        self._processor = processor
        self._before, self._after = before, after
        pieces = range(processor.get_piece_size())
        own = [
            SpecialToken(index, processor.id_to_piece(index), control=True)
            for index in pieces
            if processor.is_control(index) or processor.is_unknown(index)
        ]
        self.added = by_id([*own, *declared])
        self._added_ids = {token.text: token.id for token in self.added.values()}
        self.size = max([*self.added, len(pieces) - 1]) + 1

    @cached_property
    def leading_space(self) -> bool:
        return self._normalized("a").startswith("▁")

    def _normalized(self, text: str) -> str:
        return "".join(self._processor.encode(text, out_type=str))

    @cached_property
    def _cut(self) -> re.Pattern[str]:
        texts = sorted((text for text in self._added_ids if text), key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, texts)) + ")" if texts else r"(?!)")

    def encode(self, text: str, add_special: bool) -> list[int]:
        ids: list[int] = []
        for piece in self._cut.split(text):
            if piece in self._added_ids:
                ids.append(self._added_ids[piece])
            elif piece:
                ids += self._processor.encode(piece)
        return [*self._before, *ids, *self._after] if add_special else ids

    def token_id(self, text: str) -> int | None:
        if text in self._added_ids:
            return self._added_ids[text]
        index: int = self._processor.piece_to_id(text)
        return None if self._processor.is_unknown(index) else index

    def token_text(self, index: int) -> str:
        if index in self.added:
            return self.added[index].text
        return str(self._processor.id_to_piece(index)) if index < self._processor.get_piece_size() else ""

    def token_bytes(self, index: int) -> bytes:
        text = self.token_text(index)
        if text and self._processor.is_byte(index):
            return bytes.fromhex(text[3:5])
        return text.replace("▁", " ").encode()


def load_sentencepiece(path: Path) -> SentencePieceVocabulary:
    library = tokenizer_library("sentencepiece", path)
    try:
        processor = library.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as exc:
        raise LoadError(f"{path}: neither a SentencePiece model nor a tiktoken rank file: {exc}") from exc
    config = read_json(path.parent / "tokenizer_config.json")
    before = [processor.bos_id()] if config.get("add_bos_token", True) else []
    after = [processor.eos_id()] if config.get("add_eos_token", False) else []
    return SentencePieceVocabulary(
        processor,
        declared_tokens(path.parent),
        [index for index in before if index >= 0],
        [index for index in after if index >= 0],
    )
