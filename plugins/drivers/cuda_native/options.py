"""The options of the CUDA driver, as they stand under `driver.options` in the YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class CudaNativeOptions:
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "arithmetic and KV cache"}
    )
    gpu_mem_utilization: float = field(
        default=0.9,
        metadata={
            "help": "share of the GPU's memory for weights, activations, graphs and KV pages together",
            "minimum": 0.05,
            "maximum": 1.0,
        },
    )
    kv_page_size: int = field(
        default=16, metadata={"help": "tokens on a KV page; the kernels want a power of two", "minimum": 1}
    )
    total_pages: int = field(
        default=0,
        metadata={
            "help": "number of KV pages; 0 = as many as gpu_mem_utilization leaves room for",
            "minimum": 0,
        },
    )
    host_pages: int = field(
        default=0,
        metadata={
            "help": "pages of pinned host memory to which idle contexts are swapped; 0 = what swap_memory_mb"
            " holds",
            "minimum": 0,
        },
    )
    max_batch_tokens: int = field(default=8192, metadata={"help": "token rows of one step", "minimum": 1})
    max_batch_requests: int = field(default=256, metadata={"help": "contexts in one step", "minimum": 1})
    kernels: Literal["auto", "triton", "torch"] = field(
        default="auto",
        metadata={"help": "fused kernels; auto: triton on a GPU, plain torch operations elsewhere"},
    )
    attention: Literal["auto", "flashinfer", "own"] = field(
        default="auto",
        metadata={
            "help": "attention of prefill; auto: flashinfer where it is installed, else the driver's own kernel;"
            " decoding and masked rows always take the driver's own"
        },
    )
    products: Literal["auto", "library"] = field(
        default="auto",
        metadata={
            "help": "matrix products of up to 64 rows; auto: the driver's own kernel where it is measured, at loading,"
            " to be faster than the library's"
        },
    )
    cuda_graphs: bool = field(
        default=True,
        metadata={
            "help": "replay steps from CUDA graphs, one for each batch bucket; with plain torch kernels, which wait for"
            " the GPU, none is"
        },
    )
    graph_rows: int = field(
        default=2048,
        metadata={
            "help": "replay steps with prompts of up to so many token rows, and those of max_batch_tokens, from CUDA"
            " graphs; 0 = run them eagerly",
            "minimum": 0,
        },
    )
    graph_drafts: int = field(
        default=0,
        metadata={
            "help": "replay steps of up to 32 requests that verify up to so many drafts each; 0 = run them eagerly",
            "minimum": 0,
        },
    )
    tensor_parallel: int = field(
        default=1,
        metadata={
            "help": "GPUs that share the model, each with a part of the heads; dense decoders",
            "minimum": 1,
        },
    )
    random_weights: bool = field(
        default=False,
        metadata={"help": "reads config.json only and draws weights of its shapes, for measuring"},
    )
    batch_invariant: bool = field(
        default=False,
        metadata={
            "help": "the same bits for a request whatever else is in its batch: fixed splits and matrix tiles; slower"
        },
    )
