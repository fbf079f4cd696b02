"""Waiting passes to one ForwardBatch: pages are taken chunk by chunk, then everything is laid out as arrays.

The cost is a + b * requests: what a pass needs lies ready in arrays, and a step joins slices of them.
"""

from __future__ import annotations

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
from pie_core.kv_pages.page_list import PageList
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
    ProbeRows,
    SampleRows,
)

_NONE = slice(0, 0)


def take_chunk(running: Pass, rows: int) -> Chunk | None:
    """Takes pages for up to `rows` rows of a pass; None if there are not enough."""
    context, start = running.context, running.context.written
    drafts = running.num_drafts
    reserved = context.length - start
    rows = context.pages.fitting_rows(start, rows, reserved, 1 + drafts)
    if rows < reserved:
        rows = min(rows, reserved - running.indivisible)
    if rows <= 0:
        return None
    stop = start + rows
    outcomes = range(stop - drafts, stop + 1) if rows == reserved else (stop,)
    copies = context.pages.begin(start, rows, reserved, outcomes)
    return Chunk(
        running=running,
        start=start,
        stop=stop,
        copies=tuple(copies),
        samples=running.samples.within(start, stop) if running.samples else _NONE,
        probes=running.probes.within(start, stop) if running.probes else _NONE,
    )


