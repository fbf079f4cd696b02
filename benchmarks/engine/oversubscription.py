"""Guests that want more KV memory than there is, up to 64 times: whether all complete, and what it costs them.

    python -m benchmarks.engine.oversubscription [--quick] [--json FILE]

64 guests read a prompt of their own and draw as many tokens again; the pages are what all of them need at their
longest, divided by 1, 2, 4, … 64. At 64 there is room for one of them. Goodput is tokens that guests got for each
second, against that of memory for all; less memory means smaller batches, so beside it stands what is possible at best.
A step takes 1 ms and 20 us for each row, so what is computed again costs the driver time.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from benchmarks.engine.command import Results, run, say
from benchmarks.engine.guests import python
from benchmarks.engine.stage import Crowd, configured, status
from benchmarks.pie_in_process import WatchedApplication, quiet

GUESTS, ROWS, PAGE = 64, 64, 16
PAGES_EACH = 2 * ROWS // PAGE
STEP_MS, ROW_US = 1.0, 20.0

GUEST = """
from inferlet import Context, Model, Sampler, session

async def main(input):
    ctx = Context(Model.load())
    await session.receive()
    ctx.append([(input["number"] * 31 + row * 7) % 256 for row in range(input["rows"])])
    generation = ctx.generate(Sampler.argmax(), max_tokens=input["rows"], auto_flush=False, stop=[])
    return len(await generation.collect_tokens())
"""


@dataclass(frozen=True, slots=True)
class Row:
    oversubscription: int
    completed: float
    tokens_per_s: float
    goodput: float  # against the first row
    possible: float  # with the smaller batches that fit into the memory, were nothing moved or computed again
    device_s: float
    suspensions: int
    swapped: int  # of them, those that went to host memory
    replayed_tokens: int


async def measure(quick: bool) -> Results:
    rows: list[Row] = []
    for factor in (1, 4) if quick else (1, 2, 4, 8, 16, 32, 64):
        rows.append(await _row(factor, rows[0].tokens_per_s if rows else None))
        row = rows[-1]
        say(
            f"{row.oversubscription:3}x: {row.completed:.0%} complete, {row.tokens_per_s:7.0f} tok/s = "
            f"{row.goodput:.2f} of what memory for all gives ({row.possible:.2f} possible); "
            f"{row.suspensions} suspended, {row.swapped} of them swapped, {row.replayed_tokens} rows computed again"
        )
    return {"rows": [asdict(row) for row in rows]}


async def _row(factor: int, best: float | None) -> Row:
    pages = max(GUESTS * PAGES_EACH // factor, PAGES_EACH)
    config = configured(step_ms=STEP_MS, driver={"token_us": ROW_US, "num_pages": pages, "page_size": PAGE})
    inputs = [{"number": number, "rows": ROWS} for number in range(GUESTS)]
    async with WatchedApplication(config, quiet) as app:
        crowd = Crowd(app, python("oversubscribed", GUEST), inputs)
        await crowd.ready()
        begin = time.perf_counter()
        crowd.go()
        drawn = await crowd.end()
        took_s = time.perf_counter() - begin
        found = await status(app)
    speed = sum(drawn) / took_s
    return Row(
        oversubscription=factor,
        completed=sum(count == ROWS for count in drawn) / GUESTS,
        tokens_per_s=speed,
        goodput=1.0 if best is None else speed / best,
        possible=_possible(GUESTS // factor) / _possible(GUESTS),
        device_s=found.busy_s,
        suspensions=found.suspensions,
        swapped=found.swapping.suspensions,
        replayed_tokens=found.replayed_tokens,
    )


def _possible(batch: int) -> float:
    """Tokens for each millisecond of steps of so many contexts."""
    return batch / (STEP_MS + batch * ROW_US / 1e3)


def main(arguments: list[str] | None = None) -> None:
    run("oversubscription", __doc__, measure, arguments)


if __name__ == "__main__":
    main()
