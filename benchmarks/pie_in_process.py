"""A whole pie in this process, with a driver that notes when each of its steps began and ended.

The benchmarks that compare guests with the bare driver run both on the same loaded model.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pie_core.app import Application
from pie_core.config import Config, load_config, parse_config
from pie_core.config.tree import ModelConfig
from pie_core.contracts.driver import Driver, DriverDeclaration, Progress
from pie_core.contracts.forward import ForwardBatch, ForwardResult
from pie_core.ids import Ticket
from pie_core.models import with_paths
from pie_core.plugins import load_plugins
from pie_core.programs import ProgramSource
from pie_core.testing.recording_client import RecordingClient


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the driver, by the clock of `time.perf_counter`."""

    requests: int
    rows: int
    submitting_cpu_s: float  # CPU time of the submitting thread until then
    collected_at: float
    busy_s: float
    submitted_at: float
    submit_cpu_s: float  # CPU time of submitting alone; the dummy does all its work there


class WatchedDriver:
    """Passes everything on to a driver and keeps a list of its steps."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._open: dict[Ticket, tuple[int, int, float, float, float]] = {}
        self.steps: list[Step] = []
        self.submit_cpu_s = 0.0  # what `submit` took so far; the dummy does all its work there
        self._flows = threading.Event()
        self._flows.set()

    def submit(self, batch: ForwardBatch) -> Ticket:
        submitted_at, begin = time.perf_counter(), time.thread_time()
        ticket = self._driver.submit(batch)
        end = time.thread_time()
        self.submit_cpu_s += end - begin
        self._open[ticket] = (batch.num_requests, int(batch.indptr[-1]), end, submitted_at, end - begin)
        return ticket

    def collect(self, ticket: Ticket) -> ForwardResult:
        self._flows.wait()
        result = self._driver.collect(ticket)
        requests, rows, submitting_cpu_s, submitted_at, submit_cpu_s = self._open.pop(ticket)
        collected_at = time.perf_counter()
        self.steps.append(
            Step(requests, rows, submitting_cpu_s, collected_at, result.busy_s, submitted_at, submit_cpu_s)
        )
        return result

    def hold(self) -> None:
        """No step ends until `release`: what is asked for meanwhile goes on together."""
        self._flows.clear()

    def release(self) -> None:
        self._flows.set()

    def take_steps(self) -> list[Step]:
        """The steps since the last call."""
        steps, self.steps = self.steps, []
        return steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)


class WatchedApplication(Application):
    """An application of one model, whose driver is there to be driven while no program runs."""

    watched: WatchedDriver

    def _load_driver(self, declaration: DriverDeclaration, model: ModelConfig) -> Driver:
        self.watched = WatchedDriver(super()._load_driver(declaration, model))
        return cast(Driver, self.watched)

    @property
    def driver(self) -> Driver:
        return cast(Driver, self.watched)


async def run_all(
    app: Application, source: ProgramSource, inputs: list[dict[str, Any]]
) -> list[tuple[Any, RecordingClient]]:
    """Runs one program for each input, all at once: what each returned, and what it said."""
    clients = [RecordingClient() for _ in inputs]
    returned = await asyncio.gather(
        *(
            app.run(source, given, app.new_process("benchmark", client))
            for given, client in zip(inputs, clients, strict=True)
        )
    )
    return list(zip(returned, clients, strict=True))


def settings(file: Path | None, options: Mapping[str, Any] | None = None) -> Config:
    """A configuration file, or the default model on the default driver; the weights are fetched if need be."""
    config = (
        load_config(file) if file is not None else parse_config(_default(options or {}), "benchmark", Path())
    )
    return with_paths(config, load_plugins().drivers, quiet)


def _default(options: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{name}: {value}" for name, value in options.items())
    return f"models: [{{name: default, driver: {{type: portable, options: {{{listed}}}}}}}]"


def dummy() -> Config:
    """The driver that answers without a model: what remains is everything but the model."""
    return parse_config("models: [{name: dummy, driver: {type: dummy}}]", "benchmark", Path())


def resident_bytes() -> int:
    """Memory of this process that it alone has: private pages, as the kernel counts them."""
    fields = (
        line.split() for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    )
    sizes = {each[0]: int(each[1]) for each in fields if each[-1] == "kB"}
    return 1024 * (sizes["Private_Clean:"] + sizes["Private_Dirty:"])


def quiet(_: Progress) -> None:
    """Nobody watches."""
