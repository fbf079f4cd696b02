"""ForwardBatch -> one block of words for the device; the only file that knows the layout of the contract's arrays.

What the host can check, it checks here: a request that cannot run (a page that does not exist, a position past the
limit) is refused and runs on the scratch page. What only the device will know (tokens and lengths of open steps) goes
down as places in the ring of outcomes.

Pages that a context gave up are holes. Attention works on *columns*: the rows of the listed pages side by side. New
rows are always the last columns, so causality needs no more than the number of columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import (
    NO_TICKET,
    AttentionMasks,
    Bool,
    ForwardBatch,
    Int32,
    Int64,
    PageTable,
    StateTable,
    TokenRefs,
)
from pie_core.errors import ForwardError
from pie_plugins.drivers.cuda_native.kv_cache import KvCache
from pie_plugins.drivers.cuda_native.outcomes import NOWHERE, Failure, KeptStep, Outcomes
from pie_plugins.drivers.cuda_native.shared_prefixes import PrefixTiles, no_tiles, plan_tiles


@dataclass(frozen=True, slots=True)
class ModelLimits:
    vocab_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Refs:
    """Tokens as the device finds them: `source` and `dependency` are places in the ring, or NOWHERE."""

    literal: Int32
    source: Int32
    dependency: Int32  # of the failure that spoils it
    live: Int32  # of the flag that says whether it counts


@dataclass(frozen=True, slots=True)
class GroupTable:
    """The pages of one cache group, holes closed."""

    indptr: Int32  # [R + 1]
    pages: Int32
    holes: Int32  # [R] KV rows that lie on pages given up
    masks: RowMasks | None


@dataclass(frozen=True, slots=True)
class RowMasks:
    """Which columns some rows may read: bit c % 32 of word c // 32."""

    index: Int32  # [T] row of `words`, -1 = causal
    causal: Int32  # [M] 1: intersected with causality
    words: Int32  # [M, W]


class OneRowEach:
    """What all steps of so many requests with one row each have in common; nobody writes to it."""

    def __init__(self, requests: int) -> None:
        self.indptr = _fixed(np.arange(requests + 1, dtype=np.int32))
        self.rows = self.indptr[:-1]
        self.requests = _fixed(np.arange(requests))
        self.counts = _fixed(np.ones(requests, np.int64))
        self.zeros_and_one = _fixed(np.zeros(requests + 1, np.int32))
        self.zeros = self.zeros_and_one[1:]
        self.nowhere = _fixed(np.full(requests, NOWHERE, np.int32))


def _fixed(values: NDArray[Any]) -> NDArray[Any]:
    values.flags.writeable = False
    return values


@lru_cache(maxsize=1024)
def one_row_each(requests: int) -> OneRowEach:
    return OneRowEach(requests)


_NO_TILES = no_tiles(0)


@dataclass(slots=True)
class HostStep:
    """One step as the host knows it."""

    batch: ForwardBatch
    counts: Int64  # [R] token rows
    row_request: Int64  # [T]
    tokens: Refs  # [T]
    positions: Int32  # [T]
    lengths: Int32  # [R] KV rows before the step, or their upper bound
    length_source: Int32  # [R]
    length_dependency: Int32  # [R]
    groups: tuple[GroupTable, ...]
    history: Refs  # of samplers
    sampler_requests: Int64  # [S]
    failed: dict[int, str]
    fail: Int32 = field(default_factory=lambda: one_row_each(0).zeros)  # [R] Failure
    tiles: PrefixTiles = _NO_TILES
    is_plain: bool = False  # every request has one row with one sampler, without masks and drafts

    @property
    def rows_each(self) -> int:
        """How many rows every request has, if all have equally many and none is masked; else 0."""
        if self.is_plain:
            return 1
        if not len(self.counts) or any(group.masks for group in self.groups):
            return 0
        each = int(self.counts[0])
        return each if (self.counts == each).all() else 0

    @property
    def lengths_are_known(self) -> bool:
        return bool((self.length_source == NOWHERE).all())


@dataclass(frozen=True, slots=True)
class _WholeTable:
    """A table that nobody writes to, whose pages exist, and which lists all pages of each request from the first on."""

    table: PageTable
    rows: Int32  # [R] for so many rows


