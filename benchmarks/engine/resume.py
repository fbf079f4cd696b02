"""How long a guest waits for a result that is there already.

    python -m benchmarks.engine.resume [--quick] [--json FILE]

*Taken*: it executes a pass, sleeps, and takes the tokens, which have come to its worker. *Computed ahead*: it sleeps,
and steps; the engine has guessed the pass and computed it. The guest reads the clock right before and right after. The
times are the host's side of these two calls of `now-ns`, so they hold the whole way: out of the guest, for a step to
the engine, and back.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

from benchmarks.engine.command import Results, run, say
from benchmarks.engine.guests import component, timed_stepping, timed_taking
from benchmarks.engine.stage import Crowd, configured, status
from benchmarks.pie_in_process import WatchedApplication, quiet
from pie_core.host_api import poll
from pie_core.sandbox.hosting import GuestState

PAUSE_MS = 2.0  # a step of the driver takes no time
WARM_UP = 20


@contextmanager
def clock_read_by_guests() -> Iterator[list[float]]:
    """When guests read the clock, by the host's own."""
    moments: list[float] = []
    honest = poll.interface.functions["now-ns"]

    def now_ns(_: GuestState) -> int:
        moments.append(time.perf_counter())
        return time.monotonic_ns()

    poll.interface.functions["now-ns"] = replace(honest, call=now_ns)
    try:
        yield moments
    finally:
        poll.interface.functions["now-ns"] = honest


async def measure(quick: bool) -> Results:
    tokens = 100 if quick else 500
    rows = {}
    with tempfile.TemporaryDirectory() as folder, clock_read_by_guests() as moments:
        stepping = component(Path(folder), "stepping", timed_stepping(tokens, PAUSE_MS))
        taking = component(Path(folder), "taking", timed_taking(tokens, PAUSE_MS))
        for label, source, depth in (
            ("taken", taking, 1),
            ("computed ahead", stepping, 2),
            ("not computed ahead", stepping, 0),
        ):
            async with WatchedApplication(configured(step_ms=0, depth=depth), quiet) as app:
                await Crowd(app, source, [{}]).run()
                moments.clear()
                await Crowd(app, source, [{}]).run()
                hits = (await status(app)).run_ahead_hits / (2 * tokens)
            rows[label] = _row(label, moments, hits)
    return rows


def _row(label: str, moments: list[float], hits: float) -> Results:
    waits = [1e6 * (after - before) for before, after in zip(moments[::2], moments[1::2], strict=True)]
    waits = waits[WARM_UP:]
    p50, p99 = median(waits), quantiles(waits, n=100)[-1]
    say(f"{label:20}: {p50:6.1f} us p50, {p99:6.1f} us p99 ({hits:.1%} of the passes were computed ahead)")
    return {"p50_us": p50, "p99_us": p99, "hit_rate": hits}


def main(arguments: list[str] | None = None) -> None:
    run("resume", __doc__, measure, arguments)


if __name__ == "__main__":
    main()
