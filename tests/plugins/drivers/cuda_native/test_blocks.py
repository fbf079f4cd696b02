"""Blocks put together where old ones stand hold what they would hold in memory of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pie_core.contracts.forward import Bool, PageTable, PrefixGroups
from pie_core.testing.batches import Context, FromTicket, Request, Sample, Stepper
from pie_plugins.drivers.cuda_native import batch_tensors
from pie_plugins.drivers.cuda_native.batch_tensors import HostStep
from pie_plugins.drivers.cuda_native.shared_prefixes import PrefixTiles, plan_tiles
from pie_plugins.drivers.cuda_native.step_tensors import BlockPacker, pack
from pie_plugins.drivers.cuda_native.timeline import Room
from tests.plugins.drivers.cuda_native.machine import cuda_native
from tests.plugins.drivers.cuda_native.test_driver import checkpoint

SAMPLES = [
    Sample(),
    Sample(temperature=0.7, stream=2**40 + 3, top_p=0.9),
    Sample(top_k=3, min_p=0.1, epoch=2),
]


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The words of every block that was put together, each compared with the same block on clean memory."""
    counts: list[int] = []
    original = BlockPacker.pack

    def compared(self: BlockPacker, step: HostStep, base: int, room: Room) -> int:
        count = original(self, step, base, room)
        np.testing.assert_array_equal(room.words[:count], pack(step, self._layout, base, self._scratch_pages))
        counts.append(count)
        return count

    monkeypatch.setattr(BlockPacker, "pack", compared)
    return counts


def decode(
    stepper: Stepper, contexts: Sequence[Context], shift: int, sources: Sequence[FromTicket | int]
) -> list[FromTicket]:
    """One token of each, its sampler another one in every step. Where the next ones are drawn."""
    requests = [
        Request(context, [source], samples=[SAMPLES[(place + shift) % 3]])
        for place, (context, source) in enumerate(zip(contexts, sources, strict=True))
    ]
    ticket = stepper.submit(requests)
    stepper.collect(ticket)
    return [FromTicket(ticket, row) for row in range(len(contexts))]


@pytest.mark.parametrize("page_size", [1, 4])
def test_steps_of_changing_size_and_kind_leave_nothing_behind(packed: list[int], page_size: int) -> None:
    stepper = Stepper(cuda_native(checkpoint(), kv_page_size=page_size, graph_drafts=2))
    recorded = len(packed)
    contexts = [stepper.context() for _ in range(8)]
    for place, context in enumerate(contexts):  # prompts of several sizes
        stepper.run([Request(context, list(range(3 + 4 * place)), samples=[SAMPLES[place % 3]])])
    for shift, count in enumerate((5, 5, 3, 8, 8, 5, 1, 1, 7)):
        tokens = decode(stepper, contexts[:count], shift, [7] * count)
        decode(stepper, contexts[:count], shift, tokens)
        decode(stepper, contexts[:count], shift + 1, tokens[::-1])  # those of a ticket in another order
        if count % 3 == 0:  # a prompt beside those that decode
            both = [
                Request(contexts[0], [9], samples=[Sample()]),
                Request(contexts[1], [4, 5, 6], samples=[Sample()]),
            ]
            stepper.run(both)
        if count == 8:  # drafts
            verified = [Sample(row=row) for row in range(3)]
            stepper.run([Request(each, [9, 3, 4], samples=verified, drafts=2) for each in contexts[:3]])
    assert len(packed) - recorded == 8 + 9 * 3 + 1 + 2


def test_a_step_with_a_refused_request_leaves_nothing_behind(packed: list[int]) -> None:
    stepper = Stepper(cuda_native(checkpoint()))
    contexts = [stepper.context() for _ in range(3)]
    stepper.run([Request(context, [1, 2, 3], samples=[Sample()]) for context in contexts])
    before = len(packed)
    for bad in (False, True, False):
        requests = [
            Request(context, [10**6 if bad and place == 1 else 5], samples=[Sample()])
            for place, context in enumerate(contexts)
        ]
        assert bool(stepper.run(requests).failed) == bad
    assert len(packed) - before == 3


def test_steps_with_and_without_shared_prefixes_leave_nothing_behind(
    packed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []

    def noting(groups: PrefixGroups, eligible: Bool) -> PrefixTiles:
        tiles = plan_tiles(groups, eligible, least_saved=1)
        planned.append(tiles.count)
        return tiles

    monkeypatch.setattr(batch_tensors, "plan_tiles", noting)
    stepper = Stepper(cuda_native(checkpoint(), kv_page_size=4))
    parent = stepper.context()
    stepper.run([Request(parent, list(range(8)))])
    contexts = [stepper.fork(parent) for _ in range(4)]
    before = len(packed)
    for shared in (True, False, True):
        requests = [Request(context, [5], samples=[Sample()]) for context in contexts]
        for request in requests:
            stepper.make_room(request.context, 1)
        batch = stepper.grouped(requests, [(0, 4, 8)]) if shared else stepper.build(requests)
        assert not stepper.collect(stepper.submit_batch(requests, batch)).failed
    assert len(packed) - before == 3
    assert planned == [1, 1]


def test_an_array_that_was_written_to_is_read_again(packed: list[int]) -> None:
    stepper = Stepper(cuda_native(checkpoint()))
    contexts = [stepper.context() for _ in range(2)]
    stepper.run([Request(context, [1, 2], samples=[Sample()]) for context in contexts])
    batch = stepper.build([Request(context, [5], samples=[Sample()]) for context in contexts])
    for temperature in (0.0, 0.5, 0.9):
        batch.samplers.temperature[:] = temperature
        batch.tokens.ids[:] = [3 + int(10 * temperature), 4]
        assert not stepper.driver.collect(stepper.driver.submit(batch)).failed
    assert len(packed) >= 4


def test_a_table_that_comes_again_is_still_checked_against_what_is_written() -> None:
    """Tables of the engine are the same object as long as pages stay the same."""
    stepper = Stepper(cuda_native(checkpoint(), kv_page_size=4))
    context = stepper.context()
    stepper.run([Request(context, [1, 2], samples=[Sample()])])
    batch = stepper.build([Request(context, [5], samples=[Sample()])])
    (table,) = batch.cache
    assert isinstance(table, PageTable)
    for each in (table.indptr, table.pages, table.logical):
        each.flags.writeable = False
    for length, cause in ((2, ""), (3, ""), (4, "has no page to be written to"), (3, "")):
        told = replace(batch, kv_lengths=np.array([length], np.int32))
        failed = stepper.driver.collect(stepper.driver.submit(told)).failed
        assert bool(failed) == bool(cause)
        assert cause in failed.get(0, "")
    moved = replace(table, pages=np.array([10**6], np.int32))
    other = replace(batch, cache=(moved,))
    assert "does not exist" in stepper.driver.collect(stepper.driver.submit(other)).failed[0]
