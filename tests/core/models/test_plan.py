"""What a model needs of memory follows from its config.json: sizes that are known of published models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pie_core.errors import LoadError
from pie_core.models.plan import GIB, ModelPlan, plan_model
from tests.plugins.models.reference import ARCHITECTURES
from tests.rules.source_tree import ROOT

# Billions, counted by transformers on its meta device or published, without towers and layers for further tokens.
COUNTS = {
    "CSM-1B": 1.553,
    "DeepSeek-V3": 671.03,
    "DeepSeek-V3.2": 671.9,
    "GLM-5.1": 743.9,
    "Gemma-4-26B-A4B": 25.2,
    "Gemma-4-31B": 30.7,
    "Kimi-K2": 1026.4,
    "Kimi-Linear-48B-A3B": 49.1,
    "Llama-3.1-405B": 405.85,
    "Llama-3.1-8B": 8.03,
    "Llama-3.2-1B": 1.236,
    "Llama-3.2-3B": 3.213,
    "Llama-3.3-70B": 70.55,
    "Nemotron-3-Nano-30B-A3B": 31.6,
    "Nemotron-3-Super-120B-A12B": 120.7,
    "Nemotron-3-Ultra-550B-A55B": 549.3,
    "Nemotron-H-56B": 56.3,
    "Qwen3-0.6B": 0.596,
    "Qwen3-1.7B": 1.72,
    "Qwen3-14B": 14.77,
    "Qwen3-235B-A22B": 235.1,
    "Qwen3-30B-A3B": 30.53,
    "Qwen3-32B": 32.76,
    "Qwen3-4B": 4.02,
    "Qwen3-8B": 8.19,
    "Qwen3-Coder-480B-A35B": 480.2,
    "Qwen3.5-122B-A10B": 122.1,
    "Qwen3.5-27B": 26.9,
    "Qwen3.5-35B-A3B": 34.7,
    "Qwen3.5-397B-A17B": 396.3,
}


def published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ROOT / f"docs/checkpoints/{name}.json").read_text())
    return config


DEEPSEEK_V3, QWEN3_30B = published("DeepSeek-V3"), published("Qwen3-30B-A3B")


def planned(folder: Path, config: dict[str, Any]) -> ModelPlan:
    (folder / "config.json").write_text(json.dumps(config))
    return plan_model(folder, ARCHITECTURES)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_those_that_are_published(name: str, tmp_path: Path) -> None:
    assert planned(tmp_path, published(name)).num_parameters == pytest.approx(COUNTS[name] * 1e9, rel=3e-3)


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
