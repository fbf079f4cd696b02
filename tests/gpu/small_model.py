"""A small Qwen3 on the CUDA driver, as the tests on a GPU use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pie_core.contracts.driver import Driver
from tests.plugins.drivers.cuda_native.machine import cuda_native

# As large as tensor cores and FlashInfer want their heads, and small enough to be written in a second.
SMALL = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_hidden_layers": 4, "vocab_size": 4096,
         "max_position_embeddings": 2048}  # fmt: skip


def small(checkpoint: Path, **options: Any) -> Driver:
    """With the library's products where nothing else is said: others are measured at load, which takes seconds."""
    chosen: dict[str, Any] = {"dtype": "bfloat16", "max_batch_tokens": 2048, "products": "library"}
    return cuda_native(checkpoint, **(chosen | options))
