"""Blocks of rows that the prefix cache keeps: what decides their KV, where it lies, and what it costs to compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pie_core.contracts.forward import Int32

READING_COSTS_AS_MUCH = 8192  # so many rows to read cost about what everything else about a row does


@dataclass(frozen=True, slots=True)
class Rows:
    """What decides the KV of some rows, given what stands before them."""

    tokens: Int32
    positions: Int32
    masks: Sequence[tuple[int, Int32]] = ()

    def common_with(self, other: Rows) -> int:
        """How many rows are the same, from the first one on; masked rows are compared whole or not at all."""
        if self.masks or other.masks:
            return 0
        count = min(len(self.tokens), len(other.tokens))
        same = (self.tokens[:count] == other.tokens[:count]) & (
            self.positions[:count] == other.positions[:count]
        )
        return int(np.argmin(same)) if not same.all() else count


@dataclass(slots=True, eq=False)
class Block:
    key: bytes
    parent: bytes
    start: int  # rows before it
    rows: Rows
    pages: list[Int32]  # by cache group; none in groups of states, and where they were let go
    states: dict[int, tuple[int, ...]] = field(
        default_factory=dict
    )  # by rows: a slot of each group of states
    host_pages: list[Int32] = field(default_factory=list)  # likewise, if it lies in host memory
    is_away: bool = False  # it lies there alone
    uses: int = 0
    since: float = 0.0  # when it was last used, by the clock of those that can go

    @property
    def stop(self) -> int:
        return self.start + len(self.rows.tokens)

    @property
    def cost(self) -> float:
        """Rows cost more the more rows they read."""
        return len(self.rows.tokens) * (1 + self.start / READING_COSTS_AS_MUCH)


@dataclass(frozen=True, slots=True)
class Hit:
    """Rows that need not be computed. What it names is held for whoever takes it."""

    length: int
    pages: list[Int32]  # by cache group
    states: tuple[int, ...]
    blocks: Sequence[Block]


def lengths_within(
    chain: Sequence[Block], tail: tuple[Block, int] | None
) -> Iterator[tuple[int, Sequence[Block]]]:
    """From which lengths one could go on, the greatest first, and the blocks up to there."""
    if tail is not None:
        yield tail[1], [*chain, tail[0]]
    for count in range(len(chain), 0, -1):
        yield chain[count - 1].stop, chain[:count] if count < len(chain) else chain


def pages_in_host(blocks: Sequence[Block]) -> list[Int32]:
    """By cache group; all of them lie there."""
    return [np.concatenate(held) for held in zip(*(block.host_pages for block in blocks), strict=True)]


def pages_away(blocks: Iterable[Block]) -> list[int]:
    """By cache group, of those that are not on the device; nothing if there are none."""
    away = [block.host_pages for block in blocks if block.is_away]
    return [sum(map(len, held)) for held in zip(*away, strict=True)]


def shared_out(pages: Sequence[Int32], blocks: Sequence[Block]) -> Iterator[list[Int32]]:
    """By block, its part of these, which are as many as its pages in host memory."""
    starts = [0] * len(pages)
    for block in blocks:
        stops = [start + len(held) for start, held in zip(starts, block.host_pages, strict=True)]
        yield [held[start:stop] for held, start, stop in zip(pages, starts, stops, strict=True)]
        starts = stops
