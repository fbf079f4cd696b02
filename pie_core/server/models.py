"""The models of a server's configuration: which are loaded, loading and unloading them, how they do."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pie_core.app import Application
from pie_core.config import Config, ModelConfig
from pie_core.engine.messages import ReadStatus, Status
from pie_core.errors import NotFound, PieError
from pie_core.host_api.engine_client import EngineClient
from pie_core.host_api.replicas import answer
from pie_core.ids import ModelName
from pie_core.naming import unknown
from pie_core.server.status import ModelState, ReplicaCondition

log = logging.getLogger(__name__)

# What `model_status` tells beside what Pie 0.4 does, as it stands in Status.
_ADDED = (
    *("passes", "sampled_tokens", "schedule_s", "deliver_s", "suspensions", "replayed_tokens"),
    *("run_ahead_hits", "run_ahead_misses", "run_ahead_drops", "prefix_lookup_tokens", "prefix_hit_tokens"),
)


class Models:
    """Loads one model at a time; programs see a model from the moment it is loaded."""

    def __init__(self, app: Application, config: Config) -> None:
        self._app = app
        self._configured = {ModelName(model.name): model for model in config.models}
        self._lock = asyncio.Lock()
        self._failures: dict[ModelName, PieError] = {}
        self._loading: ModelName | None = None
        self.is_ready = False

    @property
    def can_compute(self) -> bool:
        """Each loaded model has an engine, one of several replicas is enough; and programs have a process to run in."""
        return self._app.runs_programs and all(map(self._app.has_engine, self._app.models))

    async def load_all(self) -> None:
        """What the server does at its start. Raises what the first model fails with."""
        for name in self._configured:
            await self.load(name)
        self.is_ready = True

    async def load(self, name: str) -> None:
        """Raises NotFound, LoadError or what the driver refuses; a model that is loaded stays as it is."""
        model = self._find(name)
        async with self._lock:
            if ModelName(name) not in self._app.models:
                await self._load(model)

    async def unload(self, name: str) -> None:
        self._find(name)
        async with self._lock:
            await self._app.unload_model(ModelName(name))

    def listing(self) -> list[dict[str, Any]]:
        return [self._described(name) for name in self._configured]

    async def statuses(
        self, patience_s: float = 60.0, processes: bool = False
    ) -> dict[ModelName, list[Status | None]]:
        """Of each replica of the loaded ones, None if it does not answer in time; on request with what each process
        uses."""
        loaded = dict(self._app.models)
        asked = [
            asyncio.gather(*(_status_in_time(engine, patience_s, processes) for engine in each.engines))
            for each in loaded.values()
        ]
        return dict(zip(loaded, await asyncio.gather(*asked), strict=True))

    def replicas(self, name: ModelName) -> list[ReplicaCondition]:
        """How each engine of a loaded model does."""
        return ["ready" if each.is_ready else "restarting" for each in self._app.replicas(name)]

    def conditions(self) -> dict[ModelName, list[ReplicaCondition]]:
        """Of all loaded models."""
        return {name: self.replicas(name) for name in self._app.models}

    def _find(self, name: str) -> ModelConfig:
        model = self._configured.get(ModelName(name))
        if model is None:
            raise NotFound(
                f"{unknown('model', name, self._configured)} (the server's configuration lists them)"
            )
        return model

    async def _load(self, model: ModelConfig) -> None:
        name = ModelName(model.name)
        self._loading = name
        self._failures.pop(name, None)
        try:
            await self._app.load_model(model)
        except PieError as error:
            self._failures[name] = error
            raise
        finally:
            self._loading = None

    def _described(self, name: ModelName) -> dict[str, Any]:
        model = self._app.models.get(name)
        described: dict[str, Any] = {"name": name, "state": self.state(name)}
        if model is not None:
            info = model.engine.info
            described |= {
                "driver": info.driver,
                "architecture": info.architecture,
                "vocab_size": info.vocab_size,
                "max_model_len": info.max_model_len,
                "replicas": self.replicas(name),
            }
        if name in self._failures:
            described["error"] = str(self._failures[name])
        return described

    def state(self, name: ModelName) -> ModelState:
        if name in self._app.models:
            return "loaded" if self._app.has_engine(name) else "restarting"
        return "loading" if name == self._loading else "failed" if name in self._failures else "unloaded"


async def _status_in_time(engine: EngineClient, patience_s: float, processes: bool) -> Status | None:
    asked = answer(engine, lambda request: ReadStatus(request=request, processes=processes))
    try:
        status = await asyncio.wait_for(asked, patience_s)
    except (PieError, TimeoutError):
        return None
    assert isinstance(status, Status)
    return status


def model_status(statuses: Mapping[ModelName, Iterable[Status | None]]) -> dict[str, int | float]:
    """Flat, replicas together, in the names that clients of Pie 0.4 ask for where it has one."""
    found: Counter[str] = Counter()
    for name, replicas in statuses.items():
        for status in replicas:
            if status is not None:
                found.update({f"{name}.{key}": value for key, value in _flat(status).items()})
    return dict(found)


def _flat(status: Status) -> dict[str, int | float]:
    total = sum(status.total_pages)
    return {
        "kv_pages_used": total - sum(status.free_pages),
        "kv_pages_total": total,
        "total_batches": status.steps,
        "total_tokens_processed": status.tokens,
        "contexts": status.contexts,
        "requests_waiting": status.waiting,
        "requests_running": status.running,
        "busy_s": status.busy_s,
        **{name: getattr(status, name) for name in _ADDED},
    }
