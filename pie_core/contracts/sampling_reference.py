"""What samplers and probes mean, in plain numpy: the reference that every driver is compared with.

Logits come in as `[S, vocab]`, one row for each sampler; float32 stays float32 until probabilities are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Bool, Float32, Int32, Samplers
from pie_core.contracts.sampling import gumbel_noise

_HIDDEN = np.float32(-np.inf)


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The history of one sampler as distinct tokens and how often each was seen."""

    tokens: Int32
    counts: Float32


def sample_tokens(logits: Float32, samplers: Samplers, history_tokens: Int32) -> Int32:
    """Draws one token for each sampler; `history_tokens` are `samplers.history` with every reference resolved."""
    scores = adjusted_logits(logits, samplers, history_tokens)
    tokens: Int32 = np.argmax(scores, axis=1).astype(np.int32)
    drawn = np.flatnonzero(samplers.temperature > 0)
    if len(drawn):
        tokens[drawn] = _draw(scores[drawn], samplers, drawn)
    return tokens


def _draw(scores: Float32, samplers: Samplers, drawn: NDArray[np.intp]) -> NDArray[np.intp]:
    scaled = filtered_logits(
        scores / samplers.temperature[drawn, None],
        samplers.top_k[drawn],
        samplers.top_p[drawn],
        samplers.min_p[drawn],
    )
    counter = (samplers.stream[drawn], samplers.index[drawn], samplers.slot[drawn], samplers.epoch[drawn])
    tokens: NDArray[np.intp] = np.argmax(scaled + gumbel_noise(*counter, scores.shape[1]), axis=1)
    return tokens


def adjusted_logits(logits: Float32, samplers: Samplers, history_tokens: Int32) -> Float32:
    """The logits after penalties, bias and logit mask; `logits` itself where nothing asks for a change."""
    scores = logits
    if penalized := np.flatnonzero(is_penalized(samplers)).tolist():
        scores = scores.copy()
        for sampler in penalized:
            _penalize(scores[sampler], samplers, sampler, history_tokens)
    if len(samplers.bias_tokens):
        scores = scores + _bias(samplers, scores.shape[1])
    if (samplers.mask_index >= 0).any():
        scores = np.where(allowed_tokens(samplers, scores.shape[1]), scores, _HIDDEN)
    return scores


def is_penalized(samplers: Samplers) -> Bool:
    """[S]: which samplers count their history."""
    penalized: Bool = (samplers.repetition != 1) | (samplers.presence != 0) | (samplers.frequency != 0)
    return penalized


def seen_tokens(samplers: Samplers, sampler: int, history_tokens: Int32) -> TokenCounts:
    start, stop = samplers.history_indptr[sampler : sampler + 2]
    tokens, inverse = np.unique(history_tokens[start:stop], return_inverse=True)
    counts = np.bincount(inverse, samplers.history_counts[start:stop], len(tokens))
    present = counts > 0
    return TokenCounts(tokens[present], counts[present].astype(np.float32))


def _penalize(scores: Float32, samplers: Samplers, sampler: int, history_tokens: Int32) -> None:
    seen = seen_tokens(samplers, sampler, history_tokens)
    values = scores[seen.tokens]
    repetition = samplers.repetition[sampler]
    values = np.where(values > 0, values / repetition, values * repetition)
    scores[seen.tokens] = values - samplers.presence[sampler] - samplers.frequency[sampler] * seen.counts


def _bias(samplers: Samplers, vocab_size: int) -> Float32:
    bias = np.zeros((len(samplers.rows), vocab_size), np.float32)
    owners = np.repeat(np.arange(len(samplers.rows)), np.diff(samplers.bias_indptr))
    np.add.at(bias, (owners, samplers.bias_tokens), samplers.bias_values)
    return bias


def allowed_tokens(samplers: Samplers, vocab_size: int) -> Bool:
    """[S, vocab]: what the logit mask of each sampler allows; everything where it has none."""
    allowed = np.ones((len(samplers.rows), vocab_size), np.bool_)
    masked = np.flatnonzero(samplers.mask_index >= 0)
    words = samplers.logit_masks[samplers.mask_index[masked]].astype("<u4")
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    allowed[masked] = bits[:, :vocab_size]
    return allowed


def filtered_logits(scaled: Float32, top_k: Int32, top_p: Float32, min_p: Float32) -> Float32:
    """Hides what top-k, then top-p, then min-p leave out; `scaled` are logits over temperature."""
    ranked = np.flatnonzero((top_k > 0) | (top_p < 1))
    kept = scaled
    if len(ranked):
        kept = scaled.copy()
        kept[ranked] = _most_probable(scaled[ranked], top_k[ranked], top_p[ranked])
    if (min_p > 0).any():
        with np.errstate(divide="ignore"):
            floor = kept.max(axis=1) + np.log(min_p)
        kept = np.where(kept >= floor[:, None], kept, _HIDDEN)
    return kept


def _most_probable(scaled: Float32, top_k: Int32, top_p: Float32) -> Float32:
    order = np.argsort(-scaled, axis=1, kind="stable")  # stable: the lower id first among equals
    ordered = np.take_along_axis(scaled, order, axis=1)
    ranks = np.arange(scaled.shape[1])
    limit = np.where(top_k > 0, top_k, scaled.shape[1])[:, None]
    ordered = np.where(ranks < limit, ordered, _HIDDEN)
    probabilities = softmax(ordered)
    before = np.cumsum(probabilities, axis=1) - probabilities
    inside = (before < top_p[:, None]) | (top_p >= 1)[:, None] | (ranks == 0)
    kept = np.empty_like(scaled)
    np.put_along_axis(kept, order, np.where(inside, ordered, _HIDDEN), axis=1)
    return kept


def softmax(logits: Float32) -> NDArray[np.float64]:
    """Probabilities over the last axis, in float64."""
    wide = logits.astype(np.float64)
    weights = np.exp(wide - wide.max(axis=-1, keepdims=True))
    probabilities: NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


def log_softmax(logits: Float32) -> NDArray[np.float64]:
    """Natural-log probabilities over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    logs: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return logs


def distribution(logits: Float32, temperature: float, k: int) -> tuple[Int32, Float32]:
    """The k most probable tokens of one row and their probabilities over the whole vocabulary; k = 0 gives all.

    Equals come in the order of their ids. Temperature 0 puts everything on the best token.
    """
    order = np.argsort(-logits, kind="stable")
    if temperature == 0:
        probabilities = np.zeros(len(logits))
        probabilities[order[0]] = 1.0
    else:
        probabilities = softmax(logits / np.float32(temperature))
    chosen = order[: k or None]
    return chosen.astype(np.int32), probabilities[chosen].astype(np.float32)


def entropy(logits: Float32) -> float:
    """Nats of one row at temperature 1."""
    logs = log_softmax(logits)
    probabilities = np.exp(logs)
    return float(-(probabilities * np.where(probabilities > 0, logs, 0.0)).sum())
