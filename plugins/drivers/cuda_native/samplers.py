"""What samplers change in the logits before a token is drawn: penalties, bias, logit masks. Few steps need any of it.

Everything here is queued without a look at the device: counts and places are the host's, values stay where they are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pie_core.contracts.forward import Int64, Samplers
from pie_core.contracts.sampling_reference import is_penalized
from pie_plugins.drivers.cuda_native.batch_tensors import HostStep
from pie_plugins.drivers.cuda_native.outcomes import NOWHERE, Failure
from pie_plugins.drivers.cuda_native.timeline import Timeline

HIDDEN = float("-inf")


def changes_logits(samplers: Samplers) -> bool:
    """Whether anything but the noise and the filters stands between logits and tokens."""
    return bool(len(samplers.history.ids) or len(samplers.bias_tokens) or (samplers.mask_index >= 0).any())


class LogitChanges:
    """Applies what one step's samplers ask for to their own copy of the logits, [S, vocab] in float32."""

    def __init__(self, timeline: Timeline, ring: Tensor) -> None:
        self._timeline, self._ring = timeline, ring

    def apply(self, logits: Tensor, step: HostStep, fail: Tensor) -> None:
        samplers = step.batch.samplers
        if len(samplers.history.ids):
            self._penalize(logits, step, fail)
        if len(samplers.bias_tokens):
            self._add_bias(logits, samplers)
        if (samplers.mask_index >= 0).any():
            self._hide_forbidden(logits, samplers)

    def _penalize(self, logits: Tensor, step: HostStep, fail: Tensor) -> None:
        samplers, up = step.batch.samplers, self._timeline.upload
        owners = np.repeat(np.arange(len(samplers.rows)), np.diff(samplers.history_indptr))
        tokens, live = self._resolved(step, owners, fail, logits.shape[1])
        wanted = is_penalized(samplers)
        counts = logits.new_zeros(logits.shape)
        weights = up(np.where(wanted[owners], samplers.history_counts, 0).astype(np.float32)) * live
        counts.view(-1).scatter_add_(0, up(owners.astype(np.int64)) * logits.shape[1] + tokens, weights)
        repetition, presence, frequency = (
            up(values)[:, None] for values in (samplers.repetition, samplers.presence, samplers.frequency)
        )
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits.copy_(torch.where(counts > 0, repeated - presence - frequency * counts, logits))

    def _resolved(self, step: HostStep, owners: Int64, fail: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
        """Token of each entry, and whether it was really sampled; entries of failed requests fail their sampler's."""
        refs, up = step.history, self._timeline.upload
        literal = up(refs.literal.astype(np.int64))
        if (refs.source == NOWHERE).all():
            return literal, torch.ones_like(literal, dtype=torch.float32)
        source, live, dependency = (
            up(part.astype(np.int64)) for part in (refs.source, refs.live, refs.dependency)
        )
        requests = up(step.sampler_requests[owners].astype(np.int64))
        token = torch.where(source >= 0, self._ring[source.clamp(min=0)].to(torch.int64), literal)
        is_live = torch.where(live >= 0, self._ring[live.clamp(min=0)], 1)
        broken = (dependency >= 0) & (self._ring[dependency.clamp(min=0)] != 0)
        broken |= (is_live > 0) & ((token < 0) | (token >= vocab))
        fail.scatter_reduce_(0, requests, broken.to(torch.int32) * int(Failure.DEPENDENCY), "amax")
        return token.clamp(0, vocab - 1), (is_live * ~broken).to(torch.float32)

    def _add_bias(self, logits: Tensor, samplers: Samplers) -> None:
        owners = np.repeat(np.arange(len(samplers.rows)), np.diff(samplers.bias_indptr))
        places, inverse = np.unique(owners * logits.shape[1] + samplers.bias_tokens, return_inverse=True)
        sums = np.zeros(len(places), np.float32)
        np.add.at(
            sums, inverse, samplers.bias_values
        )  # summed here: the order of device atomics is not fixed
        logits.view(-1).index_add_(0, self._timeline.upload(places), self._timeline.upload(sums))

    def _hide_forbidden(self, logits: Tensor, samplers: Samplers) -> None:
        masked = np.flatnonzero(samplers.mask_index >= 0)
        words = self._timeline.upload(samplers.logit_masks[samplers.mask_index[masked]].view(np.int32))
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = ((words[:, :, None] >> bits) & 1).view(len(masked), -1)[:, : logits.shape[1]]
        forbidden: Tensor = allowed == 0
        if len(masked) == len(samplers.rows):
            logits.masked_fill_(forbidden, HIDDEN)
            return
        rows = self._timeline.upload(masked)
        logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(forbidden, HIDDEN))
