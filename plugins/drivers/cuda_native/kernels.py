"""The operations that a step is made of, in whichever way this machine does them best.

`torch_kernels` has all of them in plain torch: they say what is meant, run on a CPU, and are what the tests compare the
fused ones with. `triton_kernels` has the same in few launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pie_plugins.drivers.cuda_native.step_tensors import GroupTensors, StepTensors
from pie_plugins.models.layers.step import AttentionHeads


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosine and sine of every position, [positions, head_dim / 2] each, in float32."""

    cos: Tensor
    sin: Tensor


def written_heads(heads: AttentionHeads) -> int:
    """Key heads that come in with the queries."""
    return 0 if heads.reads_only else heads.num_kv_heads


class Kernels(Protocol):
    """Everything is queued. Shapes as in `layers.step`."""

    name: str
    waits: bool  # for the device, so that no step can be recorded

    def prepare(self, step: StepTensors, ring: Tensor, vocab_size: int) -> None:
        """Resolves tokens, positions and lengths, finds the slot of every new row, marks failures in `step.fail`."""
        ...

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds in place, norms the sum."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

    def grouped(self, x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor: ...

    def place_heads(
        self,
        qkv: Tensor,
        heads: AttentionHeads,
        angles: Angles | None,
        positions: Tensor,
        slots: Tensor,
        pages: Tensor,
    ) -> Tensor:
        """Norms and rotates query and key heads, writes keys and values to the pages of one layer; the queries,
        [T, H, D], which may be a view of `qkv`."""
        ...

    def attend(
        self, q: Tensor, pages: Tensor, group: GroupTensors, step: StepTensors, scale: float
    ) -> Tensor:
        """[T, H * D]: every row over the columns it may see."""
        ...

    def sample(self, logits: Tensor, step: StepTensors) -> Tensor:
        """[S] int32: the tokens that the samplers of the step draw."""
        ...

    def settle(self, step: StepTensors, sampled: Tensor, ring: Tensor) -> None:
        """Verifies drafts and leaves the step's row in the ring."""
        ...
