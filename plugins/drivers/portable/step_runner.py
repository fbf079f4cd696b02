"""One step from batch to result: read, run the model, sample, probe, verify drafts."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from pie_core.contracts.forward import ForwardBatch, ForwardResult, Int64, ProbeKind
from pie_core.ids import Ticket
from pie_plugins.drivers.portable.batch_tensors import BatchReader, BatchTensors, Outcomes
from pie_plugins.drivers.portable.model_runner import ModelRunner, PortableStep
from pie_plugins.drivers.portable.probes import ProbeValues, read_probes
from pie_plugins.drivers.portable.sampler import Drawn, SamplerInputs, draw
from pie_plugins.drivers.portable.verification import verify


class StepRunner:
    """Runs steps in order and remembers what later ones may refer to."""

    def __init__(self, reader: BatchReader, runner: ModelRunner, outcomes: Outcomes) -> None:
        self._reader, self._runner, self._outcomes = reader, runner, outcomes

    def run(self, ticket: Ticket, batch: ForwardBatch, started: float) -> ForwardResult:
        tensors = self._reader.read(batch, self._outcomes)
        step = self._runner.step(tensors)
        drawn, probed = self._answers(batch, tensors, step)
        failed = tensors.failed | _failures(batch, tensors, drawn, probed)
        accepted, outcome = verify(batch, tensors, drawn.tokens, failed)
        self._outcomes.keep(ticket, outcome)
        return ForwardResult(
            ticket=ticket,
            tokens=drawn.tokens,
            accepted=accepted,
            draft_indptr=np.zeros(batch.num_requests + 1, np.int32),
            draft_tokens=np.empty(0, np.int32),
            probe_indptr=probed.indptr,
            probe_values=probed.values,
            probe_token_indptr=probed.token_indptr,
            probe_tokens=probed.tokens,
            failed=failed,
            busy_s=perf_counter() - started,
        )

    def _answers(
        self, batch: ForwardBatch, tensors: BatchTensors, step: PortableStep
    ) -> tuple[Drawn, ProbeValues]:
        """Only rows that somebody samples or probes get a norm; only those that need them, logits."""
        samplers, probes = batch.samplers, batch.probes
        asked, places = np.unique(np.concatenate([samplers.rows, probes.rows]), return_inverse=True)
        hidden = self._runner.normalized(step, torch.from_numpy(asked.astype(np.int64)))
        sampler_places, probe_places = places[: len(samplers.rows)], places[len(samplers.rows) :]
        reads_logits = probes.kinds != ProbeKind.HIDDEN
        logits = None
        if len(sampler_places) or reads_logits.any():
            logits = self._runner.logits(step, hidden)
        probed = read_probes(probes, _select(logits, probe_places), _select(hidden, probe_places))
        inputs = SamplerInputs(samplers, tensors.sampler_index, tensors.history, tensors.history_counts)
        drawn = _no_tokens() if logits is None else draw(_owned(logits, sampler_places), inputs)
        return drawn, probed


def _select(rows: Tensor | None, places: Int64) -> Tensor | None:
    if rows is None or not len(places):
        return None
    return rows.index_select(0, torch.from_numpy(places))


def _owned(logits: Tensor, places: Int64) -> Tensor:
    """The samplers' rows, which they may change: all of them as they lie, where each row has one sampler."""
    if len(places) == len(logits) and (places == np.arange(len(places))).all():
        return logits
    return logits.index_select(0, torch.from_numpy(places))


def _no_tokens() -> Drawn:
    return Drawn(np.empty(0, np.int32), {})


def _failures(
    batch: ForwardBatch, tensors: BatchTensors, drawn: Drawn, probed: ProbeValues
) -> dict[int, str]:
    """Samplers and probes that failed, as requests."""
    owner = tensors.request_of_row
    failed = {
        int(owner[batch.probes.rows[probe]]): "a probed value is not a number" for probe in probed.failed
    }
    return failed | {
        int(owner[batch.samplers.rows[sampler]]): cause for sampler, cause in drawn.failed.items()
    }
