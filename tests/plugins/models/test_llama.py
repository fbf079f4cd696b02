"""Llama over the architecture contract: equal to transformers in its several settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32
from pie_core.testing.any_architecture import ArchitectureContract
from pie_plugins.models.llama import DECLARATION
from tests.plugins.models.reference import portable, tiny, transformers_logits

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class TestLlama(ArchitectureContract):
    declaration = DECLARATION
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "grouped": tiny("llama"),
        "tied": tiny("llama", tie_word_embeddings=True),
        "biases": tiny("llama", attention_bias=True, mlp_bias=True),
        "llama3 rope": tiny("llama", rope_scaling=LLAMA3, rope_theta=500000.0),
        "one key head": tiny("llama", num_key_value_heads=1, head_dim=8),
        "every key head": tiny("llama", num_key_value_heads=4, head_dim=32),
    }

    def make_driver(self, path: Path) -> Driver:
        return portable(path)

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        return transformers_logits(path, tokens)
