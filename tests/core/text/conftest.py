"""Tiny real tokenizers, trained on a few lines, as Hugging Face directories and as GGUF files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

LINES = [
    "The capital of France is Paris, and 1234 people don't know it.",
    "Ein Satz über Äpfel, Öl und größere Übungen; plus naïve café.",
    "東京は日本の首都です。 emoji 🎉🎉 and tabs\t\tand   spaces\n\nnewlines",
    "Hello! How are you? I am fine. user assistant system model tool",
] * 4

CONTROL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<s>", "</s>", "[INST]", "[/INST]",
]  # fmt: skip
PLAIN_ADDED = ["<think>", "</think>"]


def _byte_level_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=CONTROL, initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED])
    return backend


def _sentencepiece_backend() -> Backend:
    trained = Backend(models.BPE(byte_fallback=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fixed = ["<unk>", *CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=fixed, show_progress=False)
    trained.train_from_iterator(LINES[:2] * 8, trainer)
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    backend = Backend(
        models.BPE(state["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ["<unk>", *CONTROL]]
    )
    return backend


@pytest.fixture(scope="session")
def byte_level_backend() -> Backend:
    return _byte_level_backend()


@pytest.fixture(scope="session")
def sentencepiece_backend() -> Backend:
    return _sentencepiece_backend()


@pytest.fixture(params=["byte_level", "sentencepiece"], scope="session")
def any_backend(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.getfixturevalue(f"{request.param}_backend")
    return backend


def write_directory(directory: Path, backend: Backend, **tokenizer_config: Any) -> Path:
    """A Hugging Face directory with this tokenizer; None values of the configuration are left out."""
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config}
    text = json.dumps({key: value for key, value in config.items() if value is not None})
    (directory / "tokenizer_config.json").write_text(text)
    return directory


def write_gguf(path: Path, backend: Backend, model: str, **extra: Any) -> Path:
    """A GGUF file that holds only this tokenizer, as the usual converters write it."""
    state = json.loads(backend.to_str())
    by_id = {index: text for text, index in backend.get_vocab(with_added_tokens=True).items()}
    tokens = [by_id[index] for index in range(len(by_id))]
    added = {token["id"]: token["special"] for token in state["added_tokens"]}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types([{True: 3, False: 4, None: 1}[added.get(index)] for index in range(len(tokens))])
    merges = [tuple(merge) for merge in state["model"]["merges"]]
    if model == "llama":
        rank = {left + right: place for place, (left, right) in reversed(list(enumerate(merges)))}
        writer.add_token_scores([float(-rank.get(token, len(merges))) for token in tokens])
    else:
        writer.add_tokenizer_pre(extra.pop("pre", "smollm"))
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    for key, value in extra.items():
        adders: dict[type, Any] = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add = adders[type(value)]
        add(f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture
def write_checkpoint_directory() -> Any:
    return write_directory


@pytest.fixture
def write_gguf_file() -> Any:
    return write_gguf


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The real default model's GGUF file, where the machine has it."""
    named = os.environ.get("PIE_TEST_DEFAULT_MODEL")
    home = Path(os.environ.get("PIE_HOME", Path.home() / ".pie"))
    places = [Path(named)] if named else sorted(home.glob("**/SmolLM2-135M-Instruct*.gguf"))
    for path in places:
        if path.is_file():
            return path
    pytest.skip("the default model is not on this machine (PIE_TEST_DEFAULT_MODEL or PIE_HOME)")
