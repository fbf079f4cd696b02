"""Guests that compute between two tokens: how much of that is hidden behind the driver's steps.

    python -m benchmarks.engine.pauses [--quick] [--json FILE]

Alone: one guest computes for 0.1, 1 and 10 ms before each token, at speculation depths 0, 1 and 4, with steps of 10 ms.
At depth 0 all of it makes its tokens come later; what does not at other depths is hidden. Saturated: more
guests than a step takes; what runs ahead then takes a place from what was asked for, so depth 4 must not be slower than
depth 1. Plain: guests that only decode; hits are passes that a guess had computed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.engine.command import Results, run, say
from benchmarks.engine.guests import component, spinning, stepping
from benchmarks.engine.stage import Crowd, configured, decode_of, status
from benchmarks.pie_in_process import WatchedApplication, quiet
from pie_core.programs import ProgramSource
from pie_core.testing.recording_client import RecordingClient

STEP_MS = 10.0
COMPUTE_MS = (0.1, 1.0, 10.0)
DEPTHS = (0, 1, 4)


async def measure(quick: bool) -> Results:
    with tempfile.TemporaryDirectory() as folder:
        turns = await _turns_per_ms(Path(folder))
        return {
            "hidden": await _hidden(Path(folder), turns, quick),
            "saturated": await _saturated(Path(folder), turns, quick),
            "plain": await _plain(Path(folder), quick),
        }


async def _turns_per_ms(folder: Path) -> float:
    """How often a guest's loop goes round in a millisecond."""
    turns = 20_000_000
    source = component(folder, "spin", spinning(turns))
    async with WatchedApplication(configured(step_ms=0), quiet) as app:
        times = []
        for _ in range(4):  # the first one compiles
            begin = time.perf_counter()
            await app.run(source, {}, app.new_process("benchmark", RecordingClient()))
            times.append(time.perf_counter() - begin)
    return turns / (1e3 * min(times[1:]))


# ---- alone


async def _hidden(folder: Path, turns: float, quick: bool) -> list[Results]:
    rows: list[Results] = []
    taken_ms: dict[float, float] = {}  # by what they mean to compute: what it takes, as depth 0 shows
    tokens = 30 if quick else 60
    for depth in (0, 1) if quick else DEPTHS:
        async with WatchedApplication(configured(step_ms=STEP_MS, depth=depth), quiet) as app:
            plain_ms = await _period_ms(app, component(folder, "plain", stepping(tokens)))
            for compute_ms in COMPUTE_MS[:2] if quick else COMPUTE_MS:
                guest = stepping(tokens, spins=round(turns * compute_ms))
                period_ms = await _period_ms(app, component(folder, f"compute-{compute_ms}", guest))
                taken_ms.setdefault(compute_ms, period_ms - plain_ms)
                rows.append(_row(depth, compute_ms, taken_ms[compute_ms], period_ms - plain_ms))
    return rows


async def _period_ms(app: WatchedApplication, source: ProgramSource) -> float:
    """From token to token; the first run compiles."""
    await Crowd(app, source, [{}]).run()
    app.watched.take_steps()
    await Crowd(app, source, [{}]).run()
    return decode_of(app, 1).period_us / 1e3


def _row(depth: int, compute_ms: float, taken_ms: float, longer_ms: float) -> Results:
    """Of computing that took so long at depth 0, all that does not make tokens come later is hidden."""
    hidden = min(max(1 - longer_ms / taken_ms, 0.0), 1.0)
    say(
        f"depth {depth}, {compute_ms:4g} ms between tokens ({taken_ms:.2f} taken): tokens come {longer_ms:5.2f} ms "
        f"later, {hidden:6.1%} of the computing hidden"
    )
    return {
        "depth": depth,
        "compute_ms": compute_ms,
        "taken_ms": taken_ms,
        "longer_ms": longer_ms,
        "hidden": hidden,
    }


# ---- more guests than a step takes


async def _saturated(folder: Path, turns: float, quick: bool) -> Results:
    guests, places, rounds = (8, 4, 2) if quick else (32, 16, 5)
    source = component(folder, "busy", stepping(40, spins=round(turns * 0.01)))
    got: dict[int, list[float]] = {1: [], 4: []}
    for _ in range(rounds):
        for depth, speeds in got.items():
            config = configured(step_ms=5, depth=depth, scheduler={"max_batch_requests": places})
            async with WatchedApplication(config, quiet) as app:
                await Crowd(app, source, [{}]).run()
                begin = time.perf_counter()
                await Crowd(app, source, [{}] * guests).run()
                speeds.append(40 * guests / (time.perf_counter() - begin))
    ratio = median(deep / shallow for shallow, deep in zip(got[1], got[4], strict=True))
    say(
        f"saturated, {guests} guests for {places} places: depth 4 makes {ratio:.3f} times the tokens of depth 1"
    )
    return {"guests": guests, "places": places, "depth_4_over_depth_1": ratio}


# ---- plain decoding


async def _plain(folder: Path, quick: bool) -> list[Results]:
    rows = []
    for guests in (1, 8) if quick else (1, 8, 32):
        async with WatchedApplication(configured(step_ms=5, depth=1), quiet) as app:
            source = component(folder, "plain", stepping(100 if quick else 200))
            before = await status(app)
            await Crowd(app, source, [{}] * guests).run()
            after = await status(app)
        hits = after.run_ahead_hits - before.run_ahead_hits
        rate = hits / ((100 if quick else 200) - 1) / guests  # nothing runs ahead of the first pass
        decode = decode_of(app, guests)
        rows.append({"guests": guests, "hit_rate": rate, "utilisation": decode.utilisation})
        say(f"plain decoding, {guests} guests: {rate:.2%} of the passes were computed ahead")
    return rows


def main(arguments: list[str] | None = None) -> None:
    run("pauses", __doc__, measure, arguments)


if __name__ == "__main__":
    main()
