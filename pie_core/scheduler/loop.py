"""The stations of a step: policy chooses, batching lays out, the driver computes, delivery records.

It neither waits nor owns a thread: whoever drives it submits with `start`, collects from the driver as it likes, and
brings the outcome back with `finish` (asyncio and a thread in the engine's port, a virtual clock in a simulation).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import ForwardBatch, ForwardResult
from pie_core.engine.histograms import SECONDS, SIZES, Histogram
from pie_core.engine.options import EngineOptions
from pie_core.engine.suspensions import Suspensions
from pie_core.errors import ForwardError, PieError
from pie_core.ids import Ticket
from pie_core.kv_pages.context_pages import Cache
from pie_core.kv_pages.page_list import PageCopy
from pie_core.scheduler.batching import build_batch
from pie_core.scheduler.choosing import Chooser, Chosen
from pie_core.scheduler.cohort import Cohort, Drawn, RowStep
from pie_core.scheduler.delivery import record_step
from pie_core.scheduler.prefixes import Prefixes
from pie_core.scheduler.request import Chunk, Pass
from pie_core.scheduler.row_batch import RowBatches, joined
from pie_core.scheduler.run_ahead import RunAhead

Chunks = Sequence[Chunk]


# What a step came to: its chunks, and why some of them (by their place) failed.
Settle = Callable[[Chunks, Mapping[int, PieError]], None]


class RowKeeper(Protocol):
    """Who is told what a step came to for the cohort's rows; causes are by their place in the step."""

    def fail_rows(self, step: RowStep, causes: Mapping[int, PieError]) -> None: ...

    def hear(self, drawn: Drawn) -> None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """What a step at the driver computes."""

    chunks: Chunks
    rows: RowStep

    def __len__(self) -> int:
        return len(self.chunks) + len(self.rows)


