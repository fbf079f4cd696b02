"""Kimi K2 and K2.5 over the architecture contract: equal to transformers' DeepSeek V3 with the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32
from pie_core.errors import LoadError
from pie_core.testing.any_architecture import ArchitectureContract, logits, write_checkpoint
from pie_core.testing.batches import Stepper
from pie_plugins.models.kimi_k2 import K2, K25
from tests.plugins.models.reference import YARN, portable, tiny_latent, transformers_logits

TEXT = tiny_latent("kimi_k2", rope_scaling=YARN | {"beta_fast": 1.0, "mscale_all_dim": 1.0})
WHOLE = {"model_type": "kimi_k25", "text_config": TEXT, "vision_config": {"vt_hidden_size": 48}}


def as_deepseek(path: Path, prefix: str, config: Mapping[str, Any]) -> Path:
    """The language model alone, under the name by which transformers knows it."""
    folder = path / "deepseek"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(config) | {"model_type": "deepseek_v3"}))
    weights = load_file(path / "model.safetensors")
    renamed = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class TestKimiK2(ArchitectureContract):
    declaration = K2
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {"K2": TEXT}

    def make_driver(self, path: Path) -> Driver:
        return portable(path)

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        return transformers_logits(as_deepseek(path, "", TEXT), tokens)


@pytest.mark.parametrize("stack", ["layers", "blocks"])  # as published, as transformers saves it
def test_the_language_model_of_k25_equals_it_alone(tmp_path: Path, stack: str) -> None:
    write_checkpoint(tmp_path, K25, WHOLE)
    prompt = np.random.default_rng(5).integers(0, 320, 24).tolist()
    expected = transformers_logits(as_deepseek(tmp_path, "language_model.", TEXT), prompt)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace(".layers.", f".{stack}."): weight for name, weight in weights.items()}
    towers = {"vision_tower.patch_embed.proj.bias": np.zeros(4), "mm_projector.proj.0.bias": np.zeros(4)}
    save_file(renamed | towers, tmp_path / "model.safetensors", metadata={"format": "pt"})
    driver = portable(tmp_path)
    seen = logits(Stepper(driver), [prompt])
    driver.close()
    assert np.abs(seen - expected).max() <= 1e-4 * expected.std()


def test_keys_inside_and_outside_the_language_model_are_refused_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, K25, WHOLE)
    for change in ({"brand_new_switch": True}, {"text_config": TEXT | {"brand_new_switch": True}}):
        (tmp_path / "config.json").write_text(json.dumps(WHOLE | change))
        with pytest.raises(LoadError, match="brand_new_switch"):
            portable(tmp_path)
