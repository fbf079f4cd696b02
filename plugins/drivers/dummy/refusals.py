"""Which features a batch uses: the dummy refuses what it does not declare, so a core that lets it through is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from pie_core.contracts.driver import Feature
from pie_core.contracts.forward import NO_TICKET, ForwardBatch, ProbeKind
from pie_core.contracts.sampling_reference import is_penalized


def _probes(kind: ProbeKind) -> Callable[[ForwardBatch], bool]:
    return lambda batch: bool((batch.probes.kinds == kind).any())


_USES: Mapping[Feature, Callable[[ForwardBatch], bool]] = {
    Feature.ATTENTION_MASK: lambda batch: len(batch.masks.rows) > 0,
    Feature.NONCAUSAL_MASK: lambda batch: not batch.masks.causal.all(),
    Feature.LOGIT_MASK: lambda batch: bool((batch.samplers.mask_index >= 0).any()),
    Feature.PENALTIES: lambda batch: bool(is_penalized(batch.samplers).any()),
    Feature.LOGIT_BIAS: lambda batch: len(batch.samplers.bias_tokens) > 0,
    Feature.PROBE_LOGITS: _probes(ProbeKind.LOGITS),
    Feature.PROBE_DISTRIBUTION: _probes(ProbeKind.DISTRIBUTION),
    Feature.PROBE_LOGPROBS: _probes(ProbeKind.LOGPROBS),
    Feature.PROBE_ENTROPY: _probes(ProbeKind.ENTROPY),
    Feature.PROBE_HIDDEN: _probes(ProbeKind.HIDDEN),
    Feature.PROBE_COLUMNS: _probes(ProbeKind.COLUMNS),
    Feature.TICKET_TOKENS: lambda batch: bool(np.any(batch.tokens.tickets != NO_TICKET)),
    Feature.TICKET_LENGTHS: lambda batch: bool(np.any(batch.length_tickets != NO_TICKET)),
    Feature.DRAFTS: lambda batch: bool(batch.num_drafts.any()),
    Feature.PROPOSALS: lambda batch: bool(batch.num_proposals.any()),
    Feature.ADAPTERS: lambda batch: bool((batch.adapter_ids >= 0).any()),
    Feature.MEDIA: lambda batch: len(batch.media.rows) > 0,
}


def used_features(batch: ForwardBatch, among: Iterable[Feature]) -> list[Feature]:
    """Those of the features that the batch asks for."""
    return [feature for feature in among if feature in _USES and _USES[feature](batch)]
