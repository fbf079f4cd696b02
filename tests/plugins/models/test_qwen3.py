"""Qwen3 over the architecture contract: equal to transformers in its several settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32
from pie_core.testing.any_architecture import ArchitectureContract
from pie_plugins.models.qwen3 import DECLARATION
from tests.plugins.models.reference import YARN, portable, tiny, transformers_logits


class TestQwen3(ArchitectureContract):
    declaration = DECLARATION
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tied": tiny("qwen3", head_dim=32, tie_word_embeddings=True, rope_theta=1e6),
        "untied": tiny("qwen3", max_window_layers=2, use_sliding_window=False),
        "biases": tiny("qwen3", attention_bias=True),
        "yarn": tiny("qwen3", rope_scaling=YARN),
    }
    refused: ClassVar[Mapping[str, object]] = {"brand_new_switch": True, "use_sliding_window": True}

    def make_driver(self, path: Path) -> Driver:
        return portable(path)

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        return transformers_logits(path, tokens)
