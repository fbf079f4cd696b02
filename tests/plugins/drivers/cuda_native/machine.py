"""The CUDA driver over a tiny checkpoint: on a GPU where there is one, on its plain operations elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pie_core.contracts.driver import Driver, DriverRequest
from pie_plugins.drivers.cuda_native import pie_drivers
from pie_plugins.drivers.cuda_native.options import CudaNativeOptions
from tests.plugins.models.reference import ARCHITECTURES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cuda_native(path: Path, swap_bytes: int = 0, **options: Any) -> Driver:
    chosen = {
        "dtype": "float32",
        "total_pages": 512,
        "max_batch_tokens": 512,
        "max_batch_requests": 8,
        "graph_rows": 64,  # a few recordings; there is one for each size
        **options,
    }
    (declaration,) = pie_drivers()
    request = DriverRequest(
        path, DEVICE, CudaNativeOptions(**chosen), ARCHITECTURES, {}, swap_bytes=swap_bytes
    )
    return declaration.load(request)
