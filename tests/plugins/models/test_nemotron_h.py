"""Nemotron-H over the architecture contract: equal to transformers in its several settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32
from pie_core.testing.any_architecture import ArchitectureContract
from pie_plugins.models.nemotron_h import DECLARATION
from tests.plugins.models.reference import portable, transformers_logits


def tiny_nemotron(pattern: str, **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "nemotron_h",
        "vocab_size": 320,
        "hidden_size": 64,
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": 6,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "chunk_size": 8,
        "use_conv_bias": True,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    return config | changes


class TestNemotronH(ArchitectureContract):
    declaration = DECLARATION
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "plain layers": tiny_nemotron("M-*-", use_conv_bias=False),
        "experts": tiny_nemotron("ME*", n_group=2, topk_group=1, num_experts_per_tok=2),
        "experts over latents": tiny_nemotron("MEM*", moe_latent_size=32),
    }
    refused: ClassVar[Mapping[str, object]] = {
        "brand_new_switch": True,
        "hybrid_override_pattern": "MMX*",
        "time_step_limit": [0.1, 1.0],
        "mlp_hidden_act": "silu",
        "mamba_num_heads": 7,
    }

    def make_driver(self, path: Path) -> Driver:
        return portable(path)

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        return transformers_logits(path, tokens)
