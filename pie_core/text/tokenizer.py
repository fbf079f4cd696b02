"""Text <-> token ids, from the tokenizer file of a checkpoint or a GGUF header, with decoding that streams.

Decoding goes by the true bytes of each token, so that a token that ends inside a character is no special case:
whole decoding and any split of it into steps give the same text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from pie_core.errors import InvalidRequest, LoadError
from pie_core.text.gguf_metadata import GgufMetadata, read_gguf_metadata
from pie_core.text.gguf_tokenizer import GPT2_SPLIT, tokenizer_from_gguf
from pie_core.text.sentencepiece_vocabulary import load_sentencepiece
from pie_core.text.tiktoken_vocabulary import is_rank_file, load_rank_file, load_tekken
from pie_core.text.vocabulary import SpecialToken, Vocabulary, by_id

_CONTEXT_CHARACTERS = 256  # how far back the tokens of a continuation may depend on the text before it


class Tokenizer:
    """One vocabulary. `padded_size` is the model's own, where it has more rows than the tokenizer has tokens."""

    def __init__(self, backend: Backend | Vocabulary, origin: str, padded_size: int = 0) -> None:
        self._vocabulary = _JsonVocabulary(backend, origin) if isinstance(backend, Backend) else backend
        self._bytes: dict[int, bytes] = {}
        self.origin = origin
        self._added = self._vocabulary.added
        self.size = max(self._vocabulary.size, padded_size)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Special tokens written out in `text` become their ids; `add_special` adds what the checkpoint adds (BOS)."""
        return self._vocabulary.encode(_encodable(text), add_special)

    def encode_after(self, before: str, text: str) -> list[int]:
        """The tokens of `text` where it follows `before`: as in one encoding of both, where that has a seam."""
        context = self._tail(before)
        if not context:
            return self.encode(text)
        known, whole = self.encode(context), self.encode(context + text)
        if whole[: len(known)] == known:
            return whole[len(known) :]
        return self._encode_alone(text)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary are refused."""
        decoder = self.incremental_decoder(skip_special)
        return decoder.feed(ids) + decoder.flush()

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """Like `decode`, for tokens that follow others: a leading space stays."""
        return b"".join(self.token_bytes(index) for index in ids).decode("utf-8", "replace")

    def incremental_decoder(self, skip_special: bool = False) -> IncrementalDecoder:
        return IncrementalDecoder(self, self._vocabulary, skip_special)

    def token_bytes(self, index: int) -> bytes:
        """The exact bytes that token `index` adds to the text; none for an id that only pads the model's vocabulary."""
        found = self._bytes.get(index)
        if found is None:
            found = self._bytes[index] = self._read_bytes(index)
        return found

    def _read_bytes(self, index: int) -> bytes:
        self.check_ids((index,))
        if index in self._added:
            return self._added[index].text.encode()
        return self._vocabulary.token_bytes(index)

    def check_ids(self, ids: Iterable[int]) -> None:
        for index in ids:
            if not 0 <= index < self.size:
                raise InvalidRequest(
                    f"token id {index} is outside the vocabulary; expected 0 to {self.size - 1}"
                )

    def vocabulary(self) -> list[tuple[int, bytes]]:
        return [(index, self.token_bytes(index)) for index in range(self.size)]

    def special_tokens(self) -> list[tuple[int, str]]:
        """Ids and texts of the control tokens, by id."""
        return sorted((token.id, token.text) for token in self._added.values() if token.control)

    def is_control(self, index: int) -> bool:
        token = self._added.get(index)
        return token is not None and token.control

    def token_id(self, text: str) -> int | None:
        return self._vocabulary.token_id(text)

    def token_text(self, index: int) -> str:
        self.check_ids((index,))
        return self._vocabulary.token_text(index)

    @property
    def split_regex(self) -> str:
        """The pattern that cuts text before merging; empty where the tokenizer has none."""
        return self._vocabulary.split_regex

    @cached_property
    def added_texts(self) -> tuple[str, ...]:
        """Texts that are one token wherever they stand."""
        return tuple(token.text for token in self._added.values() if token.text)

    def _tail(self, before: str) -> str:
        """The end of `before` from its last special token on: nothing in front of it matters to what follows."""
        near = before[-_CONTEXT_CHARACTERS:]
        last = max((near.rfind(text) for text in self.added_texts), default=-1)
        return near[last:] if last >= 0 else near

    def _encode_alone(self, text: str) -> list[int]:
        """`text` without the space that some tokenizers put in front of a beginning."""
        if not self._vocabulary.leading_space:
            return self.encode(text)
        newline = self.encode("\n")
        ids = self.encode("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self.encode(text)


class IncrementalDecoder:
    """Turns ids into text as they come: what it returns is final, and never cuts a character in two."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._started = False
        self._lead = vocabulary.leading_space

    def feed(self, ids: Iterable[int]) -> str:
        """The text that is complete now; characters still in the making wait for their last byte."""
        return self._without_lead(self._utf8.decode(b"".join([self._next(index) for index in ids])))

    def flush(self) -> str:
        """What is left, with a U+FFFD for an unfinished character; the decoder is as new afterwards."""
        text = self._without_lead(self._utf8.decode(b"", final=True))
        self.reset()
        return text

    def reset(self) -> None:
        self._utf8.reset()
        self._started = False
        self._lead = self._vocabulary.leading_space

    def _next(self, index: int) -> bytes:
        data = self._tokenizer.token_bytes(index)
        if self._skip_special and self._tokenizer.is_control(index):
            return b""
        if self._started and self._vocabulary.separator:
            return self._vocabulary.separator + data
        self._started = True
        return data

    def _without_lead(self, text: str) -> str:
        if self._lead and text:
            self._lead = False
            return text.removeprefix(" ")
        return text


class _JsonVocabulary:
    """A tokenizer.json, or what a GGUF header says of one, in the library tokenizers."""

    def __init__(self, backend: Backend, origin: str) -> None:
        self._backend = backend
        spec = _spec_without_vocabulary(backend)
        self._spelling = _spelling(spec["decoder"], origin)
        self.separator, self.leading_space = self._spelling.separator, self._spelling.leading_space
        self.split_regex = _split_regex(spec["pre_tokenizer"])
        self.added = by_id(
            SpecialToken(index, token.content, bool(token.special))
            for index, token in backend.get_added_tokens_decoder().items()
        )
        self.size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, add_special: bool) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def token_id(self, text: str) -> int | None:
        found: int | None = self._backend.token_to_id(text)
        return found

    def token_text(self, index: int) -> str:
        return self._backend.id_to_token(index) or ""

    def token_bytes(self, index: int) -> bytes:
        token = self._backend.id_to_token(index)
        return b"" if token is None else self._spelling.read(token)


@dataclass(frozen=True, slots=True)
class _Spelling:
    """How the vocabulary writes bytes: what its decoder would do, token by token."""

    read: Callable[[str], bytes]
    separator: bytes = b""
    leading_space: bool = False  # a space in front of the text belongs to the tokenizer, not to the text


def _spelling(decoder: dict[str, Any] | None, origin: str) -> _Spelling:
    if decoder is None:
        return _Spelling(str.encode, separator=b" ")
    kind = decoder["type"]
    if kind == "ByteLevel":
        return _Spelling(_byte_level_bytes)
    if kind == "Metaspace":
        lead = decoder.get("prepend_scheme", "always") != "never"
        return _Spelling(
            lambda token: token.replace(decoder["replacement"], " ").encode(), leading_space=lead
        )
    steps = decoder["decoders"] if kind == "Sequence" else [decoder]
    return _sequence_spelling(steps, origin)


def _sequence_spelling(steps: list[dict[str, Any]], origin: str) -> _Spelling:
    """Sequences of Replace, ByteFallback, Fuse and Strip (SentencePiece), or around a ByteLevel or Metaspace."""
    inner = [step for step in steps if step["type"] in ("ByteLevel", "Metaspace")]
    if inner and len(steps) == 1:
        return _spelling(inner[0], origin)
    known = {"Replace", "ByteFallback", "Fuse", "Strip"}
    for step in steps:
        if step["type"] not in known or (step["type"] == "Replace" and "String" not in step["pattern"]):
            raise LoadError(
                f"{origin}: the tokenizer's decoder {step['type']!r} is not supported; "
                f"supported: ByteLevel, Metaspace, or a sequence of {', '.join(sorted(known))}"
            )
    replacements = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
    falls_back = any(step["type"] == "ByteFallback" for step in steps)
    strips = any(step["type"] == "Strip" and step["start"] for step in steps)
    return _Spelling(lambda token: _fallback_bytes(token, replacements, falls_back), leading_space=strips)


def _fallback_bytes(token: str, replacements: list[tuple[str, str]], falls_back: bool) -> bytes:
    if falls_back and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    for old, new in replacements:
        token = token.replace(old, new)
    return token.encode()


def _byte_letters() -> dict[str, int]:
    """Byte-level vocabularies write each byte as one printable letter: itself, or the next free one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if chr(byte) not in letters)
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(rest)}


