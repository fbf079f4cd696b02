"""Whole generations, for the request level: a loop of one-token steps over pages of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pie_core.contracts.driver import CacheSpace, DriverCapabilities, GenerationRequest
from pie_core.contracts.forward import (
    NO_TICKET,
    AttentionMasks,
    ForwardBatch,
    ForwardResult,
    Int32,
    MediaSpans,
    PageTable,
    Probes,
    Samplers,
    StateTable,
    TokenRefs,
)
from pie_core.errors import ForwardError, InvalidRequest

_NONE = np.empty(0, np.int32)
_ZEROS = np.zeros(2, np.int32)


def generate(
    request: GenerationRequest, capabilities: DriverCapabilities, run: Callable[[ForwardBatch], ForwardResult]
) -> Int32:
    """The tokens that the explicit loop would draw with `seed` as its stream, without the stop token."""
    longest = min(capabilities.max_model_len, _room(capabilities))
    if not 0 < len(request.prompt) <= longest:
        raise InvalidRequest(f"the prompt has {len(request.prompt)} tokens; expected 1 to {longest}")
    tokens: list[int] = []
    chunk, length = request.prompt, 0
    while len(tokens) < request.max_tokens and length + len(chunk) <= longest:
        result = run(_batch(request, capabilities, chunk, length))
        if result.failed:
            raise ForwardError(f"the generation failed: {result.failed[0]}")
        length += len(chunk)
        chunk = result.tokens
        if int(chunk.flat[0]) in request.stop_tokens:
            break
        tokens.append(int(chunk.flat[0]))
    return np.array(tokens, np.int32)


def _room(capabilities: DriverCapabilities) -> int:
    rooms = (space.num_pages * space.page_size for space in capabilities.cache if space.group.kind != "state")
    return min(rooms, default=capabilities.max_model_len)


def _batch(
    request: GenerationRequest, capabilities: DriverCapabilities, chunk: Int32, length: int
) -> ForwardBatch:
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
        cache=tuple(_table(space, length, rows) for space in capabilities.cache),
        masks=AttentionMasks(_NONE, _NONE, np.empty(0, np.bool_), _ZEROS[:1], _NONE),
        samplers=_samplers(request, length + rows, rows - 1, capabilities.streams),
        probes=Probes(_NONE, np.empty(0, np.uint8), np.empty(0, np.float32), _NONE, _ZEROS[:1], _NONE),
        num_drafts=np.zeros(1, np.int32),
        num_proposals=np.zeros(1, np.int32),
        adapter_ids=np.full(1, -1, np.int32),
        adapter_scales=np.zeros(1, np.float32),
        media=MediaSpans(_NONE, np.empty(0, np.int64), _NONE, _NONE),
    )


def _table(space: CacheSpace, length: int, rows: int) -> PageTable | StateTable:
    if (
        space.group.kind == "state"
    ):  # two slots take turns, since state is never written in place; generated rows come one by one
        slot_in = np.array([length % 2 if length else -1], np.int32)
        slot_out = np.array([(length + rows) % 2], np.int32)
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
