"""The pages of one context, over all cache groups of the model: grow, share on fork, truncate, release."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from pie_core.contracts.driver import CacheSpace
from pie_core.contracts.forward import Int32
from pie_core.errors import OutOfPages
from pie_core.kv_pages.host_space import HostSpace
from pie_core.kv_pages.intervals import Range
from pie_core.kv_pages.moves import Move, plan_move
from pie_core.kv_pages.page_list import PageCopy, PageList
from pie_core.kv_pages.pool import PagePool
from pie_core.kv_pages.state_slots import EMPTY, StateSlots

STATE_BLOCK_ROWS = 16


class Cache:
    """All pages of a model: one pool per cache group, and one of host memory to swap to."""

    def __init__(self, spaces: Sequence[CacheSpace], swap_bytes: int | None = 0) -> None:
        self.spaces = tuple(spaces)
        self.pools = tuple(PagePool(each.group.name, each.num_pages) for each in spaces)
        self.host = HostSpace(spaces, self.pools, swap_bytes)
        rows = [each.page_size for each in spaces if each.group.kind != "state"]
        self.block_rows = (
            math.lcm(*rows) if rows else STATE_BLOCK_ROWS
        )  # what is shared, is shared by so many
        self._promised = [0] * len(self.pools)
        self.states_every = 0  # rows; where states on the way are kept to be shared, a multiple of block_rows
        self.settles_later = False  # what a step leaves behind is shared before it goes
        self._longest = min(
            (each.page_size * each.num_pages for each in spaces if each.group.kind in ("paged", "latent")),
            default=sys.maxsize,
        )

    def could_have(self, counts: Sequence[int], *, beside_promises: bool) -> bool:
        """Whether there are so many pages of each group that nobody needs; asking changes nothing."""
        if beside_promises:
            counts = self.sum_of([counts, self._promised])
        return all(pool.could_have(count) for count, pool in zip(counts, self.pools, strict=True))

    def will_have(self, counts: Sequence[int]) -> bool:
        """Whether so many pages of each group can be taken, now or once the driver's steps are over."""
        return all(pool.will_have(count) for count, pool in zip(counts, self.pools, strict=True))

    def sum_of(self, counts: Iterable[Sequence[int]]) -> list[int]:
        """By group."""
        return [sum(group) for group in zip(*counts, strict=True)] or [0] * len(self.pools)

    def first_that_take_little(self, counts: Iterable[Sequence[int]]) -> list[int]:
        """What the first of these take together, as far as that is an eighth of the memory; the very first in any case.

        So a long queue does not drive out at once what only its head has use for.
        """
        taken: list[int] = []
        for each in counts:
            more = self.sum_of([taken, each]) if taken else list(each)
            if taken and any(
                8 * count > pool.num_pages for count, pool in zip(more, self.pools, strict=True)
            ):
                break
            taken = more
        return taken or [0] * len(self.pools)

    def begin_choice(self) -> None:
        """Nobody is promised anything yet."""
        self._promised = [0] * len(self.pools)

    def has_beside_promises(self, counts: Sequence[int]) -> bool:
        """Whether so many pages of each group can be taken, and those that others were promised after them."""
        wanted = zip(counts, self._promised, self.pools, strict=True)
        return all(pool.has(count + promised) for count, promised, pool in wanted)

    def promise_all(self, counts: Iterable[Sequence[int]]) -> None:
        """To all of these, whether there are so many pages or not: nobody else is promised any until there are."""
        self._promised = self.sum_of([self._promised, *counts])

    def promise(self, counts: Sequence[int]) -> bool:
        """Whether there are so many pages of each group for somebody, who takes them later.

        Whoever comes back to idle pages, or from host memory, needs more to go on. Without promises several might come
        back and none of them go on.
        """
        fits = self.has_beside_promises(counts)
        if fits:
            self._promised = [count + more for count, more in zip(counts, self._promised, strict=True)]
        return fits

    def begin_step(self) -> None:
        """The driver has one more step."""
        for pool in self.pools:
            pool.begin_step()

    def end_step(self) -> None:
        """The driver's oldest step is over."""
        for pool in self.pools:
            pool.end_step()

    def always_fits(self, length: int) -> bool:
        """Whether a context of this length fits when it is alone, whatever it evicted."""
        return length <= self._longest


