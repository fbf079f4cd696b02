"""Which position each KV row of a context has: consecutive as a rule, kept as runs where a guest chose otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """Rows of consecutive positions, up to the next run's start."""

    start: int  # KV index
    position: int  # of the first row
    floor: int  # the next position that the rows before would give


class PositionRuns:
    """KV length and position are separate ideas: media spans, drafts and explicit positions part them."""

    __slots__ = ("_runs", "length")

    def __init__(self, length: int = 0, runs: Sequence[tuple[int, int, int]] = ()) -> None:
        self.length = length  # KV rows
        self._runs = [Run(*run) for run in runs]

    @property
    def next(self) -> int:
        """The position after the greatest one; 0 when there is none."""
        return max(self._runs[-1].floor, self._end) if self._runs else 0

    @property
    def runs(self) -> list[Run]:
        return self._runs.copy()

    def extend(self, count: int) -> None:
        """Adds rows at the next positions."""
        if count:
            self._go_to(self.next)
            self.length += count

    def extend_at(self, positions: Sequence[int]) -> None:
        """Adds one row for each of these positions."""
        for position in positions:
            self._go_to(position)
            self.length += 1

    def truncate(self, length: int) -> None:
        """Keeps the first `length` rows."""
        while self._runs and self._runs[-1].start >= length:
            self._runs.pop()
        self.length = min(self.length, length)

    def copy(self) -> PositionRuns:
        return PositionRuns(self.length, self._runs)

    @property
    def _end(self) -> int:
        """The position that continues the last run."""
        return self._runs[-1].position + self.length - self._runs[-1].start

    def _go_to(self, position: int) -> None:
        """The next row is at `position`: in the last run if it continues that, else in a new one."""
        if not self._runs or position != self._end:
            self._runs.append(Run(self.length, position, self.next))
