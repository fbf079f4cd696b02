"""Logits of transformers in float32, and tiny configurations that it and we both read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from pie_core.contracts.driver import Driver, DriverRequest
from pie_core.contracts.forward import Float32
from pie_plugins.drivers.portable import pie_drivers
from pie_plugins.drivers.portable.options import PortableOptions
from pie_plugins.models import llama, qwen3, qwen3_moe

ARCHITECTURES = {each.name: each for each in (llama.DECLARATION, qwen3.DECLARATION, qwen3_moe.DECLARATION)}


def tiny(model_type: str, **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": model_type,
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    return config | changes


def tiny_moe(**changes: Any) -> dict[str, Any]:
    experts = {
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return tiny("qwen3_moe") | experts | changes


# One configuration of each architecture, for tests that want several.
CONFIGS = {"llama": tiny("llama"), "qwen3": tiny("qwen3"), "qwen3_moe": tiny_moe()}


def transformers_logits(path: Path, tokens: Sequence[int]) -> Float32:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        logits: Float32 = model(torch.tensor([list(tokens)])).logits[0].numpy()
    return logits


def portable(path: Path, **options: Any) -> Driver:
    chosen = {"dtype": "float32", "cpu_threads": 1, "kv_memory_mb": 8, **options}
    (declaration,) = pie_drivers()
    return declaration.load(DriverRequest(path, "cpu", PortableOptions(**chosen), ARCHITECTURES, {}))