def build_batch(chunks: Sequence[Chunk], can: DriverCapabilities) -> ForwardBatch:
    """The arrays of one step."""
    contexts = [each.running.context for each in chunks]
    starts = np.array([each.start for each in chunks], np.int32)
    stops = np.array([each.stop for each in chunks], np.int32)
    indptr = _indptr(stops - starts)
    shifts = indptr[:-1] - starts  # KV index -> token row
    requests = len(chunks)
    positions = _joined(context.history.positions[each.start : each.stop] for each, context in _pairs(chunks))
    no_tickets = np.full(requests, NO_TICKET, np.int64)
    return ForwardBatch(
        context_ids=np.array([context.id for context in contexts], np.int64),
        indptr=indptr,
        tokens=_literal(
            _joined(context.history.tokens[each.start : each.stop] for each, context in _pairs(chunks))
        ),
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


def _pairs(chunks: Sequence[Chunk]) -> Iterable[tuple[Chunk, Any]]:
    return ((each, each.running.context) for each in chunks)


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
        slots_in.append(held.current)
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
        masks = chunk.running.context.history.masks
        if masks:
            masked = [row for row in range(chunk.start, chunk.stop) if row in masks]
            rows += [row + int(shift) for row in masked]
            runs += [masks[row] for row in masked]
    return AttentionMasks(
        rows=np.array(rows, np.int32),
        groups=np.full(len(rows), -1, np.int32),
        causal=np.ones(len(rows), np.bool_),
        indptr=_indptr([len(each) for each in runs]),
        runs=_joined(runs),
    )


# ---- samplers


def _samplers(chunks: Sequence[Chunk], shifts: Int32, can: DriverCapabilities) -> Samplers:
    parts: list[tuple[Chunk, SampleRows]] = []
    counts = []
    for chunk in chunks:
        counts.append(chunk.samples.stop - chunk.samples.start)
        if counts[-1] and chunk.running.samples:
            parts.append((chunk, chunk.running.samples))
    rows = _joined(each.rows[chunk.samples] for chunk, each in parts)
    settings = _joined((each.settings[chunk.samples] for chunk, each in parts), np.float64).reshape(-1, 7)
    history, history_indptr = _histories(parts)
    bias_tokens, bias_values, bias_indptr = _biases(parts)
    mask_index, logit_masks = _logit_masks(parts, can)
    return Samplers(
        rows=rows + np.repeat(shifts, counts),
        temperature=settings[:, TEMPERATURE].astype(np.float32),
        top_k=settings[:, TOP_K].astype(np.int32),
        top_p=settings[:, TOP_P].astype(np.float32),
        min_p=settings[:, MIN_P].astype(np.float32),
        repetition=settings[:, REPETITION].astype(np.float32),
        presence=settings[:, PRESENCE].astype(np.float32),
        frequency=settings[:, FREQUENCY].astype(np.float32),
        stream=_joined((each.streams[chunk.samples] for chunk, each in parts), np.uint64),
        index=(rows + 1).astype(np.uint32),
        slot=_joined((each.slots[chunk.samples] for chunk, each in parts), np.uint32),
        epoch=np.repeat(np.array([each.running.context.epoch for each in chunks], np.uint32), counts),
        history_indptr=history_indptr,
        history=_literal(history),
        history_counts=np.ones(len(history), np.int32),
        bias_indptr=bias_indptr,
        bias_tokens=bias_tokens,
        bias_values=bias_values,
        mask_index=mask_index,
        logit_masks=logit_masks,
    )


def _histories(parts: Sequence[tuple[Chunk, SampleRows]]) -> tuple[Int32, Int32]:
    """For samplers with penalties, every token up to and with their row; and where each sampler's begin."""
    if not any(each.penalized for _, each in parts):
        return _EMPTY, _no_entries(parts)
    seen: list[Int32] = []
    for chunk, each in parts:
        tokens = chunk.running.context.history.tokens
        for row in each.rows[chunk.samples]:
            seen.append(tokens[: row + 1] if each.penalized else _EMPTY)
    return _joined(seen), _indptr([len(each) for each in seen])


def _biases(parts: Sequence[tuple[Chunk, SampleRows]]) -> tuple[Int32, Float32, Int32]:
    if not any(each.biases for _, each in parts):
        return _EMPTY, np.empty(0, np.float32), _no_entries(parts)
    pairs: list[tuple[Int32, Float32]] = []
    for chunk, each in parts:
        none = [(_EMPTY, np.empty(0, np.float32))] * (chunk.samples.stop - chunk.samples.start)
        pairs += each.biases[chunk.samples] if each.biases else none
    tokens, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return _joined(tokens), _joined(values, np.float32), _indptr([len(each) for each in tokens])


def _logit_masks(parts: Sequence[tuple[Chunk, SampleRows]], can: DriverCapabilities) -> tuple[Int32, UInt32]:
    """One row of bits for each pass that has some, and which row each sampler follows."""
    rows: list[UInt32] = []
    index: list[int] = []
    for chunk, _ in parts:
        mask = chunk.running.logit_mask
        index += [-1 if mask is None else len(rows)] * (chunk.samples.stop - chunk.samples.start)
        if mask is not None:
            rows.append(mask)
    words = -(-can.vocab_size // 32)
    return np.array(index, np.int32), np.array(rows, np.uint32).reshape(-1, words)


def _no_entries(parts: Sequence[tuple[Chunk, SampleRows]]) -> Int32:
    return np.zeros(1 + sum(chunk.samples.stop - chunk.samples.start for chunk, _ in parts), np.int32)


# ---- probes


def _probes(chunks: Sequence[Chunk], shifts: Int32) -> Probes:
    parts: list[tuple[Chunk, ProbeRows]] = []
    counts = []
    for chunk in chunks:
        counts.append(chunk.probes.stop - chunk.probes.start)
        if counts[-1] and chunk.running.probes:
            parts.append((chunk, chunk.running.probes))
    tokens = [tokens for chunk, each in parts for tokens in each.tokens[chunk.probes]]
    return Probes(
        rows=_joined(each.rows[chunk.probes] for chunk, each in parts) + np.repeat(shifts, counts),
        kinds=_joined((each.kinds[chunk.probes] for chunk, each in parts), np.uint8),
        temperature=_joined((each.temperatures[chunk.probes] for chunk, each in parts), np.float32),
        k=_joined(each.counts[chunk.probes] for chunk, each in parts),
        token_indptr=_indptr([len(each) for each in tokens]),
        tokens=_joined(tokens),
    )


# ---- arrays

_EMPTY: Int32 = np.empty(0, np.int32)


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
