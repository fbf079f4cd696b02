"""How a server does, as types: what `read_status` answers, `pie top` shows and /metrics counts."""

from __future__ import annotations

from typing import Literal

import msgspec

from pie_core.engine.histograms import Distribution
from pie_core.engine.messages import Status

ReplicaCondition = Literal["ready", "restarting"]
ModelState = Literal["unloaded", "loading", "loaded", "restarting", "failed"]


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON object. Counts grow from the start of what they count, and begin anew with an engine that is replaced."""


class GroupStatus(_Part, frozen=True, kw_only=True):
    """KV pages of one cache group; for recurrent states, slots."""

    name: str
    total: int
    used: int  # by contexts and snapshots
    cached: int  # only kept because somebody may ask for the same prefix; the rest is free
    swapped: int  # in host memory
    swap_total: int  # for which there is room in host memory; 0: nothing is swapped


class EngineStatus(_Part, frozen=True, kw_only=True):
    """What a model's engine has and has done."""

    contexts: int
    waiting: int  # passes and generations that are not in a batch
    running: int
    groups: list[GroupStatus]
    steps: int
    passes: int  # rows of batches: contexts that steps computed something for
    shared_rows: int  # KV rows that need not be read once more, because passes of a batch share them
    cohort_rows: int  # those that were computed as columns, without work for each
    tokens: int  # rows that steps computed
    sampled_tokens: int  # drawn by steps, guesses included
    schedule_s: float  # the host's time to choose and lay out steps
    driver_s: float  # the device's time to compute them
    deliver_s: float  # the host's time to record what they gave
    run_ahead_hits: int  # passes served from a guess
    run_ahead_misses: int  # passes that were not what was guessed
    run_ahead_drops: int  # guesses that were computed for nothing
    prefix_lookup_tokens: int  # rows of prompts that were looked for in the prefix cache
    prefix_hit_tokens: int  # ... and taken over instead of computed
    suspensions: int  # contexts that gave their pages up to others
    replayed_tokens: int  # rows of those whose way back was to compute them again
    swaps: int  # suspensions to host memory
    swap_failures: int  # ... that the driver refused
    swapped_out_bytes: int
    swapped_in_bytes: int
    failed_passes: int  # that the driver did not compute
    timeouts: int  # requests that took longer than they may
    batch_sizes: Distribution
    step_seconds: Distribution
    first_token_seconds: Distribution
    between_tokens_seconds: Distribution
    pass_wait_seconds: Distribution  # of programs that step by themselves, in one step of sixteen

    @classmethod
    def of(cls, status: Status) -> EngineStatus:
        same = {name: getattr(status, name) for name in cls.__struct_fields__ if name not in _DERIVED}
        swapping = status.swapping
        return cls(
            groups=_groups(status),
            driver_s=status.busy_s,
            swaps=swapping.suspensions,
            swap_failures=swapping.failures,
            swapped_out_bytes=swapping.bytes_out,
            swapped_in_bytes=swapping.bytes_in,
            **same,
        )


_DERIVED = ("groups", "driver_s", "swaps", "swap_failures", "swapped_out_bytes", "swapped_in_bytes")


def _groups(status: Status) -> list[GroupStatus]:
    nothing = [0] * len(status.groups)
    counts = zip(
        status.groups,
        status.total_pages,
        status.free_pages,
        status.cached_pages,
        status.swapping.pages or nothing,
        status.swapping.total_pages or nothing,
        strict=True,
    )
    return [
        GroupStatus(
            name=name, total=total, used=total - free, cached=cached, swapped=swapped, swap_total=swap_total
        )
        for name, total, free, cached, swapped, swap_total in counts
    ]


class ReplicaStatus(_Part, frozen=True, kw_only=True):
    """One engine of a model; `engine` is null while there is none, or it does not answer within a second."""

    state: ReplicaCondition
    restarts: int  # engines that were lost and replaced
    pid: int | None  # of its process, if it has one of its own
    cpu_s: float | None  # of that process
    resident_bytes: int | None
    engine: EngineStatus | None


class ModelStatus(_Part, frozen=True, kw_only=True):
    """One model of the configuration; it has replicas once it is loaded."""

    name: str
    state: ModelState
    error: str | None = None
    driver: str | None = None
    architecture: str | None = None
    load_s: float | None = None  # how long it took to load
    replicas: list[ReplicaStatus] = []


class WorkerStatus(_Part, frozen=True, kw_only=True):
    """A process that runs programs; without workers, that is the server itself. Its counts are null if it is busy."""

    pid: int
    processes: int
    resumes: int | None  # how often guests went on behind a wait
    host_calls: int | None  # how often they asked the host for something
    cpu_s: float | None
    resident_bytes: int | None


class ProcessStatus(_Part, frozen=True, kw_only=True):
    """A running program. `waits_for` says what holds it: the model, input or output of its client, or itself."""

    id: str
    username: str
    program: str
    elapsed_s: float
    waits_for: Literal["model", "input", "output", "itself"]
    attached: bool
    contexts: int
    pages: int
    open_requests: int
    tokens: int  # fed and drawn
    trace_id: str | None  # by which its spans and log lines are found


class PluginStatus(_Part, frozen=True, kw_only=True):
    """An installed plugin, and how long importing what it declares took."""

    name: str
    distribution: str
    version: str
    load_s: float


class ServerStatus(_Part, frozen=True, kw_only=True):
    """The whole server. `processes` are those of the user who asks, or everybody's."""

    version: str
    state: Literal["loading", "ready", "stopping"]
    uptime_s: float
    loop_lag_s: float  # how late the server's event loop was of late: its own sign of overload
    connections: int
    launched: int
    running: int
    ended: dict[str, int]  # by outcome: `returned`, or the code of an error
    worker_restarts: int
    models: list[ModelStatus]
    workers: list[WorkerStatus]
    plugins: list[PluginStatus]
    processes: list[ProcessStatus]


PARTS: tuple[type[msgspec.Struct], ...] = (
    ServerStatus,
    ModelStatus,
    ReplicaStatus,
    EngineStatus,
    GroupStatus,
    Distribution,
    WorkerStatus,
    ProcessStatus,
    PluginStatus,
)
