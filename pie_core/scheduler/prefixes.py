"""Rows that others have computed are taken over, and rows that others are computing are waited for."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import takewhile

from pie_core.engine.context import Context
from pie_core.kv_pages.prefix_blocks import Block, Hit, Rows, pages_away
from pie_core.kv_pages.prefix_cache import TAIL_SHARE, Fetch, PrefixCache
from pie_core.scheduler.request import Chunk, Pass, Readiness

Tail = tuple[Block, int]  # some block that begins like what is wanted, and the rows up to where it parts


class Prefixes:
    """Only up to the first row of a pass that has to give something."""

    def __init__(self, cache: PrefixCache) -> None:
        self.hit_tokens = self.lookup_tokens = 0
        self.fetch: Fetch = lambda *_: False
        self._cache = cache
        self._begun: set[bytes] = set()  # blocks that passes of the step being chosen would compute
        self._computing: Counter[bytes] = Counter()  # blocks, by how many steps compute them
        self._steps: deque[list[bytes]] = deque()  # what each of them computes

    def begin_choice(self) -> None:
        """Of a step: nothing has begun to be computed for it."""
        self._begun.clear()

    def readiness(self, waiting: Pass) -> Readiness:
        """It has taken over what there is."""
        return self._take_over(waiting) if self._can_take_over(waiting) else Readiness.READY

    def submitted(self, chunks: Iterable[Chunk]) -> None:
        keys = self._blocks_of(chunks)
        if keys:
            self._computing.update(keys)
        self._steps.append(keys)

    def finished(self) -> None:
        """The oldest step is over, whatever came of it."""
        keys = self._steps.popleft()
        if keys:
            self._computing -= Counter(keys)

    def written(self, context: Context, *, turn_ended: bool) -> None:
        """More rows have their KV: whole blocks of them can be taken over by others, and the rest where a turn ends."""
        if context.written // self._cache.rows > context.offered and self._applies(context):
            self._offer_blocks(context, context.written)
        if turn_ended:
            self.turn_ended(context)

    def swapped_out(self, context: Context) -> None:
        """What others found of it on the device they find in host memory, once it is nowhere else."""
        if (
            not (self._cache.enabled and self._cache.keeps_rows_only)
            or context.raw
            or context.evictions.evicted
        ):
            return
        self._extend(context, context.written)
        blocks = context.written // self._cache.rows
        start = blocks * self._cache.rows
        if start < context.written:  # the end before the beginning: what is noted last stays longest
            tail = _rows(context, start, context.written)
            key = self._cache.key(self._key_before(context, blocks), tail)
            self._cache.also_in_host([key], context.pages.block(start, context.written))
        if blocks:
            self._cache.also_in_host(context.prefix[:blocks], context.pages.block(0, start))

    def committed(self, context: Context) -> None:
        """Pages that the program manages can be taken over by others once they stay as they are."""
        if context.raw is not None and self._is_plain(context):
            self._offer_blocks(context, min(context.raw.committed_rows, context.written))

    def turn_ended(self, context: Context) -> None:
        """Others may go on from where the context stands now, in the middle of a block perhaps."""
        rows = self._cache.rows
        start, stop = context.written // rows * rows, context.written
        if stop - start < TAIL_SHARE * rows or not self._applies(context):
            return
        state = context.pages.states_at(stop)
        pages = context.pages.block(start, stop)
        if state is not None and any(map(len, pages)) | bool(state):
            self._extend(context, start)
            before = self._key_before(context, start // rows)
            tail = _rows(context, start, stop)
            self._cache.add(self._cache.key(before, tail), before, start, tail, pages, state)

    def _offer_blocks(self, context: Context, length: int) -> None:
        """Of its first `length` rows, those that are not there for others yet."""
        first, last = context.offered, length // self._cache.rows
        self._extend(context, length)
        if first < last and self._cache.keeps_rows_only and not context.history.masks:
            self._offer_run(context, first, last)
        else:
            for block in range(first, last):
                self._offer_block(context, block)
        context.offered = max(first, last)

    def _offer_run(self, context: Context, first: int, last: int) -> None:
        start, stop = first * self._cache.rows, last * self._cache.rows
        self._cache.add_run(
            context.prefix[first:last],
            self._key_before(context, first),
            start,
            _rows(context, start, stop),
            context.pages.block(start, stop),
        )

    def _offer_block(self, context: Context, block: int) -> None:
        start, stop = block * self._cache.rows, (block + 1) * self._cache.rows
        self._cache.add(
            context.prefix[block],
            self._key_before(context, block),
            start,
            _rows(context, start, stop),
            context.pages.block(start, stop),
            context.pages.states_at(stop),
        )

    def _applies(self, context: Context) -> bool:
        """Pages that the program manages are written by its passes, and shared when they are committed."""
        return context.raw is None and self._is_plain(context)

    def _is_plain(self, context: Context) -> bool:
        """What was written after an eviction depends on more than what stands before it."""
        return self._cache.enabled and not context.evictions.evicted and not context.pages.is_swapped

    def _can_take_over(self, waiting: Pass) -> bool:
        context = waiting.context
        is_settled = context.written == context.submitted and context.written % self._cache.rows == 0
        return waiting.remaining > 1 and is_settled and self._applies(context)

    def _take_over(self, waiting: Pass) -> Readiness:
        context, rows = waiting.context, self._cache.rows
        if not waiting.looked_up:
            waiting.looked_up = True
            self.lookup_tokens += waiting.remaining
        limit = _first_output(waiting)
        self._extend(context, limit)
        keys = context.prefix[context.written // rows : limit // rows]
        chain = self._cache.chain(keys)
        missing = keys[len(chain)] if len(chain) < len(keys) else None
        is_computed = missing is not None and missing in self._computing
        if missing in self._begun and not is_computed:
            return Readiness.JOINS  # others need these pages more
        length, away, has_none = (
            context.written + len(chain) * rows,
            pages_away(chain),
            context.pages.is_empty,
        )
        if has_none and not _could_fit(length, waiting, away, beside_promises=bool(chain)):
            self._cache.still_wanted(chain)
            return Readiness.NO_ROOM
        tail = None if is_computed else self._tail(context, length, limit)
        chain, tail = self._on_device(waiting, limit, chain, tail)
        hit = self._cache.hit(context.written, chain, tail)
        if hit is not None and not is_computed and not _promise_behind(hit.length, waiting):
            must_wait = has_none and _could_fit(hit.length, waiting, beside_promises=False)
            self._cache.let_go(hit)
            return Readiness.NO_ROOM if must_wait else Readiness.READY
        if hit is not None:
            self._adopt(context, hit)
        if missing is not None and not is_computed:
            self._begun.add(missing)
        return Readiness.JOINS if is_computed else Readiness.READY

    def _tail(self, context: Context, start: int, limit: int) -> Tail | None:
        """Some block that begins like the rows from `start`, as far as they need not be computed."""
        before = self._key_before(context, start // self._cache.rows)
        return self._cache.beginning_like(before, _rows(context, start, min(limit, start + self._cache.rows)))

    def _on_device(
        self, waiting: Pass, limit: int, chain: list[Block], tail: Tail | None
    ) -> tuple[list[Block], Tail | None]:
        """These as far as they are on the device: what lies in host memory alone comes back if the pass has room."""
        if not any(each.is_away for each in _both(chain, tail)):
            return chain, tail
        context, here = waiting.context, _first_here(chain)
        held = self._cache.hit(context.written, here, None)
        if any(self._bring_back(waiting, chain, end) for end in dict.fromkeys((tail, None))):
            # Making room may have taken some of them, and those that could not be fetched are gone.
            chain = self._cache.chain(each.key for each in chain)
            tail = self._tail(context, context.written + len(chain) * self._cache.rows, limit)
            here = _first_here(chain)
        if held is not None:
            self._cache.let_go(held)
        is_whole = len(here) == len(chain) and tail is not None and not tail[0].is_away
        return here, tail if is_whole else None

    def _bring_back(self, waiting: Pass, chain: list[Block], tail: Tail | None) -> bool:
        """Whether there is room."""
        blocks = _both(chain, tail)
        wanted, length = pages_away(blocks), tail[1] if tail else chain[-1].stop if chain else 0
        if not wanted:
            return True
        has_room = waiting.context.pages.has_room_beside(wanted, length, waiting.stop, 1 + waiting.num_drafts)
        if has_room:
            self._cache.bring_back([each for each in blocks if each.is_away], self.fetch)
        return has_room

    def _adopt(self, context: Context, hit: Hit) -> None:
        context.pages.adopt(context.written, hit.length, hit.pages, hit.states)
        self._cache.use(hit)
        self.hit_tokens += hit.length - context.written
        context.written = context.submitted = hit.length
        context.offered = max(context.offered, hit.length // self._cache.rows)

    def _extend(self, context: Context, length: int) -> None:
        """Brings the context's keys up to so many rows."""
        rows, keys = self._cache.rows, context.prefix
        while (len(keys) + 1) * rows <= length:
            start = len(keys) * rows
            before = self._key_before(context, len(keys))
            keys.append(self._cache.key(before, _rows(context, start, start + rows)))

    def _key_before(self, context: Context, block: int) -> bytes:
        return context.prefix[block - 1] if block else self._cache.root(context.tenant)

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


def _rows(context: Context, start: int, stop: int) -> Rows:
    tokens, positions = context.history.rows(start, stop)
    masks = context.history.masks
    masked = [(row, masks[row]) for row in range(start, stop) if row in masks] if masks else []
    return Rows(tokens, positions, masked)


def _both(chain: list[Block], tail: Tail | None) -> list[Block]:
    return chain if tail is None else [*chain, tail[0]]


def _first_here(chain: Iterable[Block]) -> list[Block]:
    return list(takewhile(lambda each: not each.is_away, chain))


def _could_fit(length: int, waiting: Pass, taken: Sequence[int] = (), *, beside_promises: bool) -> bool:
    """Behind `length` rows, for which so many pages of each group have to be taken."""
    return waiting.context.pages.could_fit_behind(
        length, waiting.stop, 1 + waiting.num_drafts, taken, beside_promises=beside_promises
    )


def _promise_behind(length: int, waiting: Pass) -> bool:
    return waiting.context.pages.promise_behind(length, waiting.stop, 1 + waiting.num_drafts)
