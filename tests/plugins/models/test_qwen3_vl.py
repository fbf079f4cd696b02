"""Qwen3-VL's language model over the architecture contract: equal to transformers in its several settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32, ProbeKind
from pie_core.testing.any_architecture import PROMPT, ArchitectureContract, rows_of
from pie_core.testing.batches import Probe, Request, Stepper
from pie_plugins.models.layers.transformers_reference import multimodal_logits
from pie_plugins.models.qwen3_vl import DENSE, EXPERTS
from tests.plugins.models.reference import portable, tiny, tiny_moe

AXES = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0],
}


def beside_tower(text: Mapping[str, Any], tied: bool = False) -> dict[str, Any]:
    language = {**text, "model_type": f"{text['model_type']}_text", "rope_scaling": AXES, "rope_theta": 5e6}
    return {
        "model_type": text["model_type"],
        "text_config": language,
        "vision_config": VISION,
        "tie_word_embeddings": tied,
        "image_token_id": 300,
    }


class TestQwen3VL(ArchitectureContract):
    declaration = DENSE
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "untied": beside_tower(tiny("qwen3_vl")),
        "tied": beside_tower(tiny("qwen3_vl"), tied=True),
    }
    refused: ClassVar[Mapping[str, object]] = {"brand_new_switch": True}

    def make_driver(self, path: Path) -> Driver:
        return portable(path)

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        return multimodal_logits(path, tokens)

    def test_three_axes_of_positions_equal_the_reference(self, checkpoint: Path, stepper: Stepper) -> None:
        prompt = self.prompt(stepper)
        positions = np.random.default_rng(2).integers(0, 40, (PROMPT, 3))
        probes = [Probe(ProbeKind.LOGITS, row) for row in range(PROMPT)]
        given = [tuple(each) for each in positions.tolist()]
        seen = rows_of(stepper, [Request(stepper.context(), prompt, positions=given, probes=probes)])
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        )
        ids = torch.from_numpy(positions.T.copy())[:, None]
        with torch.inference_mode():
            expected = model(torch.tensor([prompt]), position_ids=ids).logits[0].numpy()
        assert self.close(seen, expected)


class TestQwen3VLMoe(TestQwen3VL):
    declaration = EXPERTS
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "experts": beside_tower(tiny_moe() | {"model_type": "qwen3_vl_moe"})
    }
