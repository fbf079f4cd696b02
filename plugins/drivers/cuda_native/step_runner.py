"""One step from batch to result: everything is queued at once, and the result is put together when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pie_core.contracts.forward import ForwardBatch, ForwardResult, Int32, Int64
from pie_core.contracts.probe_values import ProbeValues
from pie_core.errors import ForwardError
from pie_core.ids import Ticket
from pie_plugins.drivers.cuda_native.attention import AttentionPlanner
from pie_plugins.drivers.cuda_native.batch_tensors import BatchReader, HostStep, RowMasks, one_row_each
from pie_plugins.drivers.cuda_native.cuda_graphs import Buckets
from pie_plugins.drivers.cuda_native.model_runner import ModelRunner
from pie_plugins.drivers.cuda_native.outcomes import (
    CAUSES,
    Failure,
    KeptStep,
    Outcomes,
    RingLayout,
    RingRow,
)
from pie_plugins.drivers.cuda_native.probes import ProbeReader
from pie_plugins.drivers.cuda_native.prompt_graphs import PromptGraphs
from pie_plugins.drivers.cuda_native.samplers import LogitChanges, changes_logits
from pie_plugins.drivers.cuda_native.step_tensors import (
    BlockLayout,
    MaskTensors,
    StepTensors,
    pack,
    sizes_of,
    view_block,
)
from pie_plugins.drivers.cuda_native.timeline import Mark, Timeline


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that is queued. What it gives lies on the host once `done` is reached."""

    ticket: Ticket
    step: HostStep
    row: RingRow
    probes: ProbeReader
    layout: RingLayout

    @property
    def done(self) -> Mark:
        return self.row.done

    def result(self) -> ForwardResult:
        row = self.row
        row.done.wait()
        batch, requests, layout, values = self.step.batch, len(self.step.counts), self.layout, row.values
        probed = self.probes.finish()
        return ForwardResult(
            ticket=self.ticket,
            tokens=values[layout.tokens : layout.tokens + len(self.step.sampler_requests)].copy(),
            accepted=values[layout.accepted : layout.accepted + requests].copy(),
            draft_indptr=one_row_each(requests).zeros_and_one,
            draft_tokens=_NO_TOKENS,
            probe_indptr=probed.indptr,
            probe_values=probed.values,
            probe_token_indptr=probed.token_indptr,
            probe_tokens=probed.tokens,
            failed=self._failed(values[:requests], batch, probed),
            busy_s=max(0.0, row.done.seconds_since(row.started)),
        )

    def forgo(self) -> None:
        """Nobody asks for the result."""
        self.probes.release()

    def _failed(self, codes: Int32, batch: ForwardBatch, probed: ProbeValues) -> dict[int, str]:
        failed = dict(self.step.failed)
        if not np.count_nonzero(codes) and not probed.failed:
            return failed
        for request in np.flatnonzero(codes).tolist():
            if request not in failed:
                failed[request] = CAUSES[Failure(int(codes[request]))]
        for probe in probed.failed:
            failed.setdefault(
                int(self.step.row_request[batch.probes.rows[probe]]), "a probed value is not a number"
            )
        return failed


_NO_TOKENS: Int32 = np.empty(0, np.int32)


class Recorded(Protocol):
    """What a step goes through that was recorded before."""

    @property
    def tensors(self) -> StepTensors: ...

    @property
    def normalized(self) -> Tensor: ...

    @property
    def logits(self) -> Tensor: ...

    def whole(self, step: HostStep, row: RingRow) -> None:
        """All of a step whose logits nobody else reads. The row's mark says when the device begins."""
        ...

    def forward(self, step: HostStep, row: RingRow) -> None:
        """Up to the logits."""
        ...

    def probed(self, step: HostStep) -> Int64:
        """Where the rows of the probes lie among the logits."""
        ...

    def sample(self, step: HostStep) -> None:
        """Draws from the logits as they are, and settles the step."""
        ...


