"""Checkpoints that transformers has saved, in its own spelling of configurations and tensors, are read like others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from pie_core.testing.any_architecture import logits, write_checkpoint
from pie_core.testing.batches import Stepper
from tests.plugins.models.reference import ARCHITECTURES, CONFIGS, portable, tiny, tiny_moe
from tests.plugins.models.test_gemma4 import LARGE
from tests.plugins.models.test_kimi_linear import tiny_kimi
from tests.plugins.models.test_nemotron_h import tiny_nemotron
from tests.plugins.models.test_qwen3_5 import tiny_experts, tiny_qwen
from tests.plugins.models.test_qwen3_vl import beside_tower

HYBRIDS = {
    "gemma4": LARGE,
    "kimi_linear": tiny_kimi([1, 2], [3]),
    "nemotron_h": tiny_nemotron("ME*-"),
    "qwen3_5": tiny_qwen(),
    "qwen3_5_moe": tiny_experts(),
    "qwen3_vl": beside_tower(tiny("qwen3_vl")),
    "qwen3_vl_moe": beside_tower({**tiny_moe(), "model_type": "qwen3_vl_moe"}),
}
ALL = CONFIGS | HYBRIDS
TOLERANCE = 1e-6  # of the deviation: experts that are stored transposed are summed up in another order


@pytest.mark.parametrize("architecture", sorted(ALL))
def test_a_saved_checkpoint_gives_the_logits_of_the_published_one(architecture: str, tmp_path: Path) -> None:
    published, saved = tmp_path / "published", tmp_path / "saved"
    write_checkpoint(published, ARCHITECTURES[architecture], ALL[architecture])
    towers = "text_config" in ALL[architecture]
    kind = transformers.AutoModelForImageTextToText if towers else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(published, dtype=torch.float32)
    model.save_pretrained(saved)
    prompt = np.random.default_rng(7).integers(0, 320, 24).tolist()
    seen = []
    for path in (published, saved):
        driver = portable(path)
        seen.append(logits(Stepper(driver), [prompt]))
        driver.close()
    assert np.abs(seen[0] - seen[1]).max() <= TOLERANCE * seen[0].std()
