"""Checkpoints that hold more than the language model load, and say by name what is left aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pie_core.errors import LoadError
from pie_core.testing.any_architecture import WEIGHTS, write_checkpoint
from tests.plugins.models.reference import ARCHITECTURES, CONFIGS, portable, tiny, tiny_moe
from tests.plugins.models.test_csm import tiny_csm
from tests.plugins.models.test_gemma4 import LARGE, SMALL, nested
from tests.plugins.models.test_kimi_k2 import WHOLE
from tests.plugins.models.test_nemotron_h import tiny_nemotron
from tests.plugins.models.test_qwen3_5 import tiny_experts, tiny_qwen
from tests.plugins.models.test_qwen3_vl import beside_tower

SECOND_TOKEN = {"num_nextn_predict_layers": 1}
VISUAL = ["model.visual.blocks.0.attn.qkv.weight", "model.visual.merger.linear_fc1.weight"]
DEEPSEEK_MTP = ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight"]
QWEN_MTP = ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"]
GEMMA_TOWERS = [
    "model.vision_tower.patch_embedder.input_proj.weight",
    "model.audio_tower.output_proj.weight",
    "model.embed_vision.embedding_projection.weight",
    "model.embed_audio.embedding_projection.weight",
]

# What a published checkpoint of each family holds beside the language model.
MORE: Mapping[str, tuple[str, Mapping[str, Any], list[str]]] = {
    "DeepSeek-V3": ("deepseek_v3", CONFIGS["deepseek_v3"] | SECOND_TOKEN, DEEPSEEK_MTP),
    "DeepSeek-V3.2": ("deepseek_v32", CONFIGS["deepseek_v32"] | SECOND_TOKEN, DEEPSEEK_MTP),
    "GLM-5": ("glm5", CONFIGS["glm5"] | SECOND_TOKEN, [*DEEPSEEK_MTP, "model.layers.3.indexer.wk.weight"]),
    "Kimi-K2.5": ("kimi_k25", WHOLE, ["vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.weight"]),
    "Nemotron-3-Super": ("nemotron_h", tiny_nemotron("M*E"), ["mtp.layers.0.eh_proj.weight"]),
    "Qwen3.5": ("qwen3_5", tiny_qwen(), QWEN_MTP + VISUAL),
    "Qwen3.5-MoE": ("qwen3_5_moe", tiny_experts(), QWEN_MTP + VISUAL),
    "Qwen3-VL": ("qwen3_vl", beside_tower(tiny("qwen3_vl")), VISUAL),
    "Qwen3-VL-MoE": ("qwen3_vl_moe", beside_tower(tiny_moe() | {"model_type": "qwen3_vl_moe"}), VISUAL),
    "Gemma-4-E": ("gemma4", nested(SMALL), GEMMA_TOWERS),
    "Gemma-4-MoE": ("gemma4", nested(LARGE), GEMMA_TOWERS),
    "CSM": ("csm", tiny_csm(), ["codec_model.encoder.layers.0.conv.weight"]),
}

Change = Callable[[dict[str, Any]], object]


def change_weights(folder: Path, change: Change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("family", MORE)
def test_what_is_not_the_language_model_is_left_aside_by_name(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, config, more = MORE[family]
    write_checkpoint(tmp_path, ARCHITECTURES[name], config)
    change_weights(tmp_path, lambda weights: weights.update({each: np.zeros((4, 4)) for each in more}))
    with caplog.at_level("INFO"):
        portable(tmp_path).close()
    patterns = [line.rpartition(": ")[2] for line in caplog.messages if "are left aside" in line]
    assert all(any(each.startswith(pattern.rstrip("*")) for pattern in patterns) for each in more), patterns


@pytest.mark.parametrize("family", MORE)
def test_what_nobody_knows_is_not(family: str, tmp_path: Path) -> None:
    name, config, _ = MORE[family]
    write_checkpoint(tmp_path, ARCHITECTURES[name], config)
    change_weights(tmp_path, lambda weights: weights.update({"model.adapter.weight": np.zeros(4)}))
    with pytest.raises(LoadError, match=r"1 left over: model\.adapter\.weight"):
        portable(tmp_path)


def test_every_tensor_of_speech_has_to_be_there_in_its_shape(tmp_path: Path) -> None:
    name = "depth_decoder.model.layers.1.mlp.down_proj.weight"
    write_checkpoint(tmp_path, ARCHITECTURES["csm"], tiny_csm())
    change_weights(tmp_path, lambda weights: weights.update({name: weights[name][:-1].copy()}))
    with pytest.raises(LoadError, match=rf"misshaped.*{name}"):
        portable(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(LoadError, match=rf"1 missing: {name}"):
        portable(tmp_path)
