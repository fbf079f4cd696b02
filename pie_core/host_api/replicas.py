"""The engines of one model: a program stays at the one that was chosen for it, snapshots are found wherever they are.

Of two snapshots of one name, saved at two engines, the newer one is meant.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TypeVar

from pie_core.engine.messages import (
    Command,
    DeleteSnapshot,
    EndProcess,
    Event,
    ListSnapshots,
    SnapshotNames,
)
from pie_core.errors import NotFound, PieError
from pie_core.host_api.engine_client import EngineClient
from pie_core.ids import ProcessId, RequestId, Tenant
from pie_core.sandbox.hosting import Pending

T = TypeVar("T")


class Replicas:
    """As one process sees them. `turn` is where it begins among equals, so that not all begin at the first."""

    def __init__(self, engines: Sequence[EngineClient], turn: int = 0) -> None:
        self.engines = tuple(engines)
        self._turn = turn
        self._bound: dict[ProcessId, EngineClient] = {}
        self._programs: Counter[EngineClient] = Counter()

    # ---- programs

    def of(self, process: ProcessId) -> EngineClient:
        """Where new contexts of a program go: chosen by load at its first, and anew when that engine is lost."""
        bound = self._bound.get(process)
        if bound is None or not bound.is_ready:
            self._unbind(process)
            bound = self._bound[process] = self._least_loaded()
            self._programs[bound] += 1
        return bound

    def end(self, process: ProcessId) -> None:
        self._unbind(process)
        for engine in self.engines:
            engine.send(EndProcess(process))

    def _unbind(self, process: ProcessId) -> None:
        bound = self._bound.pop(process, None)
        if bound is not None:
            self._programs[bound] -= 1

    def _least_loaded(self) -> EngineClient:
        usable = tuple(engine for engine in self.engines if engine.is_ready) or self.engines
        first = self._turn % len(usable)
        self._turn += 1
        return min(usable[first:] + usable[:first], key=self._load)

    def _load(self, engine: EngineClient) -> int:
        return self._programs[engine] + engine.open_requests

    # ---- snapshots

    async def find(self, tenant: Tenant, name: str) -> EngineClient:
        """The one with the newest snapshot of this name. Raises NotFound when none has it."""
        return max((await self._saved_at(tenant, name)).items(), key=lambda each: each[1])[0]

    async def delete(self, tenant: Tenant, name: str) -> None:
        """Wherever it is. Raises NotFound when it is nowhere."""
        holders = await self._saved_at(tenant, name)
        await asyncio.gather(*(delete_snapshot(engine, tenant, name) for engine in holders))

    async def forget_older(self, newest: EngineClient, tenant: Tenant, name: str, moment: float) -> None:
        """One was saved at this engine after `moment`: others of the name are of the past."""
        others = (engine for engine in self.engines if engine is not newest)
        deleting = (delete_snapshot(engine, tenant, name, moment) for engine in others)
        await asyncio.gather(
            *deleting, return_exceptions=True
        )  # there, or not there, or lost with its engine

    async def _saved_at(self, tenant: Tenant, name: str) -> dict[EngineClient, float]:
        """Who has the snapshot, and since when."""
        listings = await asyncio.gather(*(_names(engine, tenant) for engine in self.engines))
        found = {
            engine: listed.saved_at[listed.names.index(name)]
            for engine, listed in zip(self.engines, listings, strict=True)
            if listed is not None and name in listed.names
        }
        if not found:
            raise _not_found(tenant, name, listings)
        return found


async def _names(engine: EngineClient, tenant: Tenant) -> SnapshotNames | None:
    """None: the engine is lost."""
    try:
        listed = await answer(engine, lambda request: ListSnapshots(request=request, tenant=tenant))
    except PieError:
        return None
    assert isinstance(listed, SnapshotNames)
    return listed


async def delete_snapshot(
    engine: EngineClient, tenant: Tenant, name: str, saved_before: float | None = None
) -> None:
    await answer(engine, lambda request: DeleteSnapshot(request, tenant, name, saved_before))


def _not_found(tenant: Tenant, name: str, listings: Sequence[SnapshotNames | None]) -> NotFound:
    known = sorted({each for listed in listings if listed is not None for each in listed.names})
    listed = ", ".join(map(repr, known[:10])) or "none"
    lost = listings.count(None)
    told = f" ({lost} of {len(listings)} engines of the model cannot be asked)" if lost else ""
    return NotFound(f"no snapshot {name!r} of tenant {tenant!r}; there are: {listed}{told}")


def now() -> float:
    """Seconds since 1970, as snapshots carry them."""
    return time.time()


async def answer(engine: EngineClient, build: Callable[[RequestId], Command]) -> Event:
    """The final event of a request. Raises what it fails with."""
    return await awaited(engine.request(build, lambda event: event))


async def awaited(pending: Pending[T]) -> T:
    """Waits for a Pending in a coroutine; cancelling that abandons it."""
    done = asyncio.Event()
    pending.on_done(done.set)
    try:
        await done.wait()
    except asyncio.CancelledError:
        pending.abandon()
        raise
    return pending.result()


def pending_of(work: Coroutine[None, None, T]) -> Pending[T]:
    """A coroutine that a guest waits for; abandoning it cancels it."""
    task = asyncio.get_running_loop().create_task(work)
    pending: Pending[T] = Pending(partial(_cancel, task))

    def settle(ended: asyncio.Task[T]) -> None:
        if ended.cancelled():
            return
        error = ended.exception()
        if error is not None:
            pending.fail(error)
        else:
            pending.resolve(ended.result())

    task.add_done_callback(settle)
    return pending


def _cancel(task: asyncio.Task[T]) -> None:
    task.cancel()
