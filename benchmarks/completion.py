"""What programs cost: tokens per second of text-completion guests against the bare driver loop, on one loaded model.

    python -m benchmarks.completion [--guests 1 8 32] [--tokens 64] [--rounds 5] [--quick] [--json FILE]

Each round runs the guests and then the bare loop (every second round the other way around) over the same prompts,
greedily. Steps in which all contexts decode are compared: tokens per second from their median period, the tax from
the medians of one round, then the median over the rounds with the lowest and highest beside it. The host's time per
token is what remains of such a period when the driver's own time is taken off. The CPU time of the event loop's thread,
on which guests, host calls and engine run, is the figure that others on the machine disturb least.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks import bare_loop
from benchmarks.pie_in_process import Step, WatchedApplication, run_all, settings
from pie_core.host_api.guest_state import ServedModel
from pie_core.programs import find_program

HEROES = (
    "fox", "lighthouse", "river", "clock", "baker", "violin", "mountain",
    "robot", "garden", "whale", "king", "window", "train", "dragon",
)  # fmt: skip
PLACES = ("in the snow", "by the sea", "on the moon")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of all contexts, by guests or by the bare loop."""

    tokens: int
    wall_s: float
    cpu_s: float
    period_ms: float  # of the steps in which every context decodes: from one result to the next
    host_us: float  # the part of that period in which the driver does not work
    thread_us: float  # CPU time of the thread that submits; of the bare loop, it includes the driver's

    @property
    def cpu_ms_per_token(self) -> float:
        return 1e3 * self.cpu_s / self.tokens


@dataclass(frozen=True, slots=True)
class Row:
    """All rounds of one number of guests; `tax` is the guests' period over the bare loop's, less one."""

    guests: int
    guests_tokens_per_s: float
    bare_tokens_per_s: float
    tax: float
    lowest_tax: float
    highest_tax: float
    wall_ratio: float  # bare over guests: launching, prefill and stopping included
    guests_host_us_per_token: float
    bare_host_us_per_token: float
    guests_thread_us_per_token: float  # CPU time of the event loop's thread: guests, host calls and engine
    guests_cpu_ms_per_token: float
    bare_cpu_ms_per_token: float


class Bench:
    def __init__(self, app: WatchedApplication, model: ServedModel, max_tokens: int) -> None:
        self._app = app
        self._model = model
        self._max_tokens = max_tokens
        self._program = find_program("text-completion")

    async def row(self, guests: int, rounds: int) -> Row:
        pairs = [await self._pair(guests, number) for number in range(rounds)]
        programs, bare = [each for each, _ in pairs], [each for _, each in pairs]
        taxes = [program.period_ms / loop.period_ms - 1 for program, loop in pairs]
        return Row(
            guests=guests,
            guests_tokens_per_s=guests / _median(programs, lambda run: run.period_ms) * 1e3,
            bare_tokens_per_s=guests / _median(bare, lambda run: run.period_ms) * 1e3,
            tax=median(taxes),
            lowest_tax=min(taxes),
            highest_tax=max(taxes),
            wall_ratio=median(loop.wall_s / program.wall_s for program, loop in pairs),
            guests_host_us_per_token=_median(programs, lambda run: run.host_us) / guests,
            bare_host_us_per_token=_median(bare, lambda run: run.host_us) / guests,
            guests_thread_us_per_token=_median(programs, lambda run: run.thread_us) / guests,
            guests_cpu_ms_per_token=_median(programs, lambda run: run.cpu_ms_per_token),
            bare_cpu_ms_per_token=_median(bare, lambda run: run.cpu_ms_per_token),
        )

    async def warm_up(self) -> None:
        """Compiles the guest, and lets torch set itself up."""
        await self._run_programs(_prompts(1))
        await self._run_bare(_prompts(1))

    async def _pair(self, guests: int, number: int) -> tuple[Run, Run]:
        prompts = _prompts(guests)
        if number % 2:
            bare = await self._timed(guests, lambda: self._run_bare(prompts))
            return await self._timed(guests, lambda: self._run_programs(prompts)), bare
        programs = await self._timed(guests, lambda: self._run_programs(prompts))
        return programs, await self._timed(guests, lambda: self._run_bare(prompts))

    async def _timed(self, guests: int, run: Callable[[], Awaitable[None]]) -> Run:
        self._app.watched.take_steps()
        wall, cpu = time.perf_counter(), time.process_time()
        await run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return _summed_up(self._app.watched.take_steps(), guests, wall, cpu)

    async def _run_programs(self, prompts: Sequence[str]) -> None:
        given = [
            {"prompt": prompt, "temperature": 0, "top_p": 1.0, "max_tokens": self._max_tokens}
            for prompt in prompts
        ]
        await run_all(self._app, self._program, given)

    async def _run_bare(self, prompts: Sequence[str]) -> None:
        tokens = [self._rendered(prompt) for prompt in prompts]
        bare_loop.greedy(self._app.driver, tokens, self._max_tokens, self._model.text.stop_tokens)

    def _rendered(self, prompt: str) -> list[int]:
        transcript = self._model.text.transcript()
        transcript.add_text("user", prompt)
        transcript.cue()
        return list(transcript.pending_tokens())


