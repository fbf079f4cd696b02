"""Encoding against the reference, streamed decoding, and vocabularies that cannot be read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from pie_core.errors import InvalidRequest, LoadError
from pie_core.text.text_model import load_text
from pie_core.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "The capital of France is",
    " leading and trailing ",
    "12345 über 日本 🎉 <|im_end|>\n\nuser",
    "a\tb\r\nc",
    "",
    "<|im_start|>user\nHello<|im_end|>\n",
]


def test_a_directory_encodes_and_decodes_like_transformers(
    tmp_path: Path, any_backend: Backend, write_checkpoint_directory: Any
) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = write_checkpoint_directory(tmp_path, any_backend)
    ours = load_tokenizer(directory)
    reference: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(directory / "tokenizer.json")
    )
    for text in TEXTS:
        ids = reference.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)


def test_a_gguf_vocabulary_gives_the_same_tokenizer_as_its_directory(
    tmp_path: Path, byte_level_backend: Backend, write_gguf_file: Any
) -> None:
    ours = load_tokenizer(write_gguf_file(tmp_path / "tiny.gguf", byte_level_backend, "gpt2"))
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == byte_level_backend.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text


def test_sentencepiece_merges_are_rebuilt_from_scores(
    tmp_path: Path, sentencepiece_backend: Backend, write_gguf_file: Any
) -> None:
    ours = load_tokenizer(write_gguf_file(tmp_path / "tiny.gguf", sentencepiece_backend, "llama"))
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == sentencepiece_backend.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == sentencepiece_backend.decode(ids, skip_special_tokens=False)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_incremental_decoding_equals_whole_decoding(any_backend: Backend, data: st.DataObject) -> None:
    tokenizer = Tokenizer(any_backend, "test")
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=24))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    decoder = tokenizer.incremental_decoder()
    steps = [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    pieces = [decoder.feed(step) for step in steps] + [decoder.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert decoder.feed(ids) + decoder.flush() == tokenizer.decode(ids), "a flushed decoder is as new"


@given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=60, deadline=None)
def test_text_survives_encoding_and_streaming_never_shows_half_a_character(
    any_backend: Backend, text: str
) -> None:
    tokenizer = Tokenizer(any_backend, "test")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    decoder = tokenizer.incremental_decoder()
    assert all("�" not in decoder.feed([index]) or "�" in text for index in ids)


def test_lone_surrogates_are_replaced_rather_than_fatal(byte_level_backend: Backend) -> None:
    tokenizer = Tokenizer(byte_level_backend, "test")
    assert "�" in tokenizer.decode(tokenizer.encode("a\ud800b"))


def test_the_bytes_of_tokens_are_true_bytes(byte_level_backend: Backend) -> None:
    tokenizer = Tokenizer(byte_level_backend, "test")
    assert b"".join(tokenizer.token_bytes(index) for index in tokenizer.encode(" é\n🎉")) == " é\n🎉".encode()
    vocabulary = dict(tokenizer.vocabulary())
    assert set(range(256)) <= {data[0] for data in vocabulary.values() if len(data) == 1}
    assert len(vocabulary) == tokenizer.size


def test_ids_outside_the_vocabulary_are_refused_by_number(byte_level_backend: Backend) -> None:
    tokenizer = Tokenizer(byte_level_backend, "test")
    for bad in (-1, tokenizer.size, 2**31):
        with pytest.raises(InvalidRequest, match=rf"token id {bad} .* expected 0 to {tokenizer.size - 1}"):
            tokenizer.decode([0, bad])


def test_ids_that_pad_the_models_vocabulary_have_no_text(byte_level_backend: Backend) -> None:
    plain = Tokenizer(byte_level_backend, "test")
    padded = Tokenizer(byte_level_backend, "test", padded_size=plain.size + 10)
    assert padded.size == plain.size + 10
    assert padded.decode([plain.size, *padded.encode("ab"), plain.size + 9]) == "ab"


def test_special_tokens_are_the_control_tokens_and_can_be_left_out(byte_level_backend: Backend) -> None:
    tokenizer = Tokenizer(byte_level_backend, "test")
    texts = [text for _, text in tokenizer.special_tokens()]
    assert "<|im_end|>" in texts
    assert "<think>" not in texts
    ids = tokenizer.encode("<|im_start|>a<think>b<|im_end|>")
    assert tokenizer.decode(ids) == "<|im_start|>a<think>b<|im_end|>"
    assert tokenizer.decode(ids, skip_special=True) == "a<think>b"


def test_the_split_regex_is_the_last_cut_before_merging(byte_level_backend: Backend) -> None:
    assert r"\p{L}+" in Tokenizer(byte_level_backend, "test").split_regex


@pytest.mark.parametrize("before", ["", "<|im_start|>assistant\n", "some words"])
def test_a_continuation_has_the_tokens_of_the_whole(any_backend: Backend, before: str) -> None:
    tokenizer = Tokenizer(any_backend, "test")
    text = "<|im_end|>\n<|im_start|>user\nHello there"
    assert tokenizer.encode(before) + tokenizer.encode_after(before, text) == tokenizer.encode(before + text)


def test_a_continuation_without_a_seam_gets_no_invented_space(sentencepiece_backend: Backend) -> None:
    tokenizer = Tokenizer(sentencepiece_backend, "test")
    assert tokenizer.decode_continuation(tokenizer.encode_after("capi", "tal of")) == "tal of"


def test_unknown_kinds_in_a_gguf_file_are_refused_by_name(
    tmp_path: Path, byte_level_backend: Backend, write_gguf_file: Any
) -> None:
    with pytest.raises(
        LoadError, match=r"tokenizer model 'rwkv' is not supported; known models: gpt2, llama"
    ):
        load_tokenizer(write_gguf_file(tmp_path / "a.gguf", byte_level_backend, "rwkv"))
    with pytest.raises(LoadError, match=r"pre-tokenizer 'martian' is not supported; known: .*smollm"):
        load_tokenizer(write_gguf_file(tmp_path / "b.gguf", byte_level_backend, "gpt2", pre="martian"))


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_vocabularies_decode_like_the_library(scheme: str) -> None:
    backend = Backend(models.WordLevel({"▁the": 0, "▁cat": 1, "sat": 2, "▁": 3}, unk_token="▁"))
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    ours = Tokenizer(backend, "test")
    for ids in ([0, 1], [1, 2, 3, 0], [2, 0], []):
        assert ours.decode(ids) == backend.decode(ids)
        decoder = ours.incremental_decoder()
        assert "".join(decoder.feed([index]) for index in ids) + decoder.flush() == backend.decode(ids)


def test_words_without_a_decoder_are_joined_by_spaces() -> None:
    backend = Backend(models.WordLevel({"the": 0, "cat": 1}, unk_token="the"))
    assert Tokenizer(backend, "test").decode([0, 1, 0]) == backend.decode([0, 1, 0]) == "the cat the"


def test_a_decoder_of_an_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"the": 0}, unk_token="the"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        LoadError, match=r"tokenizer\.json: the tokenizer's decoder 'WordPiece' is not supported"
    ):
        load_tokenizer(tmp_path)


def test_a_directory_without_a_readable_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"looked for tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"found vocab\.txt, which cannot be read;"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LoadError, match=r"tokenizer\.json: the tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def test_a_damaged_gguf_header_is_a_load_error_wherever_it_is_cut(
    tmp_path: Path, byte_level_backend: Backend, write_gguf_file: Any
) -> None:
    whole = write_gguf_file(tmp_path / "whole.gguf", byte_level_backend, "gpt2").read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for length in (0, 3, 4, 12, 20, 60, 300, len(whole) // 2, len(whole) - 9):
        damaged.write_bytes(whole[:length])
        with pytest.raises(LoadError, match=r"damaged\.gguf"):
            load_tokenizer(damaged)
    damaged.write_bytes(whole[:16] + b"\xff" * 8 + whole[24:])
    with pytest.raises(LoadError, match="cannot fit in the rest of the file"):
        load_tokenizer(damaged)
    with pytest.raises(LoadError, match="cannot be read"):
        load_tokenizer(tmp_path / "absent.gguf")


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_corrupted_gguf_header_loads_or_is_a_load_error(
    tmp_path: Path, any_backend: Backend, write_gguf_file: Any, data: st.DataObject
) -> None:
    path = tmp_path / "corrupted.gguf"
    model = data.draw(st.sampled_from(["gpt2", "llama"]))
    content = bytearray(
        write_gguf_file(path, any_backend, model, chat_template="a", eos_token_id=1).read_bytes()
    )
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(LoadError):
        load_text(path)


def test_the_default_models_tokenizer_equals_the_reference_conversion(default_model: Path) -> None:
    from gguf import GGUFReader
    from tokenizers import AddedToken, pre_tokenizers

    header = {name: field.contents() for name, field in GGUFReader(str(default_model)).fields.items()}
    tokens = header["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in header["tokenizer.ggml.merges"]]
    reference = Backend(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    reference.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, header["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    reference.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    ours = load_tokenizer(default_model)
    for text in [*TEXTS, Path(__file__).read_text()]:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False) == text
