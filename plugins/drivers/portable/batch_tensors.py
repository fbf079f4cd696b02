"""ForwardBatch -> what the model runs on; the only file that knows the layout of the contract's arrays.

References to earlier tickets become numbers here, because steps run in the order of submission. A request that cannot
be run (a page that does not exist, a position past the limit) is marked failed and runs on the scratch page.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.contracts.forward import (
    NO_PREFIX_GROUPS,
    NO_TICKET,
    AttentionMasks,
    Bool,
    ForwardBatch,
    Int32,
    Int64,
    PageTable,
    Samplers,
    StateTable,
    TokenRefs,
    UInt32,
)
from pie_core.errors import ForwardError
from pie_core.ids import Ticket
from pie_plugins.drivers.portable.attention import AttentionPlan, GroupRows, PlanBuilder, visible_runs
from pie_plugins.drivers.portable.kv_cache import KvCache
from pie_plugins.drivers.portable.state_cache import StateCache
from pie_plugins.drivers.portable.state_plan import StatePlan, plan_states
from pie_plugins.models.layers.architecture import ModelConfig, PagedLayout, WithStreams

Cache = KvCache | StateCache
V = TypeVar("V", bound=np.generic)

KEPT_TICKETS = 64  # how many steps back a reference may reach
NO_SLOT = -2  # -1 is the empty state


@dataclass(frozen=True, slots=True)
class Outcome:
    """What later steps may refer to."""

    tokens: Int32  # [S] or [S, streams]
    last_accepted: Int32  # [R] or [R, streams]; -1 where nothing was sampled
    final_lengths: Int64  # [R]
    live_samplers: Bool  # [S]; False behind a rejected draft
    failed: Mapping[int, str]
    sampler_requests: Int64  # [S]
    states: Mapping[
        int, Int64
    ]  # state group -> [R]: the slot written after the last accepted row, or NO_SLOT


class Outcomes:
    """The last steps' outcomes by ticket."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Outcome] = OrderedDict()

    def keep(self, ticket: Ticket, outcome: Outcome) -> None:
        self._kept[ticket] = outcome
        while len(self._kept) > KEPT_TICKETS:
            self._kept.popitem(last=False)

    def find(self, ticket: int) -> Outcome | None:
        return self._kept.get(ticket)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    vocab_size: int
    max_model_len: int
    input_vocab_size: int  # of what may be fed, in the first column

    def of_columns(self, tokens: Int64) -> Int64:
        """What the ids of each column lie below."""
        columns = tokens.shape[1] if tokens.ndim > 1 else 1
        return np.array([self.input_vocab_size, *[self.vocab_size] * (columns - 1)], np.int64)


def model_limits(config: ModelConfig) -> ModelLimits:
    fed = config.input_vocab_size if isinstance(config, WithStreams) else config.vocab_size
    return ModelLimits(config.vocab_size, config.max_position_embeddings, fed)


@dataclass(frozen=True, slots=True)
class BatchTensors:
    """One step, ready to run."""

    token_ids: Tensor  # [T] or [T, streams], int64
    positions: Tensor  # [T] or [T, 3]
    plans: Mapping[int, AttentionPlan]  # by cache group
    state_plans: Mapping[int, StatePlan]
    indptr: Int64  # [R + 1]
    request_of_row: Int64  # [T]
    tokens: Int64  # token_ids again, for the verification of drafts
    kv_lengths: Int64  # [R] resolved
    sampler_index: UInt32  # [S] resolved
    history: Int64  # samplers.history, resolved
    history_counts: Int64  # zero where the sampler lay behind a rejected draft
    failed: dict[int, str]


class BatchReader:
    """Reads the batches of one model; the caches tell page sizes and limits.

    `shares`: requests with a prefix in common read it together.
    """

    def __init__(
        self, caches: Sequence[Cache], limits: ModelLimits, like: Tensor, *, shares: bool = False
    ) -> None:
        self._caches, self._limits, self._like = caches, limits, like
        self._shares = shares

    def read(self, batch: ForwardBatch, outcomes: Outcomes) -> BatchTensors:
        if len(batch.prefixes.first) and not self._shares:
            batch = replace(batch, prefixes=NO_PREFIX_GROUPS)
        return _Reading(batch, outcomes, self._caches, self._limits, self._like).tensors()


