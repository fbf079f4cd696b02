"""ForwardBatch -> the arrays that the dummy model works on, with every reference to an earlier ticket resolved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import (
    NO_TICKET,
    AttentionMasks,
    ForwardBatch,
    Int32,
    PageTable,
    Samplers,
    StateTable,
    TokenRefs,
)
from pie_plugins.drivers.dummy.kv_cache import Int64, KvRanges

KEPT_TICKETS = 16  # how many submitted steps back a reference may reach


@dataclass(slots=True)
class Failures:
    """Requests that cannot be answered; the first cause of each is kept."""

    causes: dict[int, str] = field(default_factory=dict)

    def add(self, requests: Iterable[int], cause: str) -> None:
        for request in requests:
            self.causes.setdefault(int(request), cause)


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """What later steps may refer to."""

    tokens: Int32  # [S] or [S, streams]
    sampler_requests: Int64  # [S]
    rejected: NDArray[np.bool_]  # [S]: sampled behind a draft that was not accepted
    last_samplers: Int64  # [R]: the sampler at the last accepted row; -1 = that row samples nothing
    end_lengths: Int64  # [R]
    end_slots: tuple[
        Int64, ...
    ]  # per cache group [R]: where the state after the last accepted row is; -1 = nowhere
    failed: dict[int, str]


class FinishedSteps:
    """The latest steps by ticket."""

    def __init__(self) -> None:
        self._steps: dict[int, FinishedStep] = {}

    def add(self, ticket: int, step: FinishedStep) -> None:
        self._steps[ticket] = step
        self._steps.pop(ticket - KEPT_TICKETS, None)

    def get(self, ticket: int) -> FinishedStep | None:
        return self._steps.get(ticket)


@dataclass(frozen=True, slots=True)
class ResolvedStep:
    """A batch whose tokens, lengths, positions, slots and sampler indexes are all numbers."""

    batch: ForwardBatch
    tokens: Int32  # [T] or [T, streams]
    history_tokens: Int32
    samplers: Samplers
    request: Int64  # [T]
    starts: Int64  # [R] KV rows before this step
    kv_index: Int64  # [T]
    positions: Int64  # [T, axes]
    slots_in: tuple[Int64, ...]  # per cache group [R]; empty for paged groups
    failures: Failures


def resolve(batch: ForwardBatch, finished: FinishedSteps) -> ResolvedStep:
    failures = Failures()
    request = np.arange(batch.num_requests).repeat(batch.indptr[1:] - batch.indptr[:-1])
    shift = _length_shift(batch, finished, failures)
    starts = batch.kv_lengths - shift
    positions = batch.positions.reshape(batch.num_tokens, -1).astype(np.int64) - shift[request, None]
    tokens, _ = _resolve_tokens(batch.tokens, finished, lambda at: request[at], failures)
    samplers, history = _resolve_samplers(batch, finished, request, shift, failures)
    return ResolvedStep(
        batch=batch,
        tokens=tokens,
        history_tokens=history,
        samplers=samplers,
        request=request,
        starts=starts,
        kv_index=starts[request] + np.arange(batch.num_tokens) - batch.indptr[request],
        positions=positions,
        slots_in=_slots_in(batch, finished),
        failures=failures,
    )


def _length_shift(batch: ForwardBatch, finished: FinishedSteps, failures: Failures) -> Int64:
    """[R]: by how much the upper bound of a length exceeds it."""
    shift = np.zeros(batch.num_requests, np.int64)
    for request in np.flatnonzero(batch.length_tickets != NO_TICKET).tolist():
        ticket, earlier = int(batch.length_tickets[request]), int(batch.length_requests[request])
        step = finished.get(ticket)
        if step is None or earlier in step.failed:
            failures.add([request], _lost(ticket, step, earlier))
        else:
            shift[request] = batch.kv_lengths[request] - step.end_lengths[earlier]
    return shift


def known_slots(table: PageTable | StateTable) -> Int64:
    """[R] slots that state is read from; empty for groups that have none."""
    return table.slots_in.astype(np.int64) if isinstance(table, StateTable) else np.empty(0, np.int64)


def _slots_in(batch: ForwardBatch, finished: FinishedSteps) -> tuple[Int64, ...]:
    """Where the length comes from a ticket, so does the slot: that of the last row which was accepted."""
    slots_in = tuple(map(known_slots, batch.cache))
    for request in np.flatnonzero(batch.length_tickets != NO_TICKET).tolist():
        step = finished.get(int(batch.length_tickets[request]))
        for slots, written in zip(slots_in, step.end_slots if step else slots_in, strict=True):
            earlier = int(batch.length_requests[request])
            if len(slots) and step is not None and written[earlier] >= 0:
                slots[request] = written[earlier]
    return slots_in


def _resolve_samplers(
    batch: ForwardBatch, finished: FinishedSteps, request: Int64, shift: Int64, failures: Failures
) -> tuple[Samplers, Int32]:
    samplers = batch.samplers
    owners = request[samplers.rows]

    def owner(entries: Int64) -> Int64:
        return owners[np.searchsorted(samplers.history_indptr, entries, side="right") - 1]

    history, rejected = _resolve_tokens(samplers.history, finished, owner, failures)
    if not shift.any() and not rejected.any():
        return samplers, history
    counts = np.where(rejected, 0, samplers.history_counts).astype(np.int32)
    index = (samplers.index - shift[owners]).astype(np.uint32)
    return replace(samplers, history_counts=counts, index=index), history


def _resolve_tokens(
    refs: TokenRefs, finished: FinishedSteps, owner: Callable[[Int64], Int64], failures: Failures
) -> tuple[Int32, NDArray[np.bool_]]:
    """The tokens, and which of them name a sampler whose row was rejected."""
    rejected = np.zeros(len(refs.tickets), np.bool_)
    named = refs.tickets != NO_TICKET
    if not named.any():
        return refs.ids, rejected
    tokens = refs.ids.copy()
    for ticket in set(refs.tickets[named].tolist()):
        at = np.flatnonzero(refs.tickets == ticket)
        step = finished.get(ticket)
        if step is None:
            failures.add(owner(at), _lost(ticket, None, 0))
            continue
        samplers = _named_samplers(refs.rows[at], step)
        tokens[at] = step.tokens[samplers]
        rejected[at] = step.rejected[samplers]
        _fail_with_their_source(at, samplers, ticket, step, owner, failures)
    return tokens, rejected


def _named_samplers(rows: Int32, step: FinishedStep) -> Int64:
    last = step.last_samplers[np.where(rows < 0, -1 - rows, 0)]
    return np.where(rows < 0, last, rows).astype(np.int64)


def _fail_with_their_source(
    at: Int64,
    samplers: Int64,
    ticket: int,
    step: FinishedStep,
    owner: Callable[[Int64], Int64],
    failures: Failures,
) -> None:
    failures.add(owner(at[samplers < 0]), f"ticket {ticket} samples nothing at the row that a token names")
    for earlier in step.failed:
        lost = at[step.sampler_requests[samplers] == earlier]
        failures.add(owner(lost), _lost(ticket, step, earlier))


def _lost(ticket: int, step: FinishedStep | None, earlier: int) -> str:
    if step is None:
        return f"ticket {ticket} is unknown: it failed, or is more than {KEPT_TICKETS} steps back"
    return f"request {earlier} of ticket {ticket} failed: {step.failed[earlier]}"


def visible_ranges(step: ResolvedStep, group: int, window: int | None) -> KvRanges:
    """Which KV rows of one group each token row reads: causal, within the window, and through its mask."""
    rows = np.arange(step.batch.num_tokens)
    oldest = np.zeros(len(rows), np.int64) if window is None else np.maximum(step.kv_index - window + 1, 0)
    masks = step.batch.masks
    if not len(masks.rows):
        return KvRanges(rows, step.request, oldest, step.kv_index + 1)
    entry = _mask_entries(masks, group, len(rows))
    plain = np.flatnonzero(entry < 0)
    masked = _masked_ranges(step, masks, entry, oldest)
    causal = KvRanges(rows[plain], step.request[plain], oldest[plain], step.kv_index[plain] + 1)
    return _joined([causal, masked])


def _mask_entries(masks: AttentionMasks, group: int, num_rows: int) -> Int64:
    """[T]: the mask entry that holds for each row in this group, -1 = none."""
    entry = np.full(num_rows, -1, np.int64)
    for kind in (-1, group):
        chosen = np.flatnonzero(masks.groups == kind)
        entry[masks.rows[chosen]] = chosen
    return entry


def _masked_ranges(step: ResolvedStep, masks: AttentionMasks, entry: Int64, oldest: Int64) -> KvRanges:
    lengths = np.diff(masks.indptr)
    owner = np.repeat(np.arange(len(masks.rows)), lengths)  # of each run
    running = np.concatenate([[0], np.cumsum(masks.runs, dtype=np.int64)])
    start = masks.indptr[owner]
    ends = running[1:] - running[start]
    place = np.arange(len(masks.runs)) - start
    row = masks.rows[owner].astype(np.int64)
    used = (place % 2 == 1) & (entry[row] == owner)
    owner, row, high, run = owner[used], row[used], ends[used], masks.runs[used]
    low = np.maximum(high - run, oldest[row])
    request = step.request[row]
    end = (step.starts + np.diff(step.batch.indptr))[request]
    high = np.minimum(high, np.where(masks.causal[owner], step.kv_index[row] + 1, end))
    kept = low < high
    return KvRanges(row[kept], request[kept], low[kept], high[kept])


def _joined(parts: Sequence[KvRanges]) -> KvRanges:
    columns = (
        np.concatenate([getattr(part, name) for part in parts]) for name in KvRanges.__dataclass_fields__
    )
    return KvRanges(*columns)
