"""Gemma 4 over the architecture contract: equal to transformers in its several settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32
from pie_core.testing.any_architecture import ArchitectureContract
from pie_plugins.models.gemma4 import DECLARATION
from tests.plugins.models.reference import portable, transformers_logits

KINDS = ["sliding_attention", "full_attention"]


def tiny_gemma(**changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "gemma4_text",
        "vocab_size": 320,
        "vocab_size_per_layer_input": 320,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 256,
        "sliding_window": 6,
        "layer_types": KINDS * 2,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.25,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": True,
    }
    return config | changes


SMALL = tiny_gemma(
    hidden_size_per_layer_input=8,
    num_key_value_heads=1,
    num_kv_shared_layers=2,
    use_double_wide_mlp=True,
)
LARGE = tiny_gemma(
    attention_k_eq_v=True,
    num_global_key_value_heads=1,
    enable_moe_block=True,
    num_experts=8,
    top_k_experts=2,
    moe_intermediate_size=24,
    use_bidirectional_attention="vision",
)


def nested(text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "gemma4",
        "text_config": dict(text),
        "vision_config": None,
        "audio_config": None,
        "image_token_id": 300,
    }


class TestGemma4(ArchitectureContract):
    declaration = DECLARATION
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small: per-layer vectors, shared keys": SMALL,
        "dense: keys are values": tiny_gemma(attention_k_eq_v=True, num_global_key_value_heads=1),
        "experts": LARGE,
        "small, beside towers": nested(SMALL),
    }
    refused: ClassVar[Mapping[str, object]] = {
        "brand_new_switch": True,
        "use_bidirectional_attention": "all",
        "hidden_activation": "silu",
        "num_kv_shared_layers": 3,
        "attention_bias": True,
    }

    def make_driver(self, path: Path) -> Driver:
        return portable(path)

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        return transformers_logits(path, tokens)
