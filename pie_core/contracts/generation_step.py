"""The steps of one generation, as batches of a single request that has a driver's whole cache to itself."""

from __future__ import annotations

import numpy as np

from pie_core.contracts.driver import CacheSpace, DriverCapabilities, GenerationRequest
from pie_core.contracts.forward import (
    NO_TICKET,
    AttentionMasks,
    ForwardBatch,
    Int32,
    MediaSpans,
    PageTable,
    Probes,
    Samplers,
    StateTable,
    TokenRefs,
)

_NONE = np.empty(0, np.int32)
_ZEROS = np.zeros(2, np.int32)
NO_PROBES = Probes(_NONE, np.empty(0, np.uint8), np.empty(0, np.float32), _NONE, _ZEROS[:1], _NONE)


def longest_generation(capabilities: DriverCapabilities) -> int:
    """How many tokens fit: the model's limit or that of the cache."""
    rooms = (space.num_pages * space.page_size for space in capabilities.cache if space.group.kind != "state")
    return min([capabilities.max_model_len, *rooms])


def generation_step(
    request: GenerationRequest,
    capabilities: DriverCapabilities,
    chunk: Int32,
    length: int,
    turn: int,
    probes: Probes = NO_PROBES,
) -> ForwardBatch:
    """Step number `turn`: feeds the chunk behind the first `length` tokens and draws the token after it."""
    rows = len(chunk)
    position = np.arange(length, length + rows, dtype=np.int32)
    one = np.array([0, rows], np.int32)
    return ForwardBatch(
        context_ids=np.zeros(1, np.int64),
        indptr=one,
        tokens=TokenRefs(chunk, np.full(rows, NO_TICKET, np.int64), np.zeros(rows, np.int32)),
        positions=position if capabilities.position_axes == 1 else np.stack([position] * 3, axis=1),
        kv_lengths=np.array([length], np.int32),
        length_tickets=np.array([NO_TICKET], np.int64),
        length_requests=np.zeros(1, np.int32),
        cache=tuple(_table(space, length, rows, turn) for space in capabilities.cache),
        masks=AttentionMasks(_NONE, _NONE, np.empty(0, np.bool_), _ZEROS[:1], _NONE),
        samplers=_samplers(request, length + rows, rows - 1, capabilities.streams),
        probes=probes,
        num_drafts=np.zeros(1, np.int32),
        num_proposals=np.zeros(1, np.int32),
        adapter_ids=np.full(1, -1, np.int32),
        adapter_scales=np.zeros(1, np.float32),
        media=MediaSpans(_NONE, np.empty(0, np.int64), _NONE, _NONE),
    )


def _table(space: CacheSpace, length: int, rows: int, turn: int) -> PageTable | StateTable:
    if space.group.kind == "state":  # two slots take turns, since state is never written in place
        slot_in = np.array([turn % 2 if length else -1], np.int32)
        slot_out = np.array([(turn + 1) % 2], np.int32)
        return StateTable(slot_in, np.array([0, 1], np.int32), np.array([rows - 1], np.int32), slot_out)
    count = -(-(length + rows) // space.page_size)
    pages = np.arange(count, dtype=np.int32)
    return PageTable(np.array([0, count], np.int32), pages, pages)


def _samplers(request: GenerationRequest, index: int, row: int, streams: int) -> Samplers:
    no_history = TokenRefs(
        np.empty((0, streams), np.int32) if streams > 1 else _NONE, np.empty(0, np.int64), _NONE
    )
    return Samplers(
        rows=np.array([row], np.int32),
        temperature=np.array([request.temperature], np.float32),
        top_k=np.array([request.top_k], np.int32),
        top_p=np.array([request.top_p], np.float32),
        min_p=np.array([request.min_p], np.float32),
        repetition=np.ones(1, np.float32),
        presence=np.zeros(1, np.float32),
        frequency=np.zeros(1, np.float32),
        stream=np.array([request.seed], np.uint64),
        index=np.array([index], np.uint32),
        slot=np.zeros(1, np.uint32),
        epoch=np.zeros(1, np.uint32),
        history_indptr=_ZEROS,
        history=no_history,
        history_counts=_NONE,
        bias_indptr=_ZEROS,
        bias_tokens=_NONE,
        bias_values=np.empty(0, np.float32),
        mask_index=np.full(1, -1, np.int32),
        logit_masks=np.empty((0, 0), np.uint32),
    )
