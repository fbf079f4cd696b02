"""DeepSeek V3.2 over the architecture contract: equal to transformers where fewer rows are read than there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32
from pie_core.testing.any_architecture import ArchitectureContract
from pie_plugins.models.deepseek_v32 import DECLARATION
from tests.plugins.models.reference import YARN, portable, tiny_sparse, transformers_logits


class TestDeepseekV32(ArchitectureContract):
    declaration = DECLARATION
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "yarn": tiny_sparse("deepseek_v32", rope_scaling=YARN),
        "one row is read": tiny_sparse("deepseek_v32", index_topk=1, first_k_dense_replace=0),
        "all rows are read": tiny_sparse("deepseek_v32", index_topk=64),
    }
    refused: ClassVar[Mapping[str, object]] = {
        "index_topk": 0,
        "index_head_dim": 4,
        "layer_types": ["full_attention"],
        "indexer_types": ["full"],
    }

    def make_driver(self, path: Path) -> Driver:
        return portable(path)

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        return transformers_logits(path, tokens)
