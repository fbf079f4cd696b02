"""What the engine and its guests cost beside the driver, and how busy they keep it.

    python -m benchmarks.engine [--quick] [--json FILE]

The dummy driver pretends steps of a given length. Two kinds of guests decode greedily side by side: Python programs
whose loop runs in the engine, and WebAssembly guests that step by themselves, a host call for every token. Host work is
CPU time of the event loop's thread, without what the dummy needs to invent its tokens; utilisation is the driver's busy
time over wall time while all guests decode.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.host_calls import step_guest
from benchmarks.pie_in_process import Step, WatchedApplication, quiet, run_all
from pie_core.config import parse_config
from pie_core.programs import ComponentProgram, ProgramSource, PythonProgram

# Starting takes a Python program some milliseconds, so all wait for the last one.
OFFLOADED = """
import asyncio
from inferlet import Context, Model, Sampler

async def main(input):
    ctx = Context(Model.load()).append([1, 2, 3])
    await asyncio.sleep(input["start_s"])
    await ctx.generate(Sampler.argmax(), max_tokens=input["tokens"], auto_flush=False, stop=[]).collect_tokens()
"""
START_S = 0.02  # for each guest
WARM_UP = 8  # steps of all guests that do not count


@dataclass(frozen=True, slots=True)
class Cell:
    guests_of: str
    step_ms: float
    guests: int
    depth: int
    steps: int  # in which all guests took part
    utilisation: float
    host_us: float  # a step
    dummy_us: float  # what the dummy needs to invent the tokens of a step
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Host work of a step as a + b * guests, in microseconds."""

    guests_of: str
    a_us: float
    b_us: float


def main() -> None:
    arguments = _parse()
    step_times = (2.0, 5.0) if arguments.quick else (1.0, 2.0, 5.0, 10.0)
    guests = (1, 8, 32, 64) if arguments.quick else (1, 8, 32, 64, 128, 256, 512, 1000)
    tokens = 60 if arguments.quick else 120
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        sources = _sources(Path(folder), tokens)
        for step_ms in step_times:
            cells += asyncio.run(_measure(sources, step_ms, guests, tokens, arguments.depth))
    fits = [_fit(kind, cells) for kind in sources]
    for fit in fits:
        print(f"{fit.guests_of:10} host work of a step: {fit.a_us:.0f} us + {fit.b_us:.1f} us a guest")
    if arguments.json:
        report = {"cells": [asdict(each) for each in cells], "fits": [asdict(each) for each in fits]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small grid, about a minute")
    parser.add_argument("--depth", type=int, default=1, help="speculation depth")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def _sources(folder: Path, tokens: int) -> dict[str, ProgramSource]:
    component = folder / "step.wasm"
    component.write_bytes(step_guest(tokens))
    return {
        "offloaded": PythonProgram("offloaded", (("main.py", OFFLOADED),), "main.py"),
        "stepping": ComponentProgram("stepping", component),
    }


async def _measure(
    sources: dict[str, ProgramSource], step_ms: float, grid: Sequence[int], tokens: int, depth: int
) -> list[Cell]:
    options = f"step_ms: {step_ms}, num_pages: 32768, max_batch_requests: 1024"
    config = parse_config(
        f"models: [{{name: dummy, driver: {{type: dummy, options: {{{options}}}}}, "
        f"scheduler: {{speculation_depth: {depth}, max_batch_requests: 1024}}}}]",
        "benchmark",
        Path(),
    )
    cells = []
    async with WatchedApplication(config, quiet) as app:
        for kind, source in sources.items():
            await run_all(app, source, [{"tokens": tokens, "start_s": 0}])
            for guests in grid:
                cells.append(await _cell(app, kind, source, step_ms, guests, tokens, depth))
                _tell(cells[-1])
    return cells


async def _cell(
    app: WatchedApplication,
    kind: str,
    source: ProgramSource,
    step_ms: float,
    guests: int,
    tokens: int,
    depth: int,
) -> Cell:
    app.watched.take_steps()
    app.watched.submit_cpu_s = 0.0
    await run_all(app, source, [{"tokens": tokens, "start_s": START_S * guests}] * guests)
    steps = app.watched.take_steps()
    full = [step for step in steps if step.requests == guests][WARM_UP:-1]
    if len(full) < WARM_UP:
        raise SystemExit(
            f"{guests} guests of kind {kind!r} shared {len(full)} steps only: the machine is too busy"
        )
    span = full[-1].collected_at - full[0].collected_at
    host = full[-1].submitting_cpu_s - full[0].submitting_cpu_s
    dummy_s = app.watched.submit_cpu_s / len(steps)
    return Cell(
        guests_of=kind,
        step_ms=step_ms,
        guests=guests,
        depth=depth,
        steps=len(full),
        utilisation=_busy_s(full) / span,
        host_us=1e6 * (host / (len(full) - 1) - dummy_s),
        dummy_us=1e6 * dummy_s,
        tokens_per_s=guests * (len(full) - 1) / span,
    )


def _busy_s(steps: Sequence[Step]) -> float:
    return sum(step.busy_s for step in steps[1:])


def _fit(kind: str, cells: Sequence[Cell]) -> Fit:
    mine = [cell for cell in cells if cell.guests_of == kind]
    b, a = np.polyfit([cell.guests for cell in mine], [cell.host_us for cell in mine], 1)
    return Fit(kind, float(a), float(b))


def _tell(cell: Cell) -> None:
    print(
        f"{cell.guests_of:10} {cell.step_ms:5.1f} ms {cell.guests:5} guests: driver busy {cell.utilisation:6.1%}, "
        f"host {cell.host_us:7.0f} us a step (dummy {cell.dummy_us:.0f}), {cell.tokens_per_s:8.0f} tok/s",
        flush=True,
    )


if __name__ == "__main__":
    main()
