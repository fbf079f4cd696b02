"""Waiting passes to one ForwardBatch: pages are taken chunk by chunk, then everything is laid out as arrays.

The cost is a + b * requests: what a pass needs lies ready in arrays, and a step joins slices of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.driver import CacheSpace, DriverCapabilities
from pie_core.contracts.forward import (
    NO_TICKET,
    AttentionMasks,
    Float32,
    ForwardBatch,
    Int32,
    MediaSpans,
    PageTable,
    Probes,
    Samplers,
    StateTable,
    TokenRefs,
    UInt32,
)
from pie_core.engine.context import Context
from pie_core.kv_pages.intervals import hidden_too, hiding_runs
from pie_core.kv_pages.page_list import PageCopy, PageList
from pie_core.kv_pages.state_slots import StateSlots
from pie_core.scheduler.request import (
    FREQUENCY,
    MIN_P,
    PRESENCE,
    REPETITION,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Chunk,
    Pass,
    SampleRows,
    Settings,
    rows_within,
)
from pie_core.scheduler.run_ahead import pending_rows

_NONE = slice(0, 0)


def take_chunk(running: Pass, rows: int) -> Chunk | None:
    """Takes pages for up to `rows` rows of a pass; None if there are not enough."""
    raw = running.context.raw
    if raw is None:
        return _take_chunk(running, rows)
    promised = raw.withdraw()
    chunk = _take_chunk(running, rows)
    if chunk is None:
        raw.restore(promised)  # and no more: whoever waits must not gather what others could use
    else:
        raw.renew(running.context.pages)
    return chunk


def _take_chunk(running: Pass, rows: int) -> Chunk | None:
    context, samples, probes = running.context, running.samples, running.probes
    start = context.submitted
    copies: Sequence[PageCopy] = ()
    if not context.pages.covers(running.stop):
        rows = _fitting_rows(running, rows)
        if rows == 0:
            return None
        copies = _take_pages(running, rows)
    context.submitted = stop = start + rows
    return Chunk(
        running=running,
        start=start,
        stop=stop,
        copies=copies,
        samples=rows_within(samples.rows, start, stop) if samples else _NONE,
        probes=rows_within(probes.rows, start, stop) if probes else _NONE,
    )


def _fitting_rows(running: Pass, rows: int) -> int:
    reserved = running.remaining
    context = running.context
    rows = context.pages.fitting_rows(context.submitted, rows, reserved, 1 + running.num_drafts)
    return rows if rows == reserved else max(min(rows, reserved - running.indivisible), 0)


def _take_pages(running: Pass, rows: int) -> Sequence[PageCopy]:
    context, reserved = running.context, running.remaining
    stop = context.submitted + rows
    outcomes = range(stop - running.num_drafts, stop + 1) if rows == reserved else (stop,)
    return context.pages.begin(context.submitted, rows, reserved, outcomes)


def build_batch(chunks: Sequence[Chunk], can: DriverCapabilities) -> ForwardBatch:
    """The arrays of one step."""
    contexts = [each.running.context for each in chunks]
    starts = np.array([each.start for each in chunks], np.int32)
    stops = np.array([each.stop for each in chunks], np.int32)
    indptr = _indptr(stops - starts)
    shifts = indptr[:-1] - starts  # KV index -> token row
    requests = len(chunks)
    rows = [_rows(each) for each in chunks]
    positions = np.concatenate([each for _, each in rows])
    no_tickets = np.full(requests, NO_TICKET, np.int64)
    return ForwardBatch(
        context_ids=np.array([context.id for context in contexts], np.int64),
        indptr=indptr,
        tokens=_tokens(chunks, indptr, np.concatenate([each for each, _ in rows])),
        positions=np.repeat(positions[:, None], 3, axis=1) if can.position_axes == 3 else positions,
        kv_lengths=starts,
        length_tickets=no_tickets,
        length_requests=np.zeros(requests, np.int32),
        cache=tuple(_table(group, space, chunks) for group, space in enumerate(can.cache)),
        masks=_masks(chunks, shifts),
        samplers=_samplers(chunks, shifts, can),
        probes=_probes(chunks, shifts),
        num_drafts=np.array([each.running.num_drafts if each.is_last else 0 for each in chunks], np.int32),
        num_proposals=np.zeros(requests, np.int32),
        adapter_ids=np.full(requests, -1, np.int32),
        adapter_scales=np.ones(requests, np.float32),
        media=_no_media(),
    )


# ---- tokens


def _rows(chunk: Chunk) -> tuple[Int32, Int32]:
    """Tokens and positions; the token of a guess comes later."""
    running = chunk.running
    if running.source is None:
        return running.context.history.rows(chunk.start, chunk.stop)
    return _NO_TOKEN, np.array([running.position], np.int32)


def _tokens(chunks: Sequence[Chunk], indptr: Int32, ids: Int32) -> TokenRefs:
    """Guesses are fed what the pass before them draws: its token, or where it will be."""
    refs = _literal(ids)
    for place, chunk in enumerate(chunks):
        if chunk.running.source is not None:
            _refer(refs, int(indptr[place]), chunk.running.source)
    return refs


def _refer(refs: TokenRefs, row: int, source: Pass) -> None:
    if source.drawn is not None:
        refs.ids[row] = source.drawn
    else:
        refs.tickets[row], refs.rows[row] = source.ticket, source.sampler


# ---- cache


def _table(group: int, space: CacheSpace, chunks: Sequence[Chunk]) -> PageTable | StateTable:
    return _state_table(group, chunks) if space.group.kind == "state" else _page_table(group, chunks)


def _page_table(group: int, chunks: Sequence[Chunk]) -> PageTable:
    pages, logical = [], []
    for chunk in chunks:
        held = chunk.running.context.pages.groups[group]
        assert isinstance(held, PageList)
        physical, numbers = held.table(chunk.stop)
        pages.append(physical)
        logical.append(numbers)
    return PageTable(
        indptr=_indptr([len(each) for each in pages]), pages=_joined(pages), logical=_joined(logical)
    )


def _state_table(group: int, chunks: Sequence[Chunk]) -> StateTable:
    slots_in, counts, rows, slots = [], [], [], []
    for chunk in chunks:
        held = chunk.running.context.pages.groups[group]
        assert isinstance(held, StateSlots)
        slots_in.append(held.reading)
        counts.append(len(held.writing))
        rows += [length - 1 - chunk.start for length, _ in held.writing]
        slots += [slot for _, slot in held.writing]
    return StateTable(
        slots_in=np.array(slots_in, np.int32),
        out_indptr=_indptr(counts),
        out_rows=np.array(rows, np.int32),
        out_slots=np.array(slots, np.int32),
    )


# ---- attention masks


def _masks(chunks: Sequence[Chunk], shifts: Int32) -> AttentionMasks:
    rows: list[int] = []
    runs: list[Int32] = []
    for chunk, shift in zip(chunks, shifts, strict=True):
        context = chunk.running.context
        if context.history.masks or context.evictions.evicted:
            masks = _masked_rows(context, chunk.start, chunk.stop)
            rows += [row + int(shift) for row in masks]
            runs += masks.values()
    return AttentionMasks(
        rows=np.array(rows, np.int32),
        groups=np.full(len(rows), -1, np.int32),
        causal=np.ones(len(rows), np.bool_),
        indptr=_indptr([len(each) for each in runs]),
        runs=_joined(runs),
    )


def _masked_rows(context: Context, start: int, stop: int) -> dict[int, Int32]:
    """Rows that do not read all before them: masked by the program, or written after an eviction."""
    masks, masked = context.history.masks, {}
    for row in range(start, stop):
        hidden = context.evictions.hidden_from(row)
        if hidden and context.pages.lists_any(hidden):
            masked[row] = hidden_too(masks[row], hidden) if row in masks else hiding_runs(hidden, row + 1)
        elif row in masks:
            masked[row] = masks[row]
    return masked


# ---- samplers


def _samplers(chunks: Sequence[Chunk], shifts: Int32, can: DriverCapabilities) -> Samplers:
    counts = [each.samples.stop - each.samples.start for each in chunks]
    parts = [(chunk, chunk.running.samples) for chunk in chunks if chunk.running.samples]
    rows: list[int] = []
    streams: list[int] = []
    slots: list[int] = []
    settings: list[Settings] = []
    for chunk, each in parts:
        rows += each.rows[chunk.samples]
        streams += each.streams[chunk.samples]
        slots += each.slots[chunk.samples]
        settings += each.settings[chunk.samples]
    columns = _columns(settings)
    kv_rows = np.array(rows, np.int32)
    epochs = np.array([each.running.context.epoch for each in chunks], np.uint32)
    history, history_indptr = _histories(parts, len(rows))
    bias_tokens, bias_values, bias_indptr = _biases(parts, len(rows))
    mask_index, logit_masks = _logit_masks(chunks, counts, can)
    return Samplers(
        rows=kv_rows + np.repeat(shifts, counts),
        temperature=columns[TEMPERATURE].astype(np.float32),
        top_k=columns[TOP_K].astype(np.int32),
        top_p=columns[TOP_P].astype(np.float32),
        min_p=columns[MIN_P].astype(np.float32),
        repetition=columns[REPETITION].astype(np.float32),
        presence=columns[PRESENCE].astype(np.float32),
        frequency=columns[FREQUENCY].astype(np.float32),
        stream=np.array(streams, np.uint64),
        index=(kv_rows + 1).astype(np.uint32),
        slot=np.array(slots, np.uint32),
        epoch=np.repeat(epochs, counts),
        history_indptr=history_indptr,
        history=history,
        history_counts=np.ones(len(history.ids), np.int32),
        bias_indptr=bias_indptr,
        bias_tokens=bias_tokens,
        bias_values=bias_values,
        mask_index=mask_index,
        logit_masks=logit_masks,
    )


def _columns(settings: Sequence[Settings]) -> NDArray[np.float64]:
    """[7, S]. Equal settings are the same tuple as a rule: few distinct ones become arrays, the rest is an index."""
    places: dict[int, int] = {}
    distinct: list[Settings] = []
    index = []
    for each in settings:
        place = places.setdefault(id(each), len(distinct))
        if place == len(distinct):
            distinct.append(each)
        index.append(place)
    table = np.array(distinct, np.float64).reshape(-1, 7)
    return table[np.array(index, np.intp)].T


def _histories(parts: Sequence[tuple[Chunk, SampleRows]], count: int) -> tuple[TokenRefs, Int32]:
    """For samplers with penalties, every token up to and with their row; and where each sampler's begin."""
    if not any(each.penalized for _, each in parts):
        return _literal(_EMPTY), np.zeros(count + 1, np.int32)
    seen: list[Int32] = []
    guessed: list[tuple[int, Pass]] = []  # which of them are the tokens of guesses
    length = 0
    for chunk, each in parts:
        tokens = chunk.running.context.history.tokens
        for row, settings in zip(each.rows[chunk.samples], each.settings[chunk.samples], strict=True):
            if settings[REPETITION:] == (1, 0, 0):
                seen.append(_EMPTY)
                continue
            guesses = list(pending_rows(chunk.running))
            guessed += [(length + guess.base, guess) for guess in guesses]
            seen += [tokens[: row + 1], np.zeros(len(guesses), np.int32)]
            length += row + 1
    refs = _literal(_joined(seen))
    for place, guess in guessed:
        assert guess.source is not None
        _refer(refs, place, guess.source)
    return refs, _history_indptr(parts)


