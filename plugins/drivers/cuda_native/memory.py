"""How many KV pages fit: the share of the GPU that pie may use, less what weights and a full step were seen to take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pie_core.errors import LoadError

GRAPH_RESERVE = 768 * 2**20  # what the recorded graphs and the library's workspaces may take beside it
MIB = 2**20


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of one GPU while a model is loaded."""

    total: int
    others: int  # taken by other programs
    weights: int
    activations: int  # the most that a full step took beyond the weights


def pages_that_fit(use: MemoryUse, utilization: float, page_bytes: int) -> int:
    """Raises LoadError, with the whole sum, where not one page fits."""
    allowed = int(use.total * utilization)
    left = allowed - use.others - use.weights - use.activations - GRAPH_RESERVE
    pages = left // page_bytes
    if pages < 1:
        raise LoadError(
            "driver cuda_native: no room for KV pages:"
            f" gpu_mem_utilization {utilization} of {use.total // MIB} MiB allows {allowed // MIB} MiB, of which"
            f" weights take {use.weights // MIB}, a step of max_batch_tokens {use.activations // MIB}, graphs"
            f" {GRAPH_RESERVE // MIB} and other programs {use.others // MIB}; raise gpu_mem_utilization, or lower"
            " max_batch_tokens"
        )
    return pages


def is_out_of_memory(error: BaseException) -> bool:
    """Torch has a type for what its own allocator misses; what CUDA itself misses, for a recording say, has none."""
    return isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in str(error)
