"""Answers that cost the host next to nothing, whatever the batch: for measuring what surrounds a driver."""

from __future__ import annotations

import numpy as np

from pie_core.contracts.driver import Feature
from pie_core.contracts.forward import ForwardBatch, ForwardResult
from pie_core.ids import Ticket
from pie_plugins.drivers.dummy.hashing import GROWTH, mix

FEATURES = frozenset({Feature.TICKET_TOKENS, Feature.SWAP, Feature.EXPORT})  # of what a batch may ask

_GROWTH = np.uint64(GROWTH)


def hollow_result(batch: ForwardBatch, ticket: Ticket, vocab_size: int, busy_s: float) -> ForwardResult:
    """Each token is a hash of its context's id and its index there; no page is read or written."""
    requests, samplers = batch.num_requests, batch.samplers
    owners = np.searchsorted(batch.indptr, samplers.rows, side="right") - 1
    words = mix(batch.context_ids[owners].astype(np.uint64) * _GROWTH + samplers.index)
    return ForwardResult(
        ticket=ticket,
        tokens=(words % np.uint64(vocab_size)).astype(np.int32),
        accepted=np.zeros(requests, np.int32),
        draft_indptr=np.zeros(requests + 1, np.int32),
        draft_tokens=np.empty(0, np.int32),
        probe_indptr=np.zeros(1, np.int64),
        probe_values=np.empty(0, np.float32),
        probe_token_indptr=np.zeros(1, np.int64),
        probe_tokens=np.empty(0, np.int32),
        failed={},
        busy_s=busy_s,
    )