def _history_indptr(parts: Sequence[tuple[Chunk, SampleRows]]) -> Int32:
    return _indptr(
        [
            row + 1 if settings[REPETITION:] != (1, 0, 0) else 0
            for chunk, each in parts
            for row, settings in zip(each.rows[chunk.samples], each.settings[chunk.samples], strict=True)
        ]
    )


def _biases(parts: Sequence[tuple[Chunk, SampleRows]], count: int) -> tuple[Int32, Float32, Int32]:
    if not any(each.biases for _, each in parts):
        return _EMPTY, _NO_VALUES, np.zeros(count + 1, np.int32)
    pairs: list[tuple[Int32, Float32]] = []
    for chunk, each in parts:
        none = [(_EMPTY, _NO_VALUES)] * (chunk.samples.stop - chunk.samples.start)
        pairs += each.biases[chunk.samples] if each.biases else none
    tokens, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return _joined(tokens), _joined(values, np.float32), _indptr([len(each) for each in tokens])


def _logit_masks(
    chunks: Sequence[Chunk], counts: Sequence[int], can: DriverCapabilities
) -> tuple[Int32, UInt32]:
    """One row of bits for each pass that has some, and which row each sampler follows."""
    masks: list[UInt32] = []
    places = []
    for chunk, count in zip(chunks, counts, strict=True):
        mask = chunk.running.logit_mask
        places.append(-1 if mask is None else len(masks))
        if mask is not None and count:
            masks.append(mask)
    words = -(-can.vocab_size // 32)
    return np.repeat(np.array(places, np.int32), counts), np.array(masks, np.uint32).reshape(-1, words)


# ---- probes


def _probes(chunks: Sequence[Chunk], shifts: Int32) -> Probes:
    rows: list[int] = []
    kinds: list[int] = []
    temperatures: list[float] = []
    counts: list[int] = []
    tokens: list[tuple[int, ...]] = []
    for chunk, shift in zip(chunks, shifts, strict=True):
        each = chunk.running.probes
        if each is not None:
            rows += [row + int(shift) for row in each.rows[chunk.probes]]
            kinds += each.kinds[chunk.probes]
            temperatures += each.temperatures[chunk.probes]
            counts += each.counts[chunk.probes]
            tokens += each.tokens[chunk.probes]
    return Probes(
        rows=np.array(rows, np.int32),
        kinds=np.array(kinds, np.uint8),
        temperature=np.array(temperatures, np.float32),
        k=np.array(counts, np.int32),
        token_indptr=_indptr([len(each) for each in tokens]),
        tokens=np.array(list(itertools.chain.from_iterable(tokens)), np.int32),
    )


# ---- arrays

_EMPTY: Int32 = np.empty(0, np.int32)
_NO_TOKEN: Int32 = np.zeros(1, np.int32)
_NO_VALUES: Float32 = np.empty(0, np.float32)


def _joined(parts: Iterable[NDArray[Any]], dtype: type[np.generic] = np.int32) -> NDArray[Any]:
    parts = list(parts)
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _indptr(counts: Sequence[int] | Int32) -> Int32:
    indptr = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=indptr[1:])
    return indptr


def _literal(ids: Int32) -> TokenRefs:
    return TokenRefs(ids, np.full(len(ids), NO_TICKET, np.int64), np.zeros(len(ids), np.int32))


def _no_media() -> MediaSpans:
    return MediaSpans(_EMPTY, np.empty(0, np.int64), _EMPTY, _EMPTY)
