"""One step from batch to result: read, run the model, sample, probe, verify drafts."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from pie_core.contracts.forward import ForwardBatch, ForwardResult, Int64, ProbeKind, Probes
from pie_core.contracts.probe_values import ProbeValues
from pie_core.ids import Ticket
from pie_plugins.drivers.portable.batch_tensors import BatchReader, BatchTensors, Outcomes
from pie_plugins.drivers.portable.model_runner import ModelRunner, PortableStep
from pie_plugins.drivers.portable.probes import given_columns, read_probes
from pie_plugins.drivers.portable.sampler import Drawn, SamplerInputs, column_inputs, draw
from pie_plugins.drivers.portable.verification import verify


class StepRunner:
    """Runs steps in order and remembers what later ones may refer to."""

    def __init__(self, reader: BatchReader, runner: ModelRunner, outcomes: Outcomes, streams: int) -> None:
        self._reader, self._runner, self._outcomes = reader, runner, outcomes
        self._streams = streams

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
        probe_logits, probe_hidden = _select(logits, probe_places), _select(hidden, probe_places)
        columns = self._column_logits(probes, probe_logits, probe_hidden, step)
        probed = read_probes(probes, probe_logits, probe_hidden, columns)
        inputs = SamplerInputs(samplers, tensors.sampler_index, tensors.history, tensors.history_counts)
        if logits is None:
            return _no_tokens(batch), probed
        owned = _owned(logits, sampler_places)
        if not self._runner.has_streams:
            return draw(owned, inputs), probed
        drawn = draw(owned, column_inputs(inputs, 0))
        return self._draw_columns(drawn, inputs, _select(hidden, sampler_places), step), probed

    def _column_logits(
        self, probes: Probes, logits: Tensor | None, hidden: Tensor | None, step: PortableStep
    ) -> Tensor | None:
        """[probes of that kind, streams * vocab]"""
        at = np.flatnonzero(probes.kinds == ProbeKind.COLUMNS)
        if not len(at):
            return None
        assert logits is not None
        assert hidden is not None
        places = torch.from_numpy(at)
        found = [logits[places]]
        if self._streams > 1:
            given = torch.from_numpy(given_columns(probes, at, self._streams)).to(hidden.device)
            columns = self._runner.columns(hidden[places])
            for column in range(1, self._streams):
                named, best = given[:, column - 1], found[-1].argmax(-1)
                before = torch.where(named < 0, best, named)
                found.append(columns.logits(column, before, step).to(torch.float32))
        return torch.cat(found, 1)

    def _draw_columns(
        self, first: Drawn, inputs: SamplerInputs, hidden: Tensor | None, step: PortableStep
    ) -> Drawn:
        """The other columns of each sampler's token, each drawn as the first was, once the one before is known."""
        if hidden is None:
            return Drawn(first.tokens.reshape(0, self._streams), {})
        columns, drawn = self._runner.columns(hidden), [first.tokens]
        failed = dict(first.failed)
        for column in range(1, self._streams):
            before = torch.from_numpy(drawn[-1].astype(np.int64)).to(hidden.device)
            logits = columns.logits(column, before, step).to(torch.float32)
            drawn_column = draw(logits, column_inputs(inputs, column))
            failed |= drawn_column.failed
            drawn.append(drawn_column.tokens)
        return Drawn(np.stack(drawn, axis=1), failed)


def _select(rows: Tensor | None, places: Int64) -> Tensor | None:
    if rows is None or not len(places):
        return None
    return rows.index_select(0, torch.from_numpy(places))


def _owned(logits: Tensor, places: Int64) -> Tensor:
    """The samplers' rows, which they may change: all of them as they lie, where each row has one sampler."""
    if len(places) == len(logits) and (places == np.arange(len(places))).all():
        return logits
    return logits.index_select(0, torch.from_numpy(places))


def _no_tokens(batch: ForwardBatch) -> Drawn:
    return Drawn(np.empty((0, *batch.tokens.ids.shape[1:]), np.int32), {})


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
