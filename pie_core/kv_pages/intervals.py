"""Sets of rows as ascending half-open ranges that neither touch nor overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pie_core.contracts.forward import Int32

Range = tuple[int, int]


def united(ranges: Sequence[Range], start: int, stop: int) -> list[Range]:
    """With the rows from `start` to `stop`."""
    before = [each for each in ranges if each[1] < start]
    after = [each for each in ranges if each[0] > stop]
    touched = ranges[len(before) : len(ranges) - len(after)]
    if touched:
        start, stop = min(start, touched[0][0]), max(stop, touched[-1][1])
    return [*before, (start, stop), *after]


def gaps(ranges: Sequence[Range], start: int, stop: int) -> list[Range]:
    """The rows from `start` to `stop` that are in none of the ranges."""
    found = []
    for low, high in ranges:
        if low >= stop:
            break
        if low > start:
            found.append((start, low))
        start = max(start, high)
    return [*found, (start, stop)] if start < stop else found


def cut(ranges: Iterable[Range], length: int) -> list[Range]:
    """The rows before `length`."""
    return [(start, min(stop, length)) for start, stop in ranges if start < length]


def from_flags(flags: Sequence[bool] | np.ndarray) -> list[Range]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(flags, np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def hiding_runs(hidden: Sequence[Range], length: int) -> Int32:
    """Run lengths (hidden, visible, …) over the first `length` rows."""
    edges = [0]
    for start, stop in gaps(hidden, 0, length):
        edges += [start, stop]
    return np.diff(edges).astype(np.int32)


def hidden_too(runs: Int32, hidden: Sequence[Range]) -> Int32:
    """The run lengths of a mask that hides more rows."""
    edges = [0, *np.cumsum(runs).tolist()]
    shown = [0]
    for start, stop in zip(edges[1::2], edges[2::2], strict=False):
        for part in gaps(hidden, start, stop):
            shown += part
    return np.diff(shown).astype(np.int32)
