"""The bare driver loop at full speed: contexts with all their pages, decoded with steps queued behind open ones.

Batches are made of whole arrays, so what is measured is the driver and not the loop around it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.driver import Driver, DriverCapabilities
from pie_core.contracts.forward import (
    NO_TICKET,
    AttentionMasks,
    ForwardBatch,
    MediaSpans,
    PageTable,
    Probes,
    Samplers,
    TokenRefs,
)
from pie_core.ids import Ticket
from pie_core.kv_pages.pool import PagePool

Int = NDArray[np.int32]
Order = Literal["pool", "scattered", "contiguous"]


@dataclass(frozen=True, slots=True)
class Story:
    """One context: how long its prompt is and how many tokens it generates."""

    prompt: int
    tokens: int


@dataclass(slots=True)
class Timed:
    """One run."""

    first_token_s: float = 0.0
    decode_s: float = 0.0
    tokens: int = 0
    periods_s: list[float] = field(default_factory=list)  # between the results of two steps
    busy_s: list[float] = field(default_factory=list)  # what the device says of each

    @property
    def idle_us(self) -> float:
        """How long the device waited between two steps: the median over pairs, for steps grow with their contexts."""
        pairs = zip(self.periods_s, self.busy_s, strict=True)
        return 1e6 * max(0.0, median(period - busy for period, busy in pairs)) if self.busy_s else 0.0


class Contexts:
    """Some stories with their pages, and the batches that feed them."""

    def __init__(
        self,
        capabilities: DriverCapabilities,
        stories: Sequence[Story],
        temperature: float,
        order: Order = "pool",
    ) -> None:
        self.capabilities = capabilities
        space = capabilities.cache[0]
        self.size = space.page_size
        self.prompts = np.array([each.prompt for each in stories], np.int32)
        self.totals = self.prompts + np.array([each.tokens for each in stories], np.int32)
        self.pages = pages_in(order, stories, self.size, space.num_pages)
        self.logical = [np.arange(len(pages), dtype=np.int32) for pages in self.pages]
        self.temperature = temperature
        self.lengths = np.zeros(len(stories), np.int32)
        self._tickets = np.zeros(len(stories), np.int64)  # where the last token of each is drawn
        self._rows = np.zeros(len(stories), np.int32)
        self._tables: tuple[tuple[int, ...], PageTable] | None = None

    def prefill(self, driver: Driver, chosen: NDArray[np.intp], counts: Int) -> Ticket:
        """Queues the next rows of some prompts, a token drawn at the end of each."""
        vocab_size = driver.capabilities.vocab_size
        ids = np.random.default_rng(int(chosen[0])).integers(0, vocab_size, counts.sum()).astype(np.int32)
        starts = self.lengths[chosen]
        positions = np.concatenate(
            [
                np.arange(start, start + count, dtype=np.int32)
                for start, count in zip(starts, counts, strict=True)
            ]
        )
        tokens = TokenRefs(ids, np.full(len(ids), NO_TICKET, np.int64), np.zeros(len(ids), np.int32))
        return self._submit(driver, chosen, self._batch(chosen, counts, tokens, positions))

    def decode(self, driver: Driver, chosen: NDArray[np.intp]) -> Ticket:
        """Queues one token of each: the one that was drawn last, wherever that is known."""
        count = len(chosen)
        tokens = TokenRefs(np.zeros(count, np.int32), self._tickets[chosen], self._rows[chosen])
        batch = self._batch(chosen, np.ones(count, np.int32), tokens, self.lengths[chosen])
        return self._submit(driver, chosen, batch)

    def literal_step(self, rows: int = 1) -> ForwardBatch:
        """So many tokens of every context, known to the host."""
        chosen = np.arange(len(self.prompts))
        count = rows * len(chosen)
        tokens = TokenRefs(
            np.zeros(count, np.int32), np.full(count, NO_TICKET, np.int64), np.zeros(count, np.int32)
        )
        positions = (self.lengths[:, None] + np.arange(rows)).reshape(-1).astype(np.int32)
        return self._batch(chosen, np.full(len(chosen), rows, dtype=np.int32), tokens, positions)

    def _submit(self, driver: Driver, chosen: NDArray[np.intp], batch: ForwardBatch) -> Ticket:
        ticket = driver.submit(batch)
        self._tickets[chosen], self._rows[chosen] = ticket, np.arange(len(chosen), dtype=np.int32)
        return ticket

    def _batch(
        self, chosen: NDArray[np.intp], counts: Int, tokens: TokenRefs, positions: Int
    ) -> ForwardBatch:
        count = len(chosen)
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        lengths = self.lengths[chosen]
        self.lengths[chosen] += counts
        none = np.zeros(0, np.int32)
        zeros = np.zeros(count, np.int32)
        return ForwardBatch(
            context_ids=chosen.astype(np.int64),
            indptr=indptr,
            tokens=tokens,
            positions=positions,
            kv_lengths=lengths,
            length_tickets=np.full(count, NO_TICKET, np.int64),
            length_requests=zeros,
            cache=(self._table(chosen),),
            masks=AttentionMasks(none, none, np.zeros(0, np.bool_), np.zeros(1, np.int32), none),
            samplers=self._samplers(chosen, indptr[1:] - 1),
            probes=Probes(
                none, np.zeros(0, np.uint8), np.zeros(0, np.float32), none, np.zeros(1, np.int32), none
            ),
            num_drafts=zeros,
            num_proposals=zeros,
            adapter_ids=np.full(count, -1, np.int32),
            adapter_scales=np.zeros(count, np.float32),
            media=MediaSpans(none, np.zeros(0, np.int64), none, none),
        )

    def _table(self, chosen: NDArray[np.intp]) -> PageTable:
        key = tuple(chosen.tolist())
        if self._tables is None or self._tables[0] != key:
            pages = [self.pages[place] for place in key]
            indptr = np.cumsum([0, *map(len, pages)]).astype(np.int32)
            logical = np.concatenate([self.logical[place] for place in key])
            self._tables = key, PageTable(indptr, np.concatenate(pages), logical)
        return self._tables[1]

    def _samplers(self, chosen: NDArray[np.intp], rows: Int) -> Samplers:
        count = len(chosen)
        zeros, words = np.zeros(count, np.float32), np.zeros(count, np.uint32)
        indptr, none = np.zeros(count + 1, np.int32), np.zeros(0, np.int32)
        return Samplers(
            rows=rows,
            temperature=np.full(count, self.temperature, np.float32),
            top_k=np.zeros(count, np.int32),
            top_p=np.ones(count, np.float32),
            min_p=zeros,
            repetition=np.ones(count, np.float32),
            presence=zeros,
            frequency=zeros,
            stream=chosen.astype(np.uint64),
            index=self.lengths[chosen].astype(np.uint32),
            slot=words,
            epoch=words,
            history_indptr=indptr,
            history=TokenRefs(none, np.zeros(0, np.int64), none),
            history_counts=none,
            bias_indptr=indptr,
            bias_tokens=none,
            bias_values=np.zeros(0, np.float32),
            mask_index=np.full(count, -1, np.int32),
            logit_masks=np.zeros((0, -(-self.capabilities.vocab_size // 32)), np.uint32),
        )


def pages_in(order: Order, stories: Sequence[Story], page_size: int, num_pages: int) -> list[Int]:
    """The pages of each context: as pie's pool hands them out, drawn from the whole cache, or one after the other."""
    counts = [-(-(each.prompt + each.tokens) // page_size) for each in stories]
    if order == "pool":
        return pooled_pages(stories, page_size, num_pages)
    if sum(counts) > num_pages:
        raise MemoryError(f"{sum(counts)} pages needed, {num_pages} are there")
    mixed = np.random.default_rng(0).permutation(num_pages) if order == "scattered" else np.arange(num_pages)
    return np.split(mixed[: sum(counts)].astype(np.int32), np.cumsum(counts)[:-1])


def pooled_pages(stories: Sequence[Story], page_size: int, num_pages: int) -> list[Int]:
    """What contexts get that start together: pages for their prompts, then one whenever one is full, until they end."""
    pool = PagePool("kv", num_pages)
    pages = [pool.allocate(-(-each.prompt // page_size)) for each in stories]
    for step in range(1, max(each.tokens for each in stories) + 1):
        for each, held in zip(stories, pages, strict=True):
            if step <= each.tokens and (each.prompt + step - 1) % page_size == 0:
                held += pool.allocate(1)
            if step == each.tokens:
                pool.release(held)
    return [np.array(held, np.int32) for held in pages]


def run(
    driver: Driver,
    stories: Sequence[Story],
    temperature: float = 0.0,
    depth: int = 1,
    order: Order = "pool",
) -> Timed:
    """Prefills everything, then decodes until each has its tokens; `depth` steps wait behind the open one."""
    contexts = Contexts(driver.capabilities, stories, temperature, order)
    timed = Timed(tokens=int((contexts.totals - contexts.prompts).sum()))
    started = time.perf_counter()
    prefill(driver, contexts)
    timed.first_token_s = time.perf_counter() - started
    remaining = contexts.totals - contexts.prompts - 1  # the prefill drew the first
    open_steps: deque[Ticket] = deque()
    last = decode_started = time.perf_counter()
    while (live := np.flatnonzero(remaining > 0)).size or open_steps:
        if live.size:
            open_steps.append(contexts.decode(driver, live))
            remaining[live] -= 1
        if len(open_steps) > depth or not live.size:
            result = driver.collect(open_steps.popleft())
            assert not result.failed, result.failed
            now = time.perf_counter()
            timed.periods_s.append(now - last)
            timed.busy_s.append(result.busy_s)
            last = now
    timed.decode_s = time.perf_counter() - decode_started
    return timed


def prefill(driver: Driver, contexts: Contexts) -> None:
    """All prompts, in as few steps as hold them; what a step has no room for goes on in the next."""
    open_steps: deque[Ticket] = deque()
    capabilities = driver.capabilities
    while (left := contexts.prompts - contexts.lengths).any():
        chosen = np.flatnonzero(left)[: capabilities.max_batch_requests]
        ends = np.minimum(np.cumsum(left[chosen]), capabilities.max_batch_tokens)
        counts = np.diff(ends, prepend=0).astype(np.int32)
        open_steps.append(contexts.prefill(driver, chosen[counts > 0], counts[counts > 0]))
        if len(open_steps) == capabilities.max_in_flight:
            _check(driver, open_steps.popleft())
    while open_steps:
        _check(driver, open_steps.popleft())


def _check(driver: Driver, ticket: Ticket) -> None:
    failed = driver.collect(ticket).failed
    assert not failed, failed
