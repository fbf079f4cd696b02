"""Pinned memory is lent again as soon as the device is done with it, and not before."""

from __future__ import annotations

from typing import Any

import torch

from pie_plugins.drivers.cuda_native.timeline import PinnedBlock, PinnedBlocks


class Clock:
    """A device that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0


class Point:
    def __init__(self, clock: Clock) -> None:
        self._clock, self._at = clock, -1

    def query(self) -> bool:
        return self._clock.now > self._at

    def record(self, stream: Any) -> None:
        self._at = self._clock.now


def lender(clock: Clock) -> PinnedBlocks:
    return PinnedBlocks(lambda size: PinnedBlock(torch.empty(size, dtype=torch.uint8), Point(clock)))


def test_a_block_comes_again_when_the_device_has_passed() -> None:
    clock = Clock()
    blocks = lender(clock)
    first = blocks.lend(1000)
    assert len(first.content) == 1024
    blocks.take_back(first, None)
    second = blocks.lend(600)
    assert second is not first  # the device still reads it
    clock.now = 1
    assert blocks.lend(1024) is first
    third = blocks.lend(1024)
    assert third is not first  # which is lent


def test_blocks_come_in_powers_of_two_and_by_their_size() -> None:
    clock = Clock()
    blocks = lender(clock)
    assert [len(blocks.lend(size).content) for size in (0, 1, 256, 257, 2**20 + 1)] == [256] * 3 + [
        512,
        2**21,
    ]
    blocks.take_back(small := blocks.lend(10), None)
    clock.now = 1
    assert blocks.lend(300) is not small
    assert blocks.lend(3) is small