class ContextPages:
    """Rows are written by `begin` and then `finish` or `abort`. Several steps may be begun, each behind the one before,
    and end in the same order; until they have, nothing else may happen but `drop_latest`.

    While they are swapped out, all they hold lies in host memory: they can be shared, truncated, evicted and released
    there, but not written.
    """

    __slots__ = ("_cache", "_paged", "_state", "_windowed", "groups", "is_swapped")

    def __init__(
        self, cache: Cache, groups: tuple[PageList | StateSlots, ...], *, is_swapped: bool = False
    ) -> None:
        self._cache = cache
        self.groups = groups
        self.is_swapped = is_swapped
        self._paged = tuple(each for each in groups if isinstance(each, PageList))
        self._windowed = tuple(each for each in self._paged if each.window is not None)
        self._state = tuple(each for each in groups if isinstance(each, StateSlots))

    @classmethod
    def empty(cls, cache: Cache) -> ContextPages:
        pairs = zip(cache.spaces, cache.pools, strict=True)
        return cls(
            cache,
            tuple(
                StateSlots(group, pool) if space.group.kind == "state" else PageList(group, space, pool)
                for group, (space, pool) in enumerate(pairs)
            ),
        )

    @property
    def block_rows(self) -> int:
        """What is shared with others, is shared by so many rows."""
        return self._cache.block_rows

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Those of the device."""
        return tuple(0 if self.is_swapped else group.num_pages for group in self.groups)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held on the device."""
        return self.is_swapped or not any(group.num_pages for group in self.groups)

    def pages_of(self, group: int) -> Int32:
        """What a copy of the context would share of one group: pages, or the slot of the current state."""
        return np.empty(0, np.int32) if self.is_swapped else self.groups[group].held

    def covers(self, length: int) -> bool:
        """Whether rows up to `length` can be written on the pages that are here: most steps of most contexts."""
        return not self._state and all(pages.covers(length) for pages in self._paged)

    def can_ever_fit(self, length: int) -> bool:
        """Whether the context can get as long when it is alone."""
        return self._cache.always_fits(length) or self._too_small_for(length) is None

    def fits_afresh(self, length: int) -> bool:
        """Whether so many rows fit when nothing else is held, and none of them is evicted any more."""
        return self._cache.always_fits(length)

    def refuse_what_never_fits(self, length: int) -> None:
        """OutOfPages if a context of this length exceeds a group even when it is alone."""
        pages = None if self._cache.always_fits(length) else self._too_small_for(length)
        if pages is not None:
            raise OutOfPages(
                f"{length} tokens need {pages.size_at(length)} pages of {pages.page_size} in cache group "
                f"{pages.pool.name!r}, which has {self._cache.pools[pages.group].num_pages} in all; shorten the "
                "context, evict rows of it, or give the model more KV memory"
            )

    def _too_small_for(self, length: int) -> PageList | None:
        unbounded = (pages for pages in self._paged if pages.window is None)
        pools = self._cache.pools
        return next((each for each in unbounded if each.size_at(length) > pools[each.group].num_pages), None)

    def evict(self, ranges: Sequence[Range]) -> None:
        """Frees every page all of whose rows are evicted."""
        for pages in self._paged:
            for start, stop in ranges:
                pages.evict(start, stop)
        self._come_back_if_empty()

    def lists_any(self, ranges: Sequence[Range]) -> bool:
        """Whether a row of these ranges could still be read."""
        return any(pages.lists_any(start, stop) for pages in self._paged for start, stop in ranges)

    def fitting_rows(self, written: int, count: int, reserved: int, outcomes: int) -> int:
        """How many of the next `count` rows can be written now; 0 if there are not pages enough.

        Paged groups take the pages of all `reserved` rows at once, so that no pass is stuck half way; groups with a
        window take those of the next rows. `outcomes` is the number of states that a step can end with.
        """
        if self.is_swapped or not all(slots.pool.has(outcomes) for slots in self._state):
            return 0
        for pages in self._paged:
            if pages.window is not None:
                pages.pool.free_up(pages.missing(written, written + count))
                count = min(count, pages.room(written))
            elif not pages.pool.has(pages.missing(written, written + reserved)):
                return 0
        return count

    def begin(self, written: int, count: int, reserved: int, outcomes: Sequence[int]) -> list[PageCopy]:
        """Takes the pages for rows that fit; returns the copies to make before they are written.

        `outcomes` are the lengths that the step may end with.
        """
        copies = []
        for pages in self._paged:
            ahead = count if pages.window is not None else reserved
            copy = pages.reserve(written, written + ahead)
            if copy is not None:
                copies.append(copy)
        if self._state:
            kept = self._lengths_to_keep(written, outcomes[0])
            for slots in self._state:
                slots.begin(outcomes, kept)
        return copies

    def _lengths_to_keep(self, written: int, length: int) -> list[int]:
        """Where states are shared that a step passes on its way to `length`: every so often, and at the last block."""
        every, rows = self._cache.states_every, self._cache.block_rows
        if not every or length - written == 1:
            return []
        kept = list(range((written // every + 1) * every, length, every))
        last = (length - 1) // rows * rows
        return kept if last <= written or last in kept[-1:] else [*kept, last]

    def finish(self, length: int) -> None:
        """The oldest step went well and `length` rows are valid."""
        for slots in self._state:
            slots.finish(length)
        if not self._cache.settles_later:
            self.settle(length)

    def settle(self, length: int) -> None:
        """Whoever wants to share what is not needed behind `length` rows has done so."""
        for pages in self._windowed:
            pages.leave_window(length)
        for slots in self._state:
            slots.settle()

    # ---- sharing

    def block(self, start: int, stop: int) -> list[Int32]:
        """By group, the pages of these rows, from a page boundary on; none for states, and where some have left."""
        return [
            _NO_PAGES if isinstance(each, StateSlots) else _all_or_none(each, start, stop)
            for each in self.groups
        ]

    def states_at(self, length: int) -> tuple[int, ...] | None:
        """The slots of the states after so many rows; None where one is not here."""
        slots = tuple(each.state_at(length) for each in self._state)
        return None if EMPTY in slots else slots

    def promise_behind(self, length: int, stop: int, outcomes: int) -> bool:
        """Whether rows up to `stop` fit once the first `length` are shared with others; then there will be room."""
        return self._cache.promise(self._missing_behind(length, stop, outcomes))

    def could_fit_behind(
        self, length: int, stop: int, outcomes: int, taken: Sequence[int], *, beside_promises: bool
    ) -> bool:
        """Whether they might fit, so many pages of each group taken before; others may have been promised them."""
        missing = self._missing_behind(length, stop, outcomes)
        wanted = self._cache.sum_of([missing, taken]) if taken else missing
        return self._cache.could_have(wanted, beside_promises=beside_promises)

    def has_room_beside(self, taken: Sequence[int], length: int, stop: int, outcomes: int) -> bool:
        """Whether so many pages of each group can be taken and rows up to `stop` fit behind `length` shared ones."""
        missing = self._missing_behind(length, stop, outcomes)
        return self._cache.has_beside_promises(self._cache.sum_of([taken, missing]))

    def _missing_behind(self, length: int, stop: int, outcomes: int) -> list[int]:
        return [
            outcomes if isinstance(each, StateSlots) else each.missing_behind(length, stop)
            for each in self.groups
        ]

    def adopt(self, written: int, length: int, pages: Sequence[Int32], states: Sequence[int]) -> None:
        """Goes on from `length` rows that others have written, on pages and slots that are held for it already."""
        slots = iter(states)
        for each, held in zip(self.groups, pages, strict=True):
            if isinstance(each, StateSlots):
                each.adopt(length, next(slots))
            else:
                each.adopt(written, length, held)

    def abort(self) -> None:
        """The oldest step failed, or nobody wants its rows: all is as it was."""
        for slots in self._state:
            slots.abort()

    def drop_latest(self, steps: int, length: int) -> None:
        """The latest steps were for nothing: whatever they write behind `length` rows is given up."""
        for pages in self._paged:
            pages.truncate(length)
        for slots in self._state:
            slots.drop_latest(steps)

    def writes_shared(self, written: int) -> bool:
        """Whether the next row belongs on a page that others hold as well."""
        return not self.is_swapped and any(pages.writes_shared(written) for pages in self._paged)

    def undo(self, copies: Sequence[PageCopy]) -> None:
        """Right after `begin`: these copies were not made, so the shared pages are read again."""
        for copy in copies:
            pages = self.groups[copy.group]
            assert isinstance(pages, PageList)
            pages.undo(copy)

    def checkpoint(self, limit: int) -> None:
        for slots in self._state:
            slots.checkpoint(limit)

    def drop_checkpoints(self) -> bool:
        """Whether there were any."""
        return any(slots.drop_checkpoints() for slots in self._state)

    def truncate(self, length: int) -> int:
        """Keeps at most `length` rows and returns how many: fewer where a state or a window has to be rebuilt."""
        length = self._restart(length)
        for group in self.groups:
            group.truncate(length)
        self._come_back_if_empty()
        return length

    def fork(self, written: int) -> ContextPages:
        """The same pages, shared: whoever writes to one first gets a copy. What is reserved behind is given back."""
        for pages in self._paged:
            pages.truncate(written)
        groups = tuple(group.fork() for group in self.groups)
        return ContextPages(self._cache, groups, is_swapped=self.is_swapped)

    def release(self) -> None:
        for group in self.groups:
            group.release()
        self._come_back_if_empty()

    # ---- swapping

    def plan_swap_out(self, written: int) -> Move:
        """The way to host memory, with the first `written` rows and nothing else: what is kept for going back goes."""
        assert not self.is_swapped
        self.settle(written)
        self.drop_checkpoints()
        for pages in self._paged:
            pages.truncate(written)
        return plan_move(self.groups, self._cache.host.pools)

    def plan_swap_in(self) -> Move:
        """The way back."""
        assert self.is_swapped
        return plan_move(self.groups, self._cache.pools)

    def needed_behind(self, written: int, length: int, outcomes: int) -> list[int]:
        """By group: pages to take for the next rows, up to `length`, once all that is held is back on the device."""
        return [
            outcomes if isinstance(each, StateSlots) else each.needed_behind(written, length)
            for each in self.groups
        ]

    def needed_for(self, written: int, length: int) -> list[int]:
        """By group: pages to take until rows up to `length` are written, those for coming back included."""
        behind = self.needed_behind(written, length, 1)
        if not self.is_swapped:
            return behind
        return [sum(each) for each in zip(self.plan_swap_in().num_copied, behind, strict=True)]

    def swapped(self, move: Move, written: int) -> None:
        """The move was made."""
        move.keep(written)
        self.is_swapped = not self.is_swapped

    def _come_back_if_empty(self) -> None:
        """Nothing is left in host memory: what is written next lies on the device."""
        if self.is_swapped and not any(group.num_pages for group in self.groups):
            for group, pool in zip(self.groups, self._cache.pools, strict=True):
                group.move_to(pool, group.held)
            self.is_swapped = False

    def _restart(self, length: int) -> int:
        """The greatest length up to `length` from which every group can go on."""
        restarts = [slots.restart(length) for slots in self._state]
        while restarts and min(restarts) < length:
            length = min(restarts)
            restarts = [slots.restart(length) for slots in self._state]
        return length if all(pages.can_restart(length) for pages in self._paged) else 0


_NO_PAGES: Int32 = np.empty(0, np.int32)


def _all_or_none(pages: PageList, start: int, stop: int) -> Int32:
    held = pages.of_rows(start, stop)
    return held if len(held) == pages.needs(start, stop) else _NO_PAGES
