"""The options of the portable driver, as they stand under `driver.options` in the YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class PortableOptions:
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "arithmetic and KV cache; auto: bfloat16 where the CPU multiplies it natively (AVX-512 BF16, AMX),"
            " else float32"
        },
    )
    cpu_threads: int = field(
        default=0,
        metadata={
            "help": "threads of one matrix product; 0 = OMP_NUM_THREADS, else every core but one",
            "minimum": 0,
        },
    )
    kv_page_size: int = field(default=16, metadata={"help": "tokens on a KV page", "minimum": 1})
    kv_memory_mb: int = field(
        default=1024,
        metadata={"help": "memory for KV pages, in MiB; taken as pages fill", "minimum": 1},
    )
    total_pages: int = field(
        default=0, metadata={"help": "number of KV pages; 0 = as many as kv_memory_mb holds", "minimum": 0}
    )
    state_slots: int = field(
        default=0,
        metadata={
            "help": "slots for the state of recurrent layers; 0 = four for each context of a step, where half of"
            " kv_memory_mb holds them",
            "minimum": 0,
        },
    )
    host_pages: int = field(
        default=0,
        metadata={
            "help": "pages, and slots, of host memory to swap to; 0 = as many as the model's swap_memory_mb holds",
            "minimum": 0,
        },
    )
    shared_prefixes: Literal["auto", "always", "never"] = field(
        default="auto",
        metadata={
            "help": "whether requests of a step that share a prefix read it together; auto: except in float32, where"
            " it would change the last bits of a result with what else is in the step"
        },
    )
    max_batch_tokens: int = field(default=1024, metadata={"help": "token rows of one step", "minimum": 1})
    max_batch_requests: int = field(default=64, metadata={"help": "contexts in one step", "minimum": 1})
