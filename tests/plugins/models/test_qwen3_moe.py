"""Qwen3-MoE over the architecture contract: equal to transformers in its several settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32
from pie_core.testing.any_architecture import ArchitectureContract
from pie_plugins.models.qwen3_moe import DECLARATION
from tests.plugins.models.reference import portable, tiny_moe, transformers_logits


class TestQwen3Moe(ArchitectureContract):
    declaration = DECLARATION
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "every layer": tiny_moe(),
        "a plain layer between": tiny_moe(num_hidden_layers=3, mlp_only_layers=[1]),
        "every other layer, weights as they are": tiny_moe(decoder_sparse_step=2, norm_topk_prob=False),
        "one expert for a token": tiny_moe(num_experts_per_tok=1, norm_topk_prob=False),
    }
    refused: ClassVar[Mapping[str, object]] = {
        "use_sliding_window": True,
        "quantization_config": {"bits": 4},
        "num_experts_per_tok": 9,
        "n_group": 2,
        "moe_intermediate_size": 20,
    }

    def make_driver(self, path: Path) -> Driver:
        return portable(path)

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        return transformers_logits(path, tokens)
