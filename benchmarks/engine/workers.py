"""Python guests with code per token, in this process and in worker processes: what a token costs, and who pays.

    python -m benchmarks.engine.workers [--quick] [--json FILE]

Cost: CPU time of all worker processes (or of this one) for each token, of which b, the part that grows with the guests,
decides how many workers hide it: guests * b / step time, on as many processors. On a machine with fewer processors
than that the table says what was seen, and the number is an extrapolation.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

from benchmarks.engine.command import Results, run, say
from benchmarks.engine.fit import robust_line
from benchmarks.engine.guests import PER_TOKEN, python
from benchmarks.engine.stage import Crowd, configured, status
from benchmarks.pie_in_process import quiet
from pie_core.app import Application

STEP_MS = 10.0


@dataclass(frozen=True, slots=True)
class Row:
    workers: int
    guests: int
    tokens_per_s: float
    utilisation: float  # of the driver, launching aside
    cpu_us_per_token: float  # of the processes with guests; without workers, the engine's part is in it
    front_us_per_token: float  # of this process


async def measure(quick: bool) -> Results:
    counts, tokens = ((4, 16), 30) if quick else ((8, 32, 64, 128), 60)
    rows = [
        await _row(workers, guests, tokens)
        for workers in ((0, 1) if quick else (0, 1, 2))
        for guests in counts
    ]
    fits = {}
    for workers in sorted({row.workers for row in rows}):
        points = [(row.guests, row.cpu_us_per_token * row.guests) for row in rows if row.workers == workers]
        line = robust_line(points)
        fits[workers] = asdict(line)
        say(f"{workers} workers: {line.a:.0f} us + {line.b:.1f} us a guest of CPU time for a step")
    b = fits[max(fits)]["b"]
    needed = {str(guests): ceil(1.3 * guests * b / (1e3 * STEP_MS)) for guests in (64, 256, 1000)}
    say(f"workers that hide it behind steps of {STEP_MS:g} ms, on as many processors: {needed} (extrapolated; "
        f"this machine has {len(os.sched_getaffinity(0))})")  # fmt: skip
    return {"rows": [asdict(row) for row in rows], "fits_us": fits, "workers_needed": needed}


async def _row(workers: int, guests: int, tokens: int) -> Row:
    async with Application(configured(step_ms=STEP_MS, workers=workers), quiet) as app:
        source = python("per-token", PER_TOKEN)
        await asyncio.gather(
            *(Crowd(app, source, [{"tokens": tokens}]).run() for _ in range(max(workers, 1)))
        )
        crowd = Crowd(app, source, [{"tokens": tokens}] * guests)
        await crowd.ready()
        before, engine = _cpu_s(), await status(app)
        begin = time.perf_counter()
        crowd.go()
        await crowd.end()
        took_s = time.perf_counter() - begin
        after, ended = _cpu_s(), await status(app)
    row = _row_of(workers, guests, tokens, took_s, before, after, ended.busy_s - engine.busy_s)
    say(
        f"{workers} workers, {guests:4} guests: {row.tokens_per_s:7.0f} tok/s, driver busy {row.utilisation:6.1%}, "
        f"{row.cpu_us_per_token:6.0f} us of CPU time a token, {row.front_us_per_token:.0f} us of this process"
    )
    return row


def _row_of(
    workers: int,
    guests: int,
    tokens: int,
    took_s: float,
    before: dict[str, float],
    after: dict[str, float],
    busy_s: float,
) -> Row:
    count = guests * tokens
    spent = {kind: 1e6 * (after[kind] - before.get(kind, 0.0)) / count for kind in after}
    return Row(
        workers=workers,
        guests=guests,
        tokens_per_s=count / took_s,
        utilisation=busy_s / took_s,
        cpu_us_per_token=spent["workers"] if workers else spent["front"],
        front_us_per_token=spent["front"],
    )


def _cpu_s() -> dict[str, float]:
    """CPU time of this process, and of its children that run programs."""
    return {"front": time.process_time(), "workers": sum(map(_process_cpu_s, _workers()))}


def _workers() -> list[int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    return [int(pid) for pid in children if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _process_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(arguments: list[str] | None = None) -> None:
    run("workers", __doc__, measure, arguments)


if __name__ == "__main__":
    main()