def _summed_up(steps: Sequence[Step], guests: int, wall_s: float, cpu_s: float) -> Run:
    periods, host, thread = [], [], []
    for before, step in itertools.pairwise(steps):
        if step.requests == step.rows == before.requests == before.rows == guests:
            periods.append(step.collected_at - before.collected_at)
            host.append(periods[-1] - step.busy_s)
            thread.append(step.submitting_cpu_s - before.submitting_cpu_s)
    if not periods:
        raise SystemExit(f"no two steps in a row decoded all {guests} contexts: raise --tokens")
    sampled = sum(step.requests for step in steps)
    return Run(sampled, wall_s, cpu_s, 1e3 * median(periods), 1e6 * median(host), 1e6 * median(thread))


def _median(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    return median(value(run) for run in runs)


def _prompts(count: int) -> list[str]:
    """Different for up to 42 guests."""
    return [
        f"Write a long story about a {HEROES[place % len(HEROES)]} {PLACES[place // len(HEROES) % len(PLACES)]}."
        for place in range(count)
    ]


async def measure(arguments: argparse.Namespace) -> list[Row]:
    app = WatchedApplication(settings(arguments.config, {"cpu_threads": arguments.threads}), lambda _: None)
    rows = []
    async with app:
        bench = Bench(app, next(iter(app.models.values())), arguments.tokens)
        await bench.warm_up()
        for guests in arguments.guests:
            rows.append(await bench.row(guests, arguments.rounds))
            print(_line(rows[-1]), flush=True)
    return rows


def _line(row: Row) -> str:
    return (
        f"{row.guests:3} guests: {row.guests_tokens_per_s:8.1f} tok/s, bare loop {row.bare_tokens_per_s:8.1f}; "
        f"tax {row.tax:+.1%} ({row.lowest_tax:+.1%} to {row.highest_tax:+.1%}), whole run {row.wall_ratio:.3f}x; "
        f"host {row.guests_host_us_per_token:.0f} us/token, bare {row.bare_host_us_per_token:.0f}; "
        f"event loop {row.guests_thread_us_per_token:.0f} CPU us/token; all "
        f"CPU {row.guests_cpu_ms_per_token:.2f} ms/token, bare {row.bare_cpu_ms_per_token:.2f}"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.completion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--guests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="the most that each guest generates")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=0, help="of the default model's driver; 0 is all cores"
    )
    parser.add_argument(
        "--config", type=Path, help="a configuration of one model; the default model otherwise"
    )
    parser.add_argument("--quick", action="store_true", help="one round of 8 tokens, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parsed = parser.parse_args(arguments)
    if parsed.quick:
        parsed.rounds, parsed.tokens = 1, 8
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = _parse(arguments)
    rows = asyncio.run(measure(parsed))
    if parsed.json:
        parsed.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