class Loop:
    """Passes that wait for a step, and the steps that the driver works on."""

    def __init__(
        self,
        driver: Driver,
        options: EngineOptions,
        cache: Cache,
        suspensions: Suspensions,
        prefixes: Prefixes,
        ahead: RunAhead,
        cohort: Cohort,
        settle: Settle,
        row_keeper: RowKeeper,
    ) -> None:
        self.waiting: dict[Pass, None] = {}  # in the order in which they began to wait
        self.in_flight: dict[Ticket, Step] = {}
        self.shared_rows = 0  # that need not be read once more
        self.steps = self.passes = 0
        self.tokens = 0
        self.busy_s = 0.0
        self.sampled_tokens = self.failed_passes = 0
        self.batch_sizes, self.step_seconds = Histogram(SIZES), Histogram(SECONDS)
        self._driver = driver
        self._can = driver.capabilities
        self._cache = cache
        self._prefixes = prefixes
        self._ahead = ahead
        self._cohort, self._rows = cohort, RowBatches(cohort, self._can)
        self._options = options
        self._settle, self._row_keeper = settle, row_keeper
        self._chooser = Chooser(self._can, options, suspensions, prefixes, ahead, cohort)
        self._max_in_flight = min(options.max_in_flight, self._can.max_in_flight)

    def add(self, running: Pass) -> None:
        """The pass needs a step, or another one."""
        running.since = self._cohort.next_turn()
        self.waiting[running] = None

    def remove(self, running: Pass) -> None:
        self.waiting.pop(running, None)

    @property
    def stalled(self) -> bool:
        """Nothing runs, and what waits lacks pages."""
        return self._chooser.stalled

    def start(self) -> Ticket | None:
        """Submits the next step, if there is something to do and room at the driver."""
        while len(self.in_flight) < self._max_in_flight:
            chosen = self._chooser.choose(self.waiting, is_idle=not self.in_flight)
            if not len(chosen):
                return None
            try:
                if chosen.chunks:
                    self._copy_pages(chosen.chunks)
                ticket = self._driver.submit(self._lay_out(chosen))
            except Exception as error:  # whatever the driver raises ends this step's passes, not the engine
                self._undo(chosen.chunks)
                self._lose(chosen.chunks, self._cohort.not_begun(chosen.places), error)
                continue
            self._submitted(ticket, chosen)
            return ticket
        return None

    def finish(self, ticket: Ticket, outcome: ForwardResult | Exception) -> None:
        """Takes what collecting the ticket gave or raised."""
        step = self.in_flight.pop(ticket)
        self._cache.end_step()
        self._prefixes.finished()
        if isinstance(outcome, Exception):
            self._abort(step.chunks)
            self._lose(step.chunks, step.rows, outcome)
            return
        self._count(step, outcome)
        if step.chunks:
            self._finish_chunks(step.chunks, outcome)
        if len(step.rows):
            self._finish_rows(step, outcome)

    def _finish_chunks(self, chunks: Chunks, outcome: ForwardResult) -> None:
        record_step(chunks, outcome, self._options.checkpoint_tokens, self._options.max_checkpoints)
        self._share_prefixes(chunks, outcome)
        failed = outcome.failed.items()
        causes = {place: ForwardError(cause) for place, cause in failed if place < len(chunks)}
        self._abort([chunks[place] for place in causes])
        self._settle(chunks, causes)

    def _finish_rows(self, step: Step, outcome: ForwardResult) -> None:
        first, failed = len(step.chunks), outcome.failed.items()
        causes = {place - first: ForwardError(cause) for place, cause in failed if place >= first}
        if causes:
            self._row_keeper.fail_rows(step.rows, causes)
        tokens = outcome.tokens[len(outcome.tokens) - len(step.rows) :]
        self._row_keeper.hear(self._cohort.record(step.rows, tokens))

    def _lay_out(self, chosen: Chosen) -> ForwardBatch:
        batch = self._lay_out_parts(chosen)
        return replace(batch, prefixes=chosen.prefixes) if len(chosen.prefixes.first) else batch

    def _lay_out_parts(self, chosen: Chosen) -> ForwardBatch:
        if not len(chosen.places):
            return build_batch(chosen.chunks, self._can)
        rows = self._rows.build(chosen.places)
        return joined(build_batch(chosen.chunks, self._can), rows) if chosen.chunks else rows

    def _submitted(self, ticket: Ticket, chosen: Chosen) -> None:
        """What has more rows goes on waiting, at the end of the queue; what has none can be run ahead of."""
        self._cache.begin_step()
        self._prefixes.submitted(chosen.chunks)
        self._chooser.submitted(chosen)
        if len(chosen.prefixes.first):
            self.shared_rows += chosen.prefixes.saved_rows
        samplers = 0
        for chunk in chosen.chunks:
            running = chunk.running
            samplers += chunk.samples.stop - chunk.samples.start
            if not chunk.is_last:
                self.add(running)
            else:
                running.ticket, running.sampler = ticket, samplers - 1
                if not self._cohort.join(running):
                    self._ahead.submitted(running)
        rows = self._cohort.begun(chosen.places, ticket, samplers)
        self.in_flight[ticket] = Step(chosen.chunks, rows)

    def _share_prefixes(self, chunks: Chunks, result: ForwardResult) -> None:
        for place, chunk in enumerate(chunks):
            running = chunk.running
            counts = running.request is not None and running.ended is None and not running.dropped
            if counts and place not in result.failed:
                many = chunk.stop - chunk.start > 1
                self._prefixes.written(running.context, turn_ended=many and chunk.is_last)
                running.context.pages.settle(running.context.written)

    def _copy_pages(self, chunks: Chunks) -> None:
        by_group: dict[int, list[PageCopy]] = defaultdict(list)
        for chunk in chunks:
            for copy in chunk.copies:
                by_group[copy.group].append(copy)
        for group, copies in by_group.items():
            self._driver.copy_pages(group, [each.source for each in copies], [each.target for each in copies])

    def _undo(self, chunks: Chunks) -> None:
        """Nothing of the step is at the driver. Copied pages are given up: they may never have been copied."""
        for chunk in chunks:
            context = chunk.running.context
            context.pages.undo(chunk.copies)
            context.pages.drop_latest(1, chunk.start)
            context.submitted = chunk.start
            if chunk.running.request is None:
                chunk.running.dropped = True
                self._ahead.drop(context)

    def _abort(self, chunks: Chunks) -> None:
        """Their rows are not written. Of a guess that nobody has claimed, nothing counts as written yet."""
        for chunk in chunks:
            if chunk.running.request is not None and not chunk.running.dropped:
                chunk.running.context.pages.abort()

    def _lose(self, chunks: Chunks, rows: RowStep, error: Exception) -> None:
        self.failed_passes += len(chunks) + len(rows)
        cause = error if isinstance(error, ForwardError) else ForwardError(f"{type(error).__name__}: {error}")
        self._settle(chunks, dict.fromkeys(range(len(chunks)), cause))
        self._row_keeper.fail_rows(rows, dict.fromkeys(range(len(rows)), cause))

    def _count(self, step: Step, result: ForwardResult) -> None:
        self.steps += 1
        self.passes += len(step)
        self.failed_passes += len(result.failed)
        self.tokens += sum(chunk.stop - chunk.start for chunk in step.chunks) + len(step.rows)
        self.busy_s += result.busy_s
        self.sampled_tokens += len(result.tokens)
        self.batch_sizes.observe(len(step))
        self.step_seconds.observe(result.busy_s)
