"""What a Python program from source costs on a whole pie: its launch, and the memory it holds while it waits.

    python -m benchmarks.launch [--launches 200] [--suspended 100 1000] [--quick] [--json FILE]

The first launch reads the generic Python guest from the cache of compiled programs; the others find it loaded. A launch
is everything from `Application.run` to its return for a program of one line. Suspended guests wait in
`session.receive`; their memory is what the process grew by, everything on the host's side included.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from benchmarks.pie_in_process import dummy, resident_bytes
from pie_core.app import Application
from pie_core.programs import PythonProgram
from pie_core.testing.recording_client import RecordingClient

EMPTY = PythonProgram("empty", (("main.py", "async def main(input):\n    return None\n"),), "main.py")
WAITING = PythonProgram(
    "waiting",
    (
        (
            "main.py",
            "from inferlet import session\nasync def main(input):\n    return await session.receive()\n",
        ),
    ),
    "main.py",
)


async def measure(arguments: argparse.Namespace) -> dict[str, float]:
    rows: dict[str, float] = {}
    async with Application(dummy(), lambda _: None) as app:
        await _launch(app)  # compiles the guest, where no cache holds it yet
    async with Application(dummy(), lambda _: None) as app:
        rows["first launch, the guest read from the cache, ms"] = 1e3 * (await _launch(app))[0]
        times = [await _launch(app) for _ in range(arguments.launches)]
        rows["launch, p50, ms"] = 1e3 * median(wall for wall, _ in times)
        rows["launch, p95, ms"] = 1e3 * quantiles([wall for wall, _ in times], n=20)[-1]
        rows["launch, p50, CPU ms of the event loop's thread"] = 1e3 * median(cpu for _, cpu in times)
        begin = time.perf_counter()
        await asyncio.gather(*(_launch(app) for _ in range(100)))
        rows["100 launched at once, ms each"] = 1e3 * (time.perf_counter() - begin) / 100
    for count in arguments.suspended:
        rows[f"memory of each of {count} suspended guests, MB"] = await _memory(count) / 1e6
    return rows


async def _launch(app: Application) -> tuple[float, float]:
    begin, cpu = time.perf_counter(), time.thread_time()
    await app.run(EMPTY, {}, app.new_process("benchmark", RecordingClient()))
    return time.perf_counter() - begin, time.thread_time() - cpu


async def _memory(count: int) -> float:
    """Bytes for each guest, in an application of its own."""
    async with Application(dummy(), lambda _: None) as app:
        await _launch(app)
        gc.collect()
        before = resident_bytes()
        states = [app.new_process("benchmark", RecordingClient()) for _ in range(count)]
        tasks = [asyncio.create_task(app.run(WAITING, {}, state)) for state in states]
        for state in states:
            await state.messages.wanted()
        grown = resident_bytes() - before
        for state in states:
            state.close_input()
        await asyncio.gather(*tasks)
    return grown / count


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--launches", type=int, default=200)
    parser.add_argument("--suspended", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--quick", action="store_true", help="few of each, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parsed = parser.parse_args(arguments)
    if parsed.quick:
        parsed.launches, parsed.suspended = 5, [5]
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = _parse(arguments)
    rows = asyncio.run(measure(parsed))
    for label, value in rows.items():
        print(f"{label:<64} {value:>10.2f}")
    if parsed.json:
        parsed.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
