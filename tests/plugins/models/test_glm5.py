"""GLM-5 over the architecture contract: equal to transformers, indexers shared or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32
from pie_core.testing.any_architecture import ArchitectureContract
from pie_plugins.models.glm5 import DECLARATION
from tests.plugins.models.reference import portable, tiny_sparse, transformers_logits

ROPE = {"rope_type": "default", "rope_theta": 1e6}


class TestGlm5(ArchitectureContract):
    declaration = DECLARATION
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "5.1": tiny_sparse("glm_moe_dsa", rope_parameters=ROPE, indexer_rope_interleave=True),
        "5.2": tiny_sparse(
            "glm_moe_dsa",
            num_hidden_layers=4,
            indexer_types=["full", "full", "shared", "shared"],
            head_dim=192,
        ),
        "every second layer": tiny_sparse(
            "glm_moe_dsa", num_hidden_layers=4, index_topk_freq=2, index_skip_topk_offset=1
        ),
    }
    refused: ClassVar[Mapping[str, object]] = {
        "indexer_rope_interleave": False,
        "indexer_types": ["shared", "full", "full"],
        "moe_router_dtype": "bfloat16",
    }

    def make_driver(self, path: Path) -> Driver:
        return portable(path)

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        return transformers_logits(path, tokens)
