"""Kimi Linear over the architecture contract: equal to transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32
from pie_core.testing.any_architecture import ArchitectureContract
from pie_plugins.models.kimi_linear import DECLARATION
from tests.plugins.models.reference import portable, transformers_logits


def tiny_kimi(delta: Sequence[int], full: Sequence[int], **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "kimi_linear",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 24,
        "num_hidden_layers": len(delta) + len(full),
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_shared_experts": 1,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "routed_scaling_factor": 2.446,
        "moe_renormalize": True,
        "num_expert_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-5,
        "model_max_length": 256,
        "linear_attn_config": {
            "full_attn_layers": list(full),
            "kda_layers": list(delta),
            "head_dim": 8,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config | changes


class TestKimiLinear(ArchitectureContract):
    declaration = DECLARATION
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "attention last": tiny_kimi([1, 2], [3]),
        "attention between, groups of experts": tiny_kimi(
            [1, 3], [2], num_expert_group=2, moe_renormalize=False, first_k_dense_replace=2
        ),
    }
    refused: ClassVar[Mapping[str, object]] = {
        "brand_new_switch": True,
        "q_lora_rank": 8,
        "mla_use_nope": False,
        "linear_attn_config": {"num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4, "kda_layers": [1]},
    }

    def make_driver(self, path: Path) -> Driver:
        return portable(path)

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        return transformers_logits(path, tokens)
