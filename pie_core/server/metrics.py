"""What a server counts, in Prometheus' text format at /metrics. Names end in their unit, totals in `_total`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pie_core.engine.histograms import Distribution
from pie_core.server.status import EngineStatus, GroupStatus, ReplicaStatus, ServerStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float | Distribution]]


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric that is read from a status: of each of its label values, a number or a distribution."""

    name: str  # a counter's without `_total`
    kind: Kind
    help: str
    labels: Labels
    read: Callable[[ServerStatus], Samples]

    def family(self, status: ServerStatus) -> Metric:
        samples = self.read(status)
        if self.kind == "histogram":
            return _histogram(self, samples)
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(self.name, self.help, labels=self.labels)
        for labels, value in samples:
            assert not isinstance(value, Distribution), self.name
            family.add_metric(labels, value)
        return family


@dataclass(frozen=True, slots=True)
class Description:
    """A metric as the docs list it."""

    name: str
    kind: Kind
    labels: Labels
    help: str


class Metrics:
    """One registry for each server, so that two in one process do not add up."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._latest = _Latest()
        self._registry.register(self._latest)
        self._counted: list[Description] = []
        ProcessCollector(registry=self._registry)
        self.logins = self._counter("pie_logins", "Attempts to log in.", "outcome")
        self.requests = self._counter("pie_requests", "Messages answered.", "type", "outcome")
        self.disconnects = self._counter(
            "pie_disconnects", "Connections that the server closed or refused.", "reason"
        )
        self.process_seconds = self._counter("pie_process_seconds", "How long ended programs ran in all.")
        self.events = self._counter("pie_events_sent", "Process events sent to clients.")

    def exposed(self, status: ServerStatus) -> bytes:
        """Everything, with how the server does just now."""
        self._latest.status = status
        return generate_latest(self._registry)

    def described(self) -> list[Description]:
        """All of them, but for those of the process itself, which prometheus_client names."""
        read = [Description(_exposed_name(each), each.kind, each.labels, each.help) for each in MEASURES]
        return [*read, *self._counted]

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        self._counted.append(Description(f"{name}_total", "counter", labels, text))
        return Counter(name, text, labels, registry=self._registry)


class _Latest(Collector):
    """The latest status as metrics."""

    def __init__(self) -> None:
        self.status: ServerStatus | None = None

    def collect(self) -> Iterator[Metric]:
        if self.status is not None:
            for measure in MEASURES:
                yield measure.family(self.status)


def _exposed_name(measure: Measure) -> str:
    return f"{measure.name}_total" if measure.kind == "counter" else measure.name


def _histogram(measure: Measure, samples: Samples) -> HistogramMetricFamily:
    family = HistogramMetricFamily(measure.name, measure.help, labels=measure.labels)
    for labels, value in samples:
        assert isinstance(value, Distribution), measure.name
        bounds = [*map(str, value.bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, accumulate(value.counts), strict=True)), value.total)
    return family


# ---- reading a status


def _of_server(name: str, kind: Kind, text: str, read: Callable[[ServerStatus], float]) -> Measure:
    return Measure(name, kind, text, (), lambda status: [((), read(status))])


def _of_engines(
    name: str, kind: Kind, text: str, read: Callable[[EngineStatus], float | Distribution]
) -> Measure:
    """Of each model that has an engine."""
    return Measure(
        name,
        kind,
        text,
        ("model", "replica"),
        lambda status: [(of, read(engine)) for of, engine in _engines(status)],
    )


def _of_engines_by(
    name: str,
    kind: Kind,
    text: str,
    label: str,
    values: Sequence[tuple[str, Callable[[EngineStatus], float]]],
) -> Measure:
    """Likewise, with a second label."""

    def read(status: ServerStatus) -> Samples:
        for of, engine in _engines(status):
            for value, number in values:
                yield (*of, value), number(engine)

    return Measure(name, kind, text, ("model", "replica", label), read)


def _replicas(status: ServerStatus) -> list[tuple[Labels, ReplicaStatus]]:
    return [
        ((model.name, str(place)), replica)
        for model in status.models
        for place, replica in enumerate(model.replicas)
    ]


def _engines(status: ServerStatus) -> list[tuple[Labels, EngineStatus]]:
    return [(of, replica.engine) for of, replica in _replicas(status) if replica.engine is not None]


def _pages(status: ServerStatus) -> Samples:
    for of, engine in _engines(status):
        for group in engine.groups:
            for state, count in _page_states(group):
                yield (*of, group.name, state), count


def _page_states(group: GroupStatus) -> list[tuple[str, int]]:
    free = group.total - group.used - group.cached
    return [("used", group.used), ("cached", group.cached), ("free", free), ("swapped", group.swapped)]


def _os_processes(status: ServerStatus) -> Iterator[tuple[Labels, float | None, int | None]]:
    """Those besides the server's own, of which prometheus_client tells."""
    for (model, place), replica in _replicas(status):
        if replica.pid is not None:
            yield ("engine", f"{model} {place}"), replica.cpu_s, replica.resident_bytes
    for number, worker in enumerate(status.workers):
        if worker.pid != os.getpid():
            yield ("worker", str(number)), worker.cpu_s, worker.resident_bytes


