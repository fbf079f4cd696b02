"""Batches that the driver makes for itself: none at all, to record graphs, and the largest, to see what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pie_core.contracts.forward import (
    NO_TICKET,
    AttentionMasks,
    ForwardBatch,
    Int32,
    MediaSpans,
    PageTable,
    Probes,
    Samplers,
    TokenRefs,
)
from pie_plugins.drivers.cuda_native.batch_tensors import GroupTable, HostStep, Refs


def prefill_step(page_sizes: Sequence[int], tokens: int, requests: int) -> ForwardBatch:
    """So many tokens of so many fresh contexts, each with a greedy sampler at its end."""
    requests = min(requests, tokens)
    counts = np.full(requests, tokens // requests)
    counts[: tokens % requests] += 1
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = np.concatenate([np.arange(count) for count in counts]).astype(np.int32)
    return ForwardBatch(
        context_ids=np.arange(requests),
        indptr=indptr,
        tokens=_literal(np.zeros(tokens, np.int32)),
        positions=positions,
        kv_lengths=np.zeros(requests, np.int32),
        length_tickets=np.full(requests, NO_TICKET, np.int64),
        length_requests=np.zeros(requests, np.int32),
        cache=tuple(_fresh_pages(counts, size) for size in page_sizes),
        masks=_no_masks(),
        samplers=_greedy(indptr[1:] - 1),
        probes=_no_probes(),
        num_drafts=np.zeros(requests, np.int32),
        num_proposals=np.zeros(requests, np.int32),
        adapter_ids=np.full(requests, -1, np.int32),
        adapter_scales=np.zeros(requests, np.float32),
        media=_no_media(),
    )


def masked(batch: ForwardBatch) -> ForwardBatch:
    """Its first row sees itself alone, and a mask says so."""
    first = np.zeros(1, np.int32)
    runs, ends = np.array([0, 1], np.int32), np.array([0, 2], np.int32)
    return replace(batch, masks=AttentionMasks(first, first - 1, np.ones(1, np.bool_), ends, runs))


def idle_step(groups: int) -> HostStep:
    """No requests: a bucket pads it to its size."""
    none, wide = np.zeros(0, np.int32), np.zeros(0, np.int64)
    batch = ForwardBatch(
        context_ids=wide,
        indptr=np.zeros(1, np.int32),
        tokens=_literal(none),
        positions=none,
        kv_lengths=none,
        length_tickets=wide,
        length_requests=none,
        cache=(),
        masks=_no_masks(),
        samplers=_greedy(none),
        probes=_no_probes(),
        num_drafts=none,
        num_proposals=none,
        adapter_ids=none,
        adapter_scales=np.zeros(0, np.float32),
        media=_no_media(),
    )
    refs = Refs(none, none, none, none)
    tables = tuple(GroupTable(np.zeros(1, np.int32), none, none, None) for _ in range(groups))
    return HostStep(batch, wide, wide, refs, none, none, none, none, tables, refs, wide, {}, none)


def _literal(ids: Int32) -> TokenRefs:
    return TokenRefs(ids, np.full(len(ids), NO_TICKET, np.int64), np.zeros(len(ids), np.int32))


def _fresh_pages(counts: Int32, size: int) -> PageTable:
    listed = -(-counts // size)
    logical = np.concatenate([np.arange(count) for count in listed]).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(listed)]).astype(np.int32)
    return PageTable(indptr, np.arange(len(logical), dtype=np.int32), logical)


def _greedy(rows: Int32) -> Samplers:
    count = len(rows)
    zeros, words = np.zeros(count, np.float32), np.zeros(count, np.uint32)
    indptr = np.zeros(count + 1, np.int32)
    return Samplers(
        rows=rows.astype(np.int32),
        temperature=zeros,
        top_k=np.zeros(count, np.int32),
        top_p=np.ones(count, np.float32),
        min_p=zeros,
        repetition=np.ones(count, np.float32),
        presence=zeros,
        frequency=zeros,
        stream=np.zeros(count, np.uint64),
        index=words,
        slot=words,
        epoch=words,
        history_indptr=indptr,
        history=_literal(np.zeros(0, np.int32)),
        history_counts=np.zeros(0, np.int32),
        bias_indptr=indptr,
        bias_tokens=np.zeros(0, np.int32),
        bias_values=np.zeros(0, np.float32),
        mask_index=np.full(count, -1, np.int32),
        logit_masks=np.zeros((0, 0), np.uint32),
    )


def _no_masks() -> AttentionMasks:
    none = np.zeros(0, np.int32)
    return AttentionMasks(none, none, np.zeros(0, np.bool_), np.zeros(1, np.int32), none)


def _no_probes() -> Probes:
    none = np.zeros(0, np.int32)
    return Probes(none, np.zeros(0, np.uint8), np.zeros(0, np.float32), none, np.zeros(1, np.int32), none)


def _no_media() -> MediaSpans:
    none = np.zeros(0, np.int32)
    return MediaSpans(none, np.zeros(0, np.int64), none, none)
