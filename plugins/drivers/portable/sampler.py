"""Logits -> tokens, as `contracts.forward.Samplers` says; whole rows at once, no loop over samplers.

Only tokens that can still win draw noise: Gumbel noise of 23 bits lies between -2.82 and 16.64, so a token further than
that below the best one cannot catch up. That leaves a few hundred of 50,000 and makes the core's own generator cheap
enough, so the noise is the reference's to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.contracts.forward import Float32, Int32, Int64, Samplers, UInt32
from pie_core.contracts.sampling import column_slots, philox4x32

NOISE_SPAN = 19.5  # largest minus smallest noise, and some room for rounding
SORTED_FIRST = 1024  # tokens that are ranked before anybody ranks the whole vocabulary
HIDDEN = float("-inf")


@dataclass(frozen=True, slots=True)
class SamplerInputs:
    """The batch's samplers with references resolved."""

    samplers: Samplers
    index: UInt32  # [S]
    history: Int64  # or [n, streams], before a column is chosen
    history_counts: Int64


def column_inputs(inputs: SamplerInputs, column: int) -> SamplerInputs:
    """The same samplers for one column of tokens of several."""
    samplers = inputs.samplers
    slots = replace(samplers, slot=column_slots(samplers.slot, column))
    return replace(inputs, samplers=slots, history=inputs.history[:, column])


@dataclass(frozen=True, slots=True)
class Drawn:
    tokens: Int32  # [S] or [S, streams]
    failed: dict[int, str]  # sampler -> cause


def draw(logits: Tensor, inputs: SamplerInputs) -> Drawn:
    """`logits` [S, vocab] in float32 belong to the caller and may be changed."""
    samplers = inputs.samplers
    scores = _adjusted(logits, inputs)
    best, tokens = scores.max(dim=-1)
    failed = _failures(best)
    warm = np.flatnonzero(samplers.temperature > 0)
    if len(warm):
        rows = torch.from_numpy(warm).to(scores.device)
        chosen = scores if len(warm) == len(samplers.rows) else scores[rows]
        tokens[rows] = _draw_warm(chosen, inputs, warm)
    return Drawn(tokens.to(torch.int32).cpu().numpy(), failed)


def _failures(best: Tensor) -> dict[int, str]:
    values = best.cpu().numpy()
    failed = {int(row): "the logits are not numbers" for row in np.flatnonzero(np.isnan(values))}
    hidden = np.flatnonzero(np.isneginf(values))
    return failed | {int(row): "no token is allowed: the logit mask and bias hide all" for row in hidden}


def _adjusted(logits: Tensor, inputs: SamplerInputs) -> Tensor:
    """Penalties, bias and logit mask."""
    samplers = inputs.samplers
    if len(inputs.history):
        _penalize(logits, inputs)
    if len(samplers.bias_tokens):
        owners = np.repeat(np.arange(len(samplers.rows)), np.diff(samplers.bias_indptr))
        places = (_device(owners, logits), _device(samplers.bias_tokens.astype(np.int64), logits))
        logits.index_put_(places, _device(samplers.bias_values, logits), accumulate=True)
    masked = np.flatnonzero(samplers.mask_index >= 0)
    if len(masked):
        allowed = _allowed(samplers, logits)[samplers.mask_index[masked]]
        rows = _device(masked, logits)
        logits[rows] = logits[rows].masked_fill_(~allowed, HIDDEN)
    return logits


def _penalize(logits: Tensor, inputs: SamplerInputs) -> None:
    samplers = inputs.samplers
    rows = np.flatnonzero(np.diff(samplers.history_indptr))
    owners = np.repeat(np.arange(len(rows)), np.diff(samplers.history_indptr)[rows])
    seen = logits[_device(rows, logits)]
    counts = torch.zeros_like(seen)
    places = (_device(owners, logits), _device(inputs.history, logits))
    counts.index_put_(places, _device(inputs.history_counts, logits).to(counts.dtype), accumulate=True)
    repetition, presence, frequency = (
        _device(values[rows], logits)[:, None]
        for values in (samplers.repetition, samplers.presence, samplers.frequency)
    )
    repeated = torch.where(seen > 0, seen / repetition, seen * repetition)
    penalized = repeated - presence - frequency * counts
    logits[_device(rows, logits)] = torch.where(counts > 0, penalized, seen)


def _allowed(samplers: Samplers, logits: Tensor) -> Tensor:
    """[L, vocab]"""
    words = np.ascontiguousarray(samplers.logit_masks.astype("<u4"))
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : logits.shape[1]]
    return _device(bits, logits).to(torch.bool)


