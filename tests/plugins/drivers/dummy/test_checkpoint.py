"""The dummy's own tokenizer and chat template are what their script writes, and serve as a real checkpoint's do."""

from __future__ import annotations

import pytest

from pie_core.text.text_model import load_text
from pie_plugins.drivers.dummy import CHECKPOINT
from pie_plugins.drivers.dummy.write_checkpoint import VOCAB_SIZE, checkpoint_files


def test_the_files_are_what_the_script_writes() -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in CHECKPOINT.iterdir()}
    assert written == checkpoint_files()


@pytest.mark.parametrize("text", ["", "Hello, world!", "wörld 你好 🦀\n\ttabs", "the the the", "\0\x7f"])
def test_every_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = load_text(CHECKPOINT).tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < VOCAB_SIZE for token in ids)


def test_every_token_has_bytes_so_that_whatever_is_sampled_can_be_shown() -> None:
    tokenizer = load_text(CHECKPOINT).tokenizer
    vocabulary = tokenizer.vocabulary()
    assert len(vocabulary) == VOCAB_SIZE
    assert {content for _, content in vocabulary} >= {bytes([value]) for value in range(256)}


def test_common_words_are_single_tokens() -> None:
    assert len(load_text(CHECKPOINT).tokenizer.encode("the the there")) < len("the the there") // 2


def test_turns_are_rendered_by_its_template_and_end_at_its_stop_tokens() -> None:
    text = load_text(CHECKPOINT)
    decode = text.tokenizer.decode
    assert decode(text.turn_tokens("user", "hi")) == "<|im_start|>user\nhi<|im_end|>\n"
    assert decode(text.turn_tokens("cue")) == "<|im_start|>assistant\n"
    assert {decode([token]) for token in text.stop_tokens} == {"<|endoftext|>", "<|im_end|>"}
