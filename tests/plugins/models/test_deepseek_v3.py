"""DeepSeek V3 over the architecture contract: equal to transformers in its several settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32
from pie_core.testing.any_architecture import ArchitectureContract, edit_config, write_checkpoint
from pie_plugins.models.deepseek_v3 import DECLARATION
from tests.plugins.models.reference import YARN, portable, tiny_latent, transformers_logits


class TestDeepseekV3(ArchitectureContract):
    declaration = DECLARATION
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "plain": tiny_latent("deepseek_v3"),
        "groups and yarn": tiny_latent(
            "deepseek_v3",
            n_routed_experts=16,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=4,
            rope_scaling=YARN,
        ),
        "direct queries": tiny_latent("deepseek_v3", q_lora_rank=None, norm_topk_prob=False),
        # Whole prompts expand their latents here, shorter chunks absorb them.
        "wide latents": tiny_latent("deepseek_v3", kv_lora_rank=64, qk_nope_head_dim=8, v_head_dim=8),
        "two shared experts, tied": tiny_latent(
            "deepseek_v3", n_shared_experts=2, tie_word_embeddings=True, first_k_dense_replace=0
        ),
    }
    refused: ClassVar[Mapping[str, object]] = {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "moe_layer_freq": 2,
        "attention_bias": True,
        "n_group": 3,
        "rope_interleave": False,
        "quantization_config": {"quant_method": "fp8"},
        "index_topk": 8,
    }

    def make_driver(self, path: Path) -> Driver:
        return portable(path)

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        return transformers_logits(path, tokens)


def test_the_layer_that_predicts_a_second_token_is_left_aside_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, DECLARATION, tiny_latent("deepseek_v3", num_hidden_layers=4))
    edit_config(tmp_path, lambda config: config.update(num_hidden_layers=3, num_nextn_predict_layers=1))
    path = tmp_path / "model.safetensors"
    weights = load_file(path) | {"model.layers.3.eh_proj.weight": np.zeros((64, 128), np.float32)}
    save_file(weights, path, metadata={"format": "pt"})
    with caplog.at_level("INFO"):
        portable(tmp_path).close()
    assert "tensors are left aside: model.layers.3.*" in caplog.text