def _child_cpu(status: ServerStatus) -> Samples:
    return [(labels, cpu_s) for labels, cpu_s, _ in _os_processes(status) if cpu_s is not None]


def _child_memory(status: ServerStatus) -> Samples:
    return [(labels, resident) for labels, _, resident in _os_processes(status) if resident is not None]


MEASURES: tuple[Measure, ...] = (
    Measure(
        "pie_build_info",
        "gauge",
        "1; which version runs.",
        ("version",),
        lambda status: [((status.version,), 1)],
    ),
    _of_server("pie_ready", "gauge", "Whether /ready answers 200.", lambda s: s.state == "ready"),
    _of_server("pie_connections", "gauge", "Open client connections.", lambda s: s.connections),
    _of_server(
        "pie_event_loop_lag_seconds",
        "gauge",
        "How late the server's event loop was at worst in the last ten seconds.",
        lambda s: s.loop_lag_s,
    ),
    _of_server("pie_launches", "counter", "Programs started.", lambda s: s.launched),
    _of_server("pie_processes", "gauge", "Programs that run.", lambda s: s.running),
    Measure(
        "pie_process_ends",
        "counter",
        "Programs that ended: `returned`, or the code of the error.",
        ("outcome",),
        lambda status: [((outcome,), count) for outcome, count in status.ended.items()],
    ),
    _of_server("pie_workers", "gauge", "Processes that run programs.", lambda s: len(s.workers)),
    _of_server(
        "pie_worker_restarts", "counter", "Workers that were lost and replaced.", lambda s: s.worker_restarts
    ),
    Measure(
        "pie_worker_processes",
        "gauge",
        "Programs of each worker.",
        ("worker",),
        lambda status: [((str(place),), each.processes) for place, each in enumerate(status.workers)],
    ),
    Measure(
        "pie_guest_resumes",
        "counter",
        "How often guests went on behind a wait, of each worker.",
        ("worker",),
        lambda status: [
            ((str(place),), each.resumes)
            for place, each in enumerate(status.workers)
            if each.resumes is not None
        ],
    ),
    Measure(
        "pie_host_calls",
        "counter",
        "How often guests asked the host for something, of each worker.",
        ("worker",),
        lambda status: [
            ((str(place),), each.host_calls)
            for place, each in enumerate(status.workers)
            if each.host_calls is not None
        ],
    ),
    Measure(
        "pie_child_cpu_seconds",
        "counter",
        "Processor time of engine and worker processes.",
        ("role", "name"),
        _child_cpu,
    ),
    Measure(
        "pie_child_resident_memory_bytes",
        "gauge",
        "Memory of engine and worker processes.",
        ("role", "name"),
        _child_memory,
    ),
    Measure(
        "pie_plugin_load_seconds",
        "gauge",
        "How long importing what a plugin declares took.",
        ("plugin",),
        lambda status: [((each.name,), each.load_s) for each in status.plugins],
    ),
    Measure(
        "pie_model_up",
        "gauge",
        "Whether the engine of a loaded model answers.",
        ("model", "replica"),
        lambda status: [(of, each.engine is not None) for of, each in _replicas(status)],
    ),
    Measure(
        "pie_model_load_seconds",
        "gauge",
        "How long loading a model took.",
        ("model",),
        lambda status: [((each.name,), each.load_s) for each in status.models if each.load_s is not None],
    ),
    Measure(
        "pie_engine_restarts",
        "counter",
        "Engine processes that were lost and replaced.",
        ("model", "replica"),
        lambda status: [(of, each.restarts) for of, each in _replicas(status)],
    ),
    Measure(
        "pie_kv_pages",
        "gauge",
        "KV pages of each cache group: in use, only cached, or free; and those in host memory.",
        ("model", "replica", "group", "state"),
        _pages,
    ),
    _of_engines("pie_contexts", "gauge", "Contexts.", lambda e: e.contexts),
    _of_engines_by(
        "pie_engine_requests",
        "gauge",
        "Passes and generations: in a batch, or waiting for one.",
        "state",
        (("waiting", lambda e: e.waiting), ("running", lambda e: e.running)),
    ),
    _of_engines("pie_steps", "counter", "Steps, of one batch each.", lambda e: e.steps),
    _of_engines(
        "pie_passes", "counter", "Rows of batches: contexts that steps computed.", lambda e: e.passes
    ),
    _of_engines(
        "pie_cohort_rows",
        "counter",
        "Passes that were computed as columns, without work for each.",
        lambda e: e.cohort_rows,
    ),
    _of_engines(
        "pie_shared_rows",
        "counter",
        "KV rows that need not be read once more, because passes of a batch share them.",
        lambda e: e.shared_rows,
    ),
    _of_engines("pie_tokens", "counter", "Token rows computed, prompts included.", lambda e: e.tokens),
    _of_engines(
        "pie_sampled_tokens", "counter", "Tokens drawn, guesses included.", lambda e: e.sampled_tokens
    ),
    _of_engines_by(
        "pie_step_phase_seconds",
        "counter",
        "Time of steps: the host lays out, the device computes, the host records.",
        "phase",
        (
            ("schedule", lambda e: e.schedule_s),
            ("driver", lambda e: e.driver_s),
            ("deliver", lambda e: e.deliver_s),
        ),
    ),
    _of_engines("pie_step_seconds", "histogram", "Device time of a step.", lambda e: e.step_seconds),
    _of_engines("pie_batch_size", "histogram", "Passes of a step.", lambda e: e.batch_sizes),
    _of_engines(
        "pie_time_to_first_token_seconds",
        "histogram",
        "Of a generation, from when the engine was asked.",
        lambda e: e.first_token_seconds,
    ),
    _of_engines(
        "pie_time_between_tokens_seconds",
        "histogram",
        "The mean of a generation, counted once for each further token.",
        lambda e: e.between_tokens_seconds,
    ),
    _of_engines(
        "pie_pass_wait_seconds",
        "histogram",
        "Of a program that steps by itself, for a pass that had not run ahead; in one step of sixteen.",
        lambda e: e.pass_wait_seconds,
    ),
    _of_engines_by(
        "pie_run_ahead_passes",
        "counter",
        "Guessed passes: asked for as guessed, asked for otherwise, or computed for nothing.",
        "outcome",
        (
            ("hit", lambda e: e.run_ahead_hits),
            ("miss", lambda e: e.run_ahead_misses),
            ("drop", lambda e: e.run_ahead_drops),
        ),
    ),
    _of_engines(
        "pie_prefix_lookup_tokens",
        "counter",
        "Rows of prompts that were looked for in the prefix cache.",
        lambda e: e.prefix_lookup_tokens,
    ),
    _of_engines(
        "pie_prefix_hit_tokens",
        "counter",
        "Rows of prompts that were taken over instead of computed.",
        lambda e: e.prefix_hit_tokens,
    ),
    _of_engines(
        "pie_suspensions", "counter", "Contexts that gave their pages up to others.", lambda e: e.suspensions
    ),
    _of_engines(
        "pie_replayed_tokens", "counter", "Rows that suspended contexts had.", lambda e: e.replayed_tokens
    ),
    _of_engines("pie_swaps", "counter", "Suspensions to host memory.", lambda e: e.swaps),
    _of_engines("pie_swap_failures", "counter", "Swaps that a driver refused.", lambda e: e.swap_failures),
    _of_engines_by(
        "pie_swapped_bytes",
        "counter",
        "Copied to host memory, and back.",
        "direction",
        (("out", lambda e: e.swapped_out_bytes), ("in", lambda e: e.swapped_in_bytes)),
    ),
    _of_engines(
        "pie_failed_passes", "counter", "Passes that a driver did not compute.", lambda e: e.failed_passes
    ),
    _of_engines(
        "pie_request_timeouts", "counter", "Requests that took longer than they may.", lambda e: e.timeouts
    ),
)