class StepRunner:
    """Queues steps in order and remembers what later ones may refer to."""

    def __init__(
        self,
        reader: BatchReader,
        runner: ModelRunner,
        outcomes: Outcomes,
        planner: AttentionPlanner,
        timeline: Timeline,
    ) -> None:
        self._reader, self._runner, self._outcomes = reader, runner, outcomes
        self.planner, self._timeline = planner, timeline
        self._changes = LogitChanges(timeline, outcomes.ring)
        self.buckets: Buckets | None = None
        self.prompts: PromptGraphs | None = None

    def enqueue(self, ticket: Ticket, batch: ForwardBatch) -> PendingStep:
        step = self._reader.read(batch, self._outcomes)
        self._check_size(step)
        row, layout = self._outcomes.claim(), self._outcomes.layout
        recorded = self._find(step)
        probes = ProbeReader(batch.probes, self._timeline)
        if recorded:
            self._replay(recorded, step, row, probes)
        else:
            self._run_eagerly(step, row, probes)
        row.fetch(layout.tokens + len(step.sampler_requests))
        self._outcomes.keep(
            ticket, row, KeptStep(row.base, len(step.counts), step.sampler_requests, step.failed)
        )
        row.done.set()
        return PendingStep(ticket, step, row, probes, layout)

    def trial(self, batch: ForwardBatch) -> PendingStep:
        """A step that nobody refers to, to see what it takes."""
        return self.enqueue(Ticket(-1), batch)

    def _check_size(self, step: HostStep) -> None:
        layout = self._outcomes.layout
        _check_count("requests", len(step.counts), layout.max_requests)
        _check_count("samplers", len(step.sampler_requests), layout.max_samplers)

    def _find(self, step: HostStep) -> Recorded | None:
        bucket = self.buckets.find(step) if self.buckets else None
        return bucket or (self.prompts.find(step) if self.prompts else None)

    def _replay(self, recorded: Recorded, step: HostStep, row: RingRow, probes: ProbeReader) -> None:
        samplers, is_probed = step.batch.samplers, bool(len(step.batch.probes.rows))
        is_changed = changes_logits(samplers)
        if not is_probed and not is_changed:
            recorded.whole(step, row)
            return
        recorded.forward(step, row)
        if is_probed:
            probes.read(recorded.probed(step), recorded.logits, recorded.normalized)
        if is_changed:
            logits = recorded.logits.to(torch.float32, copy=True)
            self._changes.apply(logits[: len(samplers.rows)], step, recorded.tensors.fail)
            self._settle(replace(recorded.tensors, max_drafts=_most_drafts(step)), logits)
        else:
            recorded.sample(step)

    def _run_eagerly(self, step: HostStep, row: RingRow, probes: ProbeReader) -> None:
        tensors = self._tensors(step, row.base)
        row.started.set()
        self._runner.kernels.prepare(tensors, self._outcomes.ring, self._runner.vocab_size)
        samplers, probed = step.batch.samplers, step.batch.probes
        asked, places = np.unique(np.concatenate([samplers.rows, probed.rows]), return_inverse=True)
        places = places.astype(np.int64)
        rows = self._timeline.upload(asked.astype(np.int64))
        normalized, logits = self._runner.answer(tensors, self.planner.plan(step, tensors), rows)
        if len(probed.rows):
            probes.read(places[len(samplers.rows) :], logits, normalized)
        own = self._rows(logits, places[: len(samplers.rows)])
        if changes_logits(samplers):
            own = own.to(torch.float32, copy=True)
            self._changes.apply(own, step, tensors.fail)
        self._settle(tensors, own)

    def _rows(self, logits: Tensor, places: Int64) -> Tensor:
        """The rows of the samplers; as they lie, where every row has one."""
        if len(places) == len(logits) and (places == np.arange(len(places))).all():
            return logits
        return logits.index_select(0, self._timeline.upload(places))

    def _settle(self, tensors: StepTensors, logits: Tensor) -> None:
        kernels = self._runner.kernels
        sampled = kernels.sample(logits, tensors) if len(logits) else tensors.tokens.new_empty(0)
        kernels.settle(tensors, sampled, self._outcomes.ring)

    def _tensors(self, step: HostStep, base: int) -> StepTensors:
        layout = BlockLayout(sizes_of(step))
        caches = self._runner.caches
        block = torch.empty(layout.words, dtype=torch.int32, device=self._timeline.device)
        self._timeline.send(pack(step, layout, base, [cache.scratch_page for cache in caches]), block)
        page_sizes = [cache.page_size for cache in caches]
        tensors = view_block(block, layout, page_sizes, np.sort(step.counts)[::-1], _most_drafts(step))
        for tensors_of, table in zip(tensors.groups, step.groups, strict=True):
            if table.masks is not None:
                tensors_of.masks = self._mask_tensors(table.masks)
        return tensors

    def _mask_tensors(self, masks: RowMasks) -> MaskTensors:
        up = self._timeline.upload
        return MaskTensors(up(masks.index), up(masks.causal), up(masks.words))


def _check_count(what: str, seen: int, limit: int) -> None:
    if seen > limit:
        raise ForwardError(f"driver cuda_native: the step has {seen} {what}, at most {limit} fit")


def _most_drafts(step: HostStep) -> int:
    return int(step.batch.num_drafts.max(initial=0))
