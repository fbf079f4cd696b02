"""Batches in a few lines, and the page bookkeeping that a driver needs when no engine stands in front of it.

    stepper = Stepper(driver)
    story = stepper.context()
    result = stepper.run([Request(story, [5, 6, 7], samples=[Sample()])])

A `Context` is what an engine would know of one: its pages and slots in every cache group, and its length. `Stepper`
gives contexts room, builds the batch with `build_batch`, submits it, and keeps the lengths when it is collected.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.driver import CacheSpace, Driver, DriverCapabilities
from pie_core.contracts.forward import (
    NO_TICKET,
    AttentionMasks,
    ForwardBatch,
    ForwardResult,
    Int32,
    MediaSpans,
    PageTable,
    PrefixGroups,
    ProbeKind,
    Probes,
    Samplers,
    StateTable,
    TokenRefs,
)
from pie_core.ids import Ticket


@dataclass(frozen=True, slots=True)
class FromTicket:
    """A token that an earlier batch samples; `row` is its sampler, or `last_accepted(request)`."""

    ticket: Ticket
    row: int


Token = int | FromTicket | tuple[int, ...]  # a tuple: one column for each stream


@dataclass(frozen=True, slots=True)
class Sample:
    """A sampler. `row` counts from the end of the request's rows where negative."""

    row: int = -1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    stream: int = 0
    index: int | None = None  # None: the number of rows up to and with this one
    slot: int | None = None  # None: how many samplers the row already has
    epoch: int = 0
    history: Sequence[Token] = ()
    history_counts: Sequence[int] | None = None  # None: once each
    bias: Sequence[tuple[int, float]] = ()
    allowed: Sequence[int] | None = None  # tokens of the logit mask; None = no mask


@dataclass(frozen=True, slots=True)
class Probe:
    kind: ProbeKind
    row: int = -1
    temperature: float = 1.0
    k: int = 0
    tokens: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Mask:
    """KV indexes that a row may read, as half-open ranges in ascending order."""

    row: int
    visible: Sequence[tuple[int, int]]
    group: int = -1
    causal: bool = True


@dataclass(frozen=True, slots=True)
class Media:
    row: int  # first token row of the request that is media
    handle: int
    offset: int
    length: int


@dataclass(slots=True)
class Context:
    """One token history on pages of every cache group; `pages[g]` maps logical to physical."""

    id: int
    pages: list[dict[int, int]]
    slots: list[int]  # per group: where the state is; -1 = empty, and for groups that are paged
    held: list[set[int]]  # per group: the slots that are this context's until its open steps are collected
    open_steps: int = 0
    length: int = 0  # KV rows, or their upper bound while `length_ticket` is set
    length_ticket: Ticket | None = None
    length_request: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """What one context does in a step."""

    context: Context
    tokens: Sequence[Token]
    positions: Sequence[int] | Sequence[tuple[int, int, int]] | None = None  # None: its KV indexes
    samples: Sequence[Sample] = ()
    probes: Sequence[Probe] = ()
    masks: Sequence[Mask] = ()
    media: Sequence[Media] = ()
    drafts: int = 0  # how many of the last tokens are drafts
    proposals: int = 0
    adapter: int = -1
    adapter_scale: float = 1.0
    state_rows: Sequence[int] | None = None  # rows whose state is kept; None: the last, and those of drafts


