"""Decode attention over a list of tiles against plain attention, whichever way programs and requests cross."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_plugins.drivers.cuda_native.step_tensors import StepTensors
from tests.plugins.drivers.cuda_native.both_kernels import LAYOUT, host_step, kernels, needs_triton, on_device
from tests.plugins.drivers.cuda_native.machine import DEVICE
from tests.plugins.drivers.cuda_native.test_layer_kernels import PAGES, assert_close, random

pytest.importorskip("triton")
from pie_plugins.drivers.cuda_native.decode_attention import ALONE, FEW, MANY, MOST_FEW, DecodeTiling
from pie_plugins.drivers.cuda_native.triton_kernels import TritonKernels

pytestmark = needs_triton

TILINGS = [DecodeTiling(32, 2, 3, programs) for programs in (1, 5)] + [ALONE, None]


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 5, 31, 32, 64, 130, 300]), min_size=1, max_size=6),
    rows=st.sampled_from([1, 1, 3]),
    page_size=st.sampled_from([4, 16, 128]),
    shape=st.sampled_from([(1, 1, 16), (2, 3, 24), (3, 2, 16), (4, 1, 32)]),
    tiling=st.sampled_from(TILINGS),
)
def test_decoding_over_a_list_of_tiles_equals_the_plain_one(
    lengths: list[int], rows: int, page_size: int, shape: tuple[int, int, int], tiling: DecodeTiling | None
) -> None:
    """Programs cross requests, requests cross programs, and the same list serves several layers."""
    group_size, kv_heads, dim = shape
    chance = np.random.default_rng(len(lengths))
    pages = [chance.integers(0, PAGES, -(-(length + rows) // page_size) + 1).tolist() for length in lengths]
    step = on_device(host_step([rows] * len(lengths), lengths, pages, [0] * len(lengths)), page_size)
    fused = TritonKernels(LAYOUT)
    assert fused.decode is not None
    fused.decode.tiling = tiling
    prepare(fused, step)
    assert step.groups[0].work is not None
    for layer in range(2):
        q = random(step.sizes.rows, group_size * kv_heads, dim, seed=layer)
        cached = random(PAGES, 2, kv_heads, page_size, dim, seed=2 + layer)
        expected = kernels("torch").attend(q, cached, step.groups[0], step, 0.25)
        assert_close(fused.attend(q, cached, step.groups[0], step, 0.25), expected)


def test_a_request_that_went_wrong_spoils_no_other() -> None:
    """One program goes on from request to request."""
    step = on_device(host_step([1] * 3, [9] * 3, [[1], [2], [3]], [0] * 3), 16)
    fused = TritonKernels(LAYOUT)
    prepare(fused, step)
    q, cached = random(3, 2, 16), random(PAGES, 2, 1, 16, 16, seed=1)
    expected = kernels("torch").attend(q, cached, step.groups[0], step, 0.25)
    cached[1] = float("nan")
    found = fused.attend(q, cached, step.groups[0], step, 0.25)
    assert found[0].isnan().all()
    assert_close(found[1:], expected[1:])


def test_only_requests_that_decode_are_listed() -> None:
    """Beside prompts those of one row; all of them where all have equally few; none in a step of prompts."""
    for counts, decoded in (([1, 20, 1], 1), ([4, 4], 4), ([20, 20], 0), ([2, 20], 0), ([2, 3], 0)):
        step = on_device(host_step(counts, [0] * len(counts), [[1, 2]] * len(counts), [0] * len(counts)), 16)
        prepare(TritonKernels(LAYOUT), step)
        assert step.rows_decoded == decoded
        assert (step.groups[0].work is not None) == (decoded > 0)


def test_the_number_of_requests_says_which_tiles() -> None:
    for requests, tiling in ((1, ALONE), (MOST_FEW, FEW), (MOST_FEW + 1, MANY)):
        step = on_device(host_step([1] * requests, [99] * requests, [[1] * 7] * requests, [0] * requests), 16)
        prepare(TritonKernels(LAYOUT), step)
        work = step.groups[0].work
        assert work is not None
        assert work[0] == requests * -(-100 // tiling.columns)


def prepare(fused: TritonKernels, step: StepTensors) -> None:
    fused.prepare(step, torch.zeros(8, dtype=torch.int32, device=DEVICE), vocab_size=10**6)