class BatchReader:
    """Reads the batches of one model; the caches tell page sizes and limits. `cascades`: plan shared prefixes."""

    def __init__(self, caches: Sequence[KvCache], limits: ModelLimits, cascades: bool = True) -> None:
        self._caches, self._limits, self._cascades = caches, limits, cascades
        self._whole: dict[int, _WholeTable] = {}  # of each group, the last one

    def read(self, batch: ForwardBatch, outcomes: Outcomes) -> HostStep:
        step = _Reading(batch, outcomes, self._caches, self._limits, self._whole).step()
        if self._cascades and len(batch.prefixes.first) and step.rows_each == 1:
            step.tiles = plan_tiles(batch.prefixes, _may_share(step))
        return step


class _Reading:
    """One batch while it is read: collects failures and resolves references to places in the ring."""

    def __init__(
        self,
        batch: ForwardBatch,
        outcomes: Outcomes,
        caches: Sequence[KvCache],
        limits: ModelLimits,
        whole: dict[int, _WholeTable],
    ) -> None:
        self._batch, self._outcomes, self._caches, self._limits = batch, outcomes, caches, limits
        self._whole = whole
        self._same = same = one_row_each(batch.num_requests)
        self._has_one_row_each = _are_equal(batch.indptr, same.indptr)
        if self._has_one_row_each:
            self._counts, self._row_request = same.counts, same.requests
        else:
            self._counts = np.diff(batch.indptr).astype(np.int64)
            self._row_request = np.repeat(same.requests, self._counts)
        self._failed: dict[int, str] = {}

    def step(self) -> HostStep:
        batch = self._batch
        sampler_requests = self._sampler_requests()
        lengths, source, dependency = self._lengths()
        tokens = self._refs(batch.tokens, self._row_request)
        history = self._history(sampler_requests)
        self._check_rows(tokens)
        groups = [
            self._group(index, cache, table, lengths)
            for index, (cache, table) in enumerate(zip(self._caches, self._tables(), strict=True))
        ]
        step = HostStep(
            batch=batch,
            counts=self._counts,
            row_request=self._row_request,
            tokens=tokens,
            positions=batch.positions,
            lengths=lengths,
            length_source=source,
            length_dependency=dependency,
            groups=tuple(groups),
            history=history,
            sampler_requests=sampler_requests,
            failed=self._failed,
            fail=self._same.zeros,
            is_plain=self._is_plain(sampler_requests),
        )
        if self._failed:
            _bury(step, self._caches)
        return step

    def _sampler_requests(self) -> Int64:
        rows = self._batch.samplers.rows
        if self._has_one_row_each and _are_equal(rows, self._same.rows):
            return self._same.requests
        requests: Int64 = self._row_request[rows]
        return requests

    def _is_plain(self, sampler_requests: Int64) -> bool:
        return (
            self._has_one_row_each
            and sampler_requests is self._same.requests
            and not len(self._batch.masks.rows)
            and not np.count_nonzero(self._batch.num_drafts)
        )

    def _fail(self, requests: NDArray[np.integer], cause: str) -> None:
        for request in np.unique(requests).tolist():
            self._failed.setdefault(request, cause)

    def _tables(self) -> list[PageTable]:
        found = []
        for cache, table in zip(self._caches, self._batch.cache, strict=True):
            if isinstance(table, StateTable):
                name = cache.layout.name
                raise ForwardError(f"driver cuda_native: group {name!r} is paged, got a table of states")
            found.append(table)
        return found

    def _lengths(self) -> tuple[Int32, Int32, Int32]:
        """Bounds, and where in the ring the true lengths and their failures will stand."""
        batch, layout, nowhere = self._batch, self._outcomes.layout, self._same.nowhere
        if not np.count_nonzero(batch.length_tickets != NO_TICKET):
            return batch.kv_lengths, nowhere, nowhere
        source, dependency = nowhere.copy(), nowhere.copy()
        for ticket, at in _by_ticket(batch.length_tickets):
            kept, others = self._outcomes.find(ticket), batch.length_requests[at]
            if kept is None:
                self._fail(at, _unknown(ticket))
                continue
            outside = (others < 0) | (others >= kept.num_requests)
            for request, other in zip(at[outside].tolist(), others[outside].tolist(), strict=True):
                self._failed.setdefault(request, f"ticket {ticket} has no request {other}")
            at, others = at[~outside], others[~outside]
            for other in kept.failed:
                self._fail(at[others == other], f"ticket {ticket} failed: {kept.failed[other]}")
            source[at], dependency[at] = kept.base + layout.length + others, kept.base + others
        return batch.kv_lengths, source, dependency

    def _refs(self, refs: TokenRefs, owners: NDArray[np.integer]) -> Refs:
        if refs.ids.ndim != 1:
            raise ForwardError(
                f"driver cuda_native: tokens have {refs.ids.shape[1]} columns, this model has one"
            )
        count = len(refs.ids)
        nowhere = self._same.nowhere if count == len(self._same.nowhere) else _nowhere(count)
        named = np.count_nonzero(refs.tickets != NO_TICKET)
        if not named:
            return Refs(refs.ids, nowhere, nowhere, nowhere)
        if named == count and (found := self._all_of_one(refs)) is not None:
            return found
        found = Refs(refs.ids, nowhere.copy(), nowhere.copy(), nowhere.copy())
        for ticket, at in _by_ticket(refs.tickets):
            self._refer(ticket, refs.rows[at], owners[at], at, found)
        return found

    def _all_of_one(self, refs: TokenRefs) -> Refs | None:
        """What samplers of one step draw that has no failure: so is nearly every step of decoding."""
        ticket = int(refs.tickets[0])
        kept, layout = self._outcomes.find(ticket), self._outcomes.layout
        if kept is None or kept.failed or np.count_nonzero(refs.tickets != ticket):
            return None
        if not are_below(refs.rows, len(kept.sampler_requests)):
            return None
        dependency = kept.sampler_requests[refs.rows] + kept.base
        return Refs(
            refs.ids,
            refs.rows + np.int32(kept.base + layout.tokens),
            dependency.astype(np.int32),
            refs.rows + np.int32(kept.base + layout.live),
        )

    def _refer(
        self, ticket: int, rows: Int32, owners: NDArray[np.integer], at: NDArray[np.intp], found: Refs
    ) -> None:
        kept, layout = self._outcomes.find(ticket), self._outcomes.layout
        if kept is None:
            self._fail(owners, _unknown(ticket))
            return
        by_request = rows < 0
        places = np.where(by_request, -1 - rows, rows)
        outside = places >= np.where(by_request, kept.num_requests, len(kept.sampler_requests))
        if outside.any():
            self._fail(owners[outside], _missing(ticket, kept, int(rows[outside][0])))
            places = np.where(outside, 0, places)
        requests = np.where(by_request, places, _take(kept.sampler_requests, places))
        if kept.failed:
            broken = np.isin(requests, list(kept.failed)) & ~outside
            self._fail(owners[broken], f"a token comes from a request of ticket {ticket} that failed")
        part = np.where(by_request, layout.last, layout.tokens)
        found.source[at] = kept.base + part + places
        found.dependency[at] = kept.base + requests
        found.live[at] = np.where(by_request, NOWHERE, kept.base + layout.live + places)

    def _history(self, requests: NDArray[np.integer]) -> Refs:
        samplers = self._batch.samplers
        if not len(samplers.history.ids):
            return _NO_REFS
        owners = np.repeat(requests, np.diff(samplers.history_indptr))
        history = self._refs(samplers.history, owners)
        wrong = self._outside(history)
        if wrong.any():
            seen, last = history.literal[wrong][0], self._limits.vocab_size - 1
            self._fail(owners[wrong], f"token {seen} of the history is outside 0 … {last}")
        return history

    def _outside(self, refs: Refs) -> Bool:
        """Literal tokens that are outside of the vocabulary."""
        wrong = (refs.literal < 0) | (refs.literal >= self._limits.vocab_size)
        outside: Bool = wrong & (refs.source == NOWHERE)
        return outside

    def _check_rows(self, tokens: Refs) -> None:
        if not are_below(tokens.literal, self._limits.vocab_size):
            wrong = self._outside(tokens)
            if wrong.any():
                cause = f"token id {tokens.literal[wrong][0]} is outside 0 … {self._limits.vocab_size - 1}"
                self._fail(self._row_request[wrong], cause)
        positions, longest = self._batch.positions, self._limits.max_model_len
        if positions.ndim != 1:
            raise ForwardError(
                f"driver cuda_native: positions of shape {positions.shape} have more than the one axis of this model"
            )
        if not are_below(positions, longest):
            wrong = (positions < 0) | (positions >= longest)
            cause = f"position {positions[wrong][0]} is outside 0 … {longest - 1}"
            self._fail(self._row_request[wrong], cause)

    def _group(self, index: int, cache: KvCache, table: PageTable, lengths: Int32) -> GroupTable:
        masks = _row_masks(self._batch, index, table, cache.page_size)
        known, ends = self._whole.get(index), lengths + self._counts
        if known is not None and known.table is table and not np.count_nonzero(ends > known.rows):
            holes = self._same.zeros
        else:
            holes = self._holes(index, cache, table, lengths, ends)
        return GroupTable(table.indptr, table.pages, holes, masks)

    def _holes(self, index: int, cache: KvCache, table: PageTable, lengths: Int32, ends: Int64) -> Int32:
        """[R] rows on pages given up. A row without a page to be written to fails its request."""
        exist = self._check_pages(cache, table)
        listed = table.indptr[1:] - table.indptr[:-1]
        rows = listed * np.int32(cache.page_size)
        is_whole = _last_pages(table) == listed - 1  # ascending from 0 to listed - 1: nothing is missing
        is_whole &= ends <= rows
        if np.count_nonzero(is_whole) == len(listed):
            if exist and _is_unwritten(table):
                self._whole[index] = _WholeTable(table, rows)
            return self._same.zeros
        holes = np.zeros(len(listed), np.int32)
        for request in np.flatnonzero(~is_whole & (self._counts > 0)).tolist():
            holes[request] = self._holes_of(request, cache, table, int(lengths[request]), int(ends[request]))
        return holes

    def _check_pages(self, cache: KvCache, table: PageTable) -> bool:
        """Whether all of them exist; where not, their requests fail."""
        if are_below(table.pages, cache.num_pages):
            return True
        wrong = (table.pages < 0) | (table.pages >= cache.num_pages)
        owners = np.repeat(np.arange(self._batch.num_requests), np.diff(table.indptr))
        cause = f"page {table.pages[wrong][0]} does not exist; there are {cache.num_pages}"
        self._fail(owners[wrong], cause)
        return False

    def _holes_of(self, request: int, cache: KvCache, table: PageTable, length: int, end: int) -> int:
        size = cache.page_size
        stop = -(-end // size)
        logical = table.logical[table.indptr[request] : table.indptr[request + 1]]
        used = logical[logical < stop]
        missing = np.setdiff1d(np.arange(length // size, stop), used)
        if len(missing):
            row, name = max(int(missing[0]) * size, length), cache.layout.name
            self._fail(np.array([request]), f"KV row {row} of group {name!r} has no page to be written to")
        return (stop - len(used)) * size


def are_below(values: Int32, limit: int) -> bool:
    """All of 0 … limit - 1, in one pass: what is negative is large without its sign."""
    return not len(values) or int(np.maximum.reduce(values.view(np.uint32))) < limit


def _are_equal(some: Int32, others: Int32) -> bool:
    return some is others or (len(some) == len(others) and np.count_nonzero(some != others) == 0)


def _nowhere(count: int) -> Int32:
    return np.full(count, NOWHERE, np.int32)


def _by_ticket(tickets: Int64) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Every ticket that is named, and where."""
    for ticket in sorted(set(tickets.tolist()) - {NO_TICKET}):
        yield ticket, np.flatnonzero(tickets == ticket)


def _is_unwritten(table: PageTable) -> bool:
    return not any(each.flags.writeable for each in (table.indptr, table.pages, table.logical))


def _last_pages(table: PageTable) -> Int32:
    """The logical number of the last page of each request; of one that lists none, some page's."""
    if not len(table.logical):
        return np.zeros(len(table.indptr) - 1, np.int32)
    last: Int32 = table.logical[table.indptr[1:] - 1]
    return last


_NO_REFS = Refs(*[one_row_each(0).zeros] * 4)


def _may_share(step: HostStep) -> Bool:
    """[R] requests that run, with every page they ever had. Their shared rows lie before what they write."""
    whole: Bool = step.fail == 0
    for group in step.groups:
        whole &= group.holes == 0
    return whole


def _bury(step: HostStep, caches: Sequence[KvCache]) -> None:
    """Refused requests run on the scratch page, from length 0."""
    dead = np.zeros(len(step.counts), np.bool_)
    dead[list(step.failed)] = True
    rows = dead[step.row_request]
    step.fail = np.where(dead, np.int32(Failure.REFUSED), np.int32(Failure.NONE))
    step.tokens = Refs(*(np.where(rows, fill, values) for fill, values in _buried(step.tokens)))
    owners = np.repeat(step.sampler_requests, np.diff(step.batch.samplers.history_indptr))
    step.history = Refs(*(np.where(dead[owners], fill, values) for fill, values in _buried(step.history)))
    step.positions = np.where(rows, 0, step.positions).astype(np.int32)
    step.lengths = np.where(dead, 0, step.lengths).astype(np.int32)
    step.length_source = np.where(dead, NOWHERE, step.length_source).astype(np.int32)
    step.length_dependency = np.where(dead, NOWHERE, step.length_dependency).astype(np.int32)
    step.groups = tuple(
        _buried_group(group, cache, dead, step.counts)
        for group, cache in zip(step.groups, caches, strict=True)
    )


def _buried(refs: Refs) -> tuple[tuple[int, Int32], ...]:
    return (0, refs.literal), (NOWHERE, refs.source), (NOWHERE, refs.dependency), (NOWHERE, refs.live)


def _buried_group(group: GroupTable, cache: KvCache, dead: Bool, counts: Int64) -> GroupTable:
    lists = [group.pages[start:stop] for start, stop in zip(group.indptr[:-1], group.indptr[1:], strict=True)]
    for request in np.flatnonzero(dead).tolist():
        lists[request] = np.full(-(-int(counts[request]) // cache.page_size), cache.scratch_page, np.int32)
    indptr = np.cumsum([0, *map(len, lists)]).astype(np.int32)
    return GroupTable(
        indptr, np.concatenate(lists), np.where(dead, 0, group.holes).astype(np.int32), group.masks
    )


def _row_masks(batch: ForwardBatch, group: int, table: PageTable, page_size: int) -> RowMasks | None:
    """The masks of one group by column; an entry for the group goes before one for all groups."""
    masks = batch.masks
    if not len(masks.rows):
        return None
    entries: dict[int, int] = {}
    for wanted in (-1, group):
        for entry in np.flatnonzero(masks.groups == wanted).tolist():
            entries[int(masks.rows[entry])] = entry
    if not entries:
        return None
    requests = np.searchsorted(batch.indptr, list(entries), side="right") - 1
    visible = [
        _visible_columns(masks, entry, table, int(request), page_size)
        for entry, request in zip(entries.values(), requests, strict=True)
    ]
    index = np.full(batch.num_tokens, -1, np.int32)
    index[list(entries)] = np.arange(len(entries))
    return RowMasks(index, masks.causal[list(entries.values())].astype(np.int32), _packed(visible))


def _visible_columns(masks: AttentionMasks, entry: int, table: PageTable, request: int, size: int) -> Bool:
    """Run lengths over KV indexes to one flag for each column."""
    runs = masks.runs[masks.indptr[entry] : masks.indptr[entry + 1]]
    visible = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    logical = table.logical[table.indptr[request] : table.indptr[request + 1]].astype(np.int64)
    kv_indexes = (logical[:, None] * size + np.arange(size)).reshape(-1)
    found = np.zeros(len(kv_indexes), np.bool_)
    inside = kv_indexes < len(visible)
    found[inside] = visible[kv_indexes[inside]]
    return found


def _packed(visible: Sequence[Bool]) -> Int32:
    width = -(-max(map(len, visible)) // 32) * 32
    bits = np.zeros((len(visible), max(width, 32)), np.bool_)
    for row, flags in enumerate(visible):
        bits[row, : len(flags)] = flags
    return np.packbits(bits, axis=1, bitorder="little").view("<u4").view(np.int32)


def _take(values: Int64, places: NDArray[np.integer]) -> Int64:
    """values[places], 0 where there is none."""
    if not len(values):
        return np.zeros(len(places), np.int64)
    taken: Int64 = values[np.minimum(places, len(values) - 1)]
    return taken


def _missing(ticket: int, kept: KeptStep, row: int) -> str:
    asked = f"request {-1 - row}" if row < 0 else f"sampler {row}"
    return (
        f"ticket {ticket} has no {asked}: {kept.num_requests} requests, {len(kept.sampler_requests)} samplers"
    )


def _unknown(ticket: int) -> str:
    return f"ticket {ticket} is not among the last steps of this driver, or failed"
