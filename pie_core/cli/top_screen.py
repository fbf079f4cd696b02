"""What `pie top` shows: a status and the one before as lines that fit a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from pie_core.cli.top_rates import EngineRates, engine_before, engine_rates, groups, seconds_between
from pie_core.cli.top_rates import Group as ProgramGroup
from pie_core.engine.histograms import Distribution
from pie_core.server.status import EngineStatus, GroupStatus, ModelStatus, ServerStatus

_BAR = 20  # characters
_STATES = {"ready": "green", "loading": "yellow", "stopping": "red", "loaded": "green", "failed": "red"}
_MIB = 1 << 20
_DAY_S = 86400


class Screen:
    """A rich renderable: as many rows of processes as there is room for."""

    def __init__(self, now: ServerStatus, before: ServerStatus | None, address: str, each: bool) -> None:
        self._now = now
        self._before = before
        self._address = address
        self._each = each

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head = [*self._server(), *self._models()]
        for line in head:
            line.no_wrap, line.overflow = True, "ellipsis"
        yield from head
        height = options.height or console.size.height
        yield self._processes(options.max_width, max(height - len(head) - 3, 1))

    # ---- the server

    def _server(self) -> Iterator[Text]:
        now = self._now
        yield Text.assemble(
            ("pie", "bold"),
            f" {now.version} at {self._address}  ",
            (now.state, _STATES[now.state]),
            f"  up {_duration(now.uptime_s)}  {now.connections} clients  lag {now.loop_lag_s * 1000:.0f} ms",
        )
        ended = sum(now.ended.values())
        bad = {outcome: count for outcome, count in now.ended.items() if outcome != "returned"}
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(bad.items(), key=lambda e: -e[1]))
        yield Text(
            f"processes {now.running} running, {now.launched} launched, {ended} ended"
            f"{f' ({told})' if told else ''}"
        )
        yield self._workers()

    def _workers(self) -> Text:
        workers = "  ".join(
            f"{each.processes} in {each.pid} ({_size(each.resident_bytes)})" for each in self._now.workers
        )
        lost = f", {self._now.worker_restarts} replaced" if self._now.worker_restarts else ""
        return Text(f"workers   {len(self._now.workers)}{lost}: {workers}")

    # ---- models

    def _models(self) -> Iterator[Text]:
        seconds = seconds_between(self._now, self._before)
        for model in self._now.models:
            yield Text("")
            yield _heading(model)
            for place, replica in enumerate(model.replicas):
                if replica.engine is None:
                    yield Text(f"  replica {place} does not answer", style="red")
                    continue
                before = engine_before(self._before, model.name, place)
                label = f"  replica {place}" if len(model.replicas) > 1 else ""
                yield from _engine(label, replica.engine, engine_rates(replica.engine, before, seconds))

    # ---- processes

    def _processes(self, width: int, room: int) -> Group:
        found = groups(self._now, self._before, self._each)
        wide = width >= 100
        table = Table(box=None, pad_edge=False, expand=True, header_style="bold")
        table.add_column("PROGRAM", no_wrap=True, overflow="ellipsis", ratio=2)
        table.add_column("USER", no_wrap=True, overflow="ellipsis", ratio=1)
        for name in ("N", "WAITS FOR", *(("AGE", "CONTEXTS", "PAGES", "TOKENS") if wide else ()), "TOK/S"):
            table.add_column(name, no_wrap=True, justify="left" if name == "WAITS FOR" else "right")
        for group in found[:room]:
            table.add_row(*_row(group, wide))
        left = len(found) - room
        return Group(Text(""), table, *([Text(f"… and {left} rows more", style="dim")] if left > 0 else []))


def _heading(model: ModelStatus) -> Text:
    restarts = sum(replica.restarts for replica in model.replicas)
    facts = [model.driver or "", model.architecture or ""]
    if model.load_s is not None:
        facts.append(f"loaded in {model.load_s:.1f} s")
    if restarts:
        facts.append(f"{restarts} restarts")
    if model.error:
        facts.append(model.error)
    return Text.assemble(
        (model.name, "bold"),
        "  ",
        (model.state, _STATES.get(model.state, "yellow")),
        f"  {'  '.join(filter(None, facts))}",
    )


def _engine(label: str, engine: EngineStatus, rates: EngineRates) -> Iterator[Text]:
    if label:
        yield Text(label)
    if not (rates.steps_s or engine.contexts or engine.waiting):
        yield Text("  idle", style="dim")
        return
    yield Text(
        f"  queue     {engine.waiting} waiting, {engine.running} in batches, {engine.contexts} contexts"
    )
    yield Text(
        f"  steps     {rates.steps_s:.1f}/s of {rates.batch:.1f}   "
        f"{rates.tokens_s:.0f} tokens/s, {rates.drawn_s:.0f} drawn/s"
    )
    yield Text.assemble(
        f"  a step    {rates.schedule_ms:.2f} + {rates.driver_ms:.2f} + {rates.deliver_ms:.2f} ms"
        " schedule, driver, deliver   ",
        (f"{rates.busy:.0%} busy", "green" if rates.busy > 0.9 else ""),
    )
    yield Text(
        f"  tokens    first {_spread(rates.first_token)}   between {_spread(rates.between_tokens)}  (p50, p99)"
    )
    for group in engine.groups:
        yield _bar(group)
    yield Text(
        f"  hits      prefix {_percent(rates.prefix_hits)}   run-ahead {_percent(rates.ahead_hits)}   "
        f"{engine.suspensions} suspended, {engine.swaps} swapped, {engine.failed_passes} failed"
    )


def _bar(group: GroupStatus) -> Text:
    used, cached = (
        round(_BAR * count / group.total) if group.total else 0 for count in (group.used, group.cached)
    )
    cached = min(cached, _BAR - used)
    swapped = f", {group.swapped} swapped" if group.swapped else ""
    return Text.assemble(
        "  kv        ",
        ("█" * used, "red" if group.used > 0.95 * group.total else "cyan"),
        ("▒" * cached, "blue"),
        ("·" * (_BAR - used - cached), "dim"),
        f" {group.name} {group.used} used, {group.cached} cached of {group.total}{swapped}",
    )


def _row(group: ProgramGroup, wide: bool) -> list[str]:
    waits = ", ".join(
        state if group.count == 1 else f"{count} {state}" for state, count in group.waits_for.items() if count
    )
    more = [_duration(group.elapsed_s), str(group.contexts), str(group.pages), str(group.tokens)]
    return [
        group.label,
        group.username,
        str(group.count),
        waits,
        *(more if wide else []),
        f"{group.tokens_s:.0f}",
    ]


def _spread(times: Distribution) -> str:
    middle, late = times.quantile(0.5), times.quantile(0.99)
    return "-" if middle is None or late is None else f"{_milliseconds(middle)}, {_milliseconds(late)}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _size(resident: int | None) -> str:
    return "?" if resident is None else f"{resident / _MIB:.0f} MiB"


def _duration(seconds: float) -> str:
    days, rest = divmod(int(seconds), _DAY_S)
    minutes, second = divmod(rest, 60)
    hours, minute = divmod(minutes, 60)
    clock = f"{hours}:{minute:02}:{second:02}" if hours or days else f"{minute}:{second:02}"
    return f"{days}d {clock}" if days else clock