class PageBook:
    """Gives out pages and slots, shares them between forks, and takes them back."""

    def __init__(self, capabilities: DriverCapabilities) -> None:
        self.spaces = capabilities.cache
        self._free = [list(range(space.num_pages)) for space in self.spaces]
        self._readers: list[dict[int, int]] = [{} for _ in self.spaces]
        self._contexts = 0

    def context(self) -> Context:
        self._contexts += 1
        count = len(self.spaces)
        return Context(
            self._contexts, [{} for _ in range(count)], [-1] * count, [set() for _ in range(count)]
        )

    def shuffle(self, seed: int) -> None:
        """Makes the physical order of later pages arbitrary."""
        for free in self._free:
            np.random.default_rng(seed).shuffle(free)

    def take(self, group: int) -> int:
        page = self._free[group].pop(0)
        self._readers[group][page] = 1
        return page

    def drop(self, group: int, page: int) -> None:
        self._readers[group][page] -= 1
        if self._readers[group][page] == 0:
            del self._readers[group][page]
            self._free[group].append(page)

    def share(self, group: int, page: int) -> int:
        self._readers[group][page] += 1
        return page

    def is_shared(self, group: int, page: int) -> bool:
        return self._readers[group][page] > 1

    def drop_context(self, context: Context) -> None:
        for group in range(len(self.spaces)):
            for page in (*context.held[group], *context.pages[group].values()):
                self.drop(group, page)
            context.held[group].clear()
            context.pages[group].clear()
            context.slots[group] = -1

    def hold(self, context: Context, group: int, slot: int) -> int:
        context.held[group].add(slot)
        return slot

    def keep_only(self, context: Context, group: int, slot: int) -> None:
        for other in context.held[group] - {slot}:
            context.held[group].remove(other)
            self.drop(group, other)

    def is_state(self, group: int) -> bool:
        return self.spaces[group].group.kind == "state"


class Stepper:
    """Talks to a driver as an engine would, for a handful of contexts."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.book = PageBook(driver.capabilities)
        self._open: dict[Ticket, tuple[Sequence[Request], ForwardBatch]] = {}

    def context(self) -> Context:
        return self.book.context()

    def fork(self, context: Context) -> Context:
        """A context that shares every full page and the state, with a copy of the page that is written next."""
        child = self.context()
        child.length = context.length
        for group, space in enumerate(self.book.spaces):
            if self.book.is_state(group):
                slot = context.slots[group]
                if slot >= 0:
                    child.slots[group] = self.book.hold(child, group, self.book.share(group, slot))
                continue
            for logical, page in context.pages[group].items():
                ragged = (logical + 1) * space.page_size > context.length
                child.pages[group][logical] = (
                    self._copied(group, page) if ragged else self.book.share(group, page)
                )
        return child

    def _copied(self, group: int, page: int) -> int:
        target = self.book.take(group)
        self.driver.copy_pages(group, [page], [target])
        return target

    def run(self, requests: Sequence[Request]) -> ForwardResult:
        return self.collect(self.submit(requests))

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Afterwards a context that has drafts takes its length from the ticket, until that is collected."""
        for request in requests:
            self.make_room(request.context, len(request.tokens))
        return self.submit_batch(requests, self.build(requests))

    def build(self, requests: Sequence[Request]) -> ForwardBatch:
        slots = [self._state_slots(request) for request in requests]
        return build_batch(requests, self.driver.capabilities, slots)

    def grouped(self, requests: Sequence[Request], groups: Sequence[tuple[int, int, int]]) -> ForwardBatch:
        """The batch, with requests `first` to `stop` sharing so many rows."""
        first, stop, rows = np.array(groups, np.int32).reshape(-1, 3).T
        return replace(self.build(requests), prefixes=PrefixGroups(first, stop, rows))

    def submit_batch(self, requests: Sequence[Request], batch: ForwardBatch) -> Ticket:
        ticket = self.driver.submit(batch)
        self._open[ticket] = (requests, batch)
        for place, request in enumerate(requests):
            _advance(request, batch, ticket, place)
        return ticket

    def collect(self, ticket: Ticket) -> ForwardResult:
        requests, batch = self._open.pop(ticket)
        result = self.driver.collect(ticket)
        for place, request in enumerate(requests):
            rejected = request.drafts - int(result.accepted[place])
            _settle(request.context, ticket, place, rejected)
            self._settle_state(request.context, batch, place, rejected)
        return result

    def make_room(self, context: Context, rows: int) -> None:
        """Pages for that many more rows."""
        for group, space in enumerate(self.book.spaces):
            if self.book.is_state(group):
                continue
            first, end = context.length // space.page_size, -(-(context.length + rows) // space.page_size)
            for logical in range(first, end):
                if logical not in context.pages[group]:
                    context.pages[group][logical] = self.book.take(group)

    def _state_slots(self, request: Request) -> list[dict[int, int]]:
        """Per group: row -> the fresh slot that keeps the state after it."""
        rows = _state_rows(request)
        return [
            {row: self.book.hold(request.context, group, self.book.take(group)) for row in rows}
            if self.book.is_state(group)
            else {}
            for group in range(len(self.book.spaces))
        ]

    def _settle_state(self, context: Context, batch: ForwardBatch, place: int, rejected: int) -> None:
        """Goes back to the state after the last accepted row, unless a later step has already gone on from it."""
        last = int(batch.indptr[place + 1] - batch.indptr[place]) - 1
        for group, table in enumerate(batch.cache):
            if not isinstance(table, StateTable):
                continue
            written = _written_slots(table, place)
            if last in written and context.slots[group] == written[last]:
                context.slots[group] = written[last - rejected]
            if context.open_steps == 0:
                self.book.keep_only(context, group, context.slots[group])


