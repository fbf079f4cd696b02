"""Moving what a context holds from the pages of one pool to those of its partner, the device or host memory.

A move is planned, copied by the driver, and then kept or undone. What has a twin at the target is not copied: forks
that are moved one after the other share there, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Int32
from pie_core.kv_pages.page_list import PageList
from pie_core.kv_pages.pool import PagePool
from pie_core.kv_pages.state_slots import StateSlots


@dataclass(frozen=True, slots=True)
class GroupMove:
    """Of one cache group."""

    held: PageList | StateSlots
    target: PagePool
    pages: Int32  # by entry: the page at the target; -1 until it is taken
    missing: NDArray[np.intp]  # entries that have to be copied

    @classmethod
    def of(cls, held: PageList | StateSlots, target: PagePool) -> GroupMove:
        twins = held.pool.twins_of(held.held)
        pages = np.array([-1 if each is None else each for each in twins], np.int32)
        return cls(held, target, pages, np.flatnonzero(pages < 0))

    @property
    def sources(self) -> list[int]:
        return list(map(int, self.held.held[self.missing]))

    @property
    def targets(self) -> list[int]:
        return list(map(int, self.pages[self.missing]))

    def take(self) -> None:
        """The target's pages have one more holder from now on."""
        self.target.share(self.pages[self.pages >= 0])
        self.pages[self.missing] = self.target.allocate(len(self.missing))

    def undo(self) -> None:
        """Nothing was copied."""
        self.target.release(self.pages)

    def keep(self, written: int) -> None:
        """What was to be copied has been: the context holds the target's pages now, and no others."""
        source, pages = self.held.pool, self.held.held.copy()
        for entry in self.missing[self.held.are_complete(written)[self.missing]].tolist():
            source.pair(int(pages[entry]), int(self.pages[entry]))
        self.held.move_to(self.target, self.pages)
        source.release(pages)


@dataclass(frozen=True, slots=True)
class Move:
    """Of all that a context holds."""

    groups: tuple[GroupMove, ...]

    @property
    def num_copied(self) -> list[int]:
        """By cache group: pages that have no twin at the target."""
        return [len(each.missing) for each in self.groups]

    def take(self) -> None:
        for each in self.groups:
            each.take()

    def undo(self) -> None:
        for each in self.groups:
            each.undo()

    def keep(self, written: int) -> None:
        for each in self.groups:
            each.keep(written)


def plan_move(groups: Sequence[PageList | StateSlots], targets: Sequence[PagePool]) -> Move:
    return Move(tuple(GroupMove.of(held, pool) for held, pool in zip(groups, targets, strict=True)))
