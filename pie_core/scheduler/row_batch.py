"""The cohort's part of a step: one row of each place to a ForwardBatch, and two parts to one batch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.driver import DriverCapabilities
from pie_core.contracts.forward import (
    NO_TICKET,
    AttentionMasks,
    ForwardBatch,
    Int32,
    Int64,
    MediaSpans,
    PageTable,
    Probes,
    Samplers,
    StateTable,
    TokenRefs,
)
from pie_core.scheduler.cohort import Cohort
from pie_core.scheduler.columns import Columns


class RowBatches:
    """Lays out the next row of places in the cohort."""

    def __init__(self, cohort: Cohort, can: DriverCapabilities) -> None:
        self._cohort, self._can = cohort, can
        self._steady: _Steady | None = None

    def build(self, places: Int64) -> ForwardBatch:
        """One token row with one sampler for each place, in this order."""
        columns, can = self._cohort.columns, self._can
        rows, steady = columns.submitted[places], self._steady_of(places)
        same = _same_for(len(places), -(-can.vocab_size // 32))
        positions = rows + steady.shift
        return ForwardBatch(
            context_ids=steady.context,
            indptr=same.indptr,
            tokens=_tokens(columns, places, rows),
            positions=np.repeat(positions[:, None], 3, axis=1) if can.position_axes == 3 else positions,
            kv_lengths=rows,
            length_tickets=same.no_tickets,
            length_requests=same.zeros,
            cache=tuple(group.table(places, rows) for group in self._cohort.pages.groups),
            masks=same.masks,
            samplers=_samplers(steady, rows, same),
            probes=same.probes,
            num_drafts=same.zeros,
            num_proposals=same.zeros,
            adapter_ids=same.minus_ones,
            adapter_scales=same.ones,
            media=same.media,
        )

    def _steady_of(self, places: Int64) -> _Steady:
        """Gathered anew when other contexts are there."""
        steady, columns = self._steady, self._cohort.columns
        stamps = columns.stamp[places]
        if steady is None or not steady.is_of(places, stamps):
            steady = self._steady = _Steady(places, stamps, columns)
        return steady


class _Steady:
    """What stays the same of some places as long as the same contexts are there; nobody writes to it, and drivers need
    not look at it again."""

    __slots__ = (
        *("_places", "_stamps", "context", "epoch", "min_p", "shift", "stream"),
        *("temperature", "top_k", "top_p"),
    )

    def __init__(self, places: Int64, stamps: Int64, columns: Columns) -> None:
        self._places, self._stamps = places, stamps
        self.context, self.shift = _fixed(columns.context[places]), _fixed(columns.shift[places])
        self.stream, self.epoch = _fixed(columns.stream[places]), _fixed(columns.epoch[places])
        self.temperature, self.top_k = _fixed(columns.temperature[places]), _fixed(columns.top_k[places])
        self.top_p, self.min_p = _fixed(columns.top_p[places]), _fixed(columns.min_p[places])

    def is_of(self, places: Int64, stamps: Int64) -> bool:
        return (
            len(places) == len(self._places)
            and not np.count_nonzero(places != self._places)
            and not np.count_nonzero(stamps != self._stamps)
        )


def _tokens(columns: Columns, places: Int64, rows: Int32) -> TokenRefs:
    """The token drawn last, or where it will be."""
    known = rows == columns.written[places]
    ids = columns.tokens[places, rows & (columns.tokens.shape[1] - 1)]
    count = np.count_nonzero(known)
    if count == len(places):
        same = _same_for(len(places), 0)
        return TokenRefs(ids, same.no_tickets, same.zeros)
    tickets, samplers = columns.ticket[places], columns.sampler[places]
    if count:
        tickets[known], samplers[known] = NO_TICKET, 0
    return TokenRefs(ids, tickets, samplers)


def _samplers(steady: _Steady, rows: Int32, same: _Same) -> Samplers:
    return Samplers(
        rows=same.numbers,
        temperature=steady.temperature,
        top_k=steady.top_k,
        top_p=steady.top_p,
        min_p=steady.min_p,
        repetition=same.ones,
        presence=same.float_zeros,
        frequency=same.float_zeros,
        stream=steady.stream,
        index=(rows + 1).view(np.uint32),
        slot=same.slots,
        epoch=steady.epoch,
        history_indptr=same.zeros_and_one,
        history=same.no_tokens,
        history_counts=_NO_NUMBERS,
        bias_indptr=same.zeros_and_one,
        bias_tokens=_NO_NUMBERS,
        bias_values=_NO_VALUES,
        mask_index=same.minus_ones,
        logit_masks=same.no_masks,
    )


class _Same:
    """What all batches of so many rows have in common; nobody writes to it."""

    def __init__(self, count: int, words: int) -> None:
        self.indptr = _fixed(np.arange(count + 1, dtype=np.int32))
        self.numbers = self.indptr[:-1]
        self.zeros_and_one = _fixed(np.zeros(count + 1, np.int32))
        self.zeros = self.zeros_and_one[1:]
        self.slots = _fixed(np.zeros(count, np.uint32))
        self.minus_ones = _fixed(np.full(count, -1, np.int32))
        self.no_tickets = _fixed(np.full(count, NO_TICKET, np.int64))
        self.ones = _fixed(np.ones(count, np.float32))
        self.float_zeros = _fixed(np.zeros(count, np.float32))
        self.no_masks = _fixed(np.empty((0, words), np.uint32))
        no_flags, zero = np.empty(0, np.bool_), np.zeros(1, np.int32)
        no_int64s = np.empty(0, np.int64)
        self.no_tokens = TokenRefs(_NO_NUMBERS, no_int64s, _NO_NUMBERS)
        self.masks = AttentionMasks(_NO_NUMBERS, _NO_NUMBERS, no_flags, zero, _NO_NUMBERS)
        self.probes = Probes(_NO_NUMBERS, np.empty(0, np.uint8), _NO_VALUES, _NO_NUMBERS, zero, _NO_NUMBERS)
        self.media = MediaSpans(_NO_NUMBERS, no_int64s, _NO_NUMBERS, _NO_NUMBERS)


def _fixed(values: NDArray[Any]) -> NDArray[Any]:
    values.flags.writeable = False
    return values


_NO_NUMBERS: Int32 = _fixed(np.empty(0, np.int32))
_NO_VALUES = _fixed(np.empty(0, np.float32))


@lru_cache(maxsize=4096)
def _same_for(count: int, words: int) -> _Same:
    return _Same(count, words)


# ---- two parts


def joined(first: ForwardBatch, second: ForwardBatch) -> ForwardBatch:
    """Both, one behind the other; the second has neither masks, probes, media, histories nor biases."""
    shift, more = first.num_tokens, len(second.samplers.rows)
    both = _both(first, second)
    return ForwardBatch(
        context_ids=both("context_ids"),
        indptr=_indptr(first.indptr, second.indptr),
        tokens=_both_refs(first.tokens, second.tokens),
        positions=both("positions"),
        kv_lengths=both("kv_lengths"),
        length_tickets=both("length_tickets"),
        length_requests=both("length_requests"),
        cache=tuple(_both_tables(*tables) for tables in zip(first.cache, second.cache, strict=True)),
        masks=first.masks,
        samplers=_both_samplers(first.samplers, second.samplers, shift, more),
        probes=first.probes,
        num_drafts=both("num_drafts"),
        num_proposals=both("num_proposals"),
        adapter_ids=both("adapter_ids"),
        adapter_scales=both("adapter_scales"),
        media=first.media,
        prefixes=first.prefixes,
    )


def _both_samplers(first: Samplers, second: Samplers, shift: int, more: int) -> Samplers:
    both = _both(first, second)
    return Samplers(
        rows=np.concatenate([first.rows, second.rows + np.int32(shift)]),
        temperature=both("temperature"),
        top_k=both("top_k"),
        top_p=both("top_p"),
        min_p=both("min_p"),
        repetition=both("repetition"),
        presence=both("presence"),
        frequency=both("frequency"),
        stream=both("stream"),
        index=both("index"),
        slot=both("slot"),
        epoch=both("epoch"),
        history_indptr=_held(first.history_indptr, more),
        history=first.history,
        history_counts=first.history_counts,
        bias_indptr=_held(first.bias_indptr, more),
        bias_tokens=first.bias_tokens,
        bias_values=first.bias_values,
        mask_index=both("mask_index"),
        logit_masks=first.logit_masks,
    )


def _both(first: object, second: object) -> Any:
    return lambda name: np.concatenate([getattr(first, name), getattr(second, name)])


def _both_refs(first: TokenRefs, second: TokenRefs) -> TokenRefs:
    both = _both(first, second)
    return TokenRefs(both("ids"), both("tickets"), both("rows"))


def _both_tables(first: PageTable | StateTable, second: PageTable | StateTable) -> PageTable:
    assert isinstance(first, PageTable)
    assert isinstance(second, PageTable)
    both = _both(first, second)
    return PageTable(_indptr(first.indptr, second.indptr), both("pages"), both("logical"))


def _indptr(first: Int32, second: Int32) -> Int32:
    return np.concatenate([first, first[-1] + second[1:]])


def _held(indptr: Int32, more: int) -> Int32:
    """As many more empty stretches."""
    return np.concatenate([indptr, np.full(more, indptr[-1], np.int32)])
