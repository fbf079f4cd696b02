"""A pie on the dummy driver, set up for one measurement: crowds of guests start together, and every step is noted."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.pie_in_process import Step, WatchedApplication
from pie_core.app import Application
from pie_core.config import Config, parse_config
from pie_core.engine.messages import ReadStatus, Status
from pie_core.programs import ProgramSource
from pie_core.testing.recording_client import RecordingClient

MAX_GUESTS = 1024


def configured(
    *,
    step_ms: float,
    depth: int = 1,
    workers: int = 0,
    driver: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> Config:
    """One dummy model whose steps take so long; `driver` and `scheduler` are further options of theirs."""
    options = {
        "step_ms": step_ms,
        "interpret": "false",
        "num_pages": 131072,
        "max_batch_requests": MAX_GUESTS,
        "max_model_len": 65536,
        **(driver or {}),
    }
    settings = {
        "speculation_depth": depth,
        "max_batch_requests": MAX_GUESTS,
        "max_batch_tokens": 8 * MAX_GUESTS,
        **(scheduler or {}),
    }
    return parse_config(
        f"runtime: {{workers: {workers}}}\n"
        f"models: [{{name: dummy, driver: {{type: dummy, options: {_flow(options)}}}, "
        f"scheduler: {_flow(settings)}}}]",
        "benchmark",
        Path(),
    )


def _flow(values: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in values.items()) + "}"


class Crowd:
    """Programs that were started and wait for the word."""

    def __init__(self, app: Application, source: ProgramSource, inputs: Sequence[Mapping[str, Any]]) -> None:
        self._states = [app.new_process("benchmark", RecordingClient()) for _ in inputs]
        self._tasks = [
            asyncio.create_task(app.run(source, each, state))
            for each, state in zip(inputs, self._states, strict=True)
        ]

    async def ready(self) -> None:
        """Returns once all of them wait. Raises what one that failed raised."""
        for state, task in zip(self._states, self._tasks, strict=True):
            wanted = asyncio.create_task(state.messages.wanted())
            await asyncio.wait({wanted, task}, return_when=asyncio.FIRST_COMPLETED)
            if not wanted.done():
                wanted.cancel()
                await task
                raise SystemExit("a program ended before it was told to begin")

    def go(self) -> None:
        for state in self._states:
            state.messages.put("go")

    async def go_together(self, app: WatchedApplication) -> None:
        """Nobody's first step ends before all have asked for theirs."""
        await self.ready()
        app.watched.hold()
        try:
            self.go()
            while (found := await status(app)).waiting + found.running < len(self._tasks):
                if any(task.done() for task in self._tasks):
                    raise SystemExit("a program ended before all had begun")
                await asyncio.sleep(0.01)
        finally:
            app.watched.take_steps()
            app.watched.release()

    async def end(self) -> list[Any]:
        """What they returned."""
        return list(await asyncio.gather(*self._tasks))

    async def run(self) -> list[Any]:
        await self.ready()
        self.go()
        return await self.end()


async def status(app: Application) -> Status:
    model = next(iter(app.models.values()))
    waiting: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
    pending = model.engine.request(lambda request: ReadStatus(request=request), lambda event: event)

    def done() -> None:
        if not waiting.done():
            found = pending.result()
            assert isinstance(found, Status)
            waiting.set_result(found)

    pending.on_done(done)
    return await waiting


@dataclass(frozen=True, slots=True)
class Decode:
    """Steps in a row, in which all guests took part if the host was fast enough for that."""

    steps: int
    together: bool  # it was
    utilisation: float  # of the driver
    host_us: float  # CPU time of the event loop's thread for a token of every guest, without the driver's
    period_us: float  # from one result to the next; median
    period_p99_us: float
    idle_p50_us: float  # of the driver, between two steps
    idle_p99_us: float
    tokens_per_s: float


def decode_of(app: WatchedApplication, guests: int, warm_up: int = 8) -> Decode:
    """What the steps since the last call were like, those at both ends aside."""
    steps = app.watched.take_steps()
    full = [place for place, step in enumerate(steps) if step.requests == step.rows == guests]
    full = full[warm_up:-2]
    together = len(full) > 3 and full[-1] - full[0] < 1.25 * len(full)
    return _decode(steps[full[0] : full[-1] + 1] if together else _middle(steps), guests, together)


def _middle(steps: Sequence[Step]) -> Sequence[Step]:
    """The steps that drew the middle three fifths of the tokens."""
    drawn = np.cumsum([step.requests for step in steps])
    first, last = np.searchsorted(drawn, (0.2 * drawn[-1], 0.8 * drawn[-1]))
    if last - first < 3:
        raise SystemExit(f"{len(steps)} steps are too few to measure: draw more tokens")
    return steps[first : last + 1]


def _decode(steps: Sequence[Step], guests: int, together: bool) -> Decode:
    span = steps[-1].collected_at - steps[0].collected_at
    host = [
        after.submitting_cpu_s - before.submitting_cpu_s - after.submit_cpu_s
        for before, after in pairwise(steps)
    ]
    periods = [after.collected_at - before.collected_at for before, after in pairwise(steps)]
    idle = idle_times(steps)
    drawn = sum(step.requests for step in steps[1:])
    busy_s = sum(step.busy_s for step in steps[1:])
    return Decode(
        steps=len(steps),
        together=together,
        utilisation=busy_s / (busy_s + sum(idle)),
        host_us=1e6 * (median(host) if together else sum(host) * guests / drawn),
        period_us=1e6 * median(periods),
        period_p99_us=1e6 * float(np.percentile(periods, 99)),
        idle_p50_us=1e6 * median(idle),
        idle_p99_us=1e6 * float(np.percentile(idle, 99)),
        tokens_per_s=drawn / span,
    )


def idle_times(steps: Sequence[Step]) -> list[float]:
    """How long the device had nothing to do before each step but the first: it works on one after the other."""
    idle, free_at = [], None
    for step in steps:
        start = step.submitted_at if free_at is None else max(step.submitted_at, free_at)
        if free_at is not None:
            idle.append(start - free_at)
        free_at = start + step.busy_s
    return idle
