"""Hidden words -> logits -> the tokens and values that samplers and probes ask for; verification of drafts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Float32, ForwardBatch, Int32, Int64, ProbeKind, Samplers
from pie_core.contracts.probe_values import ProbeValues, joined_probes
from pie_core.contracts.sampling import column_slots
from pie_core.contracts.sampling_reference import (
    allowed_tokens,
    distribution,
    entropy,
    is_penalized,
    log_softmax,
    sample_tokens,
)
from pie_plugins.drivers.dummy.batch_tensors import ResolvedStep
from pie_plugins.drivers.dummy.hashing import Words, mix, uniform

_PEAK = np.float32(6.0)
_PER_SAMPLER = (
    *("rows", "temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency"),
    *("stream", "index", "slot", "epoch", "mask_index"),
)
_HIDDEN_SALT = np.uint64(0x1D8E4E27C47D124F)


class Head:
    """The output layer: all logits lie in [-4, 4) but that of one token, which `best_tokens` knows without them."""

    def __init__(self, vocab_size: int, hidden_size: int, streams: int) -> None:
        self._vocab_size = vocab_size
        self._hidden_size = hidden_size
        self._streams = streams

    def logits(self, words: Words) -> Float32:
        values = uniform(words, self._vocab_size)
        values *= np.float32(8)
        values -= np.float32(4)
        values[np.arange(len(words)), self.best_tokens(words)] = _PEAK
        return values

    def column_logits(self, words: Words) -> Float32:
        """[rows, streams * vocab]. The columns of this model's tokens know nothing of each other."""
        columns = [self.logits(column_words(words, column)) for column in range(self._streams)]
        return np.concatenate(columns, axis=1)

    def best_tokens(self, words: Words) -> Int32:
        return (words % np.uint64(self._vocab_size)).astype(np.int32)

    def hidden(self, words: Words) -> Float32:
        return uniform(mix(words ^ _HIDDEN_SALT), self._hidden_size) * np.float32(2) - np.float32(1)

    def sample(self, words: Words, step: ResolvedStep) -> Int32:
        """[S] or [S, streams]; `words` are the hidden words at the samplers' rows."""
        if self._streams == 1:
            return self._sample_column(words, step.samplers, step.history_tokens)
        columns = [
            self._sample_column(
                column_words(words, c), _of_column(step.samplers, c), step.history_tokens[:, c]
            )
            for c in range(self._streams)
        ]
        return np.stack(columns, axis=1)

    def _sample_column(self, words: Words, samplers: Samplers, history: Int32) -> Int32:
        tokens = self.best_tokens(words)
        rest = np.flatnonzero(_needs_logits(samplers))
        if len(rest) == len(tokens):
            return sample_tokens(self.logits(words), samplers, history)
        if len(rest):
            chosen, chosen_history = chosen_samplers(samplers, rest, history)
            tokens[rest] = sample_tokens(self.logits(words[rest]), chosen, chosen_history)
        return tokens

    def nothing_allowed(self, samplers: Samplers) -> NDArray[np.intp]:
        """The samplers whose logit mask forbids every token."""
        if not (samplers.mask_index >= 0).any():
            return np.empty(0, np.intp)
        return np.flatnonzero(~allowed_tokens(samplers, self._vocab_size).any(axis=1))


def column_words(words: Words, column: int) -> Words:
    """The hidden words behind one column of the tokens; column 0 is the words themselves."""
    return words if column == 0 else mix(words + np.uint64(column))


def _of_column(samplers: Samplers, column: int) -> Samplers:
    return replace(samplers, slot=column_slots(samplers.slot, column))


def _needs_logits(samplers: Samplers) -> NDArray[np.bool_]:
    biased = np.diff(samplers.bias_indptr) > 0
    return (samplers.temperature > 0) | is_penalized(samplers) | biased | (samplers.mask_index >= 0)


def chosen_samplers(samplers: Samplers, chosen: NDArray[np.intp], history: Int32) -> tuple[Samplers, Int32]:
    """Some of the samplers, as samplers of their own."""
    history_indptr, history_at = _gathered(samplers.history_indptr, chosen)
    bias_indptr, bias_at = _gathered(samplers.bias_indptr, chosen)
    picked = replace(
        samplers,
        **{name: getattr(samplers, name)[chosen] for name in _PER_SAMPLER},
        history_indptr=history_indptr,
        history_counts=samplers.history_counts[history_at],
        bias_indptr=bias_indptr,
        bias_tokens=samplers.bias_tokens[bias_at],
        bias_values=samplers.bias_values[bias_at],
    )
    return picked, history[history_at]