def _state_rows(request: Request) -> Sequence[int]:
    if request.state_rows is not None:
        return request.state_rows
    return range(len(request.tokens) - 1 - request.drafts, len(request.tokens))


def _advance(request: Request, batch: ForwardBatch, ticket: Ticket, place: int) -> None:
    context = request.context
    context.length += len(request.tokens)
    context.open_steps += 1
    if request.drafts or context.length_ticket is not None:
        context.length_ticket, context.length_request = ticket, place
    for group, table in enumerate(batch.cache):
        if isinstance(table, StateTable):
            written = _written_slots(table, place)
            context.slots[group] = written.get(len(request.tokens) - 1, context.slots[group])


def _settle(context: Context, ticket: Ticket, place: int, rejected: int) -> None:
    context.length -= rejected
    context.open_steps -= 1
    if context.length_ticket == ticket and context.length_request == place:
        context.length_ticket = None


def _written_slots(table: StateTable, place: int) -> dict[int, int]:
    """Row -> slot of one request."""
    written = slice(table.out_indptr[place], table.out_indptr[place + 1])
    return dict(zip(table.out_rows[written].tolist(), table.out_slots[written].tolist(), strict=True))


def build_batch(
    requests: Sequence[Request],
    capabilities: DriverCapabilities,
    state_slots: Sequence[Sequence[dict[int, int]]] | None = None,
) -> ForwardBatch:
    """`state_slots[r][g]` maps rows of request r to the slots of state group g that keep the state after them."""
    slots = state_slots or [[{} for _ in capabilities.cache] for _ in requests]
    contexts = [request.context for request in requests]
    indptr = _indptr(len(request.tokens) for request in requests)
    adapters = [request.adapter for request in requests]
    return ForwardBatch(
        context_ids=np.array([context.id for context in contexts], np.int64),
        indptr=indptr,
        tokens=token_refs([t for request in requests for t in request.tokens], capabilities.streams),
        positions=_positions(requests, capabilities.position_axes),
        kv_lengths=_int32(context.length for context in contexts),
        length_tickets=np.array([_ticket_of(context) for context in contexts], np.int64),
        length_requests=_int32(context.length_request for context in contexts),
        cache=tuple(_cache_table(g, space, contexts, slots) for g, space in enumerate(capabilities.cache)),
        masks=_masks(requests, indptr),
        samplers=_samplers(requests, indptr, capabilities),
        probes=_probes(requests, indptr),
        num_drafts=_int32(request.drafts for request in requests),
        num_proposals=_int32(request.proposals for request in requests),
        adapter_ids=_int32(adapters),
        adapter_scales=_float32(
            request.adapter_scale if request.adapter >= 0 else 0.0 for request in requests
        ),
        media=_media(requests, indptr),
    )


