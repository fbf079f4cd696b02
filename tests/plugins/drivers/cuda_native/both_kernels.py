"""The plain and the fused kernels side by side, and steps made for them."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from pie_core.contracts.forward import Int32, Samplers
from pie_plugins.drivers.cuda_native.batch_tensors import GroupTable, HostStep, Refs
from pie_plugins.drivers.cuda_native.kernels import Kernels
from pie_plugins.drivers.cuda_native.outcomes import NOWHERE, RingLayout
from pie_plugins.drivers.cuda_native.step_tensors import BlockLayout, StepTensors, pack, sizes_of, view_block
from pie_plugins.drivers.cuda_native.torch_kernels import TorchKernels
from pie_plugins.drivers.cuda_native.trial import idle_step
from tests.plugins.drivers.cuda_native.machine import DEVICE

LAYOUT = RingLayout(max_requests=16, max_samplers=64)

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
every_kernel = pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=needs_triton)])


def kernels(name: str) -> Kernels:
    if name == "torch":
        return TorchKernels(LAYOUT)
    from pie_plugins.drivers.cuda_native.triton_kernels import TritonKernels

    return TritonKernels(LAYOUT)


def literal(tokens: Int32) -> Refs:
    nowhere = np.full(len(tokens), NOWHERE, np.int32)
    return Refs(tokens, nowhere, nowhere, nowhere)


def host_step(counts: list[int], lengths: list[int], pages: list[list[int]], holes: list[int]) -> HostStep:
    """Requests with so many new rows behind so many old ones, on these pages; tokens and positions count up."""
    rows = sum(counts)
    indptr = np.cumsum([0, *counts]).astype(np.int32)
    idle = idle_step(1)
    table = GroupTable(
        np.cumsum([0, *map(len, pages)]).astype(np.int32),
        np.array([page for listed in pages for page in listed], np.int32),
        np.array(holes, np.int32),
        None,
    )
    nowhere = np.full(len(counts), NOWHERE, np.int32)
    drafts = np.zeros(len(counts), np.int32)
    return replace(
        idle,
        batch=replace(idle.batch, indptr=indptr, num_drafts=drafts, context_ids=np.arange(len(counts))),
        counts=np.array(counts, np.int64),
        row_request=np.repeat(np.arange(len(counts)), counts),
        tokens=literal(np.arange(rows, dtype=np.int32)),
        positions=np.arange(rows, dtype=np.int32),
        lengths=np.array(lengths, np.int32),
        length_source=nowhere,
        length_dependency=nowhere.copy(),
        groups=(table,),
        fail=np.zeros(len(counts), np.int32),
    )


def with_samplers(step: HostStep, samplers: Samplers) -> HostStep:
    requests = step.row_request[samplers.rows]
    return replace(step, batch=replace(step.batch, samplers=samplers), sampler_requests=requests)


def on_device(step: HostStep, page_size: int = 4, scratch: int = 0, base: int = 0) -> StepTensors:
    layout = BlockLayout(sizes_of(step))
    words = np.zeros(layout.words, np.int32)
    packed = pack(step, layout, base, [scratch])
    words[: len(packed)] = packed
    block = torch.from_numpy(words).to(DEVICE)
    drafts = int(step.batch.num_drafts.max(initial=0))
    return view_block(block, layout, [page_size], np.sort(step.counts)[::-1], drafts)
