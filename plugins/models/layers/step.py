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


@dataclass(frozen=True, slots=True, eq=False)
class LatentHeads:
    """Multi-head latent attention: every head expands its keys and values from one cached row of C + P values.

    The first N values of a query meet the expanded key, the last P, rotated, the rotated end of the cached row.
    """

    num_heads: int
    rope: Rope | None  # None: attention does not know positions
    rope_dim: int  # P
    key_expansion: Tensor  # [H, N, C]
    value_expansion: Tensor  # [H, V, C]
    scale: float

    @property
    def plain_dim(self) -> int:
        """N"""
        return self.key_expansion.shape[1]

    @property
    def latent_dim(self) -> int:
        """C"""
        return self.key_expansion.shape[2]


@dataclass(frozen=True, slots=True, eq=False)
class IndexHeads:
    """The small attention that chooses which rows the large one reads: heads of D values over one key row."""

    num_heads: int
    rope: Rope
    rope_dim: int  # of the first values of each head
    top_k: int


@dataclass(frozen=True, slots=True, eq=False)
class Around:
    """What a layer does right before and right behind a product."""

    norm: Tensor | None = None  # weight of an RMS norm of what comes in
    norm_eps: float = 0.0
    gated: bool = False  # silu of the first half of the columns, times the second half
    onto: Tensor | None = None  # [T, outputs]: what comes out is added to it in place


NOTHING = Around()


class Recurrence(Protocol):
    """What a recurrent layer does with runs of equally many rows. Pure: the state that comes in is left as it is."""

    def __call__(self, inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [R, n, …] and a state [R, …] to an output [R, n, …] and the state behind the last row."""
        ...


class Step(Protocol):
    """Shapes: T token rows, H and K query and key-value heads of D values."""

    @property
    def token_ids(self) -> Tensor:
        """[T], or [T, streams] where a token has several columns; for embeddings that are more than one lookup."""
        ...

    def embed(self, table: Tensor) -> Tensor:
        """[T, hidden]: a fresh tensor that layers may write into."""
        ...

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        """`weight` is what LinearKernels.prepare made of the checkpoint's matrix."""
        ...

    def linear_around(self, x: Tensor, weight: Any, around: Around) -> Tensor:
        """A product with what stands around it. One operation, so that kernels can fuse it; `linear.one_by_one` says
        what it means."""
        ...

    def grouped(self, x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        """[R, inputs] times [E, outputs, inputs], transposed: rows lie sorted by the matrix they meet, and those of
        matrix e end before `ends[e]`, int32. [R, outputs]"""
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

    def attend_latent(
        self, cache: CacheRef, q: Tensor, latent: Tensor, heads: LatentHeads, chosen: CacheRef | None
    ) -> Tensor:
        """[T, H * (N + P)] and normed latents [T, C + P] to [T, H * V]: rotates the ends of both, writes the latents to
        the pages and attends over all rows that each row may see, or over those that `choose_rows` chose there."""
        ...

    def choose_rows(
        self, cache: CacheRef, q: Tensor, k: Tensor, head_weights: Tensor, heads: IndexHeads
    ) -> None:
        """[T, H * D], [T, D] and float32 [T, H]: rotates and writes the keys to the pages, and keeps for this step
        which `top_k` of the visible rows have the greatest sum of weighted positive products."""
        ...

    def recur(self, cache: CacheRef, part: int, rule: Recurrence, inputs: Sequence[Tensor]) -> Tensor:
        """Runs every request's rows, inputs [T, …], through `rule`, from the state it has in that part of the layer's
        slots, and keeps the states that the batch asks for. Returns [T, …]."""
        ...


class LinearKernels(Protocol):
    """How a driver keeps the matrices of linear layers: packed, sharded, quantized."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Any: ...
