"""Which prefixes a step reads once for several requests (cascade attention), planned on the host.

A tile is up to `REQUESTS_EACH` adjacent requests with one row each: one program of the attention kernel brings the
shared columns in once for all of their rows. What each request has behind its prefix it reads alone, and the merge of
split columns puts both together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pie_core.contracts.forward import Bool, Int32, PrefixGroups

REQUESTS_EACH = 16
MOST_TILES = 32  # room in a recorded step: a full batch of 512, or the 32 tiles that save most
# Columns that need not be read again. Half as many are worth just the two more launches, as measured; and where own
# columns are as many as shared ones (256 requests behind 256), 61,440 cost 14 us of a layer more than they save.
LEAST_SAVED = 2**16


@dataclass(frozen=True, slots=True)
class PrefixTiles:
    """Requests that read their prefix together."""

    columns: Int32  # [R] shared columns of each request; 0 = it reads all by itself
    first: Int32  # [N] first request of each tile
    stop: Int32  # [N]

    @property
    def count(self) -> int:
        return len(self.first)


def no_tiles(requests: int) -> PrefixTiles:
    none = np.zeros(0, np.int32)
    return PrefixTiles(np.zeros(requests, np.int32), none, none)


def plan_tiles(groups: PrefixGroups, eligible: Bool, least_saved: int = LEAST_SAVED) -> PrefixTiles:
    """The tiles that save most. `eligible` [R]: the request has one row, all its pages, and runs at all."""
    tiles = sorted(_tiles(groups, eligible), key=lambda tile: -tile.saved)[:MOST_TILES]
    planned = no_tiles(len(eligible))
    if sum(tile.saved for tile in tiles) < least_saved:
        return planned
    for tile in tiles:
        planned.columns[tile.first : tile.stop] = tile.columns
    first = np.array([tile.first for tile in tiles], np.int32)
    return PrefixTiles(planned.columns, first, np.array([tile.stop for tile in tiles], np.int32))


@dataclass(frozen=True, slots=True)
class _Tile:
    first: int
    stop: int
    columns: int

    @property
    def saved(self) -> int:
        return (self.stop - self.first - 1) * self.columns


def _tiles(groups: PrefixGroups, eligible: Bool) -> list[_Tile]:
    """Tiles of two requests or more; a group with a request that is not eligible is left alone."""
    tiles = []
    for first, stop, rows in zip(
        groups.first.tolist(), groups.stop.tolist(), groups.rows.tolist(), strict=True
    ):
        if eligible[first:stop].all():
            starts = range(first, stop - 1, REQUESTS_EACH)
            tiles += [_Tile(start, min(start + REQUESTS_EACH, stop), rows) for start in starts]
    return tiles
