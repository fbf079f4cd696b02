"""Agents that talk for 40 turns, with tools between: how many tokens are computed again that were cached.

    python -m benchmarks.engine.agent_session [--quick] [--json FILE]

In each turn an agent reads 50 new tokens, draws 30, and waits for a tool. *Kept*: it keeps its context. *Sent again*:
it opens a new one with all that was said, as the client of a stateless server does, and the prefix cache is to find it.
Computed again are rows beyond those that the turns bring. First everything fits; then the agents together want four
times the pages that there are, so that most of what was cached has to go before it is wanted again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from benchmarks.engine.command import Results, run, say
from benchmarks.engine.guests import python
from benchmarks.engine.stage import Crowd, configured, status
from benchmarks.pie_in_process import WatchedApplication, quiet

READ, DRAWN, PAGE = 50, 30, 16

AGENT = """
import asyncio
from inferlet import Context, Model, Sampler, session

async def main(input):
    model = Model.load()
    ctx, history = Context(model), []
    await session.receive()
    for turn in range(input["turns"]):
        said = [(input["number"] * 31 + turn * 17 + place * 7) % 256 for place in range(input["read"])]
        if input["again"]:
            history += said
            ctx = Context(model).append(history)
        else:
            ctx.append(said)
        generation = ctx.generate(Sampler.argmax(), max_tokens=input["drawn"], auto_flush=False, stop=[])
        history += await generation.collect_tokens()
        await asyncio.sleep(input["tool_s"])
    return len(history)
"""


@dataclass(frozen=True, slots=True)
class Row:
    history: str
    agents: int
    crowding: int
    turns: int
    rows: int  # that the steps computed
    new_rows: int  # that the turns brought
    recomputed: int
    suspensions: int


async def measure(quick: bool) -> Results:
    turns, agents = (4, 2) if quick else (40, 8)
    rows = []
    for crowding in (1,) if quick else (1, 4):
        for again in (False, True):
            rows.append(await _row(turns, agents, crowding, again))
            row = rows[-1]
            say(
                f"{row.agents} agents, {row.turns} turns, {row.history}, wanting {row.crowding} times the pages: "
                f"{row.rows} rows computed, {row.new_rows} new, {row.recomputed} again "
                f"({row.recomputed / row.new_rows:.1%})"
            )
    return {"rows": [asdict(row) for row in rows]}


async def _row(turns: int, agents: int, crowding: int, again: bool) -> Row:
    length = turns * (READ + DRAWN)
    pages = agents * (-(-length // PAGE) + 2) // crowding
    sizes = {"num_pages": pages, "num_host_pages": 4096, "page_size": PAGE}
    config = configured(step_ms=0.2, driver={**sizes, "interpret": "true"})
    each = {"turns": turns, "read": READ, "drawn": DRAWN, "tool_s": 0.005, "again": again}
    async with WatchedApplication(config, quiet) as app:
        await Crowd(
            app, python("agent", AGENT), [{**each, "number": number} for number in range(agents)]
        ).run()
        found = await status(app)
    new = agents * length
    return Row(
        history="sent again" if again else "kept",
        agents=agents,
        crowding=crowding,
        turns=turns,
        rows=found.tokens,
        new_rows=new,
        recomputed=max(found.tokens - new, 0),
        suspensions=found.suspensions,
    )


def main(arguments: list[str] | None = None) -> None:
    run("agent_session", __doc__, measure, arguments)


if __name__ == "__main__":
    main()
