"""Contexts that give their pages up: to host memory where that is the cheaper way back, else to be computed again.

    swap:    device ──copy──► host ......... host ──copy──► device      costs bytes, twice
    replay:  pages are free at once ........ rows are computed again    costs steps

Swapping is chosen if the driver does it, host memory has room, and moving the bytes there and back at
`swap_gb_per_s` takes no longer than computing the rows at the least time per row of any step so far. A driver that
refuses a swap is not asked to explain: the context is replayed, and the failure is counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pie_core.contracts.driver import Driver, Feature
from pie_core.contracts.forward import Int32
from pie_core.engine.context import Context
from pie_core.engine.messages import SwapUse
from pie_core.engine.options import EngineOptions
from pie_core.kv_pages.context_pages import Cache
from pie_core.kv_pages.moves import Move
from pie_core.scheduler.request import Pass

# Pages of one cache group to pages on the other side.
Swap = Callable[[int, list[int], list[int]], None]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Moved:
    """What was copied in one direction."""

    pages: int = 0
    bytes: int = 0


class Suspensions:
    def __init__(self, driver: Driver, cache: Cache, options: EngineOptions) -> None:
        self.swaps = self.replays = 0  # suspensions by kind
        self.failures = 0  # swaps that the driver refused
        self.replayed_tokens = 0
        self._out, self._back, self._fetched = Moved(), Moved(), Moved()
        self.swapped_out: Callable[[Context], None] = lambda _: None  # is told of contexts in host memory
        self._gave_way: set[Context] = set()  # for the step that is being chosen
        self._was_let_back = False
        self._driver = driver
        self._cache = cache
        self._host = cache.host
        self._can_swap = driver.capabilities.has(Feature.SWAP)
        self._bytes_per_s = options.swap_gb_per_s * 1e9
        self._row_s = 0.0  # the least time that a row of a step has taken; 0 = not known
        self._rows = 0
        self._busy_s = 0.0

    def observe(self, rows: int, busy_s: float) -> None:
        """How many rows all steps have computed so far, and in what time."""
        added, took_s = rows - self._rows, busy_s - self._busy_s
        self._rows, self._busy_s = rows, busy_s
        if added > 0 and took_s > 0:
            row_s = took_s / added
            self._row_s = min(self._row_s, row_s) if self._row_s else row_s

    def suspend(self, context: Context) -> None:
        """The context gives all its pages up."""
        self._gave_way.add(context)
        if self._can_swap and self._swap_out(context):
            self.swaps += 1
            return
        self.replays += 1
        self.replayed_tokens += context.written
        context.suspend()

    def would_swap(self, context: Context) -> bool:
        """Whether the context would go to host memory, and nothing of it be computed again."""
        pages = context.pages.num_pages
        return (
            self._can_swap
            and self._is_cheaper(self._host.bytes_of(pages), context.written)
            and self._host.has(pages)
        )

    def cheapest(self, idle: Iterable[Context]) -> Context:
        """Of the lowest priority whoever has been idle for longest; if possible, one that can go on afterwards."""
        ordered = sorted(idle, key=lambda each: (each.priority, each.last_used))
        return next((each for each in ordered if self._can_come_back(each)), ordered[0])

    def _can_come_back(self, context: Context) -> bool:
        """A context that has evicted rows may be too long to be computed again."""
        return context.pages.fits_afresh(context.length) or (
            self._can_swap and self._host.has(context.pages.num_pages)
        )

    def begin_step(self) -> None:
        """Whoever gave way for the last step may come back for this one."""
        self._gave_way.clear()
        self._was_let_back = False

    def let_back(self) -> bool:
        """Whoever gave way for this step may come back for it after all, once: those it gave way to cannot go on."""
        may = bool(self._gave_way) and not self._was_let_back
        self._gave_way.clear()
        self._was_let_back = True
        return may

    def begin_choice(self, waiting: Iterable[Pass], *, is_short: bool) -> tuple[list[Pass], list[Pass]]:
        """Those that are there, and those that would come (back).

        Whoever gave way for this step stays away from it: else giving way might never end. If memory `is_short`, those
        that come leave room for those that are there: else they push each other out again and again.
        """
        self._cache.begin_choice()
        if self._gave_way:
            waiting = [each for each in waiting if each.context not in self._gave_way]
        there: list[Pass] = []
        coming: list[Pass] = []
        for each in waiting:
            (coming if each.is_coming else there).append(each)
        if is_short and coming:
            self._promise_to_those_there(there, max(each.priority for each in coming))
        return there, coming

    def _promise_to_those_there(self, there: Iterable[Pass], coming: int) -> None:
        """The pages that they lack, unless somebody of higher priority comes."""
        first = [each for each in there if each.holds_pages and each.priority >= coming]
        self._cache.promise_all(each.wanted_pages for each in first)

    def is_on_device(self, waiting: Pass) -> bool:
        """A context that was swapped has come back, if there is room for it and for the rows of the pass."""
        return not waiting.context.pages.is_swapped or self._swap_in(waiting)

    def use(self, contexts: Iterable[Context]) -> SwapUse:
        return SwapUse(
            contexts=sum(each.pages.is_swapped for each in contexts),
            bytes=self._host.used_bytes,
            pages=self._host.used_pages,
            total_pages=[pool.num_pages for pool in self._host.pools],
            suspensions=self.swaps,
            failures=self.failures,
            pages_out=self._out.pages,
            bytes_out=self._out.bytes,
            pages_in=self._back.pages,
            bytes_in=self._back.bytes,
            cached_pages=[pool.num_idle for pool in self._host.pools],
            pages_fetched=self._fetched.pages,
        )

    # ---- there and back

    def _swap_out(self, context: Context) -> bool:
        move = self._move_to_host(context)
        if move is None or not self._is_cheaper(self._host.bytes_of(move.num_copied), context.written):
            return False
        move.take()
        if not self._copy(move, self._driver.swap_out):
            return False
        context.pages.swapped(move, context.written)
        context.submitted = context.written
        self._count(self._out, move.num_copied)
        self.swapped_out(context)
        return True

    def _move_to_host(self, context: Context) -> Move | None:
        """The way there, if there is room."""
        while True:
            move = context.pages.plan_swap_out(context.written)
            if not self._host.has(move.num_copied):
                return None
            if context.pages.plan_swap_out(context.written).num_copied == move.num_copied:
                return move  # what gave room was no twin

    def _is_cheaper(self, num_bytes: int, rows: int) -> bool:
        return not self._row_s or 2 * num_bytes / self._bytes_per_s <= rows * self._row_s

    def _swap_in(self, waiting: Pass) -> bool:
        """Whether the context is on the device again, or has given up what it had in host memory."""
        context = waiting.context
        move = self._fitting_move(waiting)
        if move is None:
            return False
        move.take()
        if not self._copy(move, self._driver.swap_in):
            self.replayed_tokens += context.written
            context.suspend()
            return True
        self._count(self._back, move.num_copied)
        context.pages.swapped(move, context.written)
        return True

    def _fitting_move(self, waiting: Pass) -> Move | None:
        """The way back, if there is room for it and for the rows of the pass, which are promised then."""
        pages, written = waiting.context.pages, waiting.context.written
        behind = pages.needed_behind(written, waiting.stop, 1 + waiting.num_drafts)
        while True:
            copied = (move := pages.plan_swap_in()).num_copied
            if not self._cache.has_beside_promises([*map(sum, zip(copied, behind, strict=True))]):
                return None
            if pages.plan_swap_in().num_copied == copied:  # what gave room was no twin
                self._cache.promise(behind)
                return move

    def fetch(self, sources: Sequence[Int32], targets: Sequence[Int32]) -> bool:
        """Copies pages of host memory to the device, both by cache group; whether the driver has taken all of it."""
        pairs = [(held.tolist(), taken.tolist()) for held, taken in zip(sources, targets, strict=True)]
        is_fetched = self._copy_pages(pairs, self._driver.swap_in)
        if is_fetched:
            for moved in (self._back, self._fetched):
                self._count(moved, [len(held) for held in sources])
        return is_fetched

    def _copy(self, move: Move, swap: Swap) -> bool:
        """Whether the driver has taken all of it."""
        is_copied = self._copy_pages([(each.sources, each.targets) for each in move.groups], swap)
        if not is_copied:
            move.undo()
        return is_copied

    def _copy_pages(self, pairs: Iterable[tuple[list[int], list[int]]], swap: Swap) -> bool:
        try:
            for group, (sources, targets) in enumerate(pairs):
                if sources:
                    swap(group, sources, targets)
        except Exception as error:  # whatever the driver raises, the rows can be computed again
            _log.warning("a swap failed, its rows are computed again: %s: %s", type(error).__name__, error)
            self.failures += 1
            return False
        return True

    def _count(self, moved: Moved, copied: Sequence[int]) -> None:
        moved.pages += sum(copied)
        moved.bytes += self._host.bytes_of(copied)
