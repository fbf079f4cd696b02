"""What the CUDA driver has kernels for gives the logits of the portable driver; the rest is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pie_core.errors import LoadError
from pie_core.testing.any_architecture import logits, write_checkpoint
from pie_core.testing.batches import Stepper
from tests.plugins.drivers.cuda_native.machine import cuda_native
from tests.plugins.models.reference import ARCHITECTURES, CONFIGS, YARN, portable, tiny, tiny_moe

PROMPT = np.random.default_rng(3).integers(0, 320, 24).tolist()


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("qwen3", tiny("qwen3")),
        ("qwen3", tiny("qwen3", rope_scaling=YARN)),
        ("qwen3_moe", tiny_moe(num_hidden_layers=3, mlp_only_layers=[1])),
    ],
    ids=["dense", "yarn", "experts"],
)
def test_logits_equal_those_of_the_portable_driver(
    architecture: str, config: Mapping[str, Any], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, ARCHITECTURES[architecture], config)
    seen = []
    for driver in (cuda_native(tmp_path), portable(tmp_path)):
        seen.append(logits(Stepper(driver), [PROMPT[:20], *([token] for token in PROMPT[20:])]))
        driver.close()
    assert np.abs(seen[0] - seen[1]).max() <= 1e-4 * seen[1].std()


@pytest.mark.parametrize("architecture", ["deepseek_v3", "glm5"])
def test_latent_rows_are_refused_by_name(architecture: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARCHITECTURES[architecture], CONFIGS[architecture])
    with pytest.raises(LoadError, match=r"group 'latent'.*use the driver portable"):
        cuda_native(tmp_path)
