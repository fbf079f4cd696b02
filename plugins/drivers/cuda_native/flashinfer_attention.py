"""FlashInfer's attention for steps with prompts in them, where the host knows every length.

`plan` copies from a pinned workspace of its wrapper while the device may be behind, so wrappers are used in turn: a
wrapper comes round again only after more steps than may be open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pie_core.contracts.forward import Int32, Int64
from pie_plugins.drivers.cuda_native.attention import AttentionPlan, OwnAttention
from pie_plugins.drivers.cuda_native.batch_tensors import GroupTable, HostStep
from pie_plugins.drivers.cuda_native.kernels import Kernels
from pie_plugins.drivers.cuda_native.kv_cache import KvCache
from pie_plugins.drivers.cuda_native.step_tensors import StepTensors

WORKSPACE_BYTES = 128 * 2**20
HEAD_DIMS = (64, 128, 256)
PREBUILT_FA3_DIM = 128
MOST_RECORDED = 2**23  # rows times columns: beyond, this attention gains more than launching its step costs


def is_usable(device: torch.device, dtype: torch.dtype, head_dims: Sequence[int]) -> bool:
    """Whether FlashInfer is installed and has kernels for such a model."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and all(dim in HEAD_DIMS for dim in head_dims)
        and find_spec("flashinfer") is not None
    )


def import_it() -> None:
    """Takes two seconds, and may be done beside something else."""
    import_module("flashinfer")


@dataclass(frozen=True, slots=True)
class PageLists:
    """The pages that hold rows, as FlashInfer counts them: whole ones, and how full the last one is."""

    indptr: Int32
    pages: Int32
    last_page_len: Int32


def page_lists(table: GroupTable, lengths: Int32, counts: Int64, page_size: int) -> PageLists:
    """Without the pages that are listed for later rows."""
    columns = lengths - table.holes + counts
    used = -(-columns // page_size)
    listed = np.diff(table.indptr)
    pages = table.pages
    if (used < listed).any():
        place = np.arange(len(pages)) - np.repeat(table.indptr[:-1], listed)
        pages = pages[place < np.repeat(used, listed)]
    indptr = np.concatenate([[0], np.cumsum(used)]).astype(np.int32)
    return PageLists(indptr, pages, (columns - (used - 1) * page_size).astype(np.int32))


class FlashInferPlanner:
    """Prompts go to FlashInfer; decoding, masked rows and lengths that only the device knows to the own kernel."""

    def __init__(self, kernels: Kernels, caches: Sequence[KvCache], device: torch.device, turns: int) -> None:
        import flashinfer

        self._kernels, self._caches = kernels, caches
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        backend = "auto" if all(cache.layout.head_dim == PREBUILT_FA3_DIM for cache in caches) else "fa2"
        self._wrappers = [
            [
                flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=backend)
                for _ in caches
            ]
            for _ in range(turns)
        ]
        self._turn = 0

    @property
    def most_recorded(self) -> int:
        return MOST_RECORDED

    def try_out(self, dtype: torch.dtype) -> None:
        """Loads the kernels of every group and runs them on one row. Raises whatever stands against it: a kernel that
        is not prebuilt needs a compiler."""
        for wrapper, cache in zip(self._wrappers[0], self._caches, strict=True):
            layout, ends = cache.layout, torch.tensor([0, 1], dtype=torch.int32)
            page, full = (
                torch.tensor([cache.scratch_page], dtype=torch.int32),
                torch.ones(1, dtype=torch.int32),
            )
            heads = (layout.num_kv_heads, layout.num_kv_heads, layout.head_dim, cache.page_size)
            wrapper.plan(ends, ends, page, full, *heads, causal=True, q_data_type=dtype, kv_data_type=dtype)
            pages = cache.layer(0)
            wrapper.run(pages.new_zeros((1, layout.num_kv_heads, layout.head_dim)), pages)

    def plan(self, host: HostStep, step: StepTensors) -> AttentionPlan:
        is_masked = any(group.masks is not None for group in host.groups)
        if step.max_rows == 1 or is_masked or not host.lengths_are_known:
            return OwnAttention(self._kernels, step)
        self._turn = (self._turn + 1) % len(self._wrappers)
        return FlashInferAttention(self._wrappers[self._turn], self._caches, host)


class FlashInferAttention:
    """One step. Plans when the first layer of a group tells how many query heads there are."""

    def __init__(self, wrappers: Sequence[Any], caches: Sequence[KvCache], host: HostStep) -> None:
        self._wrappers, self._caches, self._host = wrappers, caches, host
        self._planned: set[int] = set()

    def run(self, group: int, q: Tensor, pages: Tensor, scale: float) -> Tensor:
        if group not in self._planned:
            self._plan(group, q, scale)
            self._planned.add(group)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # its own would be filled with zeros first
        attended: Tensor = self._wrappers[group].run(q, pages, out=out)
        return attended.flatten(1)

    def _plan(self, group: int, q: Tensor, scale: float) -> None:
        host, cache = self._host, self._caches[group]
        lists = page_lists(host.groups[group], host.lengths, host.counts, cache.page_size)
        self._wrappers[group].plan(
            torch.tensor(host.batch.indptr),
            torch.from_numpy(lists.indptr),
            torch.tensor(lists.pages),
            torch.from_numpy(lists.last_page_len),
            q.shape[1],
            cache.layout.num_kv_heads,
            cache.layout.head_dim,
            cache.page_size,
            causal=True,
            sm_scale=scale,
            q_data_type=q.dtype,
            kv_data_type=q.dtype,
        )
