"""Checkpoints that transformers has saved, in its own spelling of configurations and tensors, are read like others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from pie_core.testing.any_architecture import logits, write_checkpoint
from pie_core.testing.batches import Stepper
from tests.plugins.models.reference import ARCHITECTURES, CONFIGS, portable


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_a_saved_checkpoint_gives_the_logits_of_the_published_one(architecture: str, tmp_path: Path) -> None:
    published, saved = tmp_path / "published", tmp_path / "saved"
    write_checkpoint(published, ARCHITECTURES[architecture], CONFIGS[architecture])
    model = transformers.AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    model.save_pretrained(saved)
    prompt = np.random.default_rng(7).integers(0, 320, 24).tolist()
    seen = []
    for path in (published, saved):
        driver = portable(path)
        seen.append(logits(Stepper(driver), [prompt]))
        driver.close()
    assert np.array_equal(seen[0], seen[1])
