"""The operations that layers are written in. A driver implements them: `portable` in plain torch, others in kernels.

A `Step` is one forward pass over the token rows of a batch. It knows tokens, positions, pages and masks, so layers
never ask for them, nor for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from pie_plugins.models.layers.rope import Rope


@dataclass(frozen=True, slots=True)
class CacheRef:
    """Where one attention layer keeps its rows."""

    group: int  # index into Architecture.cache_layouts
    layer: int  # within the group


@dataclass(frozen=True, slots=True, eq=False)
class AttentionHeads:
    """What the columns of a fused projection are, and what is done to them before they meet."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: Tensor | None  # [H + K, D]: weight of an RMS norm over each query and key head
    norm_eps: float
    rope: Rope | None  # None: attention does not know positions
    scale: float
    reads_only: bool = False  # another layer writes the keys and values: only queries come in


class Recurrence(Protocol):
    """What a recurrent layer does with runs of equally many rows. Pure: the state that comes in is left as it is."""

    def __call__(self, inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [R, n, …] and a state [R, …] to an output [R, n, …] and the state behind the last row."""
        ...


class Step(Protocol):
    """Shapes: T token rows, H and K query and key-value heads of D values."""

    def embed(self, table: Tensor) -> Tensor:
        """[T, hidden]: a fresh tensor that layers may write into."""
        ...

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        """`weight` is what LinearKernels.prepare made of the checkpoint's matrix."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Over the last axis; `weight` broadcasts over the others."""
        ...

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds `delta` to `x` in place and returns the norm of the sum."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu of the first half of the columns, times the second half."""
        ...

    def attend(self, cache: CacheRef, qkv: Tensor, heads: AttentionHeads) -> Tensor:
        """[T, (H + 2 K) * D] to [T, H * D]: norms and rotates query and key heads, writes keys and values to the
        pages, and attends over all rows that each row may see. One operation, so that kernels can fuse it."""
        ...

    def recur(self, cache: CacheRef, part: int, rule: Recurrence, inputs: Sequence[Tensor]) -> Tensor:
        """Runs every request's rows, inputs [T, …], through `rule`, from the state it has in that part of the layer's
        slots, and keeps the states that the batch asks for. Returns [T, …]."""
        ...


class LinearKernels(Protocol):
    """How a driver keeps the matrices of linear layers: packed, sharded, quantized."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Any: ...
