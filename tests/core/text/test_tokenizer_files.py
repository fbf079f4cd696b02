"""Tokenizer files other than tokenizer.json, compared with the libraries that define them."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

from pie_core.errors import InvalidRequest, LoadError
from pie_core.text.text_model import load_text
from pie_core.text.tiktoken_vocabulary import CONVENTIONS
from pie_core.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "Hello world! It's 12345 o'clock, naïve café.",
    "東京は日本の首都です。\n\n  漢字and latin 🎉",
    "  two leading, a tab\there",
    "",
]
FRAGMENTS = ["a", " the", "Paris", "é", "🎉", "東", "\n", "  ", "<|im_end|>", "<s>", "�"]
SPLIT = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def learned_ranks(backend: Backend) -> dict[bytes, int]:
    """The single bytes, then the merges that the tiny tokenizer learned, in their order."""
    merges = json.loads(backend.to_str())["model"]["merges"]
    letters = {letter: bytes([byte]) for byte, letter in zip(range(256), _letters_of_bytes(), strict=True)}
    words = [b"".join(letters[letter] for letter in "".join(merge)) for merge in merges]
    tokens = dict.fromkeys([bytes([byte]) for byte in range(256)] + words)
    return {token: rank for rank, token in enumerate(tokens)}


def _letters_of_bytes() -> list[str]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    letters = [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
    assert sorted(letters) == sorted(ByteLevel.alphabet())
    return letters


def write_rank_file(path: Path, ranks: dict[bytes, int], tokenizer_class: str, **config: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    text = json.dumps({"tokenizer_class": tokenizer_class, **config})
    (path.parent / "tokenizer_config.json").write_text(text)
    return path.parent


def write_tekken(path: Path, ranks: dict[bytes, int], special: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "pattern": SPLIT,
        "default_vocab_size": len(ranks) + 20 - 10,  # the last ten ranks find no room
        "default_num_special_tokens": 20,
        "version": "v7",
    }
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    listed = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(special)]
    path.write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": listed}))
    return path.parent


def train_sentencepiece(directory: Path, lines: list[str], **options: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


AS_LLAMA: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "user_defined_symbols": ["<|im_end|>"],
}


@pytest.fixture(scope="session")
def ranks(byte_level_backend: Backend) -> dict[bytes, int]:
    return learned_ranks(byte_level_backend)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory, ranks: dict[bytes, int]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    end = {str(len(ranks) + 2): {"content": "<|im_end|>", "special": True}}
    lines = [line for line in TEXTS[:2] * 20 if line] + ["The capital of France is Paris"] * 20
    return {
        "kimi": write_rank_file(
            root / "kimi" / "tiktoken.model", ranks, "TikTokenTokenizer", added_tokens_decoder=end
        ),
        "qwen": write_rank_file(root / "qwen" / "qwen.tiktoken", ranks, "QWenTokenizer"),
        "tekken": write_tekken(
            root / "tekken" / "tekken.json", ranks, ["<unk>", "<s>", "</s>", "<|im_end|>"]
        ),
        "sentencepiece": train_sentencepiece(root / "sentencepiece", lines, **AS_LLAMA),
    }


@pytest.fixture(scope="session")
def load(directories: dict[str, Path]) -> Callable[[str], Tokenizer]:
    loaded = {kind: load_tokenizer(directory) for kind, directory in directories.items()}
    return loaded.__getitem__


KINDS = ["kimi", "qwen", "tekken", "sentencepiece"]


@pytest.mark.parametrize(("kind", "class_name"), [("kimi", "TikTokenTokenizer"), ("qwen", "QWenTokenizer")])
@pytest.mark.parametrize("text", TEXTS)
def test_a_rank_file_encodes_like_tiktoken(
    load: Callable[[str], Tokenizer], ranks: dict[bytes, int], kind: str, class_name: str, text: str
) -> None:
    library = tiktoken.Encoding(
        "x", pat_str=CONVENTIONS[class_name].split, mergeable_ranks=ranks, special_tokens={}
    )
    tokenizer = load(kind)
    assert tokenizer.encode(text) == library.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_follow_the_ranks_of_a_rank_file(
    load: Callable[[str], Tokenizer], ranks: dict[bytes, int]
) -> None:
    base, kimi, qwen = len(ranks), load("kimi"), load("qwen")
    assert kimi.encode("a<|im_end|>") == [*kimi.encode("a"), base + 2]
    assert (kimi.size, kimi.token_text(base)) == (base + 256, f"<|reserved_token_{base}|>")
    assert qwen.special_tokens()[:3] == [
        (base, "<|endoftext|>"),
        (base + 1, "<|im_start|>"),
        (base + 2, "<|im_end|>"),
    ]
    assert qwen.encode("cafe\u0301") == qwen.encode("café"), "composed first"
    assert kimi.encode("cafe\u0301") != kimi.encode("café")


def test_a_tekken_file_puts_special_tokens_first(
    load: Callable[[str], Tokenizer], ranks: dict[bytes, int]
) -> None:
    kept = {token: rank for token, rank in ranks.items() if rank < len(ranks) - 10}
    library = tiktoken.Encoding("x", pat_str=SPLIT, mergeable_ranks=kept, special_tokens={})
    tokenizer = load("tekken")
    for text in TEXTS:
        assert tokenizer.encode(text) == [20 + rank for rank in library.encode(text)]
        assert tokenizer.encode(text, add_special=True) == [1, *tokenizer.encode(text)]
    assert tokenizer.encode("<|im_end|>") == [3]
    assert tokenizer.special_tokens()[3:5] == [(3, "<|im_end|>"), (4, "<SPECIAL_4>")]
    assert tokenizer.size == len(kept) + 20


@pytest.mark.parametrize("options", [AS_LLAMA, AS_LLAMA | {"add_dummy_prefix": False}, {}])
def test_a_sentencepiece_model_encodes_and_decodes_like_its_library(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    directory = train_sentencepiece(tmp_path, TEXTS[:2] * 20, **options)
    library = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    tokenizer = load_tokenizer(directory)
    for text in TEXTS:
        ids = library.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == library.decode(ids)
        assert tokenizer.encode(text, add_special=True) == [library.bos_id(), *ids]


def test_added_tokens_of_a_sentencepiece_checkpoint_are_one_token(tmp_path: Path) -> None:
    directory = train_sentencepiece(tmp_path, TEXTS[:2] * 20, **AS_LLAMA)
    size = load_tokenizer(directory).size
    added = {
        str(size): {"content": "<tool>", "special": False},
        str(size + 1): {"content": "<end>", "special": True},
    }
    config = {"added_tokens_decoder": added, "add_bos_token": False, "add_eos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<end>"}))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("<tool><end></s>") == [size, size + 1, 2]
    assert tokenizer.encode("a", add_special=True) == [*tokenizer.encode("a"), 2]
    assert tokenizer.decode([size, size + 1], skip_special=True) == "<tool>"
    assert load_text(directory).eos_tokens == (size + 1,)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_streaming_equals_whole_decoding(
    load: Callable[[str], Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = load(kind)
    pieces = data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=6))
    loose = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=6))
    ids = tokenizer.encode("".join(pieces)) + loose
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    decoder = tokenizer.incremental_decoder()
    shown = [decoder.feed(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    assert "".join(shown) + decoder.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=40, deadline=None)
def test_text_survives_and_is_made_of_the_bytes_of_its_tokens(
    load: Callable[[str], Tokenizer], kind: str, text: str
) -> None:
    tokenizer = load(kind)
    ids = tokenizer.encode(text)
    if kind != "qwen":  # it composes characters
        assert tokenizer.decode(ids) == text
    joined = b"".join(tokenizer.token_bytes(index) for index in ids).decode()
    assert joined.removeprefix(" " if kind == "sentencepiece" else "") == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_has_the_tokens_of_the_whole(load: Callable[[str], Tokenizer], kind: str) -> None:
    tokenizer = load(kind)
    before, text = "Paris<|im_end|>\n", "the capital"
    assert tokenizer.encode(before) + tokenizer.encode_after(before, text) == tokenizer.encode(before + text)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_odd_text_are_checked(load: Callable[[str], Tokenizer], kind: str) -> None:
    tokenizer = load(kind)
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        tokenizer.token_bytes(tokenizer.size)
    assert "�" in tokenizer.decode(tokenizer.encode("a\ud800b"))
    assert tokenizer.token_id("<|im_end|>") == tokenizer.encode("x<|im_end|>")[-1]
    assert len(tokenizer.vocabulary()) == tokenizer.size


def test_very_long_runs_do_not_overwhelm_the_library(load: Callable[[str], Tokenizer]) -> None:
    text = "x" + " " * 60_000 + "y" * 60_000 + "z"
    assert load("qwen").decode(load("qwen").encode(text)) == text


def test_a_rank_file_of_unknown_convention_is_refused(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    write_rank_file(tmp_path / "tokenizer.model", ranks, "OtherTokenizer")
    with pytest.raises(LoadError, match="tokenizer_class 'OtherTokenizer', known are TikTokenTokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tiktoken.model", b"QQ== 0\n???", r"tiktoken\.model, line 2: expected a token in base64"),
        ("tiktoken.model", b"QQ== 0\n", "255 single bytes have no rank, the first is 0x00"),
        ("tokenizer.model", b"\x00\x01", "neither a SentencePiece model nor a tiktoken rank file"),
        ("tekken.json", b'{"config": {}}', "not a tekken file of version 7 or later"),
    ],
)
def test_damaged_files_are_load_errors(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoadError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("kind", "library"), [("kimi", "tiktoken"), ("sentencepiece", "sentencepiece")])
def test_a_missing_library_is_named_with_what_installs_it(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        LoadError, match=rf"needs the library {library}.*pip install 'pie-core\[tokenizers\]'"
    ):
        load_tokenizer(directories[kind])
