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

from pie_core.text.templates import ChatTemplate, TemplateSource
from pie_core.text.text_model import TextModel
from pie_core.text.tokenizer import Tokenizer

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


CHATML_DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are Tiny.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set sys = messages[0].content | trim %}{% set turns = messages[1:] %}
{%- else %}{% set sys = '' %}{% set turns = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today: ' + strftime_now('%d %b %Y') + '\\n\\n' + sys + '<|eot_id|>' }}
{%- for m in turns %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set text, thought = m.content, '' %}
        {%- if '</think>' in text %}
            {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
        {%- generation %}{{- text + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
GEMMA = """\
{{ bos_token }}{% set first = '' %}{% set turns = messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}{% endif %}
{%- for m in turns -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Roles must alternate user/assistant') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}
    {{- (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
MISTRAL = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate') }}{% endif %}
    {%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
    {%- else %}{{- raise_exception('Only user and assistant roles') }}{% endif %}
{%- endfor %}
"""
DEEPSEEK = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}
{{- '<|im_start|>' + m.content }}{% else %}
{{- '<|im_end|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_end|><think>\\n' }}{% endif %}
"""
STYLES = {
    "chatml": (CHATML_DEFAULT_SYSTEM, {"eos_token": "<|im_end|>"}),
    "llama3": (LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "qwen3": (QWEN3, {"eos_token": "<|im_end|>"}),
    "gemma": (GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>"}),
    "mistral": (MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}),
    "deepseek": (DEEPSEEK, {"bos_token": "<s>", "eos_token": "</s>"}),
}


@pytest.fixture(params=sorted(STYLES))
def style(request: pytest.FixtureRequest) -> tuple[str, str, dict[str, str]]:
    """A way of writing chat templates: its name, a short template of that kind, and the tokens it names."""
    text, named = STYLES[request.param]
    return request.param, text, named


@pytest.fixture
def styles() -> dict[str, tuple[str, dict[str, str]]]:
    return STYLES


@pytest.fixture
def make_model(byte_level_backend: Backend) -> Any:
    """A text model with the tiny byte-level tokenizer and one style of template."""

    def make(style: str) -> TextModel:
        text, named = STYLES[style]
        tokenizer = Tokenizer(byte_level_backend, "tiny")
        end = tokenizer.token_id(named["eos_token"])
        assert end is not None
        return TextModel(tokenizer, ChatTemplate(TemplateSource(text, f"{style}.jinja"), named), (end,))

    return make
