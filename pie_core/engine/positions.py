"""Which position each KV row of a context has: consecutive as a rule, kept as runs where a guest chose otherwise."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


class PositionRuns:
    """Runs of consecutive positions. KV length and position are separate ideas: media spans and drafts part them."""

    __slots__ = ("_positions", "_starts", "length")

    def __init__(self) -> None:
        self.length = 0  # KV rows
        self._starts: list[int] = []  # first KV index of each run ...
        self._positions: list[int] = []  # ... and its position

    @property
    def next(self) -> int:
        """The position after the last row's; 0 when there is none."""
        return self.at(self.length - 1) + 1 if self.length else 0

    def at(self, index: int) -> int:
        """The position of KV row `index`."""
        run = bisect_right(self._starts, index) - 1
        return self._positions[run] + index - self._starts[run]

    def extend(self, count: int) -> None:
        """Adds rows at the next positions."""
        if count and not self._starts:
            self._begin(0)
        self.length += count

    def extend_at(self, positions: Sequence[int]) -> None:
        """Adds one row for each of these positions."""
        for position in positions:
            if position != self.next or not self._starts:
                self._begin(position)
            self.length += 1

    def truncate(self, length: int) -> None:
        """Keeps the first `length` rows."""
        while self._starts and self._starts[-1] >= length:
            self._starts.pop()
            self._positions.pop()
        self.length = min(self.length, length)

    def runs(self) -> list[tuple[int, int]]:
        """(first KV index, its position) of each run."""
        return list(zip(self._starts, self._positions, strict=True))

    @classmethod
    def of(cls, length: int, runs: Sequence[tuple[int, int]]) -> PositionRuns:
        """The reverse of `length` and `runs`."""
        made = cls()
        made.length = length
        made._starts = [start for start, _ in runs]
        made._positions = [position for _, position in runs]
        return made

    def copy(self) -> PositionRuns:
        return PositionRuns.of(self.length, self.runs())

    def _begin(self, position: int) -> None:
        self._starts.append(self.length)
        self._positions.append(position)