def token_refs(tokens: Sequence[Token], streams: int = 1) -> TokenRefs:
    ids = np.zeros((len(tokens), streams), np.int32)
    tickets = np.full(len(tokens), NO_TICKET, np.int64)
    rows = np.zeros(len(tokens), np.int32)
    for place, token in enumerate(tokens):
        if isinstance(token, FromTicket):
            tickets[place], rows[place] = token.ticket, token.row
        else:
            ids[place] = token
    return TokenRefs(ids if streams > 1 else ids[:, 0], tickets, rows)


def _positions(requests: Sequence[Request], axes: int) -> Int32:
    per_request = []
    for request in requests:
        start = request.context.length
        given = range(start, start + len(request.tokens)) if request.positions is None else request.positions
        positions = np.array(given, np.int32)
        per_request.append(
            positions if axes == 1 or positions.ndim == 2 else np.repeat(positions[:, None], axes, 1)
        )
    return np.concatenate(per_request).astype(np.int32)


def _ticket_of(context: Context) -> int:
    return NO_TICKET if context.length_ticket is None else int(context.length_ticket)


def _cache_table(
    group: int, space: CacheSpace, contexts: Sequence[Context], slots: Sequence[Sequence[dict[int, int]]]
) -> PageTable | StateTable:
    if space.group.kind == "state":
        written = [slots[place][group] for place in range(len(contexts))]
        return StateTable(
            slots_in=_int32(context.slots[group] for context in contexts),
            out_indptr=_indptr(len(rows) for rows in written),
            out_rows=_int32(row for rows in written for row in rows),
            out_slots=_int32(slot for rows in written for slot in rows.values()),
        )
    tables = [sorted(context.pages[group].items()) for context in contexts]
    return PageTable(
        indptr=_indptr(len(table) for table in tables),
        pages=_int32(page for table in tables for _, page in table),
        logical=_int32(logical for table in tables for logical, _ in table),
    )


def _masks(requests: Sequence[Request], indptr: Int32) -> AttentionMasks:
    entries = [(start, mask) for start, r in zip(indptr, requests, strict=False) for mask in r.masks]
    runs = [_runs(mask.visible) for _, mask in entries]
    return AttentionMasks(
        rows=_int32(start + mask.row for start, mask in entries),
        groups=_int32(mask.group for _, mask in entries),
        causal=np.array([mask.causal for _, mask in entries], np.bool_),
        indptr=_indptr(map(len, runs)),
        runs=_int32(length for run in runs for length in run),
    )


def _runs(visible: Sequence[tuple[int, int]]) -> list[int]:
    runs, end = [], 0
    for low, high in visible:
        runs += [low - end, high - low]
        end = high
    return runs


@dataclass(slots=True)
class _PlacedSample:
    """A sampler with everything that depends on where it stands filled in."""

    row: int
    index: int
    slot: int
    sample: Sample
    counts: Sequence[int] = field(default_factory=list)


def _placed(requests: Sequence[Request], indptr: Int32) -> list[_PlacedSample]:
    placed: list[_PlacedSample] = []
    for start, request in zip(indptr.tolist(), requests, strict=False):
        for sample in request.samples:
            row = sample.row % len(request.tokens)
            index = request.context.length + row + 1 if sample.index is None else sample.index
            before = sum(other.row == start + row for other in placed)
            slot = before if sample.slot is None else sample.slot
            counts = sample.history_counts if sample.history_counts is not None else [1] * len(sample.history)
            placed.append(_PlacedSample(start + row, index, slot, sample, counts))
    return placed


