"""Which drafts a step accepted, and what later steps may refer to."""

from __future__ import annotations

import numpy as np

from pie_core.contracts.forward import ForwardBatch, Int32, Int64, StateTable
from pie_plugins.drivers.portable.batch_tensors import NO_SLOT, BatchTensors, Outcome


def verify(
    batch: ForwardBatch, tensors: BatchTensors, tokens: Int32, failed: dict[int, str]
) -> tuple[Int32, Outcome]:
    """The number of accepted drafts of each request, and the step's outcome."""
    sampled = _sampled_at_rows(batch, tokens)
    counts = np.diff(tensors.indptr)
    first_draft = tensors.indptr[1:] - batch.num_drafts
    accepted = _accepted(sampled, tensors.tokens, first_draft, batch.num_drafts)
    last_rows = first_draft - 1 + accepted
    rows = batch.samplers.rows.astype(np.int64)
    owners = tensors.request_of_row[rows]
    outcome = Outcome(
        tokens=tokens,
        last_accepted=sampled[last_rows].astype(np.int32),
        final_lengths=tensors.kv_lengths + counts - batch.num_drafts + accepted,
        live_samplers=rows <= last_rows[owners],
        failed=failed,
        sampler_requests=owners,
        states={
            group: _states_after(table, counts - batch.num_drafts + accepted - 1)
            for group, table in enumerate(batch.cache)
            if isinstance(table, StateTable)
        },
    )
    return accepted.astype(np.int32), outcome


def _states_after(table: StateTable, last: Int64) -> Int64:
    """[R]: the slot written after row `last` of each request, NO_SLOT where none was."""
    owners = np.repeat(np.arange(len(last)), np.diff(table.out_indptr))
    slots = np.full(len(last), NO_SLOT, np.int64)
    is_last = table.out_rows == last[owners]
    slots[owners[is_last]] = table.out_slots[is_last]
    return slots


def _sampled_at_rows(batch: ForwardBatch, tokens: Int32) -> Int64:
    """[T] or [T, streams]: what the first sampler of each row drew, -1 where there is none."""
    sampled = np.full((batch.num_tokens, *tokens.shape[1:]), -1, np.int64)
    first = batch.samplers.slot == 0
    sampled[batch.samplers.rows[first]] = tokens[first]
    return sampled


def _accepted(sampled: Int64, tokens: Int64, first_draft: Int64, num_drafts: Int32) -> Int64:
    """[R]: drafts before the first that differs from the token sampled one row earlier."""
    longest = int(num_drafts.max(initial=0))
    if longest == 0:
        return np.zeros(len(num_drafts), np.int64)
    places = np.arange(longest)
    rows = np.minimum(first_draft[:, None] + places, len(tokens) - 1)
    equal = sampled[rows - 1] == tokens[rows]
    agrees = (equal if equal.ndim == 2 else equal.all(axis=2)) & (places < num_drafts[:, None])
    accepted: Int64 = np.cumprod(agrees, axis=1).sum(axis=1).astype(np.int64)
    return accepted
