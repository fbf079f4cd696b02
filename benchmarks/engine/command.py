"""What the commands of these benchmarks share: `--quick`, `--json`, a line for each result."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]
Measure = Callable[[bool], Awaitable[Results]]


def run(name: str, about: str | None, measure: Measure, arguments: Sequence[str] | None = None) -> Results:
    """`measure(quick)` prints its own lines as they come; what it returns is what `--json` keeps."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.engine.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="less of everything, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    chosen = parser.parse_args(arguments)
    results = asyncio.run(_measured(measure, chosen.quick))
    write_json(chosen.json, results)
    return results


async def _measured(measure: Measure, quick: bool) -> Results:
    return await measure(quick)


def write_json(file: Path | None, results: Results) -> None:
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def say(line: str) -> None:
    print(line, flush=True)
