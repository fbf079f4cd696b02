"""Rows that others have computed are taken over, and rows that others are computing are waited for."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from pie_core.engine.context import Context
from pie_core.kv_pages.prefix_cache import PrefixCache
from pie_core.scheduler.request import Chunk, Pass


class Prefixes:
    """Whole blocks only, and only up to the first row of a pass that has to give something."""

    def __init__(self, cache: PrefixCache) -> None:
        self.hit_tokens = self.lookup_tokens = 0
        self._cache = cache
        self._computing: Counter[bytes] = Counter()  # blocks, by how many steps compute them
        self._steps: deque[list[bytes]] = deque()  # what each of them computes

    def ready(self, waiting: Iterable[Pass]) -> list[Pass]:
        """Those that have something to compute now; they have taken over what there is."""
        if not self._cache.enabled:
            return list(waiting)
        begun: set[bytes] = set()
        return [each for each in waiting if not self._can_take_over(each) or self._take_over(each, begun)]

    def submitted(self, chunks: Iterable[Chunk]) -> None:
        keys = self._blocks_of(chunks)
        self._computing.update(keys)
        self._steps.append(keys)

    def finished(self) -> None:
        """The oldest step is over, whatever came of it."""
        self._computing -= Counter(self._steps.popleft())

    def written(self, context: Context, start: int) -> None:
        """The rows from `start` on have their KV: whole blocks of them can be taken over by others."""
        size = self._cache.rows
        if context.written // size == start // size or not self._applies(context):
            return
        self._extend(context, context.written)
        for block in range(start // size, context.written // size):
            before = context.prefix[block - 1] if block else self._cache.root(context.tenant)
            self._cache.add(context.prefix[block], before, context.pages.block(block * size, size))

    def _applies(self, context: Context) -> bool:
        """What was written after an eviction depends on more than what stands before it."""
        return self._cache.enabled and not context.evictions.evicted

    def _can_take_over(self, waiting: Pass) -> bool:
        context = waiting.context
        size = self._cache.rows
        is_settled = context.written == context.submitted and context.written % size == 0
        return waiting.remaining > size and is_settled and self._applies(context)

    def _take_over(self, waiting: Pass, begun: set[bytes]) -> bool:
        """False: the next block is being computed, or about to be."""
        context, before = waiting.context, waiting.context.written
        if not waiting.looked_up:
            waiting.looked_up = True
            self.lookup_tokens += waiting.remaining
        missing = self._adopt(context, _first_output(waiting) // self._cache.rows)
        is_computed = missing is not None and missing in self._computing
        waits = is_computed or (missing is not None and missing in begun)
        if context.written > before and not is_computed and (waits or not self._has_room_for_rest(waiting)):
            context.written = context.submitted = before  # others need these pages more
            context.pages.truncate(before)
        elif missing is not None and not waits:
            begun.add(missing)
        self.hit_tokens += context.written - before
        return not waits

    def _adopt(self, context: Context, last: int) -> bytes | None:
        """Takes over the blocks before `last`; the key of the first that is not there."""
        size = self._cache.rows
        self._extend(context, last * size)
        for block in range(context.written // size, last):
            key = context.prefix[block]
            pages = self._cache.find(key)
            if pages is None:
                return key
            context.pages.adopt(context.written, size, pages)
            context.written = context.submitted = context.written + size
        return None

    def _has_room_for_rest(self, waiting: Pass) -> bool:
        pages, outcomes = waiting.context.pages, 1 + waiting.num_drafts
        return pages.fitting_rows(waiting.context.written, 1, waiting.remaining, outcomes) > 0

    def _extend(self, context: Context, length: int) -> None:
        """Brings the context's keys up to so many rows."""
        size, history = self._cache.rows, context.history
        keys = context.prefix
        while (len(keys) + 1) * size <= length:
            start, stop = len(keys) * size, (len(keys) + 1) * size
            tokens, positions = history.rows(start, stop)
            masks = [(row, history.masks[row]) for row in range(start, stop) if row in history.masks]
            keys.append(
                self._cache.key(
                    keys[-1] if keys else self._cache.root(context.tenant), tokens, positions, masks
                )
            )

    def _blocks_of(self, chunks: Iterable[Chunk]) -> list[bytes]:
        """Whole blocks in chunks of prompts, where their keys are known."""
        if not self._cache.enabled:
            return []
        size = self._cache.rows
        return [
            key
            for chunk in chunks
            if chunk.stop - chunk.start >= size
            for key in chunk.running.context.prefix[-(-chunk.start // size) : chunk.stop // size]
        ]


def _first_output(waiting: Pass) -> int:
    """The first row that must be computed for what was asked; at least the last one is."""
    asked = [waiting.stop - 1]
    if waiting.samples is not None:
        asked.append(waiting.samples.rows[0])
    if waiting.probes is not None:
        asked.append(waiting.probes.rows[0])
    return min(asked)