def _samplers(requests: Sequence[Request], indptr: Int32, capabilities: DriverCapabilities) -> Samplers:
    placed = _placed(requests, indptr)
    samples = [p.sample for p in placed]
    masks = [sample.allowed for sample in samples if sample.allowed is not None]
    bias = [entry for sample in samples for entry in sample.bias]
    return Samplers(
        rows=_int32(p.row for p in placed),
        temperature=_float32(sample.temperature for sample in samples),
        top_k=_int32(sample.top_k for sample in samples),
        top_p=_float32(sample.top_p for sample in samples),
        min_p=_float32(sample.min_p for sample in samples),
        repetition=_float32(sample.repetition for sample in samples),
        presence=_float32(sample.presence for sample in samples),
        frequency=_float32(sample.frequency for sample in samples),
        stream=np.array([sample.stream for sample in samples], np.uint64),
        index=np.array([p.index for p in placed], np.uint32),
        slot=np.array([p.slot for p in placed], np.uint32),
        epoch=np.array([sample.epoch for sample in samples], np.uint32),
        history_indptr=_indptr(len(sample.history) for sample in samples),
        history=token_refs([token for sample in samples for token in sample.history], capabilities.streams),
        history_counts=_int32(count for p in placed for count in p.counts),
        bias_indptr=_indptr(len(sample.bias) for sample in samples),
        bias_tokens=_int32(token for token, _ in bias),
        bias_values=_float32(value for _, value in bias),
        mask_index=_mask_index(samples),
        logit_masks=logit_masks(masks, capabilities.vocab_size),
    )


def _mask_index(samples: Sequence[Sample]) -> Int32:
    masked = np.array([sample.allowed is not None for sample in samples], np.bool_)
    return np.where(masked, np.cumsum(masked) - 1, -1).astype(np.int32)


def logit_masks(allowed: Sequence[Sequence[int]], vocab_size: int) -> NDArray[np.uint32]:
    """[masks, words] with the bits of the allowed tokens set."""
    bits = np.zeros((len(allowed), -(-vocab_size // 32) * 32), np.uint8)
    for mask, tokens in enumerate(allowed):
        bits[mask, list(tokens)] = 1
    return np.packbits(bits, axis=1, bitorder="little").view("<u4").astype(np.uint32)


def _probes(requests: Sequence[Request], indptr: Int32) -> Probes:
    placed = [
        (start + probe.row % len(request.tokens), probe)
        for start, request in zip(indptr.tolist(), requests, strict=False)
        for probe in request.probes
    ]
    return Probes(
        rows=_int32(row for row, _ in placed),
        kinds=np.array([probe.kind for _, probe in placed], np.uint8),
        temperature=_float32(probe.temperature for _, probe in placed),
        k=_int32(probe.k for _, probe in placed),
        token_indptr=_indptr(len(probe.tokens) for _, probe in placed),
        tokens=_int32(token for _, probe in placed for token in probe.tokens),
    )


def _media(requests: Sequence[Request], indptr: Int32) -> MediaSpans:
    spans = [(start + m.row, m) for start, r in zip(indptr.tolist(), requests, strict=False) for m in r.media]
    return MediaSpans(
        rows=_int32(row for row, _ in spans),
        handles=np.array([span.handle for _, span in spans], np.int64),
        offsets=_int32(span.offset for _, span in spans),
        lengths=_int32(span.length for _, span in spans),
    )


def probe_values(result: ForwardResult, probe: int) -> NDArray[np.float32]:
    return result.probe_values[result.probe_indptr[probe] : result.probe_indptr[probe + 1]]


def probe_tokens(result: ForwardResult, probe: int) -> Int32:
    return result.probe_tokens[result.probe_token_indptr[probe] : result.probe_token_indptr[probe + 1]]


def proposals(result: ForwardResult, request: int) -> Int32:
    return result.draft_tokens[result.draft_indptr[request] : result.draft_indptr[request + 1]]


def _indptr(lengths: Iterable[int]) -> Int32:
    return np.cumsum([0, *lengths]).astype(np.int32)


def _int32(values: Iterable[int]) -> Int32:
    return np.array(list(values), np.int32)


def _float32(values: Iterable[float]) -> NDArray[np.float32]:
    return np.array(list(values), np.float32)
