"""Attention of a mixed step as a list of work of a fixed length, planned on the host for one launch that is replayed.

An item is a tile of one request's rows over a part of the columns that it sees. Columns are cut into parts where too
few tiles would leave the GPU idle, or one context is much longer than the others; what the parts of a row find is
merged. The lengths behind the parts are read on the device: the host's are bounds, and only decide how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Int32, Int64

UNUSED = -1
WANTED_ITEMS = 128  # with a program for each key head, enough to fill the GPU
SHORTEST_PART = 256  # columns; below, merging costs more than it gains
SHORTEST_WIDE_PART = 1024  # ... for tiles of more rows than these, each of which is merged
FEW_ROWS = 16
MOST_PARTS = 64


@dataclass(frozen=True, slots=True)
class WorkRoom:
    """How long the lists of a recorded step are, and how its rows are cut."""

    tile_rows: int  # token rows of one tile
    items: int
    merged: int  # rows whose columns are split
    slots: int  # for what one part of one row finds


@dataclass(frozen=True, slots=True)
class WorkList:
    """Items, longest first, and the rows to merge. The place of part p of a merged row is slot + p."""

    request: Int32
    first_row: Int32  # of the request
    part: Int32
    parts: Int32
    slot: Int32  # of the tile's first row: its rows follow each other, `parts` places each
    merged_row: Int32
    merged_slot: Int32
    merged_parts: Int32


def room_for(rows: int, requests: int, tile_rows: int) -> WorkRoom:
    """For any step of so many rows and requests."""
    return WorkRoom(tile_rows, -(-rows // tile_rows) + min(rows, requests) + WANTED_ITEMS, 1024, 2048)


def plan_work(counts: Int64, columns: Int64, row_indptr: Int32, room: WorkRoom) -> WorkList:
    """`columns` [R]: what the last row of each request sees."""
    tiles = -(-counts // room.tile_rows)
    owner = np.repeat(np.arange(len(counts)), tiles)
    first = _counted(tiles) * room.tile_rows
    rows = np.minimum(counts[owner] - first, room.tile_rows)
    reach = columns[owner] - counts[owner] + first + rows
    parts = _parts(reach, rows, room)
    taken = np.where(parts > 1, rows * parts, 0)
    slot = np.cumsum(taken) - taken
    item = np.repeat(np.arange(len(owner)), parts)
    item_part = _counted(parts)
    longest = np.argsort(-(reach // parts)[item], kind="stable")
    item, item_part = item[longest], item_part[longest]
    split = np.flatnonzero(parts > 1)
    merged = np.repeat(split, rows[split])
    place = _counted(rows[split])
    return WorkList(
        _int32(owner[item]),
        _int32(first[item]),
        _int32(item_part),
        _int32(parts[item]),
        _int32(slot[item]),
        _int32(row_indptr[owner[merged]] + first[merged] + place),
        _int32(slot[merged] + place * parts[merged]),
        _int32(parts[merged]),
    )


def _parts(reach: Int64, rows: Int64, room: WorkRoom) -> Int64:
    """Of each tile; whole tiles first, where there is no room for what all parts would find."""
    span = max(SHORTEST_PART, -(-int(reach.sum()) // WANTED_ITEMS))
    few = rows <= FEW_ROWS
    parts = -(-reach // np.where(few, span, max(span, SHORTEST_WIDE_PART)))
    parts = parts.clip(1, MOST_PARTS)
    for whole in (~few, few):
        is_split = parts > 1
        if (rows * parts)[is_split].sum() <= room.slots and rows[is_split].sum() <= room.merged:
            break
        parts[whole] = 1
    return parts


def _counted(counts: Int64) -> Int64:
    """0 … n - 1 for each n."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - counts, counts)


def _int32(values: NDArray[np.integer]) -> Int32:
    return values.astype(np.int32)
