"""Resolving references and settling a step: plain and fused kernels against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pie_plugins.drivers.cuda_native.batch_tensors import HostStep, Refs
from pie_plugins.drivers.cuda_native.outcomes import NOWHERE, Failure
from pie_plugins.drivers.cuda_native.step_tensors import StepTensors
from tests.plugins.drivers.cuda_native.both_kernels import (
    LAYOUT,
    every_kernel,
    host_step,
    kernels,
    on_device,
    with_samplers,
)
from tests.plugins.drivers.cuda_native.machine import DEVICE
from tests.plugins.drivers.cuda_native.test_sampling_kernels import filters_only, random_samplers

VOCAB = 50


def int32(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, np.int32)


def prepared(name: str, step: HostStep, ring: list[int], page_size: int = 4) -> StepTensors:
    tensors = on_device(step, page_size)
    kernels(name).prepare(tensors, torch.tensor(ring, dtype=torch.int32, device=DEVICE), VOCAB)
    return tensors


@every_kernel
def test_tokens_and_lengths_of_open_steps_come_from_the_ring(name: str) -> None:
    host = host_step([1, 2], [10, 7], [[9, 8, 7], [6, 5, 4]], [0, 0])
    host.tokens = Refs(int32(1, 2, 3), int32(2, NOWHERE, 3), int32(0, NOWHERE, 0), int32(-1, -1, -1))
    host.positions = int32(10, 7, 8)
    host.length_source, host.length_dependency = int32(4, NOWHERE), int32(0, NOWHERE)
    step = prepared(name, host, [0, 0, 41, 43, 8])
    assert step.tokens.tolist() == [41, 2, 43]
    assert step.positions.tolist() == [8, 7, 8]
    assert step.shift.tolist() == [2, 0]
    assert step.groups[0].columns.tolist() == [9, 9]
    assert step.groups[0].slots.tolist() == [7 * 4 + 0, 5 * 4 + 3, 4 * 4 + 0]
    assert step.fail.tolist() == [0, 0]


@every_kernel
def test_what_comes_from_a_failed_request_fails_and_runs_on_with_token_0(name: str) -> None:
    host = host_step([1, 1, 1, 1], [0] * 4, [[0], [1], [2], [3]], [0] * 4)
    source, dependency = int32(2, NOWHERE, NOWHERE, 3), int32(1, NOWHERE, NOWHERE, 0)
    host.tokens = Refs(int32(5, 6, 7, 8), source, dependency, int32(-1, -1, -1, -1))
    host.length_source, host.length_dependency = int32(-1, 0, -1, -1), int32(-1, 1, -1, -1)
    host.fail = int32(0, 0, Failure.REFUSED, 0)
    step = prepared(name, host, [0, Failure.NOT_A_NUMBER, 7, -1])
    failed = Failure.DEPENDENCY
    assert step.fail.tolist() == [failed, failed, Failure.REFUSED, failed]
    assert step.tokens.tolist() == [0, 6, 7, 0]


@every_kernel
def test_rows_on_pages_given_up_leave_no_columns(name: str) -> None:
    step = prepared(name, host_step([3], [18], [[5, 9, 2, 6]], [8]), [0])
    assert step.groups[0].columns.tolist() == [13]
    assert step.groups[0].slots.tolist() == [2 * 4 + 2, 2 * 4 + 3, 6 * 4]


@every_kernel
def test_drafts_are_verified_and_later_steps_find_what_was_accepted(name: str) -> None:
    host = host_step([4, 1, 3], [10, 20, 30], [[0] * 4, [1] * 6, [2] * 9], [0, 0, 0])
    samplers = filters_only(random_samplers(0, 8))
    samplers = replace(samplers, rows=np.arange(8, dtype=np.int32), slot=np.zeros(8, np.uint32))
    host = with_samplers(host, samplers)
    host.batch = replace(host.batch, num_drafts=int32(3, 0, 2))
    host.tokens = replace(host.tokens, literal=int32(1, 11, 12, 13, 2, 3, 21, 22))
    base = 2 * LAYOUT.width
    step = on_device(host, 4, base=base)
    ring = torch.zeros(3 * LAYOUT.width, dtype=torch.int32, device=DEVICE)
    kernels(name).prepare(step, ring, VOCAB)
    sampled = torch.tensor([11, 12, 40, 41, 42, 21, 22, 43], dtype=torch.int32, device=DEVICE)
    step.fail[1] = int(Failure.NOT_A_NUMBER)
    kernels(name).settle(step, sampled, ring)
    row = ring[base:].tolist()
    assert not any(ring[:base].tolist())
    assert row[:3] == [0, Failure.NOT_A_NUMBER, 0]
    assert row[LAYOUT.accepted : LAYOUT.accepted + 3] == [2, 0, 2]
    assert row[LAYOUT.last : LAYOUT.last + 3] == [40, 42, 43]
    assert row[LAYOUT.length : LAYOUT.length + 3] == [13, 21, 33]
    assert row[LAYOUT.tokens : LAYOUT.tokens + 8] == sampled.tolist()
    assert row[LAYOUT.live : LAYOUT.live + 8] == [1, 1, 1, 0, 1, 1, 1, 1]


@every_kernel
def test_a_row_without_a_sampler_accepts_nothing_and_leaves_no_token(name: str) -> None:
    host = host_step([2, 1], [0, 0], [[0], [1]], [0, 0])
    samplers = filters_only(random_samplers(0, 1))
    samplers = replace(samplers, rows=int32(1), slot=np.zeros(1, np.uint32))
    host = with_samplers(host, samplers)
    host.batch = replace(host.batch, num_drafts=int32(1, 0))
    step = on_device(host, 4)
    ring = torch.zeros(LAYOUT.width, dtype=torch.int32, device=DEVICE)
    kernels(name).prepare(step, ring, VOCAB)
    kernels(name).settle(step, torch.tensor([1], dtype=torch.int32, device=DEVICE), ring)
    row = ring.tolist()
    assert row[LAYOUT.accepted : LAYOUT.accepted + 2] == [0, 0]
    assert row[LAYOUT.last : LAYOUT.last + 2] == [-1, -1]
    assert row[LAYOUT.live] == 0
