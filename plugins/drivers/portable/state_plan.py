"""Recurrence over the rows of a batch: requests of one length are gathered and computed together.

A plan is made once for a step and a state group. Each request's rows are cut where a state is to be kept; the first
pieces of all requests run before their second ones, which go on from the slots that the first ones wrote.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pie_core.contracts.forward import Bool, Int64, StateTable
from pie_plugins.drivers.portable.attention import selection
from pie_plugins.drivers.portable.state_cache import StateCache
from pie_plugins.models.layers.step import Recurrence


@dataclass(frozen=True, slots=True)
class StateRun:
    """R pieces of equally many rows."""

    rows: slice | Tensor  # of the batch: R * n token rows
    num_pieces: int
    sources: Tensor  # [R] slots
    targets: Tensor  # [R] slots


@dataclass(frozen=True, slots=True)
class StatePlan:
    runs: list[StateRun]
    is_partial: bool  # some token rows are in no run: failed requests

    def run(self, states: Tensor, rule: Recurrence, inputs: Sequence[Tensor]) -> Tensor:
        """`states` are one part of one layer's slots, [slots, …]; inputs and result are [T, …]."""
        outputs = [self._piece(run, states, rule, inputs) for run in self.runs]
        if len(outputs) == 1 and not self.is_partial:
            return outputs[0]
        like = outputs[0] if outputs else _nothing(states, rule, inputs)
        out = like.new_zeros((len(inputs[0]), *like.shape[1:]))
        for run, output in zip(self.runs, outputs, strict=True):
            out[run.rows] = output
        return out

    def _piece(self, run: StateRun, states: Tensor, rule: Recurrence, inputs: Sequence[Tensor]) -> Tensor:
        pieces = [each[run.rows].unflatten(0, (run.num_pieces, -1)) for each in inputs]
        output, after = rule(pieces, states.index_select(0, run.sources))
        states.index_copy_(0, run.targets, after.to(states.dtype))
        return output.flatten(0, 1)


def _nothing(states: Tensor, rule: Recurrence, inputs: Sequence[Tensor]) -> Tensor:
    """What the rule gives for no rows: its shape and dtype, where all requests have failed."""
    output, _ = rule([each[:0, None] for each in inputs], states[:0])
    return output.flatten(0, 1)


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int  # token row
    length: int
    source: int
    target: int
    order: int  # how many pieces of the request come before


def plan_states(
    table: StateTable, indptr: Int64, sources: Int64, is_alive: Bool, cache: StateCache, device: torch.device
) -> StatePlan:
    """`sources` [R] are slots, -1 for the empty state; the table's slots and rows are known to exist."""
    alike: dict[tuple[int, int], list[_Piece]] = defaultdict(list)
    for request in np.flatnonzero(is_alive).tolist():
        for piece in _pieces(table, request, indptr, int(sources[request]), cache):
            alike[piece.order, piece.length].append(piece)
    runs = [_run(alike[key], device) for key in sorted(alike)]
    return StatePlan(runs, not is_alive.all())


def _pieces(
    table: StateTable, request: int, indptr: Int64, source: int, cache: StateCache
) -> Iterator[_Piece]:
    written = slice(table.out_indptr[request], table.out_indptr[request + 1])
    cuts = sorted(zip(table.out_rows[written].tolist(), table.out_slots[written].tolist(), strict=True))
    first, count = int(indptr[request]), int(indptr[request + 1] - indptr[request])
    source = cache.empty_slot if source < 0 else source
    start, order = 0, 0
    if not cuts or cuts[-1][0] < count - 1:
        cuts.append((count - 1, cache.scratch_slot))
    for row, target in cuts:
        yield _Piece(first + start, row + 1 - start, source, target, order)
        start, source, order = row + 1, target, order + 1


def _run(pieces: Sequence[_Piece], device: torch.device) -> StateRun:
    starts = np.array([piece.start for piece in pieces], np.int64)
    rows = starts[:, None] + np.arange(pieces[0].length)
    return StateRun(
        rows=selection(rows),
        num_pieces=len(pieces),
        sources=torch.tensor([piece.source for piece in pieces], device=device),
        targets=torch.tensor([piece.target for piece in pieces], device=device),
    )
