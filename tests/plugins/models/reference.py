"""Logits of transformers in float32, and tiny configurations that it and we both read."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from pie_core.contracts.driver import Driver, DriverRequest
from pie_core.contracts.forward import Float32
from pie_plugins import models
from pie_plugins.drivers.portable import pie_drivers
from pie_plugins.drivers.portable.options import PortableOptions

ARCHITECTURES = {
    each.name: each
    for found in pkgutil.iter_modules(models.__path__, f"{models.__name__}.")
    if not found.ispkg
    for each in getattr(importlib.import_module(found.name), "pie_architectures", list)()
}


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


def tiny_latent(model_type: str, **changes: Any) -> dict[str, Any]:
    """Latent attention and experts, in the keys of DeepSeek's configurations."""
    own = {
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
    }
    config = tiny(model_type, num_hidden_layers=3) | own | changes
    del config["head_dim"]
    return config


def tiny_sparse(model_type: str, **changes: Any) -> dict[str, Any]:
    """The same with an indexer. Many index heads, or sums of positive products tie at zero."""
    index = {"index_n_heads": 8, "index_head_dim": 16, "index_topk": 8}
    return tiny_latent(model_type, **index | changes)


YARN = {
    "type": "yarn",
    "factor": 8.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 32,
}

# One configuration of each architecture, for tests that want several.
CONFIGS = {
    "llama": tiny("llama"),
    "qwen3": tiny("qwen3"),
    "qwen3_moe": tiny_moe(),
    "deepseek_v3": tiny_latent("deepseek_v3", rope_scaling=YARN),
    "deepseek_v32": tiny_sparse("deepseek_v32"),
    "glm5": tiny_sparse("glm_moe_dsa", indexer_types=["full", "full", "shared"]),
}


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
