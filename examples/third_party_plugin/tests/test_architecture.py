"""Seed-OSS gives the logits of transformers, and refuses what it cannot compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from pie_core.contracts.driver import Driver, DriverRequest
from pie_core.contracts.forward import Float32
from pie_core.testing.any_architecture import ArchitectureContract
from pie_plugins.drivers.portable import pie_drivers
from pie_plugins.drivers.portable.options import PortableOptions

from pie_seed_oss import DECLARATION

TINY: Mapping[str, Any] = {
    "model_type": "seed_oss",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "attention_bias": True,
    "residual_dropout": 0.1,
    "tie_word_embeddings": False,
}


class TestContract(ArchitectureContract):
    declaration = DECLARATION
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "plain": TINY,
        "no biases": {**TINY, "attention_bias": False},
        "an output bias": {**TINY, "attention_out_bias": True, "tie_word_embeddings": True},
    }

    def make_driver(self, path: Path) -> Driver:
        (declaration,) = pie_drivers()
        options = PortableOptions(dtype="float32", cpu_threads=1, kv_memory_mb=8)
        architectures = {DECLARATION.name: DECLARATION}
        return declaration.load(DriverRequest(path, "cpu", options, architectures, {}))

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.inference_mode():
            logits: Float32 = model(torch.tensor([list(tokens)])).logits[0].numpy()
        return logits