def _draw_warm(scores: Tensor, inputs: SamplerInputs, warm: NDArray[np.intp]) -> Tensor:
    samplers = inputs.samplers
    scaled = scores / _device(samplers.temperature[warm], scores)[:, None]
    kept = _filtered(scaled, samplers, warm)
    floor = kept.amax(dim=-1, keepdim=True) - NOISE_SPAN
    rows, tokens = (kept >= floor).nonzero(as_tuple=True)
    noise = _noise(rows.cpu().numpy(), tokens.cpu().numpy(), inputs, warm)
    perturbed = kept[rows, tokens] + _device(noise, scores)
    return kept.fill_(HIDDEN).index_put_((rows, tokens), perturbed).argmax(dim=-1)


def _noise(
    rows: NDArray[np.intp], tokens: NDArray[np.intp], inputs: SamplerInputs, warm: NDArray[np.intp]
) -> Float32:
    """`contracts.sampling.gumbel_noise` at single (sampler, token) places."""
    samplers, places = inputs.samplers, warm[rows]
    counter = np.empty((len(rows), 4), np.uint64)
    counter[:, 0] = tokens // 4
    for word, values in enumerate((inputs.index, samplers.slot, samplers.epoch), start=1):
        counter[:, word] = values[places]
    stream = samplers.stream[places]
    key = np.stack([stream & np.uint64(0xFFFFFFFF), stream >> np.uint64(32)], axis=-1)
    words = np.take_along_axis(philox4x32(counter, key), (tokens % 4)[:, None], axis=1)[:, 0]
    uniform = ((words >> np.uint64(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    noise: Float32 = np.negative(np.log(np.negative(np.log(uniform))), dtype=np.float32)
    return noise


def _filtered(scaled: Tensor, samplers: Samplers, warm: NDArray[np.intp]) -> Tensor:
    """Top-k, then top-p, then min-p: what they leave out is hidden."""
    top_k, top_p, min_p = samplers.top_k[warm], samplers.top_p[warm], samplers.min_p[warm]
    ranked = np.flatnonzero((top_k > 0) | (top_p < 1))
    if len(ranked):
        rows = _device(ranked, scaled)
        scaled[rows] = _most_probable(scaled[rows], top_k[ranked], top_p[ranked])
    if (min_p > 0).any():
        with np.errstate(divide="ignore"):
            logs = _device(np.log(min_p), scaled)[:, None]
        scaled.masked_fill_(scaled < scaled.amax(dim=-1, keepdim=True) + logs, HIDDEN)
    return scaled


def _most_probable(scaled: Tensor, top_k: Int32, top_p: Float32) -> Tensor:
    vocab = scaled.shape[1]
    limit = np.where(top_k > 0, np.minimum(top_k, vocab), vocab)
    limits = _device(limit.astype(np.int64), scaled)
    masses = _device(top_p.astype(np.float64), scaled)
    ranked = min(SORTED_FIRST, vocab)
    keep, enough = _kept_count(scaled, ranked, limits, masses)
    if not bool(enough.all()):
        keep, _ = _kept_count(scaled, vocab, limits, masses)
    return _keep_top(scaled, keep)


def _kept_count(scaled: Tensor, ranked: int, limits: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens of each row stay, and whether ranking the `ranked` best was enough to know."""
    values = scaled.topk(ranked, dim=-1).values.to(torch.float64)
    ranks = torch.arange(ranked, device=scaled.device)
    is_short = limits <= ranked
    inside = values.masked_fill(ranks >= limits[:, None], HIDDEN)
    weights = (inside - values[:, :1]).exp()
    rest = (scaled.to(torch.float64) - values[:, :1]).exp().sum(-1) if not bool(is_short.all()) else None
    total = weights.sum(-1)
    if rest is not None:
        total = torch.where(is_short, total, rest)
    probabilities = weights / total[:, None]
    before = probabilities.cumsum(-1) - probabilities
    wanted = (before < masses[:, None]) | (masses[:, None] >= 1) | (ranks == 0)
    count = (wanted & (ranks < limits[:, None])).sum(-1)
    enough = is_short | (count < ranked) | (ranked == scaled.shape[1])
    return count, enough


def _keep_top(scaled: Tensor, keep: Tensor) -> Tensor:
    """Hides all but the `keep` best of each row; among equals the lower ids stay."""
    last = scaled.topk(int(keep.max()), dim=-1).values.gather(1, keep[:, None] - 1)
    above, equal = scaled > last, scaled == last
    room = keep[:, None] - above.sum(-1, keepdim=True)
    if bool((equal.sum(-1, keepdim=True) > room).any()):
        equal &= equal.cumsum(-1) <= room
    return scaled.masked_fill(~(above | equal), HIDDEN)


def _device(values: NDArray[np.generic], like: Tensor) -> Tensor:
    """Batches that crossed a process boundary are read-only, which torch warns of: those are copied."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(like.device)
