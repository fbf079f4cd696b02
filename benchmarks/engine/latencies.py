"""How long it takes to fork, to save and to open a context, and to launch a program beside a thousand others.

    python -m benchmarks.engine.latencies [--quick] [--json FILE]

Forks and snapshots: CPU time of the engine for contexts of 16, 1,000 and 16,000 rows, and of a thousand forks of one.
Launch: from `Application.run` to its return for a program of one line, with nobody and with 1,000 guests beside it that
wait. Memory: what the process grew by for each waiting guest, the host's side included.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

from benchmarks.engine.command import Results, run, say
from benchmarks.engine.direct import PROCESS, TENANT, DirectEngine
from benchmarks.engine.guests import component, python, waiting
from benchmarks.engine.stage import configured
from benchmarks.engine.waiting import WAITING, waiting_guests
from benchmarks.pie_in_process import WatchedApplication, quiet, resident_bytes
from pie_core.engine.messages import DropContext, OpenSnapshot, SaveSnapshot
from pie_core.engine.options import EngineOptions
from pie_core.ids import ContextId, RequestId
from pie_core.programs import ProgramSource
from pie_core.testing.recording_client import RecordingClient

EMPTY = "async def main(input):\n    return None\n"


async def measure(quick: bool) -> Results:
    return {
        "memory": await memory(10 if quick else 1000),
        "contexts": [
            of_contexts(rows, 20 if quick else 200) for rows in ((16, 1000) if quick else (16, 1000, 16000))
        ],
        "many_forks": many_forks(10 if quick else 1000),
        "launch": await launches(10 if quick else 1000, 10 if quick else 50),
    }


# ---- contexts


def of_contexts(rows: int, times: int) -> Results:
    """Microseconds, p50."""
    direct = DirectEngine(EngineOptions(speculation_depth=0, max_batch_tokens=8192), num_pages=8192)
    parent = direct.create()
    direct.run(direct.forward(parent, tuple(row % 500 for row in range(rows)), sampled=False))

    def fork() -> None:
        drop(direct, direct.fork(parent))

    def save() -> None:
        direct.run(SaveSnapshot(RequestId(direct.number()), parent, "s", b""))

    def open_() -> None:
        context = ContextId(direct.number())
        direct.run(OpenSnapshot(RequestId(direct.number()), context, PROCESS, TENANT, "s", take=False))
        drop(direct, context)

    def step_of_a_fork() -> None:
        child = direct.fork(parent)
        direct.run(direct.forward(child, (1,)))
        drop(direct, child)

    actions = {"fork": fork, "save": save, "open": open_, "fork and one step": step_of_a_fork}
    found = {name: _p50_us(action, times) for name, action in actions.items()}
    say(f"context of {rows:6} rows: " + ", ".join(f"{name} {took:.0f} us" for name, took in found.items()))
    return {"rows": rows, "p50_us": found}


def drop(direct: DirectEngine, context: ContextId) -> None:
    direct.engine.handle([DropContext(context)])


def _p50_us(action: Callable[[], None], times: int) -> float:
    took = []
    for _ in range(times):
        begin = time.thread_time()
        action()
        took.append(time.thread_time() - begin)
    return 1e6 * median(took)


def many_forks(count: int) -> Results:
    direct = DirectEngine(
        EngineOptions(speculation_depth=0, max_batch_tokens=8192, max_batch_requests=1024), num_pages=8192
    )
    parent = direct.create()
    direct.run(direct.forward(parent, tuple(row % 500 for row in range(1000)), sampled=False))
    begin = time.thread_time()
    children = [direct.fork(parent) for _ in range(count)]
    forked = time.thread_time()
    direct.run(*(direct.forward(child, (1,)) for child in children))
    stepped = time.thread_time()
    row = {"forks": count, "forking_ms": 1e3 * (forked - begin), "first_step_ms": 1e3 * (stepped - forked)}
    say(
        f"{count} forks of 1,000 rows: {row['forking_ms']:.1f} ms, their first step {row['first_step_ms']:.1f} ms"
    )
    return row


# ---- programs


async def launches(others: int, times: int) -> list[Results]:
    rows = []
    async with WatchedApplication(configured(step_ms=0), quiet) as app:
        empty = python("empty", EMPTY)
        await _launch(app, empty)
        for count in (0, others):
            async with waiting_guests(app, python("waiting", WAITING), count):
                times_s = [await _launch(app, empty) for _ in range(times)]
            rows.append(_launch_row(count, times_s))
    return rows


def _launch_row(count: int, times_s: list[tuple[float, float]]) -> Results:
    wall, cpu = ([1e3 * each[side] for each in times_s] for side in (0, 1))
    row = {
        "others": count,
        "p50_ms": median(wall),
        "p95_ms": quantiles(wall, n=20)[-1],
        "cpu_p50_ms": median(cpu),
    }
    say(
        f"launch beside {count} guests: {row['p50_ms']:.1f} ms p50, {row['p95_ms']:.1f} ms p95, "
        f"{row['cpu_p50_ms']:.1f} ms of CPU time"
    )
    return row


async def _launch(app: WatchedApplication, source: ProgramSource) -> tuple[float, float]:
    begin, cpu = time.perf_counter(), time.thread_time()
    await app.run(source, {}, app.new_process("benchmark", RecordingClient()))
    return time.perf_counter() - begin, time.thread_time() - cpu


async def memory(count: int) -> list[Results]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sources = {
            "WAT": component(
                Path(folder), "waiting", waiting()
            ),  # first: what Python guests leave is used again
            "Python": python("waiting", WAITING),
        }
        for kind, source in sources.items():
            async with WatchedApplication(configured(step_ms=0), quiet) as app:
                async with waiting_guests(app, source, 1):
                    gc.collect()
                before = resident_bytes()
                async with waiting_guests(app, source, count):
                    grown = (resident_bytes() - before) / count
            rows.append({"kind": kind, "guests": count, "bytes_each": grown})
            say(f"{kind}: {grown / 1e3:.0f} kB for each of {count} suspended guests")
    return rows


def main(arguments: list[str] | None = None) -> None:
    run("latencies", __doc__, measure, arguments)


if __name__ == "__main__":
    main()
