"""The grid: kinds of guests, how many of them, and how long a step takes; what the host does meanwhile.

Each cell is a crowd that decodes greedily side by side. Host work is CPU time of the event loop's thread for a step:
guests, host API, engine, without the driver. Over the cells of a kind it is fitted as a + b * guests. Where the step
takes at least 1.3 times that, the driver should hardly ever wait.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.engine.bare import bare_decode
from benchmarks.engine.command import Results, say
from benchmarks.engine.fit import Line, robust_line
from benchmarks.engine.frontier_plot import frontier_svg
from benchmarks.engine.guests import KINDS, Kind
from benchmarks.engine.stage import Crowd, Decode, configured, decode_of
from benchmarks.pie_in_process import WatchedApplication, quiet
from pie_core.processes.garbage import survivors_set_aside

STEP_TIMES_MS = (1.0, 2.0, 5.0, 10.0)
GUESTS = (1, 8, 32, 64, 128, 256, 512, 1000)
SLACK = 1.3  # a step this many times the host's work is expected to hide it
SHARE_EXPECTED = {
    "Python, offloaded": 0.99,
    "Python, code per token": None,
    "WAT, code per token": 0.97,
}
BARE = "bare loop"


@dataclass(frozen=True, slots=True)
class Size:
    step_times_ms: Sequence[float]
    guests: Sequence[int]
    tokens: int  # that each guest draws, at least

    def tokens_of(self, kind: Kind, step_ms: float) -> int:
        """More of short steps: one hiccup among fifty would weigh more than it does."""
        slow = kind.steps_itself and not kind.is_component
        return self.tokens if slow else max(self.tokens, round(5 * self.tokens / step_ms))

    @staticmethod
    def of(quick: bool) -> Size:
        return Size((2.0,), (1, 8, 32), 40) if quick else Size(STEP_TIMES_MS, GUESTS, 60)


@dataclass(frozen=True, slots=True)
class Cell:
    kind: str
    step_ms: float
    guests: int
    decode: Decode


@dataclass(frozen=True, slots=True)
class Verdict:
    """A cell against its kind's line."""

    hideable: bool  # the step is long enough for the host's work
    kept_busy: bool | None  # as busy as is expected of the kind; None: nothing is
    added_idle_us: float  # of the driver, p50, against the bare loop


async def measure(
    quick: bool, depth: int = 1, step_times_ms: Sequence[float] = (), kinds: Sequence[Kind] = KINDS
) -> Results:
    size = Size.of(quick)
    if step_times_ms:
        size = replace(size, step_times_ms=step_times_ms)
    cells: list[Cell] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        survivors_set_aside(),
    ):  # as `pie serve` does once it is ready
        for step_ms in size.step_times_ms:
            async with WatchedApplication(configured(step_ms=step_ms, depth=depth), quiet) as app:
                cells += bare_cells(app, step_ms, size)
                for kind in kinds:
                    cells += await crowds(app, kind, step_ms, size, Path(folder))
    return summary(cells, depth)


def bare_cells(app: WatchedApplication, step_ms: float, size: Size) -> list[Cell]:
    return [Cell(BARE, step_ms, guests, bare_decode(app, guests, size.tokens)) for guests in size.guests]


async def crowds(app: WatchedApplication, kind: Kind, step_ms: float, size: Size, folder: Path) -> list[Cell]:
    most = size.tokens_of(kind, step_ms)
    source = kind.program(folder, most)
    await Crowd(app, source, [{"tokens": most}]).run()  # compiled, and everything touched once
    cells = []
    for guests in size.guests:
        halved = guests > 128 and kind.steps_itself and not kind.is_component
        tokens = most // 2 if halved else most
        crowd = Crowd(app, source, [{"tokens": tokens}] * guests)
        await crowd.go_together(app)
        await crowd.end()
        cells.append(Cell(kind.name, step_ms, guests, decode_of(app, guests)))
        say(_line(cells[-1]))
    return cells


def _line(cell: Cell) -> str:
    got = cell.decode
    return (
        f"{cell.kind:24} {cell.step_ms:4.0f} ms {cell.guests:5} guests: driver busy {got.utilisation:6.1%}, "
        f"host {got.host_us:8.0f} us a step, idle p50 {got.idle_p50_us:7.0f} p99 {got.idle_p99_us:7.0f} us, "
        f"{got.tokens_per_s:9.0f} tok/s"
    )


# ---- what the cells say together


def fits(cells: Sequence[Cell]) -> dict[str, Line]:
    """Host work of a step by kind, in microseconds: a + b * guests."""
    return {
        kind.name: robust_line(
            [(each.guests, each.decode.host_us) for each in cells if each.kind == kind.name]
        )
        for kind in KINDS
        if any(each.kind == kind.name for each in cells)
    }


def verdict(cell: Cell, line: Line, bare: Decode) -> Verdict:
    hideable = cell.step_ms * 1e3 >= SLACK * line.at(cell.guests)
    expected = SHARE_EXPECTED[cell.kind]
    return Verdict(
        hideable=hideable,
        kept_busy=None if expected is None or not hideable else cell.decode.utilisation >= expected,
        added_idle_us=cell.decode.idle_p50_us - bare.idle_p50_us,
    )


def summary(cells: Sequence[Cell], depth: int) -> Results:
    lines = fits(cells)
    bare = {(each.step_ms, each.guests): each.decode for each in cells if each.kind == BARE}
    rows = [
        {
            **asdict(cell),
            **asdict(verdict(cell, lines[cell.kind], bare[cell.step_ms, cell.guests])),
        }
        for cell in cells
        if cell.kind != BARE
    ]
    for name, line in lines.items():
        say(f"{name:24} host work of a step: {line.a:.0f} us + {line.b:.2f} us a guest")
    return {
        "depth": depth,
        "fits_us": {name: asdict(line) for name, line in lines.items()},
        "cells": rows,
        "bare": [asdict(cell) for cell in cells if cell.kind == BARE],
    }


# ---- the frontier


def table(results: Results) -> Iterator[str]:
    """Markdown: how busy the driver is. **Bold**: the step is long enough, and yet it waited."""
    cells = results["cells"]
    counts = sorted({cell["guests"] for cell in cells})
    yield "| guests of | step | " + " | ".join(map(str, counts)) + " |"
    yield "|---|---|" + "---|" * len(counts)
    for kind in KINDS:
        mine = {(each["step_ms"], each["guests"]): each for each in cells if each["kind"] == kind.name}
        for step_ms in sorted({step_ms for step_ms, _ in mine}):
            shown = (_shown(mine[step_ms, count]) if (step_ms, count) in mine else "" for count in counts)
            yield f"| {kind.name} | {step_ms:g} ms | " + " | ".join(shown) + " |"


def _shown(cell: Results) -> str:
    share = f"{100 * cell['decode']['utilisation']:.1f}"
    if cell["kept_busy"] is False:
        return f"**{share}**"
    return share if cell["hideable"] else f"({share})"


def plot(results: Results) -> str:
    panels: dict[float, dict[str, list[tuple[int, float]]]] = {}
    for cell in results["cells"]:
        curves = panels.setdefault(cell["step_ms"], {})
        curves.setdefault(cell["kind"], []).append((cell["guests"], cell["decode"]["utilisation"]))
    return frontier_svg(panels)
