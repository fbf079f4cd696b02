"""A checkpoint's text from a directory or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from pie_core.errors import InvalidRequest, LoadError, Unsupported
from pie_core.text.text_model import TextModel, load_text

MakeModel = Callable[[str], TextModel]
SIMPLE = "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def test_a_directory_gives_tokenizer_template_and_stop_tokens(
    tmp_path: Path, byte_level_backend: Backend, write_checkpoint_directory: Any
) -> None:
    directory = write_checkpoint_directory(
        tmp_path,
        byte_level_backend,
        chat_template=SIMPLE,
        eos_token="<|endoftext|>",
        bos_token={"content": "<s>"},
    )
    write_json(directory / "config.json", {"eos_token_id": 9})
    model = load_text(directory)
    ids = {text: byte_level_backend.token_to_id(text) for text in ("<|endoftext|>", "<|im_end|>")}
    assert model.eos_tokens == (9, ids["<|endoftext|>"])
    assert model.stop_tokens == (9, ids["<|endoftext|>"], ids["<|im_end|>"])
    assert model.template.named_tokens == {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    write_json(directory / "generation_config.json", {"eos_token_id": [5, 6]})
    assert load_text(directory).eos_tokens == (5, 6, ids["<|endoftext|>"])
    assert load_text(directory, padded_size=1000).tokenizer.size == 1000


def test_a_gguf_file_gives_the_same(
    tmp_path: Path, byte_level_backend: Backend, write_gguf_file: Any
) -> None:
    end = byte_level_backend.token_to_id("<|endoftext|>")
    path = write_gguf_file(
        tmp_path / "tiny.gguf",
        byte_level_backend,
        "gpt2",
        chat_template=SIMPLE,
        eos_token_id=end,
        bos_token_id=end,
    )
    model = load_text(path)
    assert model.stop_tokens == (end, byte_level_backend.token_to_id("<|im_end|>"))
    assert model.template.named_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    assert not model.template.source.is_fallback


def test_a_checkpoint_without_a_template_says_that_it_has_the_fallback(
    tmp_path: Path, byte_level_backend: Backend, write_checkpoint_directory: Any
) -> None:
    model = load_text(write_checkpoint_directory(tmp_path, byte_level_backend))
    assert model.template.source.is_fallback
    assert model.tokenizer.decode(model.turn_tokens("cue")) == "<|im_start|>assistant\n"
    assert model.stop_tokens == (byte_level_backend.token_to_id("<|im_end|>"),)


def test_a_file_can_take_the_place_of_the_template(
    tmp_path: Path, byte_level_backend: Backend, write_checkpoint_directory: Any
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("mine")
    directory = write_checkpoint_directory(tmp_path / "model", byte_level_backend, chat_template="{% broken")
    assert load_text(directory, chat_template=own).template.render([]) == "mine"
    with pytest.raises(LoadError, match=r"chat template of .*tokenizer_config\.json, line 1"):
        load_text(directory)


def test_single_turns_are_the_templates_own(make_model: MakeModel) -> None:
    model = make_model("chatml")
    turns = {
        role: model.tokenizer.decode(model.turn_tokens(role, "Hi"))
        for role in ("system", "user", "assistant")
    }
    assert turns == {role: f"<|im_start|>{role}\nHi<|im_end|>\n" for role in turns}
    assert model.tokenizer.decode(model.turn_tokens("cue")) == "<|im_start|>assistant\n"
    assert model.tokenizer.decode(model.turn_tokens("seal")) == "<|im_end|>\n"


def test_single_turns_of_other_styles(make_model: MakeModel) -> None:
    gemma, mistral = make_model("gemma"), make_model("mistral")
    assert gemma.tokenizer.decode(gemma.turn_tokens("user", "Hi")) == "<start_of_turn>user\nHi<end_of_turn>\n"
    assert mistral.tokenizer.decode(mistral.turn_tokens("user", "Hi")) == "[INST] Hi [/INST]"
    assert mistral.turn_tokens("cue") == []
    with pytest.raises(Unsupported, match=r"gemma\.jinja writes the system's words inside the user's turn"):
        gemma.turn_tokens("system", "Hi")
    with pytest.raises(InvalidRequest, match="unknown role 'tool'"):
        gemma.turn_tokens("tool", "Hi")


def test_stop_tokens_include_what_the_template_ends_turns_with(make_model: MakeModel) -> None:
    model = make_model("gemma")
    texts = [model.tokenizer.token_text(index) for index in model.stop_tokens]
    assert texts == ["<eos>", "<end_of_turn>"]


def test_what_is_no_checkpoint_is_refused(
    tmp_path: Path, byte_level_backend: Backend, write_gguf_file: Any
) -> None:
    with pytest.raises(LoadError, match=r"expected a directory with tokenizer\.json, or a \.gguf file"):
        load_text(tmp_path / "model.bin")
    bad = write_gguf_file(tmp_path / "bad.gguf", byte_level_backend, "gpt2", eos_token_id=99999)
    with pytest.raises(LoadError, match="eos_token_id is 99999, outside the vocabulary"):
        load_text(bad)


def test_the_default_models_text_is_complete(default_model: Path) -> None:
    model = load_text(default_model)
    assert model.tokenizer.size == 49152
    assert model.template.render([{"role": "user", "content": "Hi"}]).startswith("<|im_start|>system\n")
