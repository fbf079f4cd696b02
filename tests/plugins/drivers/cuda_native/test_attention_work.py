"""Attention by a list of work: every row meets each of its columns once, within the room, and as the plain one does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.contracts.forward import Int32
from pie_plugins.drivers.cuda_native import attention_work
from pie_plugins.drivers.cuda_native.attention_work import WorkList, WorkRoom, plan_work, room_for
from pie_plugins.drivers.cuda_native.step_tensors import (
    BlockLayout,
    Sizes,
    StepTensors,
    pack,
    room_to_make,
    view_block,
)
from tests.plugins.drivers.cuda_native.both_kernels import host_step, kernels, needs_triton
from tests.plugins.drivers.cuda_native.machine import DEVICE

requests = st.lists(st.tuples(st.integers(1, 200), st.integers(0, 30_000)), min_size=1, max_size=60)


def indptr_of(counts: list[int]) -> Int32:
    return np.cumsum([0, *counts]).astype(np.int32)


def planned(told: list[tuple[int, int]], room: WorkRoom) -> WorkList:
    counts, before = (np.array(values, np.int64) for values in zip(*told, strict=True))
    return plan_work(counts, before + counts, indptr_of(counts.tolist()), room)


@given(told=requests, tile_rows=st.sampled_from([1, 8, 32, 64]))
def test_every_row_is_in_one_tile_and_every_part_in_one_item(
    told: list[tuple[int, int]], tile_rows: int
) -> None:
    room = room_for(sum(count for count, _ in told), len(told), tile_rows)
    work = planned(told, room)
    assert len(work.request) <= room.items
    assert len(work.merged_row) <= room.merged
    tiles = Counter(zip(work.request.tolist(), work.first_row.tolist(), strict=True))
    assert set(tiles) == {
        (request, first) for request, (count, _) in enumerate(told) for first in range(0, count, tile_rows)
    }
    items = zip(work.request, work.first_row, work.parts, strict=True)
    assert all(tiles[int(request), int(first)] == parts for request, first, parts in items)
    assert len(set(zip(work.request, work.first_row, work.part, strict=True))) == len(work.request)


@given(told=requests, tile_rows=st.sampled_from([1, 8, 32, 64]))
def test_what_is_split_is_merged_and_every_part_has_a_place_of_its_own(
    told: list[tuple[int, int]], tile_rows: int
) -> None:
    indptr = indptr_of([count for count, _ in told])
    room = room_for(int(indptr[-1]), len(told), tile_rows)
    work = planned(told, room)
    merged = dict(
        zip(work.merged_row.tolist(), zip(work.merged_slot, work.merged_parts, strict=True), strict=True)
    )
    places: list[int] = []
    for request, first, part, parts, slot in zip(
        work.request, work.first_row, work.part, work.parts, work.slot, strict=True
    ):
        for row in range(min(tile_rows, told[request][0] - first) if parts > 1 else 0):
            expected, count = merged[int(indptr[request] + first + row)]
            assert (expected, count) == (slot + row * parts, parts)
            places.append(int(slot + row * parts + part))
    assert len(set(places)) == len(places) == sum(parts for _, parts in merged.values())
    assert max(places, default=0) < room.slots


def test_one_long_context_among_short_ones_is_cut_and_they_are_not() -> None:
    work = planned([(1, 30_000), *[(1, 200)] * 40], room_for(64, 64, 32))
    parts = dict(zip(work.request.tolist(), work.parts.tolist(), strict=True))
    assert parts[0] > 32
    assert all(parts[request] == 1 for request in range(1, 41))
    assert work.request[0] == 0  # the longest item first


def listed(
    counts: list[int], lengths: list[int], tile_rows: int, idle_rows: int, idle_requests: int
) -> StepTensors:
    """The step in a block with more room than it needs, its lengths and slots resolved."""
    pages = [
        [(7 * place + request) % 40 for place in range(-(-(length + count) // 4))]
        for request, (length, count) in enumerate(zip(lengths, counts, strict=True))
    ]
    host = host_step(counts, lengths, pages, [0] * len(counts))
    requests, rows = len(counts) + idle_requests, sum(counts) + idle_rows
    work = replace(room_for(rows, requests, tile_rows), merged=256)
    sizes = Sizes(rows, requests, 0, (sum(map(len, pages)) + idle_requests,), rows_each=0, asked=4, work=work)
    layout = BlockLayout(sizes)
    words = np.full(layout.words, 2**30, np.int32)
    packed = pack(host, layout, 0, [40])
    words[: len(packed)] = packed
    block = torch.from_numpy(words).to(DEVICE)
    step = view_block(block, layout, [4], np.zeros(0, np.int64), 0, room_to_make(block, sizes, 1))
    kernels("torch").prepare(step, torch.zeros(8, dtype=torch.int32, device=DEVICE), vocab_size=10**6)
    return step


def test_rows_left_over_go_to_the_scratch_page_and_see_nothing() -> None:
    step = listed([3, 1], [2, 9], 8, idle_rows=5, idle_requests=2)
    assert step.groups[0].columns.tolist() == [5, 10, 0, 0]
    assert step.groups[0].slots.tolist()[4:] == [40 * 4] * 5
    assert step.row_request.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert step.item_request.tolist()[2:] == [-1] * (len(step.item_request) - 2)


@needs_triton
@pytest.mark.parametrize("split", [False, True])
@settings(max_examples=6, deadline=None)
@given(
    told=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 150)), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 2), (2, 1), (7, 1)]),
    seed=st.integers(0, 99),
)
def test_attention_by_a_list_equals_the_plain_one(
    split: bool, told: list[tuple[int, int]], heads: tuple[int, int], seed: int
) -> None:
    spans = (16, 16) if split else (256, 1024)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention_work, "WANTED_ITEMS", 24)  # the interpreter takes its time
        for name, span in zip(("SHORTEST_PART", "SHORTEST_WIDE_PART"), spans, strict=True):
            patched.setattr(attention_work, name, span)
        counts, lengths = (list(values) for values in zip(*told, strict=True))
        step = listed(counts, lengths, 64 // heads[0], idle_rows=seed % 9, idle_requests=1)
    assert bool((step.item_parts > 1).any()) == (split and max(map(sum, told)) > 16)
    chance = torch.Generator().manual_seed(seed)
    q = torch.randn(step.sizes.rows, heads[0] * heads[1], 16, generator=chance).to(DEVICE)
    cached = torch.randn(41, 2, heads[1], 4, 16, generator=chance).to(DEVICE)
    expected, found = (
        kernels(name).attend(q, cached, step.groups[0], step, 0.25) for name in ("torch", "triton")
    )
    rows = sum(counts)
    assert (found[:rows] - expected[:rows]).abs().max() <= 1e-5 * expected.abs().max()