def _gathered(indptr: Int32, chosen: NDArray[np.intp]) -> tuple[Int32, NDArray[np.intp]]:
    """The indptr of the chosen segments laid end to end, and where their entries were."""
    lengths = np.diff(indptr)[chosen]
    gathered = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    at = np.repeat(indptr[chosen] - gathered[:-1], lengths) + np.arange(gathered[-1])
    return gathered, at.astype(np.intp)


@dataclass(frozen=True, slots=True)
class Verification:
    """What became of the drafts of each request."""

    accepted: Int32  # [R]
    last_samplers: Int64  # [R] sampler at the last accepted row; -1 = none
    end_lengths: Int64  # [R]
    rejected: NDArray[np.bool_]  # [S]: samplers behind a rejected draft


def verify_drafts(step: ResolvedStep, tokens: Int32) -> Verification:
    """Accepts draft after draft while the first sampler of the row before it drew the same token."""
    batch = step.batch
    first_sampler = np.full(batch.num_tokens, -1, np.int64)
    first_sampler[step.samplers.rows[::-1]] = np.arange(len(step.samplers.rows))[::-1]
    accepted = np.zeros(batch.num_requests, np.int32)
    if not batch.num_drafts.any():
        return _nothing_drafted(step, accepted, first_sampler)
    for request in np.flatnonzero(batch.num_drafts).tolist():
        accepted[request] = _count_accepted(step, request, first_sampler, tokens)
    last_rows: Int64 = batch.indptr[1:] - 1 - batch.num_drafts + accepted
    return Verification(
        accepted=accepted,
        last_samplers=first_sampler[last_rows],
        end_lengths=(step.starts + last_rows + 1 - batch.indptr[:-1]).astype(np.int64),
        rejected=step.samplers.rows > last_rows[step.request[step.samplers.rows]],
    )


def _nothing_drafted(step: ResolvedStep, accepted: Int32, first_sampler: Int64) -> Verification:
    stops = step.batch.indptr[1:]
    return Verification(
        accepted=accepted,
        last_samplers=first_sampler[stops - 1],
        end_lengths=step.starts + stops - step.batch.indptr[:-1],
        rejected=np.zeros(len(step.samplers.rows), np.bool_),
    )


def _count_accepted(step: ResolvedStep, request: int, first_sampler: Int64, tokens: Int32) -> int:
    count, end = int(step.batch.num_drafts[request]), int(step.batch.indptr[request + 1])
    for draft, row in enumerate(range(end - count, end)):
        sampler = first_sampler[row - 1]
        if sampler < 0 or not np.array_equal(tokens[sampler], step.tokens[row]):
            return draft
    return count


def read_probes(head: Head, words: Words, batch: ForwardBatch) -> ProbeValues:
    """`words` are the hidden words at the probes' rows."""
    values: list[Float32] = []
    tokens: list[Int32] = []
    for probe in range(len(words)):
        found, value = _read_probe(head, words[probe : probe + 1], batch, probe)
        tokens.append(found)
        values.append(value)
    return joined_probes(values, tokens)


def _read_probe(head: Head, word: Words, batch: ForwardBatch, probe: int) -> tuple[Int32, Float32]:
    probes, none = batch.probes, np.empty(0, np.int32)
    kind = ProbeKind(int(probes.kinds[probe]))
    if kind is ProbeKind.HIDDEN:
        return none, head.hidden(word)[0]
    if kind is ProbeKind.COLUMNS:
        return none, head.column_logits(word)[0]
    logits = head.logits(word)[0]
    if kind is ProbeKind.LOGITS:
        return none, logits
    if kind is ProbeKind.DISTRIBUTION:
        return distribution(logits, float(probes.temperature[probe]), int(probes.k[probe]))
    if kind is ProbeKind.ENTROPY:
        return none, np.array([entropy(logits)], np.float32)
    named = probes.tokens[probes.token_indptr[probe] : probes.token_indptr[probe + 1]]
    return none, log_softmax(logits)[named].astype(np.float32)
