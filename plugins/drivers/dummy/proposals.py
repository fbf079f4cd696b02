"""Drafts for the next step: the model goes on by itself on scratch pages, and is wrong as often as it is told to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pie_core.contracts.driver import CacheSpace
from pie_core.contracts.forward import (
    NO_TICKET,
    AttentionMasks,
    ForwardBatch,
    Int32,
    Int64,
    MediaSpans,
    PageTable,
    Probes,
    StateTable,
    TokenRefs,
)
from pie_plugins.drivers.dummy.batch_tensors import Failures, FinishedStep, ResolvedStep, known_slots
from pie_plugins.drivers.dummy.hashing import Words, mix, uniform
from pie_plugins.drivers.dummy.kv_cache import PagedCache
from pie_plugins.drivers.dummy.model import Attachments, DummyModel
from pie_plugins.drivers.dummy.sampler import Head, chosen_samplers

MOST = 8  # proposals for one request and step
_LUCK = np.uint64(0x5851F42D4C957F2D)


def scratch_pages(max_requests: int, page_size: int) -> int:
    return max_requests * _scratch_per_request(page_size)


def _scratch_per_request(page_size: int) -> int:
    return 2 + MOST // page_size


class Proposer:
    """Continues requests without touching their pages."""

    def __init__(
        self, model: DummyModel, head: Head, cache: tuple[CacheSpace, ...], vocab_size: int, accuracy: float
    ) -> None:
        self._model = model
        self._head = head
        self._spaces = cache
        self._vocab_size = vocab_size
        self._accuracy = accuracy

    def propose(
        self, step: ResolvedStep, finished: FinishedStep, attachments: Attachments
    ) -> tuple[Int32, Int32]:
        """`draft_indptr` and `draft_tokens` of the result."""
        if not step.batch.num_proposals.any():
            none = np.empty((0, *finished.tokens.shape[1:]), np.int32)
            return np.zeros(step.batch.num_requests + 1, np.int32), none
        wanted = np.minimum(step.batch.num_proposals, MOST)
        wanted = np.where(finished.last_samplers >= 0, wanted, 0)
        requests = np.flatnonzero(wanted)
        indptr = np.concatenate([[0], np.cumsum(wanted)]).astype(np.int32)
        if not len(requests):
            return indptr, np.empty((0, *finished.tokens.shape[1:]), np.int32)
        rounds = self._continue(step, finished, requests, int(wanted.max()), attachments)
        parts = [rounds[: wanted[request], place] for place, request in enumerate(requests)]
        return indptr, np.concatenate(parts)

    def _continue(
        self,
        step: ResolvedStep,
        finished: FinishedStep,
        requests: Int64,
        count: int,
        attachments: Attachments,
    ) -> Int32:
        """[count, len(requests)] tokens."""
        scratch = self._first_scratch_step(step, finished, requests)
        drafts = []
        for _ in range(count):
            words = self._model.run(scratch, attachments)
            tokens = self._head.sample(words, scratch)
            drafts.append(self._with_mistakes(tokens, words))
            scratch = self._next(scratch, tokens)
        return np.stack(drafts)

    def _with_mistakes(self, tokens: Int32, words: Words) -> Int32:
        right = uniform(mix(words ^ _LUCK), 1)[:, 0] < self._accuracy
        wrong = (tokens + 1) % self._vocab_size
        return np.where(right.reshape(-1, *[1] * (tokens.ndim - 1)), tokens, wrong).astype(np.int32)

    def _next(self, step: ResolvedStep, tokens: Int32) -> ResolvedStep:
        samplers = replace(step.samplers, index=step.samplers.index + np.uint32(1))
        cache = tuple(map(_swapped, step.batch.cache))
        return replace(
            step,
            batch=replace(step.batch, cache=cache),
            tokens=tokens,
            samplers=samplers,
            starts=step.starts + 1,
            kv_index=step.kv_index + 1,
            positions=step.positions + 1,
            slots_in=tuple(known_slots(table) for table in cache),
        )

    def _first_scratch_step(
        self, step: ResolvedStep, finished: FinishedStep, requests: Int64
    ) -> ResolvedStep:
        samplers, history = chosen_samplers(
            step.samplers, finished.last_samplers[requests], step.history_tokens
        )
        count = len(requests)
        samplers = replace(
            samplers,
            rows=np.arange(count, dtype=np.int32),
            index=samplers.index + np.uint32(1),
            mask_index=np.full(count, -1, np.int32),
        )
        last_rows = step.samplers.rows[finished.last_samplers[requests]]
        starts = finished.end_lengths[requests]
        slots_in = tuple(slots[requests] if len(slots) else slots for slots in finished.end_slots)
        cache = tuple(self._scratch_table(step, g, requests, starts) for g in range(len(self._spaces)))
        tokens = finished.tokens[finished.last_samplers[requests]]
        return ResolvedStep(
            batch=_bare_batch(step.batch, requests, cache, starts),
            tokens=tokens,
            history_tokens=history,
            samplers=samplers,
            request=np.arange(count),
            starts=starts,
            kv_index=starts,
            positions=step.positions[last_rows] + 1,
            slots_in=slots_in,
            failures=Failures(),
        )

    def _scratch_table(
        self, step: ResolvedStep, group: int, requests: Int64, starts: Int64
    ) -> PageTable | StateTable:
        space, table = self._spaces[group], step.batch.cache[group]
        per_request = _scratch_per_request(space.page_size)
        first = space.num_pages + np.arange(len(requests)) * per_request
        if isinstance(table, StateTable):
            slots = first.astype(np.int32)
            return StateTable(slots + 1, np.arange(len(slots) + 1, dtype=np.int32), slots * 0, slots)
        cache = self._model.caches[group]
        assert isinstance(cache, PagedCache)
        parts = [
            _continued(table, request, start, range(page, page + per_request), cache, space.page_size)
            for request, start, page in zip(requests.tolist(), starts.tolist(), first.tolist(), strict=True)
        ]
        pages, logical = (np.array([n for part in parts for n in part[i]], np.int32) for i in (0, 1))
        return PageTable(_indptr([len(part[0]) for part in parts]), pages, logical)


def _continued(
    table: PageTable, request: int, start: int, scratch: Sequence[int], cache: PagedCache, page_size: int
) -> tuple[list[int], list[int]]:
    """Pages and logical numbers of one request, its ragged last page replaced by a copy, and room behind it."""
    entries = slice(table.indptr[request], table.indptr[request + 1])
    known = dict(zip(table.logical[entries].tolist(), table.pages[entries].tolist(), strict=True))
    last = start // page_size
    pages = {number: page for number, page in known.items() if number < last}
    if start % page_size and last in known:
        cache.copy([known[last]], [scratch[0]])
    pages.update({last + place: page for place, page in enumerate(scratch)})
    return list(pages.values()), list(pages)


def _swapped(table: PageTable | StateTable) -> PageTable | StateTable:
    """State goes back and forth between two scratch slots."""
    if isinstance(table, PageTable):
        return table
    return replace(table, slots_in=table.out_slots, out_slots=table.slots_in)


def _bare_batch(
    batch: ForwardBatch, requests: Int64, cache: tuple[PageTable | StateTable, ...], starts: Int64
) -> ForwardBatch:
    """One token row for each of the requests, without masks, probes, drafts or media."""
    count = len(requests)
    none, zeros = np.empty(0, np.int32), np.zeros(1, np.int32)
    no_tickets = np.full(count, NO_TICKET, np.int64)
    floats = np.empty(0, np.float32)
    return replace(
        batch,
        context_ids=batch.context_ids[requests],
        indptr=np.arange(count + 1, dtype=np.int32),
        tokens=TokenRefs(np.zeros(count, np.int32), no_tickets, np.zeros(count, np.int32)),
        positions=np.zeros(count, np.int32),
        kv_lengths=starts.astype(np.int32),
        length_tickets=no_tickets,
        length_requests=np.zeros(count, np.int32),
        cache=cache,
        masks=AttentionMasks(none, none, np.empty(0, np.bool_), zeros, none),
        probes=Probes(none, np.empty(0, np.uint8), floats, none, zeros, none),
        num_drafts=np.zeros(count, np.int32),
        num_proposals=np.zeros(count, np.int32),
        adapter_ids=batch.adapter_ids[requests],
        adapter_scales=batch.adapter_scales[requests],
        media=MediaSpans(none, np.empty(0, np.int64), none, none),
    )


def _indptr(lengths: Sequence[int]) -> Int32:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
