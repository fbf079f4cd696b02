"""A hundred guests that wait for something that never comes: what the others notice of them.

    python -m benchmarks.engine.waiting [--quick] [--json FILE]

Some guests decode, with and without the waiting ones beside them, in turns. The goal: the p99 of the others' time from
token to token moves by no more than 2 %.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

from benchmarks.engine import guests
from benchmarks.engine.command import Results, run, say
from benchmarks.engine.stage import Crowd, Decode, configured, decode_of
from benchmarks.pie_in_process import WatchedApplication, quiet
from pie_core.programs import ProgramSource
from pie_core.testing.recording_client import RecordingClient

WAITING = "from inferlet import session\nasync def main(input):\n    await session.receive()\n"
STEP_MS = 5.0
OTHERS = 8


@asynccontextmanager
async def waiting_guests(app: WatchedApplication, source: ProgramSource, count: int) -> AsyncIterator[None]:
    states = [app.new_process("benchmark", RecordingClient()) for _ in range(count)]
    tasks = [asyncio.create_task(app.run(source, {}, state)) for state in states]
    for state in states:
        await state.messages.wanted()
    try:
        yield
    finally:
        for state in states:
            state.close_input()
        await asyncio.gather(*tasks)


async def measure(quick: bool) -> Results:
    count, tokens, rounds = (10, 60, 2) if quick else (100, 300, 7)
    alone: list[Decode] = []
    beside: list[Decode] = []
    with tempfile.TemporaryDirectory() as folder:
        source = guests.component(Path(folder), "others", guests.stepping(tokens))
        async with WatchedApplication(configured(step_ms=STEP_MS), quiet) as app:
            await _decode(app, source)
            for _ in range(rounds):
                alone.append(await _decode(app, source))
                async with waiting_guests(app, guests.python("waiting", WAITING), count):
                    beside.append(await _decode(app, source))
    moved = {name: _moved(alone, beside, name) for name in ("period_us", "period_p99_us", "host_us")}
    say(f"{count} waiting guests: the others' p99 moves by {moved['period_p99_us']:+.1%}, their median "
        f"by {moved['period_us']:+.1%}, the host's work by {moved['host_us']:+.1%}")  # fmt: skip
    return {"waiting": count, "others": OTHERS, "moved": moved}


async def _decode(app: WatchedApplication, source: ProgramSource) -> Decode:
    app.watched.take_steps()
    await Crowd(app, source, [{}] * OTHERS).run()
    return decode_of(app, OTHERS)


def _moved(alone: Sequence[Decode], beside: Sequence[Decode], name: str) -> float:
    """The median of the rounds' ratios, less one."""
    ratios: list[float] = [
        getattr(one, name) / getattr(other, name) for other, one in zip(alone, beside, strict=True)
    ]
    return median(ratios) - 1


def main(arguments: list[str] | None = None) -> None:
    run("waiting", __doc__, measure, arguments)


if __name__ == "__main__":
    main()