_BYTE_OF_LETTER = _byte_letters()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in token])
    except KeyError:
        return token.encode()  # an added token, written as it is


def _encodable(text: str) -> str:
    """Lone surrogates have no UTF-8 form; they become U+FFFD rather than an exception from the library."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace") if not text.isascii() else text


def _spec_without_vocabulary(backend: Backend) -> dict[str, Any]:
    spec = {}
    for part in ("decoder", "pre_tokenizer"):
        state = getattr(backend, part)
        spec[part] = None if state is None else json.loads(state.__getstate__())
    return spec


def _split_regex(pre_tokenizer: dict[str, Any] | None) -> str:
    if pre_tokenizer is None:
        return ""
    if pre_tokenizer["type"] == "Sequence":
        found = [_split_regex(step) for step in pre_tokenizer["pretokenizers"]]
        return next((pattern for pattern in reversed(found) if pattern), "")
    if pre_tokenizer["type"] == "Split":
        return str(pre_tokenizer["pattern"].get("Regex", ""))
    if pre_tokenizer["type"] == "ByteLevel" and pre_tokenizer.get("use_regex", True):
        return GPT2_SPLIT
    return ""


TokenizerSource = Path | str | GgufMetadata


def load_tokenizer(source: TokenizerSource, padded_size: int = 0) -> Tokenizer:
    """Reads the tokenizer of a checkpoint: a directory, a tokenizer.json, a .gguf file, or its header read."""
    if isinstance(source, GgufMetadata):
        return Tokenizer(tokenizer_from_gguf(source), str(source.path), padded_size)
    path = Path(source)
    if path.is_dir():
        return _load_directory(path, padded_size)
    if path.suffix == ".gguf":
        return load_tokenizer(read_gguf_metadata(path), padded_size)
    return _load_json(path, padded_size)


def _load_directory(directory: Path, padded_size: int) -> Tokenizer:
    if (directory / "tokenizer.json").is_file():
        return _load_json(directory / "tokenizer.json", padded_size)
    if (directory / "tekken.json").is_file():
        return Tokenizer(load_tekken(directory / "tekken.json"), str(directory / "tekken.json"), padded_size)
    for path in [
        directory / "tiktoken.model",
        *sorted(directory.glob("*.tiktoken")),
        directory / "tokenizer.model",
    ]:
        if path.is_file():
            read = load_rank_file if is_rank_file(path) else load_sentencepiece
            return Tokenizer(read(path), str(path), padded_size)
    others = [name for name in _UNREADABLE if (directory / name).is_file()]
    found = f"found {', '.join(others)}, which cannot be read; " if others else ""
    raise LoadError(
        f"{directory}: no tokenizer; looked for tokenizer.json, tekken.json, tiktoken.model, *.tiktoken and "
        f"tokenizer.model; {found}"
        "convert it once with transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    )


_UNREADABLE = ("vocab.json", "vocab.txt", "spiece.model")


def _load_json(path: Path, padded_size: int) -> Tokenizer:
    try:
        backend = Backend.from_file(str(path))
    except Exception as exc:  # the library raises bare Exceptions, for a missing file as for a malformed one
        raise LoadError(f"{path}: the tokenizer cannot be read: {exc}") from exc
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, str(path), padded_size)
