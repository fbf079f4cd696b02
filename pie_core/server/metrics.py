"""What a server counts, in Prometheus' text format at /metrics. Names end in their unit, totals in `_total`."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pie_core.engine.messages import Status
from pie_core.ids import ModelName

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One registry for each server, so that two in one process do not add up."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engines = _Engines()
        self._registry.register(self._engines)
        r = self._registry
        self.connections = Gauge("pie_connections", "Open client connections.", registry=r)
        self.logins = Counter("pie_logins", "Attempts to log in.", ["outcome"], registry=r)
        self.requests = Counter("pie_requests", "Messages answered.", ["type", "outcome"], registry=r)
        self.disconnects = Counter(
            "pie_disconnects", "Connections that the server closed.", ["reason"], registry=r
        )
        self.launches = Counter("pie_launches", "Programs started.", registry=r)
        self.ends = Counter("pie_process_ends", "Programs that ended.", ["outcome"], registry=r)
        self.process_seconds = Counter(
            "pie_process_seconds", "How long ended programs ran in all.", registry=r
        )
        self.events = Counter("pie_events_sent", "Process events sent to clients.", registry=r)

    def exposed(self, statuses: Mapping[ModelName, Status]) -> bytes:
        """Everything, with what the engines say of themselves just now."""
        self._engines.statuses = statuses
        return generate_latest(self._registry)


class _Engines(Collector):
    """Status messages as metrics."""

    def __init__(self) -> None:
        self.statuses: Mapping[ModelName, Status] = {}

    def collect(self) -> list[Metric]:
        pages = GaugeMetricFamily("pie_kv_pages", "KV pages of a model.", labels=["model", "state"])
        requests = GaugeMetricFamily(
            "pie_engine_requests", "Passes and generations.", labels=["model", "state"]
        )
        contexts = GaugeMetricFamily("pie_contexts", "Contexts of a model.", labels=["model"])
        steps = CounterMetricFamily("pie_steps", "Steps that a model has computed.", labels=["model"])
        tokens = CounterMetricFamily("pie_tokens", "Token rows that a model has computed.", labels=["model"])
        busy = CounterMetricFamily("pie_device_busy_seconds", "Device time of a model.", labels=["model"])
        for model, status in self.statuses.items():
            free = sum(status.free_pages)
            pages.add_metric([model, "free"], free)
            pages.add_metric([model, "used"], sum(status.total_pages) - free)
            requests.add_metric([model, "waiting"], status.waiting)
            requests.add_metric([model, "running"], status.running)
            contexts.add_metric([model], status.contexts)
            steps.add_metric([model], status.steps)
            tokens.add_metric([model], status.tokens)
            busy.add_metric([model], status.busy_s)
        return [pages, requests, contexts, steps, tokens, busy]
