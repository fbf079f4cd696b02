"""What happened between two looks at a server: rates, shares and means, of engines and of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pie_core.engine.histograms import Distribution
from pie_core.server.status import EngineStatus, ProcessStatus, ServerStatus


@dataclass(frozen=True, slots=True)
class EngineRates:
    """Of one engine; a share is None where there was nothing to share."""

    steps_s: float
    tokens_s: float
    drawn_s: float
    batch: float  # mean passes of a step
    busy: float  # the device's share of the time
    schedule_ms: float  # of a step, as the next two
    driver_ms: float
    deliver_ms: float
    prefix_hits: float | None
    ahead_hits: float | None
    first_token: Distribution
    between_tokens: Distribution


@dataclass(frozen=True, slots=True)
class Group:
    """Processes that are shown in one row."""

    label: str
    username: str
    count: int
    waits_for: dict[str, int]
    elapsed_s: float  # of the oldest
    contexts: int
    pages: int
    tokens: int
    tokens_s: float


def engine_rates(now: EngineStatus, before: EngineStatus | None, seconds: float) -> EngineRates:
    """Without a look before, or after the engine was replaced: since it began."""
    if before is None or before.steps > now.steps:
        before = None

    def grown(name: str) -> float:
        return float(getattr(now, name)) - (0.0 if before is None else float(getattr(before, name)))

    steps = grown("steps")
    hits, misses = grown("run_ahead_hits"), grown("run_ahead_misses")
    per_step = 1000 / steps if steps else 0.0
    nothing = Distribution()
    return EngineRates(
        steps_s=steps / seconds,
        tokens_s=grown("tokens") / seconds,
        drawn_s=grown("sampled_tokens") / seconds,
        batch=grown("passes") / steps if steps else 0.0,
        busy=min(grown("driver_s") / seconds, 1.0),
        schedule_ms=grown("schedule_s") * per_step,
        driver_ms=grown("driver_s") * per_step,
        deliver_ms=grown("deliver_s") * per_step,
        prefix_hits=_share(grown("prefix_hit_tokens"), grown("prefix_lookup_tokens")),
        ahead_hits=_share(hits, hits + misses),
        first_token=now.first_token_seconds.since(before.first_token_seconds if before else nothing),
        between_tokens=now.between_tokens_seconds.since(before.between_tokens_seconds if before else nothing),
    )


def seconds_between(now: ServerStatus, before: ServerStatus | None) -> float:
    """Since the start without a look before."""
    passed = now.uptime_s - (before.uptime_s if before is not None else 0.0)
    return passed if passed > 0 else now.uptime_s  # the server was started anew


def engine_before(before: ServerStatus | None, model: str, place: int) -> EngineStatus | None:
    """The same engine in the look before."""
    found = [each for each in before.models if each.name == model] if before is not None else []
    replicas = found[0].replicas if found else []
    return replicas[place].engine if place < len(replicas) else None


def groups(now: ServerStatus, before: ServerStatus | None, each: bool) -> list[Group]:
    """Processes by program and user, or each alone; those that compute most come first."""
    seconds = seconds_between(now, before)
    known = {process.id: process.tokens for process in before.processes} if before is not None else {}
    rows: dict[tuple[str, str], list[ProcessStatus]] = {}
    for process in now.processes:
        label = f"{process.program} {process.id}" if each else process.program
        rows.setdefault((label, process.username), []).append(process)
    found = [_group(label, user, members, known, seconds) for (label, user), members in rows.items()]
    return sorted(found, key=lambda group: (-group.tokens_s, -group.count, group.label))


def _group(
    label: str, username: str, members: Sequence[ProcessStatus], known: dict[str, int], seconds: float
) -> Group:
    waits = [each.waits_for for each in members]
    grown = sum(max(each.tokens - known.get(each.id, 0), 0) for each in members)
    return Group(
        label=label,
        username=username,
        count=len(members),
        waits_for={state: waits.count(state) for state in ("model", "itself", "input", "output")},
        elapsed_s=max(each.elapsed_s for each in members),
        contexts=sum(each.contexts for each in members),
        pages=sum(each.pages for each in members),
        tokens=sum(each.tokens for each in members),
        tokens_s=grown / seconds,
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
