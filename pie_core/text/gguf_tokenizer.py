"""The vocabulary in a GGUF header -> a `tokenizers.Tokenizer` that equals the checkpoint's own tokenizer.json.

Two models exist here: "gpt2" (byte-level BPE, whose way of splitting text is named by `tokenizer.ggml.pre`) and
"llama" (SentencePiece BPE: spaces are ▁, unknown characters fall back to byte tokens, scores order the merges).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pie_core.errors import LoadError
from pie_core.text.gguf_metadata import GgufMetadata

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35_SPLIT = QWEN2_SPLIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_PUNCTUATION_AND_BACKTICK = r"[\p{P}\$\+<=>\^~\|`]+"


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How text is cut before merging; each pattern cuts the pieces that the one before left."""

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words_first: bool = False  # a word in the vocabulary is not built by merges


_DIGITS = _Splitting((r"\p{N}", GPT2_SPLIT))
_GPT2 = _Splitting((GPT2_SPLIT,))
_LLAMA3 = _Splitting((_LLAMA3_SPLIT,), whole_words_first=True)
_QWEN2 = _Splitting((QWEN2_SPLIT,), nfc=True)

SPLITTINGS = {
    "default": _Splitting((_PUNCTUATION, GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _Splitting(_DIGITS.patterns, nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "falcon": _Splitting((_PUNCTUATION_AND_BACKTICK, GPT2_SPLIT, r"[0-9][0-9][0-9]")),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _QWEN2,
    "qwen35": _Splitting((_QWEN35_SPLIT,), nfc=True),
}


def tokenizer_from_gguf(metadata: GgufMetadata) -> Backend:
    """Builds the tokenizer that `metadata` describes; unknown models and splittings are refused by name."""
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    build = builders.get(metadata.tokenizer_model)
    if build is None:
        raise LoadError(
            f"{metadata.path}: GGUF tokenizer model {metadata.tokenizer_model!r} is not supported; "
            f"known models: {', '.join(builders)}"
        )
    backend = build(metadata)
    _add_tokens(backend, metadata)
    return backend


def _byte_level(metadata: GgufMetadata) -> Backend:
    splitting = _splitting(metadata)
    merges = [_merge(metadata, line) for line in metadata.strings("tokenizer.ggml.merges")]
    backend = _bpe(metadata, _vocabulary(metadata), merges, ignore_merges=splitting.whole_words_first)
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    bytes_to_letters = pre_tokenizers.ByteLevel(
        add_prefix_space=metadata.flag("tokenizer.ggml.add_space_prefix", default=False), use_regex=False
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_to_letters])
    backend.decoder = decoders.ByteLevel()
    return backend


def _splitting(metadata: GgufMetadata) -> _Splitting:
    kind = metadata.text("tokenizer.ggml.pre", default="default")
    if kind not in SPLITTINGS:
        raise LoadError(
            f"{metadata.path}: GGUF pre-tokenizer {kind!r} is not supported; known: {', '.join(sorted(SPLITTINGS))}. "
            "Load the checkpoint from its Hugging Face directory, whose tokenizer.json says how text is split"
        )
    return SPLITTINGS[kind]


def _merge(metadata: GgufMetadata, line: str) -> tuple[str, str]:
    left, space, right = line.partition(" ")
    if not (left and space and right):
        raise LoadError(
            f"{metadata.path}: merge {line!r} in the GGUF header is not two tokens with a space between"
        )
    return left, right


def _sentencepiece(metadata: GgufMetadata) -> Backend:
    vocabulary = _vocabulary(metadata)
    merges = _merges_by_score(vocabulary, metadata.floats("tokenizer.ggml.scores"))
    unknown = _unknown_token(metadata)
    backend = _bpe(metadata, vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", default=True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _bpe(
    metadata: GgufMetadata, vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any
) -> Backend:
    try:
        return Backend(models.BPE(vocabulary, merges, **options))
    except Exception as exc:  # the library raises bare Exceptions for merges outside the vocabulary
        raise LoadError(f"{metadata.path}: vocabulary and merges in the GGUF header disagree: {exc}") from exc


def _unknown_token(metadata: GgufMetadata) -> str:
    tokens = metadata.strings("tokenizer.ggml.tokens")
    index = metadata.integer("tokenizer.ggml.unknown_token_id", default=0)
    if not 0 <= index < len(tokens):
        raise LoadError(
            f"{metadata.path}: unknown_token_id is {index}, outside the vocabulary of {len(tokens)} tokens"
        )
    return tokens[index]


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose result scores highest; BPE wants that order as a list of pairs."""
    pairs: list[tuple[float, tuple[str, str]]] = []
    for piece, index in vocabulary.items():
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        local = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
        local.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        pairs.extend((scores[index], pair) for pair in local)
    pairs.sort(key=lambda scored: -scored[0])
    return [pair for _, pair in pairs]


def _vocabulary(metadata: GgufMetadata) -> dict[str, int]:
    tokens = metadata.strings("tokenizer.ggml.tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise LoadError(
            f"{metadata.path}: {len(tokens) - len(vocabulary)} tokens of the GGUF vocabulary occur twice; "
            "each id must have its own text"
        )
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        items = metadata.values.get(key, tokens)
        if not isinstance(items, list) or len(items) != len(tokens):
            raise LoadError(
                f"{metadata.path}: {key} must be a list of {len(tokens)} items, one for each token"
            )
    return vocabulary


def _add_tokens(backend: Backend, metadata: GgufMetadata) -> None:
    """Control and user-defined tokens are found in text before it is split."""
    tokens = metadata.strings("tokenizer.ggml.tokens")
    types = (
        metadata.integers("tokenizer.ggml.token_type")
        if "tokenizer.ggml.token_type" in metadata.values
        else []
    )
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    backend.add_tokens([token for token in added if not token.special])
    backend.add_special_tokens([token for token in added if token.special])
