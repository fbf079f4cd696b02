"""The fused kernels of the layers against the plain operations: attention, placing of heads, norms, activation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pie_core.contracts.forward import PrefixGroups
from pie_plugins.drivers.cuda_native.kernels import Angles
from pie_plugins.drivers.cuda_native.shared_prefixes import plan_tiles
from pie_plugins.drivers.cuda_native.step_tensors import MaskTensors, StepTensors
from pie_plugins.models.layers.rope import Rope
from pie_plugins.models.layers.step import AttentionHeads
from tests.plugins.drivers.cuda_native.both_kernels import LAYOUT, host_step, kernels, needs_triton, on_device
from tests.plugins.drivers.cuda_native.machine import DEVICE

pytestmark = needs_triton

PAGES = 40


def random(*shape: int, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return torch.from_numpy(values).to(DEVICE)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


def paged_step(counts: list[int], olds: list[int], page_size: int, seed: int) -> StepTensors:
    """Requests on shuffled pages, some of them with a page more than they need."""
    random_pages = np.random.default_rng(seed).permutation(PAGES).tolist()
    listed = [
        [random_pages.pop() for _ in range(-(-(count + old) // page_size) + place % 2)]
        for place, (count, old) in enumerate(zip(counts, olds, strict=True))
    ]
    step = on_device(host_step(counts, olds, listed, [0] * len(counts)), page_size)
    prepare(step)
    return step


def prepare(step: StepTensors) -> None:
    """By the fused kernels, which then have their list of tiles."""
    kernels("triton").prepare(step, torch.zeros(8, dtype=torch.int32, device=DEVICE), vocab_size=10**6)


def masks_for(step: StepTensors, seed: int) -> MaskTensors:
    """Every other row has a mask, every other one of those intersected with causality; some hide everything."""
    rows = step.sizes.rows
    entries = (rows + 1) // 2
    index = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    index[::2] = torch.arange(entries, dtype=torch.int32, device=DEVICE)
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (entries, 1)).astype(np.int32)
    words[entries // 2] = 0
    causal = torch.arange(entries, dtype=torch.int32, device=DEVICE) % 2
    return MaskTensors(index, causal, torch.from_numpy(words).to(DEVICE))


@settings(max_examples=6, deadline=None)
@given(
    counts=st.lists(st.sampled_from([1, 1, 2, 7, 19, 40]), min_size=1, max_size=3),
    olds=st.lists(st.sampled_from([0, 1, 16, 37]), min_size=3, max_size=3),
    page_size=st.sampled_from([8, 16]),
    shape=st.sampled_from([(1, 2, 16), (2, 1, 24), (4, 2, 32)]),
    masked=st.booleans(),
)
def test_attention_equals_the_plain_one(
    counts: list[int], olds: list[int], page_size: int, shape: tuple[int, int, int], masked: bool
) -> None:
    group_size, kv_heads, dim = shape
    step = paged_step(counts, olds[: len(counts)], page_size, seed=sum(counts))
    group = step.groups[0]
    if masked:
        group.masks = masks_for(step, seed=3)
    q = random(step.sizes.rows, group_size * kv_heads, dim)
    pages = random(PAGES, 2, kv_heads, page_size, dim, seed=1)
    expected, found = (kernels(name).attend(q, pages, group, step, dim**-0.5) for name in ("torch", "triton"))
    assert_close(found, expected)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1, 1], [2, 2, 2, 2, 2], [1, 20, 3, 33, 1]])
def test_attention_over_split_columns_equals_the_plain_one(counts: list[int]) -> None:
    """Long requests beside short ones: some are split, some are not, and some have too many rows for it."""
    page_size, lengths = 32, [1100, 255, 256, 600, 5]
    pages = [
        [(7 * place + request) % PAGES for place in range(-(-(length + count) // page_size))]
        for request, (length, count) in enumerate(zip(lengths, counts, strict=True))
    ]
    step = on_device(host_step(counts, lengths, pages, [0] * 5), page_size)
    prepare(step)
    q, cached = random(sum(counts), 4, 16), random(PAGES, 2, 2, page_size, 16, seed=1)
    expected, found = (
        kernels(name).attend(q, cached, step.groups[0], step, 0.25) for name in ("torch", "triton")
    )
    assert_close(found, expected)


def test_batch_invariant_attention_has_the_same_bits_by_any_number_of_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One takes a part of a request's columns, or several parts, or all of them."""
    from pie_plugins.drivers.cuda_native import triton_kernels

    page_size, lengths = 32, [1100, 511, 512, 2000, 5]
    pages = [[(7 * place + length) % PAGES for place in range(length // page_size + 1)] for length in lengths]
    step = on_device(host_step([1] * 5, lengths, pages, [0] * 5), page_size)
    prepare(step)
    q, cached = random(5, 4, 16), random(PAGES, 2, 2, page_size, 16, seed=1)
    invariant = triton_kernels.TritonKernels(LAYOUT, batch_invariant=True)
    found = []
    for programs in (1, 20, 10**4):
        monkeypatch.setattr(triton_kernels, "PROGRAMS_WANTED", programs)
        found.append(invariant.attend(q, cached, step.groups[0], step, 0.25))
    assert_close(found[0], kernels("torch").attend(q, cached, step.groups[0], step, 0.25))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dim", [16, 24])
def test_placed_heads_equal_the_plain_ones(normed: bool, dim: int) -> None:
    heads = AttentionHeads(
        6, 2, dim, random(8, dim, seed=5) if normed else None, 1e-5, Rope(random(dim // 2)), 1.0
    )
    angles = Angles(random(50, dim // 2, seed=6), random(50, dim // 2, seed=7))
    positions = torch.tensor([0, 49, 7, 7, 3], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([0, 5, 159, 31, 32], dtype=torch.int32, device=DEVICE)
    found = []
    for name in ("torch", "triton"):
        qkv, pages = random(5, 10 * dim, seed=8), random(PAGES, 2, 2, 4, dim, seed=9)
        q = kernels(name).place_heads(qkv, heads, angles, positions, slots, pages)
        found.append((q.clone(), pages))
    for seen, expected in zip(found[1], found[0], strict=True):
        assert_close(seen, expected)


@pytest.mark.parametrize("columns", [64, 100])
def test_norms_and_activation_equal_the_plain_ones(columns: int) -> None:
    plain, fused = kernels("torch"), kernels("triton")
    x, delta, weight = random(5, columns), random(5, columns, seed=1), random(columns, seed=2)
    assert_close(fused.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5))
    one, two = x.clone(), x.clone()
    assert_close(fused.add_rms_norm(one, delta, weight, 1e-5), plain.add_rms_norm(two, delta, weight, 1e-5))
    assert_close(one, two)
    assert_close(fused.silu_mul(x), plain.silu_mul(x))


def test_a_norm_in_bfloat16_is_of_the_sum_as_it_is_kept() -> None:
    x, delta = (random(3, 64, seed=seed).to(torch.bfloat16) for seed in (1, 2))
    weight = random(64, seed=3).to(torch.bfloat16)
    kept = x.clone()
    found = kernels("triton").add_rms_norm(kept, delta, weight, 1e-5)
    assert_close(kept.to(torch.float32), (x + delta).to(torch.float32), 2**-7)  # the interpreter rounds down
    wide = kept.to(torch.float32)
    expected = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.to(torch.float32)
    assert (found.to(torch.float32) - expected).norm() <= 4e-3 * expected.norm()


def test_a_bucket_s_idle_rows_do_not_reach_the_others() -> None:
    """A step in a larger block gives its rows what they get in a block of their own."""
    exact = paged_step([1, 1], [5, 9], 4, seed=2)
    host = host_step([1, 1, 1], [5, 9, 0], [[3, 1], [7, 4, 2], [0]], [0, 0, 0])
    wide = on_device(replace(host), 4)
    kernels("triton").prepare(wide, torch.zeros(8, dtype=torch.int32, device=DEVICE), vocab_size=100)
    assert wide.groups[0].columns.tolist() == [*exact.groups[0].columns.tolist(), 1]


@settings(max_examples=8, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(2, 19), st.sampled_from([4, 8, 40])), min_size=1, max_size=2),
    alone=st.integers(0, 2),
    heads=st.sampled_from([(1, 2), (2, 1), (4, 2)]),
    seed=st.integers(0, 99),
)
def test_attention_over_shared_prefixes_equals_the_plain_one(
    groups: list[tuple[int, int]], alone: int, heads: tuple[int, int], seed: int
) -> None:
    """Groups of requests share so many pages; behind them, and for those without a group, everybody has own pages."""
    page_size, dim = 8, 16
    chance = np.random.default_rng(seed)
    lengths: list[int] = []
    pages: list[list[int]] = []
    prefixes: tuple[list[int], list[int], list[int]] = ([], [], [])
    for count, shared in groups:
        together = chance.integers(0, PAGES, shared).tolist()
        for part, value in zip(prefixes, (len(pages), len(pages) + count, shared * page_size), strict=True):
            part.append(value)
        for _ in range(count):
            own = int(chance.integers(0, 30))
            lengths.append(shared * page_size + own)
            pages.append(together + chance.integers(0, PAGES, own // page_size + 1).tolist())
    for _ in range(alone):
        lengths.append(int(chance.integers(0, 60)))
        pages.append(chance.integers(0, PAGES, lengths[-1] // page_size + 1).tolist())
    host = host_step([1] * len(pages), lengths, pages, [0] * len(pages))
    planned = PrefixGroups(*(np.array(part, np.int32) for part in prefixes))
    host.tiles = plan_tiles(planned, np.ones(len(pages), np.bool_), least_saved=1)
    step = on_device(host, page_size)
    assert step.tiles == sum(-(-(count - 1) // 16) for count, _ in groups)
    prepare(step)
    q = random(len(pages), heads[0] * heads[1], dim, seed=seed)
    cached = random(PAGES, 2, heads[1], page_size, dim, seed=1)
    expected, found = (
        kernels(name).attend(q, cached, step.groups[0], step, 0.25) for name in ("torch", "triton")
    )
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("counts", "inputs", "outputs"),
    [
        ([5, 0, 70, 1, 0, 32], 48, 100),
        ([0, 0, 3], 64, 64),
        ([33], 130, 16),
        ([0, 2, 0, 0, 0, 0, 0, 0, 1], 64, 72),
    ],
)
def test_rows_meet_the_matrix_of_their_group(counts: list[int], inputs: int, outputs: int) -> None:
    """Groups without rows, groups over several tiles, sizes that fill no tile."""
    x, matrices = random(sum(counts), inputs), random(len(counts), outputs, inputs, seed=1)
    ends = torch.tensor(np.cumsum(counts), dtype=torch.int32, device=DEVICE)
    parts = zip(x.split(counts), matrices, strict=True)
    expected = torch.cat([rows @ matrix.T for rows, matrix in parts])
    assert_close(kernels("triton").grouped(x, matrices, ends), expected)


def test_no_rows_meet_nothing() -> None:
    ends = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    assert kernels("triton").grouped(random(0, 8), random(3, 16, 8), ends).shape == (0, 16)