class _Reading:
    """One batch while it is read: collects failures, resolves references, makes the plans."""

    def __init__(
        self,
        batch: ForwardBatch,
        outcomes: Outcomes,
        caches: Sequence[Cache],
        limits: ModelLimits,
        like: Tensor,
    ) -> None:
        self._batch, self._outcomes, self._caches, self._limits, self._like = (
            batch,
            outcomes,
            caches,
            limits,
            like,
        )
        self._indptr = batch.indptr.astype(np.int64)
        self._request_of_row = np.repeat(np.arange(batch.num_requests), np.diff(self._indptr))
        self._failed: dict[int, str] = {}

    def tensors(self) -> BatchTensors:
        batch = self._batch
        kv_lengths, shifts = self._lengths()
        tokens, _ = self._resolve(batch.tokens, self._request_of_row)
        positions = batch.positions.astype(np.int64) - _beside(shifts[self._request_of_row], batch.positions)
        sampler_requests = self._request_of_row[batch.samplers.rows]
        history, history_live = self._history(batch.samplers, sampler_requests)
        self._check_rows(tokens, positions)
        writes = {
            group: self._write_slots(cache, table, kv_lengths)
            for group, (cache, table) in self._paged_groups().items()
        }
        states = {group: self._states(group, *each) for group, each in self._state_groups().items()}
        plans = {group: self._plan(group, kv_lengths, slots) for group, slots in writes.items()}
        state_plans = {group: self._state_plan(group, sources) for group, sources in states.items()}
        dead = ~self._alive()[self._request_of_row]
        tokens, positions = (
            np.where(_beside(dead, tokens), 0, tokens),
            np.where(_beside(dead, positions), 0, positions),
        )
        device = self._like.device
        return BatchTensors(
            token_ids=torch.from_numpy(tokens).to(device),
            positions=torch.from_numpy(positions).to(device),
            plans=plans,
            state_plans=state_plans,
            indptr=self._indptr,
            request_of_row=self._request_of_row,
            tokens=tokens,
            kv_lengths=kv_lengths,
            sampler_index=(batch.samplers.index.astype(np.int64) - shifts[sampler_requests]).astype(
                np.uint32
            ),
            history=history,
            history_counts=np.where(history_live, batch.samplers.history_counts, 0).astype(np.int64),
            failed=self._failed,
        )

    def _alive(self) -> Bool:
        alive = np.ones(self._batch.num_requests, np.bool_)
        alive[list(self._failed)] = False
        return alive

    def _fail(self, requests: NDArray[np.integer], cause: str) -> None:
        for request in np.unique(requests).tolist():
            self._failed.setdefault(request, cause)

    def _paged_groups(self) -> dict[int, tuple[KvCache, PageTable]]:
        return {
            group: (cache, table)
            for group, (cache, table) in self._groups()
            if isinstance(cache, KvCache) and isinstance(table, PageTable)
        }

    def _state_groups(self) -> dict[int, tuple[StateCache, StateTable]]:
        return {
            group: (cache, table)
            for group, (cache, table) in self._groups()
            if isinstance(cache, StateCache) and isinstance(table, StateTable)
        }

    def _groups(self) -> Iterator[tuple[int, tuple[Cache, PageTable | StateTable]]]:
        for group, (cache, table) in enumerate(zip(self._caches, self._batch.cache, strict=True)):
            if isinstance(cache, StateCache) != isinstance(table, StateTable):
                seen, expected = (
                    type(table).__name__,
                    "StateTable" if isinstance(cache, StateCache) else "PageTable",
                )
                raise ForwardError(
                    f"driver portable: group {cache.layout.name!r} got a {seen}, expected a {expected}"
                )
            yield group, (cache, table)

    def _lengths(self) -> tuple[Int64, Int64]:
        """KV lengths, and how far each lies below the bound that the batch was made with."""
        batch = self._batch
        bounds = batch.kv_lengths.astype(np.int64)
        lengths = bounds.copy()
        for request in np.flatnonzero(batch.length_tickets != NO_TICKET).tolist():
            ticket, other = int(batch.length_tickets[request]), int(batch.length_requests[request])
            outcome = self._outcome(ticket, np.array([request]))
            if outcome is None:
                continue
            if not 0 <= other < len(outcome.final_lengths):
                self._fail(np.array([request]), f"ticket {ticket} has no request {other}")
            elif other in outcome.failed:
                self._fail(np.array([request]), f"ticket {ticket} failed: {outcome.failed[other]}")
            else:
                lengths[request] = outcome.final_lengths[other]
        return lengths, bounds - lengths

    def _outcome(self, ticket: int, requests: NDArray[np.integer]) -> Outcome | None:
        outcome = self._outcomes.find(ticket)
        if outcome is None:
            self._fail(
                requests,
                f"ticket {ticket} is not among the last {KEPT_TICKETS} steps of this driver, or failed",
            )
        return outcome

    def _resolve(self, refs: TokenRefs, owners: NDArray[np.integer]) -> tuple[Int64, Bool]:
        """Token ids, and which of them are real (not sampled behind a rejected draft)."""
        ids = refs.ids.astype(np.int64)
        live = np.ones(len(ids), np.bool_)
        for ticket in np.unique(refs.tickets[refs.tickets != NO_TICKET]).tolist():
            at = np.flatnonzero(refs.tickets == ticket)
            outcome = self._outcome(ticket, owners[at])
            if outcome is None:
                ids[at] = 0
            else:
                ids[at], live[at] = self._referred(outcome, ticket, refs.rows[at], owners[at])
        return ids, live

    def _referred(
        self, outcome: Outcome, ticket: int, rows: Int32, owners: NDArray[np.integer]
    ) -> tuple[Int64, Bool]:
        accepted = rows < 0
        places = np.where(accepted, -1 - rows.astype(np.int64), rows.astype(np.int64))
        limits = np.where(accepted, len(outcome.last_accepted), len(outcome.tokens))
        outside = places >= limits
        self._fail(owners[outside], f"ticket {ticket} has no such sampler or request")
        places = np.where(outside, 0, places)
        requests = np.where(accepted, places, _take(outcome.sampler_requests, places, -1))
        broken = np.isin(requests, list(outcome.failed)) & ~outside
        self._fail(owners[broken], f"a token comes from a request of ticket {ticket} that failed")
        drawn = _take(outcome.tokens, places, -1)
        ids = np.where(_beside(accepted, drawn), _take(outcome.last_accepted, places, -1), drawn)
        live = accepted | _take(outcome.live_samplers, places, 0)
        return ids.astype(np.int64), live

    def _history(self, samplers: Samplers, requests: NDArray[np.integer]) -> tuple[Int64, Bool]:
        owners = np.repeat(requests, np.diff(samplers.history_indptr))
        tokens, live = self._resolve(samplers.history, owners)
        outside = (tokens < 0) | (tokens >= self._limits.vocab_size)
        if outside.ndim > 1:
            outside = np.logical_or.reduce(outside, axis=1)
        self._fail(
            owners[outside & live], f"a token of the history is outside 0 … {self._limits.vocab_size - 1}"
        )
        return np.where(_beside(outside, tokens), 0, tokens), live & ~outside

    def _check_rows(self, tokens: Int64, positions: Int64) -> None:
        longest = self._limits.max_model_len
        wrong = (tokens < 0) | (tokens >= self._limits.of_columns(tokens))
        if wrong.any():
            cause = f"token id {tokens[wrong][0]} is outside 0 … {self._limits.input_vocab_size - 1}"
            self._fail(self._request_of_row[np.nonzero(wrong)[0]], cause)
        wrong = (positions < 0) | (positions >= longest)
        if wrong.any():
            cause = f"position {positions[wrong][0]} is outside 0 … {longest - 1}"
            self._fail(self._request_of_row[np.nonzero(wrong)[0]], cause)

    def _write_slots(self, cache: KvCache, table: PageTable, kv_lengths: Int64) -> Int64:
        """[T]: where each new row goes. A row whose page is not listed fails its request."""
        owners = np.repeat(np.arange(self._batch.num_requests), np.diff(table.indptr))
        pages = table.pages.astype(np.int64)
        wrong = (pages < 0) | (pages >= cache.num_pages)
        if wrong.any():
            cause = f"page {pages[wrong][0]} does not exist; there are {cache.num_pages}"
            self._fail(owners[wrong], cause)
        kv_index = kv_lengths[self._request_of_row] + self._row_in_request()
        logical, place = np.divmod(kv_index, cache.page_size)
        listed = owners * _STRIDE + table.logical
        wanted = self._request_of_row * _STRIDE + logical
        found = np.searchsorted(listed, wanted)
        missing = (found >= len(listed)) | (_take(listed, found, -1) != wanted)
        if missing.any():
            cause = (
                f"KV row {kv_index[missing][0]} of group {cache.layout.name!r} has no page to be written to"
            )
            self._fail(self._request_of_row[missing], cause)
        return np.where(missing, cache.scratch_slot, _take(pages, found, 0) * cache.page_size + place)

    def _row_in_request(self) -> Int64:
        return np.arange(len(self._request_of_row)) - self._indptr[self._request_of_row]

    def _states(self, group: int, cache: StateCache, table: StateTable) -> Int64:
        """[R]: the slot that each request's state is read from, -1 where it starts empty."""
        batch = self._batch
        sources = table.slots_in.astype(np.int64)
        for request in np.flatnonzero(batch.length_tickets != NO_TICKET).tolist():
            outcome = self._outcomes.find(int(batch.length_tickets[request]))
            other = int(batch.length_requests[request])
            if outcome is not None and 0 <= other < len(outcome.final_lengths):
                written = int(outcome.states[group][other])
                sources[request] = sources[request] if written == NO_SLOT else written
        self._check_slots(cache, np.arange(batch.num_requests), sources, -1)
        owners = np.repeat(np.arange(batch.num_requests), np.diff(table.out_indptr))
        self._check_slots(cache, owners, table.out_slots.astype(np.int64), 0)
        wrong = (table.out_rows < 0) | (table.out_rows >= np.diff(self._indptr)[owners])
        if wrong.any():
            self._fail(
                owners[wrong],
                f"a state is asked for after row {table.out_rows[wrong][0]}, which is not there",
            )
        return sources

    def _check_slots(self, cache: StateCache, owners: Int64, slots: Int64, lowest: int) -> None:
        wrong = (slots < lowest) | (slots >= cache.num_pages)
        if wrong.any():
            cause = f"slot {slots[wrong][0]} of group {cache.layout.name!r} does not exist; there are {cache.num_pages}"
            self._fail(owners[wrong], cause)

    def _state_plan(self, group: int, sources: Int64) -> StatePlan:
        cache, table = self._state_groups()[group]
        return plan_states(table, self._indptr, sources, self._alive(), cache, self._like.device)

    def _plan(self, index: int, kv_lengths: Int64, write_slots: Int64) -> AttentionPlan:
        cache, table = self._paged_groups()[index]
        alive = self._alive()
        group = GroupRows(
            indptr=self._indptr,
            kv_lengths=kv_lengths,
            is_alive=alive,
            page_indptr=table.indptr.astype(np.int64),
            pages=table.pages.astype(np.int64),
            logical=table.logical.astype(np.int64),
            masks=masks_of_group(self._batch.masks, index),
            window=cache.layout.window,
            prefixes=self._prefixes(cache),
        )
        slots = np.where(alive[self._request_of_row], write_slots, cache.scratch_slot)
        return PlanBuilder(cache, group, self._like).build(slots)

    def _prefixes(self, cache: KvCache) -> list[tuple[int, int, int]]:
        """Latent rows and windows are read by every request itself."""
        groups = self._batch.prefixes
        if not isinstance(cache.layout, PagedLayout) or cache.layout.window is not None:
            return []
        return list(zip(groups.first.tolist(), groups.stop.tolist(), groups.rows.tolist(), strict=True))


def _beside(values: NDArray[V], rows: NDArray[np.integer]) -> NDArray[V]:
    """One value for each token row, to be combined with rows of one value or of several."""
    return values if rows.ndim == 1 else values[:, None]


_STRIDE = 1 << 32  # more than there are pages in a context


def masks_of_group(masks: AttentionMasks, group: int) -> dict[int, tuple[bool, Bool]]:
    """Token row -> (causal, visible KV indexes); an entry for the group goes before one for all groups."""
    found: dict[int, tuple[bool, Bool]] = {}
    for wanted in (-1, group):
        for entry in np.flatnonzero(masks.groups == wanted).tolist():
            runs = masks.runs[masks.indptr[entry] : masks.indptr[entry + 1]]
            found[int(masks.rows[entry])] = bool(masks.causal[entry]), visible_runs(runs)
    return found


def _take(values: NDArray[V], places: NDArray[np.integer], absent: int) -> NDArray[V]:
    """values[places], `absent` where a place is outside."""
    inside = places < len(values)
    taken = np.full((len(places), *values.shape[1:]), absent, dtype=values.dtype)
    taken[inside] = values[places[inside]]
    return taken
