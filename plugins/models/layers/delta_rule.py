"""The gated delta rule: a matrix for each head that forgets, and that every row corrects towards its value.

    S = decay * S + k (beta * (v - k decay * S))        output = q S

Decay is one number a head, or one for each of its key's values. Prefill goes in chunks: within a chunk a triangular
system gives all corrections at once, between chunks the matrix is carried on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pie_plugins.models.layers.chunks import future, in_chunks, pair_decay

CHUNK = 64
FINE_CHUNK = 16  # where each value of a key decays on its own: pairs of rows then take as much memory as keys
NORM_EPS = 1e-6  # of queries and keys, in the reference's kernels


@dataclass(frozen=True, slots=True)
class DeltaRule:
    """A `Recurrence`: q and k [R, n, K, dk] are normed here; v [R, n, H, dv], log decay [R, n, H, 1 or dk], beta
    [R, n, H]; the output and the state [R, H, dk, dv] are float32. Each query and key head serves H / K neighbours."""

    def __call__(self, inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay, beta = (each.to(torch.float32).transpose(1, 2) for each in inputs)
        repeats = v.shape[1] // k.shape[1]
        q = _unit(q).mul_(q.shape[-1] ** -0.5).repeat_interleave(repeats, 1)
        k = _unit(k).repeat_interleave(repeats, 1)
        step = _one_row if q.shape[2] == 1 else _chunked
        out, after = step(q, k, v, log_decay, beta[..., None], state)
        return out.transpose(1, 2), after


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def _one_row(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """q and k [R, H, 1, dk], v [R, H, 1, dv]"""
    kept = state * log_decay.exp().transpose(-1, -2)
    after = kept.add_(k.transpose(-1, -2) @ ((v - k @ kept) * beta))
    return q @ after, after


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    count = q.shape[2]
    size = min(CHUNK if log_decay.shape[-1] == 1 else FINE_CHUNK, count)
    q, k, v, log_decay, beta = (in_chunks(each, size) for each in (q, k, v, log_decay, beta))
    total = log_decay.cumsum(-2)  # (R, H, chunks, size, 1 or dk): decay from the chunk's beginning
    own, within = _pairs(k * beta, q, k, total)
    corrections: Tensor = torch.linalg.solve_triangular(own, v * beta, upper=False, unitriangular=True)
    reading: Tensor = torch.linalg.solve_triangular(
        own, k * beta * total.exp(), upper=False, unitriangular=True
    )
    outer_q = q * total.exp()
    outer_k = (k * (total[..., -1:, :] - total).exp()).transpose(-1, -2)
    chunk_decay = total[..., -1, :, None].exp()
    outs = []
    for chunk in range(q.shape[2]):
        new = corrections[:, :, chunk] - reading[:, :, chunk] @ state
        outs.append(outer_q[:, :, chunk] @ state + within[:, :, chunk] @ new)
        state = state * chunk_decay[:, :, chunk] + outer_k[:, :, chunk] @ new
    out: Tensor = torch.cat(outs, 2)[:, :, :count]
    return out, state


def _pairs(k_beta: Tensor, q: Tensor, k: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """[..., i, j]: products of k_beta and of q of row i with k of row j, decayed from j to i; zero where j > i."""
    if total.shape[-1] == 1:
        decay, turned = pair_decay(total), k.transpose(-1, -2)
        return (k_beta @ turned) * decay, (q @ turned) * decay
    between = total[..., :, None, :] - total[..., None, :, :]  # (..., i, j, dk)
    hidden = future(k.shape[-2], k.device)[..., None]
    decayed = between.masked_fill(hidden, float("-inf")).exp() * k[..., None, :, :]
    return (decayed @ k_beta[..., None])[..., 0], (decayed @ q[..., None])[..., 0]
