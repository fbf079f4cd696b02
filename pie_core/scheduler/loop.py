"""The stations of a step: policy chooses, batching lays out, the driver computes, delivery records.

It neither waits nor owns a thread: whoever drives it submits with `start`, collects from the driver as it likes, and
brings the outcome back with `finish` (asyncio and a thread in the engine's port, a virtual clock in a simulation).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import ForwardResult
from pie_core.engine.options import EngineOptions
from pie_core.errors import ForwardError, PieError
from pie_core.ids import Ticket
from pie_core.kv_pages.page_list import PageCopy
from pie_core.scheduler.batching import build_batch, take_chunk
from pie_core.scheduler.delivery import record_step
from pie_core.scheduler.policy import Policy
from pie_core.scheduler.request import Chunk, Pass

Chunks = Sequence[Chunk]

# What a step came to: its chunks, and why some of them (by their place) failed.
Settle = Callable[[Chunks, Mapping[int, PieError]], None]


class Loop:
    """Passes that wait for a step, and the steps that the driver works on."""

    def __init__(self, driver: Driver, options: EngineOptions, settle: Settle) -> None:
        self.waiting: dict[Pass, None] = {}  # in the order in which they began to wait
        self.in_flight: dict[Ticket, Chunks] = {}
        self.stalled = False  # nothing runs, and what waits lacks pages
        self.steps = 0
        self.tokens = 0
        self.busy_s = 0.0
        self._driver = driver
        self._can = driver.capabilities
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
        while self.waiting and len(self.in_flight) < self._max_in_flight:
            chunks = self._choose()
            self.stalled = not chunks and not self.in_flight
            if not chunks:
                return None
            try:
                self._copy_pages(chunks)
                ticket = self._driver.submit(build_batch(chunks, self._can))
            except Exception as error:  # whatever the driver raises ends this step's passes, not the engine
                self._undo(chunks)
                self._lose(chunks, error)
                continue
            self.in_flight[ticket] = chunks
            return ticket
        return None

    @property
    def can_start(self) -> bool:
        """Whether it is worth calling `start`."""
        return bool(self.waiting) and not self.stalled and len(self.in_flight) < self._max_in_flight

    def finish(self, ticket: Ticket, outcome: ForwardResult | Exception) -> None:
        """Takes what collecting the ticket gave or raised."""
        chunks = self.in_flight.pop(ticket)
        if isinstance(outcome, Exception):
            self._lose(chunks, outcome)
            return
        self._count(chunks, outcome)
        record_step(chunks, outcome, self._options.checkpoint_tokens, self._options.max_checkpoints)
        causes = {place: ForwardError(cause) for place, cause in outcome.failed.items()}
        for place in causes:
            chunks[place].running.context.pages.abort(chunks[place].start)
        self._settle(chunks, causes)

    def _choose(self) -> Chunks:
        chunks = self._policy.choose(self.waiting, take_chunk, overtake=False)
        if not chunks and not self.in_flight:
            chunks = self._policy.choose(self.waiting, take_chunk, overtake=True)
        for chunk in chunks:
            del self.waiting[chunk.running]
            chunk.running.in_flight = True
        return chunks

    def _copy_pages(self, chunks: Chunks) -> None:
        by_group: dict[int, list[PageCopy]] = defaultdict(list)
        for chunk in chunks:
            for copy in chunk.copies:
                by_group[copy.group].append(copy)
        for group, copies in by_group.items():
            self._driver.copy_pages(group, [each.source for each in copies], [each.target for each in copies])

    def _undo(self, chunks: Chunks) -> None:
        """Copied pages are given up for the old ones: they may never have been copied."""
        for chunk in chunks:
            chunk.running.context.pages.undo(chunk.copies)

    def _lose(self, chunks: Chunks, error: Exception) -> None:
        for chunk in chunks:
            chunk.running.context.pages.abort(chunk.start)
        cause = error if isinstance(error, ForwardError) else ForwardError(f"{type(error).__name__}: {error}")
        self._settle(chunks, dict.fromkeys(range(len(chunks)), cause))

    def _count(self, chunks: Chunks, result: ForwardResult) -> None:
        self.steps += 1
        self.tokens += sum(chunk.stop - chunk.start for chunk in chunks)
        self.busy_s += result.busy_s
