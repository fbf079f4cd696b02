"""What the engine and its guests cost beside the driver, and how busy they keep it: the whole grid.

    python -m benchmarks.engine [--quick] [--all] [--json FILE] [--plot docs/frontier.svg] [--page docs/benchmarks.md]
    python -m benchmarks.engine --again FILE --plot …     (from figures that were kept)

The scenarios have commands of their own; `--all` runs them, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.engine import (
    agent_session,
    evictions,
    forks,
    grid,
    latencies,
    oversubscription,
    pauses,
    report,
    resume,
    waiting,
    workers,
)
from benchmarks.engine.command import Results, say, write_json
from benchmarks.engine.guests import KINDS

SCENARIOS = {
    "forks": forks.measure,
    "pauses": pauses.measure,
    "resume": resume.measure,
    "waiting": waiting.measure,
    "latencies": latencies.measure,
    "oversubscription": oversubscription.measure,
    "evictions": evictions.measure,
    "agent_session": agent_session.measure,
    "workers": workers.measure,
}


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = _parse(arguments)
    results = json.loads(chosen.again.read_text(encoding="utf-8")) if chosen.again else _measured(chosen)
    if chosen.beside is not None:
        results["beside"] = json.loads(chosen.beside.read_text(encoding="utf-8"))["grid"]
    say("\n".join([*report.goals_table(results), "", *grid.table(results["grid"])]))
    if chosen.plot is not None:
        chosen.plot.write_text(grid.plot(results["grid"]), encoding="utf-8")
    if chosen.page is not None:
        report.write_section(chosen.page, results)


def _measured(chosen: argparse.Namespace) -> Results:
    kinds = [kind for kind in KINDS if kind.is_component or not chosen.components]
    measured = grid.measure(chosen.quick, chosen.depth, chosen.step_ms, kinds)
    results: Results = {"grid": asyncio.run(measured)}
    write_json(chosen.json, results)
    for name, measure in SCENARIOS.items() if chosen.all else ():
        say(f"\n{name}")
        results[name] = asyncio.run(measure(chosen.quick))
        write_json(chosen.json, results)
    return results


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small grid, to see that it runs")
    parser.add_argument("--depth", type=int, default=1, help="speculation depth")
    parser.add_argument("--all", action="store_true", help="the scenarios, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw the frontier, as SVG")
    parser.add_argument(
        "--again", type=Path, metavar="FILE", help="figures of an earlier run, to show or draw"
    )
    parser.add_argument(
        "--step-ms", type=float, nargs="+", default=(), help="step times; 1, 2, 5 and 10 if none"
    )
    parser.add_argument("--components", action="store_true", help="no Python guests")
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="FILE",
        help="figures of components with quick_calls built, to be shown, too",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="whose section of figures to replace")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
