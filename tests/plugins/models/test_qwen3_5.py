"""Qwen3.5 over the architecture contract: equal to transformers in its several settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from safetensors.numpy import load_file, save_file

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32
from pie_core.testing.any_architecture import WEIGHTS, ArchitectureContract, logits, write_checkpoint
from pie_core.testing.batches import Stepper
from pie_plugins.models.qwen3_5 import DENSE, EXPERTS
from tests.plugins.models.reference import portable, transformers_logits


def tiny_qwen(**changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "qwen3_5_text",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "attn_output_gate": True,
        "full_attention_interval": 3,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
        },
        "tie_word_embeddings": False,
    }
    return config | changes


def tiny_experts(**changes: Any) -> dict[str, Any]:
    experts = {
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    }
    return tiny_qwen() | experts | changes


class TestQwen35(ArchitectureContract):
    declaration = DENSE
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "grouped": tiny_qwen(),
        "equal heads, short convolution, tied": tiny_qwen(
            linear_num_key_heads=4, linear_conv_kernel_dim=2, tie_word_embeddings=True
        ),
    }
    refused: ClassVar[Mapping[str, object]] = {
        "brand_new_switch": True,
        "attn_output_gate": False,
        "layer_types": ["linear_attention"],
        "rope_parameters": {"rope_type": "yarn", "factor": 2.0},
        "linear_num_key_heads": 3,
    }

    def make_driver(self, path: Path) -> Driver:
        return portable(path)

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        return transformers_logits(path, tokens)


class TestQwen35Moe(TestQwen35):
    declaration = EXPERTS
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {"shared expert": tiny_experts()}
    refused: ClassVar[Mapping[str, object]] = {"num_experts_per_tok": 9, "norm_topk_prob": False}

    def test_experts_that_are_stored_one_by_one_are_stacked(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, EXPERTS, tiny_experts())
        prompt = list(range(20))
        drivers = [self.make_driver(tmp_path)]
        unstack(tmp_path / WEIGHTS)
        drivers.append(self.make_driver(tmp_path))
        stacked, single = (logits(Stepper(driver), [prompt]) for driver in drivers)
        for driver in drivers:
            driver.close()
        assert (stacked == single).all()


def unstack(path: Path) -> None:
    weights = load_file(path)
    for name in [name for name in weights if ".mlp.experts." in name]:
        matrices = weights.pop(name)
        prefix, _, kind = name.rpartition(".")
        halves = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for expert, matrix in enumerate(matrices):
            rows = len(matrix) // len(halves)
            for place, half in enumerate(halves):
                part = matrix[place * rows : (place + 1) * rows].copy()
                weights[f"{prefix}.{expert}.{half}.weight"] = part
    save_file(weights, path, metadata={"format": "pt"})
