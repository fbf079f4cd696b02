"""Writes `checkpoint/`: a byte-level tokenizer of 512 tokens with a chat template, in Hugging Face's files.

    python -m pie_plugins.drivers.dummy.write_checkpoint

256 bytes, five special tokens, and 251 merges of frequent letters, so that a token is not always one character.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from pie_plugins.drivers.dummy import CHECKPOINT

VOCAB_SIZE = 512
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MEDIA_START, MEDIA_END = "<|media_start|>", "<|media_end|>"
SPECIAL = (END, TURN_START, TURN_END, MEDIA_START, MEDIA_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_TEXT = """
When the sun rises over the harbour, the first boats leave for the open sea, and the people of the town walk down to
the market. There are stalls with bread and fruit, with cloth and paper and tools; somebody sings, and children run
between the tables. An old sailor tells what he has seen: mountains of ice, a whale as long as a street, cities where
nobody sleeps. "You should have been there," he says, "but then, who would have listened to me today?" The answer is
laughter, and another question, and so the morning goes. What is written here has no meaning but this one: that common
letters stand together often enough to become tokens, in English at least, while numbers like 1, 20, 300 and 2024, and
code like `for i in range(10): print(i)`, are cut into smaller pieces. The assistant answers the user and the user asks
the assistant; the system speaks first. Every other text, in whatever writing, is carried by its bytes.
"""


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


def checkpoint_files() -> dict[str, str]:
    """File name -> content."""
    tokenizer = byte_level_tokenizer()
    end, media_start, media_end = (tokenizer.token_to_id(text) for text in (END, MEDIA_START, MEDIA_END))
    config = {
        "model_type": "dummy",
        "vocab_size": VOCAB_SIZE,
        "eos_token_id": [end, tokenizer.token_to_id(TURN_END)],
        "media_start_token_id": media_start,
        "media_end_token_id": media_end,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def write_checkpoint(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in checkpoint_files().items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    write_checkpoint(CHECKPOINT)
