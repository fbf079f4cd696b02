"""A very long loop under sink and window masks: how many pages it holds, and whether its tokens get slower.

    python -m benchmarks.engine.evictions [--quick] [--json FILE]

A program draws 100,000 tokens one by one; each reads the first rows (the sink) and the latest (the window), by a mask
of the program and by evicting what falls between. The goal: never more pages than those of sink and window and one
more. The dummy interprets every batch: a page that was freed too early would have changed a token, which a second run
over ample memory with masks alone shows on its first 4,000 tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from benchmarks.engine.command import Results, run, say
from benchmarks.engine.direct import GREEDY, DirectEngine
from pie_core.contracts.driver import CacheSpace
from pie_core.engine.messages import EvictRows, Forward, ForwardDone, Sample
from pie_core.engine.options import EngineOptions
from pie_core.ids import ContextId, RequestId

SINK, WINDOW, PAGE = 16, 256, 16
TOKENS, QUICK_TOKENS, COMPARED = 100_000, 4_000, 4_000


@dataclass(slots=True)
class Evictions:
    tokens: int
    most_pages: int
    pages_of_sink_and_window: int
    first_ms: float  # processor time of a token at the beginning ...
    last_ms: float  # ... and at the end
    same_tokens: bool = False
    drawn: list[int] = field(default_factory=list)


def measured(count: int, *, evicts: bool) -> Evictions:
    pages = (SINK + WINDOW) // PAGE + 1 if evicts else count // PAGE + 2
    direct = DirectEngine(
        EngineOptions(speculation_depth=0, prefix_cache=False),
        interpret=True,
        page_size=PAGE,
        num_pages=pages + 4,
        max_model_len=count + 8,
    )
    (space,) = direct.driver.capabilities.cache
    found = Evictions(count, 0, (SINK + WINDOW) // PAGE, 0.0, 0.0)
    took: list[float] = []
    begun = time.process_time()
    for token in _loop(direct, count, evicts=evicts):
        found.drawn.append(token)
        found.most_pages = max(found.most_pages, _held(direct, space))
        if len(found.drawn) % 1000 == 0:
            took.append(time.process_time() - begun)
            begun = time.process_time()
    found.first_ms, found.last_ms = took[0], took[-1]  # seconds of a thousand
    return found


def _held(direct: DirectEngine, space: CacheSpace) -> int:
    pool = direct.engine._cache.pools[0]
    return space.num_pages - pool.num_unheld


def _loop(direct: DirectEngine, count: int, *, evicts: bool) -> Iterator[int]:
    context = direct.create()
    tokens: tuple[int, ...] = (1, 2, 3, 4)
    for length in range(len(tokens), len(tokens) + count):
        commands: list[Forward | EvictRows] = [_pass(direct, context, tokens, length)]
        if evicts and length - WINDOW + 1 > SINK:
            commands.append(EvictRows(context, SINK, length - WINDOW + 1))
        done = next(each for each in direct.run(*commands) if isinstance(each, ForwardDone))
        tokens = (done.tokens[0],)
        yield done.tokens[0]


def _pass(direct: DirectEngine, context: ContextId, tokens: tuple[int, ...], length: int) -> Forward:
    masks = ((0, SINK, max(length - WINDOW - SINK, 0), WINDOW + 1),) if len(tokens) == 1 else ()
    samples = (Sample(len(tokens) - 1, GREEDY),)
    return Forward(RequestId(direct.number()), context, tokens, masks=masks, samples=samples)


async def measure(quick: bool) -> Results:
    found = measured(QUICK_TOKENS if quick else TOKENS, evicts=True)
    kept = measured(COMPARED, evicts=False)
    found.same_tokens = found.drawn[:COMPARED] == kept.drawn
    say(
        f"{found.tokens} tokens: at most {found.most_pages} pages, {found.pages_of_sink_and_window} of them of sink "
        f"and window; {found.first_ms:.2f} ms a token at first, {found.last_ms:.2f} at last"
    )
    same = "the same" if found.same_tokens else "OTHERS"
    say(f"without evicting, {kept.most_pages} pages for {kept.tokens} tokens, which are {same}")
    result = asdict(found)
    del result["drawn"]
    return {"evictions": result}


def main(arguments: list[str] | None = None) -> None:
    run("evictions", __doc__, measure, arguments)


if __name__ == "__main__":
    main()
