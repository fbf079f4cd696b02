"""Rank files of tiktoken (`tiktoken.model`, `*.tiktoken`) and Mistral's tekken.json, encoded by the library tiktoken.

A rank file holds only the merges. How text is split and which special tokens follow is in the checkpoint's own
Python code, which is not run: the classes it names are known here, others are refused.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pie_core.errors import LoadError
from pie_core.text.gguf_tokenizer import QWEN2_SPLIT
from pie_core.text.templates import read_json
from pie_core.text.vocabulary import SpecialToken, by_id, declared_tokens, tokenizer_library

_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*\Z")
_RUNS = re.compile(r"\s{1,25000}|\S{1,25000}")  # the library's regular expressions recurse on longer ones

_WORDS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_KIMI_SPLIT = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_WORDS}]*[\p{{Ll}}{_WORDS}]+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_WORDS}]+[\p{{Ll}}{_WORDS}]*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


@dataclass(frozen=True, slots=True)
class _Convention:
    """What a checkpoint's own tokenizer class does around its rank file."""

    split: str
    special: tuple[str, ...]  # in the order of their ids, which follow the ranks; {} is the id itself
    nfc: bool = False


CONVENTIONS = {
    "TikTokenTokenizer": _Convention(_KIMI_SPLIT, ("<|reserved_token_{}|>",) * 256),
    "QWenTokenizer": _Convention(
        QWEN2_SPLIT,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))),
        nfc=True,
    ),
}


class TiktokenVocabulary:
    """Ranks and special tokens; `first` is the id of rank 0, where special tokens come in front."""

    separator = b""
    leading_space = False

    def __init__(
        self,
        library: Any,
        origin: Path,
        ranks: dict[bytes, int],
        special: Iterable[SpecialToken],
        split: str,
        *,
        nfc: bool = False,
        first: int = 0,
        prefix: tuple[int, ...] = (),
    ) -> None:
        self.added = by_id(special)
        self.split_regex = split
        self._first, self._nfc, self._prefix = first, nfc, prefix
        self._ids = {data: first + rank for data, rank in ranks.items()}
        self._tokens = {index: data for data, index in self._ids.items()}
        self._added_ids = {token.text: token.id for token in self.added.values()}
        self.size = max([*self._tokens, *self.added], default=-1) + 1
        # The library wants ids that do not overlap with ranks: special tokens follow them there.
        self._beyond = max(ranks.values(), default=-1) + 1
        places = {text: self._beyond + index for text, index in self._added_ids.items()}
        try:
            self._encoding = library.Encoding(
                str(origin), pat_str=split, mergeable_ranks=ranks, special_tokens=places
            )
        except Exception as exc:  # the library raises ValueErrors of its own making for malformed ranks
            raise LoadError(f"{origin}: tiktoken does not take this vocabulary: {exc}") from exc

    def encode(self, text: str, add_special: bool) -> list[int]:
        if self._nfc:
            text = unicodedata.normalize("NFC", text)
        ids = [self._id(place) for piece in _pieces(text) for place in self._encode_piece(piece)]
        return [*self._prefix, *ids] if add_special else ids

    def _encode_piece(self, text: str) -> list[int]:
        ids: list[int] = self._encoding.encode(text, allowed_special="all")
        return ids

    def _id(self, place: int) -> int:
        return place - self._beyond if place >= self._beyond else self._first + place

    def token_id(self, text: str) -> int | None:
        found = self._added_ids.get(text)
        return self._ids.get(text.encode("utf-8", "replace")) if found is None else found

    def token_text(self, index: int) -> str:
        if index in self.added:
            return self.added[index].text
        return self.token_bytes(index).decode("utf-8", "replace")

    def token_bytes(self, index: int) -> bytes:
        return self._tokens.get(index, b"")


def _pieces(text: str) -> Iterator[str]:
    """`text`, cut only where a run of white space or of anything else is longer than the library bears."""
    start = 0
    if len(text) >= 25000:
        for run in _RUNS.finditer(text):
            if run.end() - run.start() == 25000:
                yield text[start : run.end()]
                start = run.end()
    if start < len(text):
        yield text[start:]


def is_rank_file(path: Path) -> bool:
    """Whether the file begins with a token in base64 and its rank: SentencePiece models have the same names."""
    try:
        with path.open("rb") as file:
            return _RANK_LINE.match(file.readline(4096)) is not None
    except OSError as exc:
        raise LoadError(f"{path}: the tokenizer cannot be read: {exc}") from exc


def load_rank_file(path: Path) -> TiktokenVocabulary:
    library = tokenizer_library("tiktoken", path)
    ranks = _read_ranks(path)
    convention = _convention(path)
    base = max(ranks.values()) + 1
    special = by_id(
        SpecialToken(base + place, text.format(base + place), control=True)
        for place, text in enumerate(convention.special)
    )
    special |= by_id(token for token in declared_tokens(path.parent) if token.id >= base)
    return TiktokenVocabulary(library, path, ranks, special.values(), convention.split, nfc=convention.nfc)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as exc:
            raise LoadError(f"{path}, line {number}: expected a token in base64 and its rank: {exc}") from exc
    return _checked_ranks(path, ranks)


def _checked_ranks(path: Path, ranks: dict[bytes, int]) -> dict[bytes, int]:
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise LoadError(f"{path}: {len(lacking)} single bytes have no rank, the first is 0x{lacking[0]:02X}")
    if len(set(ranks.values())) != len(ranks):
        raise LoadError(f"{path}: two tokens have the same rank")
    return ranks


def _convention(path: Path) -> _Convention:
    config = path.parent / "tokenizer_config.json"
    name = read_json(config).get("tokenizer_class")
    if name not in CONVENTIONS:
        raise LoadError(
            f"{path}: a rank file does not say how text is split; {config} names the tokenizer_class {name!r}, "
            f"known are {', '.join(CONVENTIONS)}; convert it once with transformers: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…) writes a tokenizer.json"
        )
    return CONVENTIONS[name]


def load_tekken(path: Path) -> TiktokenVocabulary:
    """Mistral's file: special tokens have the first ids, and only so many ranks count as the size leaves room for."""
    library = tokenizer_library("tiktoken", path)
    data = read_json(path)
    try:
        config, listed = data["config"], data["special_tokens"]
        first, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        named = {
            int(token["rank"]): SpecialToken(int(token["rank"]), token["token_str"], token["is_control"])
            for token in listed
        }
        entries = data["vocab"][: size - first]
        ranks = {base64.b64decode(entry["token_bytes"]): int(entry["rank"]) for entry in entries}
        split = str(config["pattern"])
    except (KeyError, TypeError, ValueError) as exc:
        raise LoadError(
            f"{path}: not a tekken file of version 7 or later (config, vocab and special_tokens): {exc!r}; "
            "checkpoints with an older one also have a tokenizer.json"
        ) from exc
    special = [
        named.get(index, SpecialToken(index, f"<SPECIAL_{index}>", control=True)) for index in range(first)
    ]
    bos = [token.id for token in special if token.text == "<s>"]
    return TiktokenVocabulary(
        library, path, _checked_ranks(path, ranks), special, split, first=first, prefix=tuple(bos)
    )
