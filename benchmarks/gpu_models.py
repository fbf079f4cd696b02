"""The shapes of the models that the GPU benchmark measures, and the least time that one step of them can take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COPY_BYTES_PER_S = 4.3e12  # an H200, measured: a large copy, bytes read and written
MATRIX_FLOP_PER_S = 7.9e14  # likewise: a large bf16 product of random values
ITEM = 2  # bytes of a bfloat16


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder."""

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    head_dim: int = 128

    @property
    def layer_weights(self) -> int:
        attention = (self.heads + 2 * self.kv_heads + self.heads) * self.head_dim * self.hidden_size
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def weights_read(self) -> int:
        """Parameters that a step reads: every layer and the head."""
        return self.layers * self.layer_weights + self.vocab_size * self.hidden_size

    @property
    def row_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * ITEM

    def write(self, folder: Path) -> Path:
        """A directory with the config.json that random weights are drawn for."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config()))
        return folder

    def config(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": self.tied,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("0.6B", "qwen3", 151936, 1024, 3072, 28, 16, 8, tied=True),
        Shape("1.7B", "qwen3", 151936, 2048, 6144, 28, 16, 8, tied=True),
        Shape("4B", "qwen3", 151936, 2560, 9728, 36, 32, 8, tied=True),
        Shape("8B", "qwen3", 151936, 4096, 12288, 36, 32, 8, tied=False),
        Shape("llama-8B", "llama", 128256, 4096, 14336, 32, 32, 8, tied=False),
    )
}


def decode_floor_ms(shape: Shape, batch: int, context: int) -> float:
    """Memory or arithmetic, whichever takes longer: the least a decode step can take on one H200."""
    memory = (shape.weights_read * ITEM + batch * context * shape.row_bytes) / COPY_BYTES_PER_S
    return 1e3 * max(memory, 2 * batch * shape.weights_read / MATRIX_FLOP_PER_S)


def prefill_floor_ms(shape: Shape, tokens: int) -> float:
    """The arithmetic of one prompt, attention included, the head for its last row only."""
    products = 2 * tokens * shape.layers * shape.layer_weights
    attention = 2 * shape.layers * shape.heads * shape.head_dim * tokens * tokens
    return 1e3 * max((products + attention) / MATRIX_FLOP_PER_S, shape.weights_read * ITEM / COPY_BYTES_PER_S)
