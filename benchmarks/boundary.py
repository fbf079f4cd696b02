"""What a Python program pays to call its host: passes, scalar calls, and bytes in both directions, on a whole pie.

    python -m benchmarks.boundary [--rounds 5] [--quick] [--json FILE]

Each program does one thing n times; a run without it is taken off, and the lowest of the rounds counts. So a figure
holds both sides: the guest's interpreter, the boundary, and for passes the engine, but not the driver. Times are CPU
time of the event loop's thread, where all of that runs. `benchmarks.host_calls` measures the boundary alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pie_in_process import WatchedApplication, dummy
from pie_core.programs import PythonProgram
from pie_core.testing.recording_client import RecordingClient

SIZES = {"1 kB": 1_000, "100 kB": 100_000, "1 MB": 1_000_000}

SOURCE = """
from inferlet import Context, Model, Sampler, session

async def main(input):
    context = Context(Model.load()).append([1])
    await context.flush()
    content = bytes(input["size"])
    sampler = Sampler.argmax()
    generation = context.generate(sampler, stop=[], auto_flush=False, max_tokens=input["count"] or None)
    context.append([1])
    for _ in range(input["count"]):
        {body}
"""


@dataclass(frozen=True, slots=True)
class Case:
    """What is done, and how often in one run."""

    label: str
    body: str
    count: int
    size: int = 0
    sends_files: bool = False


def cases() -> list[Case]:
    listed = [
        Case("scalar call (context.page_size), us", "context.page_size", 2000),
        Case("step of a generation (one call), us", "await (await anext(generation)).execute()", 400),
        Case(
            "pass described in calls (input, sample, execute), us",
            "await _pass(context.forward(), sampler)",
            400,
        ),
    ]
    for label, size in SIZES.items():
        count = max(4, min(400, 4_000_000 // size))
        listed.append(
            Case(f"{label} guest to host (session.send_file), us", "session.send_file(content)", count, size)
        )
        listed.append(
            Case(
                f"{label} host to guest (session.receive_file), us",
                "await session.receive_file()",
                count,
                size,
                True,
            )
        )
    return listed


def _program(case: Case) -> PythonProgram:
    source = textwrap.dedent(SOURCE).replace("{body}", case.body) + PASS
    return PythonProgram("boundary", (("main.py", source),), "main.py")


PASS = """
async def _pass(forward, sampler):
    forward.input([1])
    forward.sample([0], sampler)
    await forward.execute()
"""


async def measure(arguments: argparse.Namespace) -> dict[str, float]:
    rows = {}
    app = WatchedApplication(dummy(), lambda _: None)
    async with app:
        for case in cases():
            count = max(1, case.count // arguments.divisor)
            empty, full = [], []
            for _ in range(arguments.rounds):
                empty.append(await _cpu_s(app, case, 0))
                full.append(await _cpu_s(app, case, count))
            rows[case.label] = 1e6 * (min(full) - min(empty)) / count
    return rows


async def _cpu_s(app: WatchedApplication, case: Case, count: int) -> float:
    state = app.new_process("benchmark", RecordingClient())
    for _ in range(count if case.sends_files else 0):
        state.files.put(bytes(case.size))
    begin, driver = time.thread_time(), app.watched.submit_cpu_s
    await app.run(_program(case), {"count": count, "size": case.size}, state)
    return time.thread_time() - begin - (app.watched.submit_cpu_s - driver)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.boundary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of few calls, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parsed = parser.parse_args(arguments)
    parsed.divisor = 1
    if parsed.quick:
        parsed.rounds, parsed.divisor = 1, 100
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = _parse(arguments)
    rows = asyncio.run(measure(parsed))
    for label, value in rows.items():
        print(f"{label:<64} {value:>12.1f}")
    if parsed.json:
        parsed.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
