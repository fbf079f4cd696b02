"""The stations of a step: policy chooses, batching lays out, the driver computes, delivery records.

It neither waits nor owns a thread: whoever drives it submits with `start`, collects from the driver as it likes, and
brings the outcome back with `finish` (asyncio and a thread in the engine's port, a virtual clock in a simulation).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import ForwardResult
from pie_core.engine.histograms import SECONDS, SIZES, Histogram
from pie_core.engine.options import EngineOptions
from pie_core.engine.suspensions import Suspensions
from pie_core.errors import ForwardError, PieError
from pie_core.ids import Ticket
from pie_core.kv_pages.context_pages import Cache
from pie_core.kv_pages.page_list import PageCopy
from pie_core.scheduler.batching import build_batch, take_chunk
from pie_core.scheduler.delivery import record_step
from pie_core.scheduler.policy import Policy
from pie_core.scheduler.prefixes import Prefixes
from pie_core.scheduler.request import Chunk, Pass
from pie_core.scheduler.run_ahead import RunAhead

Chunks = Sequence[Chunk]

# What a step came to: its chunks, and why some of them (by their place) failed.
Settle = Callable[[Chunks, Mapping[int, PieError]], None]


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
        settle: Settle,
    ) -> None:
        self.waiting: dict[Pass, None] = {}  # in the order in which they began to wait
        self.in_flight: dict[Ticket, Chunks] = {}
        self._last_size = self._continued = 0  # passes of the latest step, and those that wait for another
        self.stalled = False  # nothing runs, and what waits lacks pages
        self.steps = self.passes = 0
        self.tokens = 0
        self.busy_s = 0.0
        self.sampled_tokens = self.failed_passes = 0
        self.batch_sizes, self.step_seconds = Histogram(SIZES), Histogram(SECONDS)
        self._driver = driver
        self._can = driver.capabilities
        self._cache = cache
        self._suspensions = suspensions
        self._prefixes = prefixes
        self._ahead = ahead
        self._options = options
        self._settle = settle
        self._policy = Policy(
            max_tokens=min(options.max_batch_tokens, self._can.max_batch_tokens),
            max_requests=min(options.max_batch_requests, self._can.max_batch_requests),
        )
        self._max_in_flight = min(options.max_in_flight, self._can.max_in_flight)

    def add(self, running: Pass) -> None:
        """The pass needs a step, or another one."""
        self.waiting[running] = None

    def remove(self, running: Pass) -> None:
        self.waiting.pop(running, None)

    def start(self) -> Ticket | None:
        """Submits the next step, if there is something to do and room at the driver."""
        while len(self.in_flight) < self._max_in_flight:
            chunks = self._choose()
            if not chunks:
                return None
            try:
                self._copy_pages(chunks)
                ticket = self._driver.submit(build_batch(chunks, self._can))
            except Exception as error:  # whatever the driver raises ends this step's passes, not the engine
                self._undo(chunks)
                self._lose(chunks, error)
                continue
            self._submitted(ticket, chunks)
            return ticket
        return None

    def finish(self, ticket: Ticket, outcome: ForwardResult | Exception) -> None:
        """Takes what collecting the ticket gave or raised."""
        chunks = self.in_flight.pop(ticket)
        self._cache.end_step()
        self._prefixes.finished()
        if isinstance(outcome, Exception):
            self._abort(chunks)
            self._lose(chunks, outcome)
            return
        self._count(chunks, outcome)
        record_step(chunks, outcome, self._options.checkpoint_tokens, self._options.max_checkpoints)
        self._share_prefixes(chunks, outcome)
        self.failed_passes += len(outcome.failed)
        causes = {place: ForwardError(cause) for place, cause in outcome.failed.items()}
        self._abort([chunks[place] for place in causes])
        self._settle(chunks, causes)

    def _choose(self) -> Chunks:
        ripe = self._ahead.ripe()
        if self.in_flight and 2 * (len(ripe) + self._continued) < self._last_size:
            return ()  # what runs and what waits would take turns in half-empty steps from now on
        following = [self._ahead.guess(each) for each in ripe if each.generation is not None]
        guesses = [self._ahead.guess(each) for each in ripe if each.generation is None]
        waiting = self._prefixes.ready(self._suspensions.ready(self.waiting))
        chunks = self._policy.choose([*waiting, *following], take_chunk, overtake=False, guesses=guesses)
        if not chunks and not self.in_flight:
            chunks = self._policy.choose(waiting, take_chunk, overtake=True)
        self.stalled = bool(self.waiting) and not chunks and not self.in_flight
        for chunk in chunks:
            self.waiting.pop(chunk.running, None)
            chunk.running.in_flight += 1
        return chunks

    def _submitted(self, ticket: Ticket, chunks: Chunks) -> None:
        """What has more rows goes on waiting, at the end of the queue; what has none can be run ahead of."""
        self._cache.begin_step()
        self._prefixes.submitted(chunks)
        self.in_flight[ticket] = chunks
        self._last_size, self._continued = len(chunks), 0
        samplers = 0
        for chunk in chunks:
            running = chunk.running
            samplers += chunk.samples.stop - chunk.samples.start
            if chunk.is_last:
                running.ticket, running.sampler = ticket, samplers - 1
                self._ahead.submitted(running)
            else:
                self._continued += 1
                self.waiting[running] = None

    def _share_prefixes(self, chunks: Chunks, result: ForwardResult) -> None:
        for place, chunk in enumerate(chunks):
            running = chunk.running
            counts = running.request is not None and running.ended is None and not running.dropped
            if counts and place not in result.failed:
                self._prefixes.written(running.context, chunk.start)

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

    def _lose(self, chunks: Chunks, error: Exception) -> None:
        self.failed_passes += len(chunks)
        cause = error if isinstance(error, ForwardError) else ForwardError(f"{type(error).__name__}: {error}")
        self._settle(chunks, dict.fromkeys(range(len(chunks)), cause))

    def _count(self, chunks: Chunks, result: ForwardResult) -> None:
        self.steps += 1
        self.passes += len(chunks)
        self.tokens += sum(chunk.stop - chunk.start for chunk in chunks)
        self.busy_s += result.busy_s
        self.sampled_tokens += len(result.tokens)
        self.batch_sizes.observe(len(chunks))
        self.step_seconds.observe(result.busy_s)
