"""What a model needs of memory follows from its config.json: sizes that are known of published models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pie_core.errors import LoadError
from pie_core.models.plan import GIB, ModelPlan, plan_model
from pie_plugins.models import deepseek_v3, gemma4, kimi_k2, llama, nemotron_h, qwen3_moe
from tests.rules.source_tree import ROOT

ARCHITECTURES = {
    declaration.name: declaration
    for module in (deepseek_v3, gemma4, kimi_k2, llama, nemotron_h, qwen3_moe)
    for declaration in module.pie_architectures()
}


def published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ROOT / f"docs/checkpoints/{name}.json").read_text())
    return config


DEEPSEEK_V3, KIMI_K2, QWEN3_30B = published("DeepSeek-V3"), published("Kimi-K2"), published("Qwen3-30B-A3B")


def planned(folder: Path, config: dict[str, Any]) -> ModelPlan:
    (folder / "config.json").write_text(json.dumps(config))
    return plan_model(folder, ARCHITECTURES)


def test_parameters_are_those_that_are_published(tmp_path: Path) -> None:
    assert planned(tmp_path, DEEPSEEK_V3).num_parameters == pytest.approx(671.03e9, rel=1e-4)
    assert planned(tmp_path, KIMI_K2).num_parameters == pytest.approx(1026.4e9, rel=1e-3)
    assert planned(tmp_path, QWEN3_30B).num_parameters == pytest.approx(30.53e9, rel=1e-3)


def test_state_is_counted_by_context_and_windows_up_to_their_length(tmp_path: Path) -> None:
    nano = planned(tmp_path, published("Nemotron-3-Nano-30B-A3B"))
    state = 23 * 64 * 64 * 128 * 4
    assert state < nano.bytes_per_context < 1.05 * state
    assert nano.bytes_per_token == 6 * 2 * 2 * 128 * 2
    gemma = planned(tmp_path, published("Gemma-4-31B"))
    assert gemma.bytes_per_context == 1024 * 50 * 2 * 16 * 256 * 2


def test_a_latent_row_is_all_that_a_token_keeps(tmp_path: Path) -> None:
    assert planned(tmp_path, DEEPSEEK_V3).bytes_per_token == 61 * (512 + 64) * 2
    assert planned(tmp_path, QWEN3_30B).bytes_per_token == 48 * 2 * 4 * 128 * 2


def test_smaller_formats_fit_where_bf16_does_not(tmp_path: Path) -> None:
    plan = planned(tmp_path, DEEPSEEK_V3)
    assert plan.weight_bytes["bf16"] / GIB == pytest.approx(1250, rel=1e-3)
    assert plan.tokens_that_fit("bf16", 8) is None
    assert (plan.tokens_that_fit("fp8", 8) or 0) > 1e6
    assert plan.tokens_that_fit("fp8", 1) is None
    assert plan.weight_bytes["bf16"] > plan.weight_bytes["fp8"] > plan.weight_bytes["int4"]


def test_how_a_checkpoint_is_quantized_does_not_matter(tmp_path: Path) -> None:
    quantized = DEEPSEEK_V3 | {"quantization_config": {"quant_method": "fp8"}}
    assert planned(tmp_path, quantized) == planned(tmp_path, DEEPSEEK_V3)


def test_a_model_that_nobody_reads_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"'mystery'.*deepseek_v3, .*kimi_k2"):
        planned(tmp_path, {"model_type": "mystery"})
