"""In bfloat16, logits are as near to exact ones as those of transformers in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pie_core.contracts.forward import Float32
from pie_core.engine.one_context import read_logits
from pie_core.testing.any_architecture import WEIGHTS, write_checkpoint
from tests.plugins.models.reference import ARCHITECTURES, portable, tiny, tiny_latent
from tests.plugins.models.test_kimi_linear import tiny_kimi
from tests.plugins.models.test_nemotron_h import tiny_nemotron
from tests.plugins.models.test_qwen3_5 import tiny_qwen

# None of them routes: an expert that is chosen otherwise at a near tie is no question of precision.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": tiny("llama"),
    "qwen3": tiny("qwen3"),
    "deepseek_v3": tiny_latent("deepseek_v3", first_k_dense_replace=3),
    "qwen3_5": tiny_qwen(),
    "nemotron_h": tiny_nemotron("M-*M-"),
    "kimi_linear": tiny_kimi([1, 2], [3], first_k_dense_replace=3),
}
PROMPTS, LENGTH = 8, 24


@pytest.mark.parametrize("name", CONFIGS)
def test_errors_are_no_larger_than_those_of_the_reference(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARCHITECTURES[name], CONFIGS[name])
    weights = {each: value.to(torch.bfloat16) for each, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
    )
    exact, rounded = portable(tmp_path), portable(tmp_path, dtype="bfloat16")
    ours: list[Float32] = []
    theirs: list[Float32] = []
    for prompt in np.random.default_rng(3).integers(0, 320, (PROMPTS, LENGTH)).tolist():
        expected = read_logits(exact, prompt).logits
        with torch.inference_mode():
            seen = model(torch.tensor([prompt])).logits[0].to(torch.float32).numpy()
        ours.append(np.abs(read_logits(rounded, prompt).logits - expected).mean(1))
        theirs.append(np.abs(seen - expected).mean(1))
    exact.close()
    rounded.close()
    assert np.median(ours) <= 1.05 * np.median(theirs)
