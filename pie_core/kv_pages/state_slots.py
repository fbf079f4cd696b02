"""The slots of one context in one state group: the current state, the states being written, and checkpoints.

State is never changed in place: a step reads the current slot and writes others, one of which is current afterwards.
So a fork, a failed step or a rejected draft costs nothing. Going back needs a checkpoint, an older state that was kept;
the empty state is one at length 0. Rows after the checkpoint have to be computed again.

Several steps may be under way: each reads the state that the one before it writes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Int32
from pie_core.kv_pages.pool import PagePool

EMPTY = -1


class StateSlots:
    __slots__ = ("_checkpoints", "_fresh", "_keeping", "_writing", "current", "group", "length", "pool")

    def __init__(self, group: int, pool: PagePool) -> None:
        self.group = group
        self.pool = pool
        self.current = EMPTY
        self.length = 0  # of the current state
        self._writing: list[list[tuple[int, int]]] = []  # for each step under way, (length, slot) it writes
        self._keeping: list[int] = []  # for each of them, how many of these are for others only
        self._fresh: list[tuple[int, int]] = []  # ... and those of steps that are over, until `settle`
        self._checkpoints: list[tuple[int, int]] = []  # (length, slot), ascending

    @property
    def num_pages(self) -> int:
        """Distinct slots held."""
        return len(set(self._held()))

    @property
    def held(self) -> Int32:
        """The slot of the current state."""
        return np.array([] if self.current == EMPTY else [self.current], np.int32)

    def are_complete(self, written: int) -> NDArray[np.bool_]:
        """A state never changes."""
        return np.ones(len(self.held), np.bool_)

    def move_to(self, pool: PagePool, slots: Int32) -> None:
        """The current state, and there is no other, lies in a slot of another pool now."""
        assert not self._writing
        assert not self._checkpoints
        self.pool = pool
        self.current = int(slots[0]) if len(slots) else EMPTY

    @property
    def writing(self) -> list[tuple[int, int]]:
        """What the latest step writes."""
        return self._writing[-1]

    @property
    def reading(self) -> int:
        """What it reads."""
        return self._writing[-2][-1][1] if len(self._writing) > 1 else self.current

    @property
    def is_scarce(self) -> bool:
        """Contexts that want to run need slots more than anybody who would go back."""
        return 2 * (self.pool.num_free + self.pool.num_idle) < self.pool.num_pages

    def begin(self, lengths: Sequence[int], kept: Sequence[int] = ()) -> None:
        """Takes a slot for the state after each of these lengths, and if there are enough after `kept` before them."""
        if kept and (self.is_scarce or not self.pool.has(len(kept) + len(lengths))):
            kept = ()
        after = [*kept, *lengths]
        self._writing.append(list(zip(after, self.pool.allocate(len(after)), strict=True)))
        self._keeping.append(len(kept))

    def finish(self, length: int) -> None:
        """The oldest step has ended and `length` rows are valid: their state is current, the others go back."""
        written = self._take_kept()
        if length == self.length:
            self.pool.release(list(written.values()))
            return
        self._let_go_of_current()
        self.current, self.length = written.pop(length), length
        self.pool.release(list(written.values()))

    def _take_kept(self) -> dict[int, int]:
        """What the oldest step has written for the context itself."""
        written, kept = self._writing.pop(0), self._keeping.pop(0)
        self._fresh += written[:kept]
        return dict(written[kept:])

    def settle(self) -> None:
        """Whoever wants to share states on the way to the current one has done so."""
        for _, slot in self._fresh:
            self.pool.release([slot])
        self._fresh.clear()

    def abort(self) -> None:
        """The oldest step has failed: what it wrote goes back."""
        del self._keeping[0]
        self.pool.release([slot for _, slot in self._writing.pop(0)])

    def drop_latest(self, steps: int) -> None:
        """The latest steps were for nothing."""
        for _ in range(steps):
            self._keeping.pop()
            self.pool.release([slot for _, slot in self._writing.pop()])

    def checkpoint(self, limit: int) -> None:
        """Keeps the current state for going back to; beyond `limit` of them, the oldest goes."""
        is_kept = bool(self._checkpoints) and self._checkpoints[-1][0] == self.length
        if self.current == EMPTY or is_kept or self.is_scarce:
            return
        self.pool.share([self.current])
        self._checkpoints.append((self.length, self.current))
        if len(self._checkpoints) > limit:
            self.pool.release([self._checkpoints.pop(0)[1]])

    def state_at(self, length: int) -> int:
        """The slot of the state after so many rows; EMPTY: it is not here."""
        if length == self.length:
            return self.current
        kept = (*self._fresh, *self._checkpoints)
        return next((slot for rows, slot in kept if rows == length), EMPTY)

    def adopt(self, length: int, slot: int) -> None:
        """Goes on from this state, which is held already for the context."""
        self._let_go_of_current()
        self.current, self.length = slot, length

    def drop_checkpoints(self) -> bool:
        """Whether there were any."""
        dropped, self._checkpoints = self._checkpoints, []
        for _, slot in dropped:
            self.pool.release([slot])
        return bool(dropped)

    def restart(self, length: int) -> int:
        """The greatest length up to `length` whose state is here."""
        if length >= self.length:
            return self.length
        return max((kept for kept, _ in self._checkpoints if kept <= length), default=0)

    def truncate(self, length: int) -> None:
        """Goes back to a length that `restart` gave."""
        self.settle()
        while self._checkpoints and self._checkpoints[-1][0] > length:
            self.pool.release([self._checkpoints.pop()[1]])
        if length == self.length:
            return
        self._let_go_of_current()
        self.current, self.length = EMPTY, length
        if length:
            kept, slot = self._checkpoints[-1]
            assert kept == length, "no state was kept at this length"
            self.pool.share([slot])
            self.current = slot

    def fork(self) -> StateSlots:
        assert not self._writing, "a step is still writing"
        child = StateSlots(self.group, self.pool)
        child.current, child.length = self.current, self.length
        child._checkpoints = list(self._checkpoints)
        for slot in child._held():
            self.pool.share([slot])
        return child

    def release(self) -> None:
        self.settle()
        self.drop_checkpoints()
        self._let_go_of_current()
        self.drop_latest(len(self._writing))
        self.current, self.length, self._writing = EMPTY, 0, []

    def _let_go_of_current(self) -> None:
        if self.current != EMPTY:
            self.pool.release([self.current])

    def _held(self) -> list[int]:
        current = [] if self.current == EMPTY else [self.current]
        writing = [slot for step in self._writing for _, slot in step]
        return current + [slot for _, slot in (*self._checkpoints, *self._fresh)] + writing
