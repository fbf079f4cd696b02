"""Looks at everything that a server runs and says how it does; what does not answer in time is left out."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from itertools import chain
from typing import Literal

from pie_core import __version__
from pie_core.app import Application, Replica
from pie_core.engine.messages import ProcessUse, Status
from pie_core.ids import ModelName, ProcessId
from pie_core.processes.usage import usage_of
from pie_core.server.credentials import Principal
from pie_core.server.models import Models
from pie_core.server.processes import ProcessTable, ServerProcess
from pie_core.server.status import (
    EngineStatus,
    ModelStatus,
    PluginStatus,
    ProcessStatus,
    ReplicaStatus,
    ServerStatus,
    WorkerStatus,
)

PATIENCE_S = 1.0
_COUNTED = ("contexts", "pages", "open_requests", "tokens")
_LAGS = 10  # how many measurements of the event loop are "of late"


class Inspector:
    """One for each server; `status` may be asked at any time."""

    def __init__(self, app: Application, models: Models, processes: ProcessTable) -> None:
        self._app = app
        self._models = models
        self._processes = processes
        self._started = time.monotonic()
        self._lags: deque[float] = deque(maxlen=_LAGS)
        self.connections = 0

    def note_lag(self, seconds: float) -> None:
        """How late the event loop came back to somebody who slept."""
        self._lags.append(max(seconds, 0.0))

    async def status(self, asked_by: Principal | None = None) -> ServerStatus:
        """`processes` are those that `asked_by` may see; without one, there are none."""
        statuses, workers = await asyncio.gather(
            self._models.statuses(PATIENCE_S, processes=asked_by is not None), self._workers()
        )
        return ServerStatus(
            version=__version__,
            state=self._state(),
            uptime_s=time.monotonic() - self._started,
            loop_lag_s=max(self._lags, default=0.0),
            connections=self.connections,
            launched=self._processes.launched,
            running=self._processes.num_running,
            ended=dict(self._processes.ended),
            worker_restarts=self._app.worker_restarts,
            models=[self._model(each, statuses) for each in self._models.listing()],
            workers=workers,
            plugins=self._plugins(),
            processes=[] if asked_by is None else self._seen(asked_by, chain(*statuses.values())),
        )

    def _state(self) -> Literal["loading", "ready", "stopping"]:
        if not self._processes.accepts:
            return "stopping"
        return "ready" if self._models.is_ready and self._models.can_compute else "loading"

    def _model(self, listed: dict[str, str], statuses: dict[ModelName, list[Status | None]]) -> ModelStatus:
        name = ModelName(listed["name"])
        return ModelStatus(
            name=name,
            state=self._models.state(name),
            error=listed.get("error"),
            driver=listed.get("driver"),
            architecture=listed.get("architecture"),
            load_s=self._app.load_seconds.get(name),
            replicas=list(map(_replica, self._app.replicas(name), statuses.get(name, ()))),
        )

    async def _workers(self) -> list[WorkerStatus]:
        found = await self._app.guest_counts(PATIENCE_S)
        return [
            WorkerStatus(
                pid=pid,
                processes=processes,
                resumes=None if counts is None else counts.resumes,
                host_calls=None if counts is None else counts.host_calls,
                cpu_s=None if (usage := usage_of(pid)) is None else usage.cpu_s,
                resident_bytes=None if usage is None else usage.resident_bytes,
            )
            for pid, processes, counts in found
        ]

    def _plugins(self) -> list[PluginStatus]:
        return [
            PluginStatus(
                name=each.name, distribution=each.distribution, version=each.version, load_s=each.load_s
            )
            for each in self._app.registry.plugins
        ]

    def _seen(self, asked_by: Principal, statuses: Iterable[Status | None]) -> list[ProcessStatus]:
        answered = (status for status in statuses if status is not None)
        uses = _by_process(use for status in answered for use in status.processes)
        return [_process(each, uses[each.id]) for each in self._processes.seen_by(asked_by)]


def _replica(replica: Replica, engine: Status | None) -> ReplicaStatus:
    usage = None if replica.pid is None else usage_of(replica.pid)
    return ReplicaStatus(
        state="ready" if replica.is_ready else "restarting",
        restarts=replica.restarts,
        pid=replica.pid,
        cpu_s=None if usage is None else usage.cpu_s,
        resident_bytes=None if usage is None else usage.resident_bytes,
        engine=None if engine is None else EngineStatus.of(engine),
    )


def _by_process(uses: Iterable[ProcessUse]) -> defaultdict[ProcessId, Counter[str]]:
    """What each process has of all models together."""
    found: defaultdict[ProcessId, Counter[str]] = defaultdict(Counter)
    for use in uses:
        counts = {name: getattr(use, name) for name in _COUNTED}
        found[use.process].update(counts)
    return found


def _process(process: ServerProcess, use: Counter[str]) -> ProcessStatus:
    return ProcessStatus(
        id=process.id,
        username=process.principal.user,
        program=process.inferlet,
        elapsed_s=process.elapsed_s,
        waits_for="model" if use["open_requests"] else process.waits_for,
        attached=process.listener is not None,
        trace_id=process.about.get("pie_trace_id"),
        **{name: use[name] for name in _COUNTED},
    )
