"""What the engine alone costs for a step, as a + b * contexts: no guests, no event loop, and no driver's work.

    python -m benchmarks.engine_rows [--depth N] [--profile KIND]

*whole*: generations whose tokens are wanted at the end; *streamed*: as they come; *steps*: one Steps message asks for
the next token of every context once the last have been told. CPU time of this thread, without what the driver takes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pie_core.contracts.driver import DriverRequest
from pie_core.contracts.forward import ForwardBatch
from pie_core.engine.engine import Engine
from pie_core.engine.messages import (
    CreateContext,
    Event,
    Forward,
    ForwardDone,
    Generate,
    Sample,
    SamplerSpec,
    Stepped,
    Steps,
)
from pie_core.engine.options import EngineOptions
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant, Ticket
from pie_core.plugins import load_plugins

KINDS = ("whole", "streamed", "steps")
GRID = (1, 8, 64, 256, 1000)
PROMPT = tuple(range(1, 40))
WARM_UP, STEPS = 12, 64  # four pages


class Rows:
    """One engine and its contexts, driven by hand."""

    def __init__(self, kind: str, count: int, depth: int) -> None:
        declaration = load_plugins().driver("dummy")
        options = declaration.options(
            vocab_size=32000, num_pages=65536, max_batch_requests=1024, interpret=False
        )
        self.driver: Any = declaration.load(DriverRequest(None, "cpu", options, {}, {}))
        limits = EngineOptions(max_batch_requests=1024, max_batch_tokens=8192, speculation_depth=depth)
        self.engine = Engine(self.driver, limits, "rows")
        self.driver_s = 0.0
        self._timed_driver()
        self._in_flight: deque[Ticket] = deque()
        self._steps_of = list(map(ContextId, range(1, count + 1))) if kind == "steps" else []
        self._numbers = count
        for context in range(1, count + 1):
            self._begin(kind, ContextId(context))

    def _begin(self, kind: str, context: ContextId) -> None:
        process, sampler = ProcessId(f"p{context}"), SamplerSpec()
        self._numbers += 1
        request = RequestId(self._numbers)
        create = CreateContext(context, process, Tenant("t"), seed=context)
        prompt = (context, *PROMPT)
        if kind == "steps":
            samples = (Sample(len(PROMPT), sampler),)
            self.engine.handle([create, Forward(request, context, prompt, samples=samples)])
        else:
            whole = kind == "whole"
            self.engine.handle([create, Generate(request, context, prompt, sampler, (2,), 4096, whole=whole)])

    def _timed_driver(self) -> None:
        for name in ("submit", "collect"):
            setattr(self.driver, name, self._timed(getattr(self.driver, name)))

    def _timed(self, work: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def timed(argument: ForwardBatch | Ticket) -> Any:
            begun = time.thread_time()
            try:
                return work(argument)
            finally:
                self.driver_s += time.thread_time() - begun

        return timed

    def turn(self) -> None:
        """As the port does it: whatever can be started is, one step ends, and programs ask again."""
        while (ticket := self.engine.start_step()) is not None:
            self._in_flight.append(ticket)
        ticket = self._in_flight.popleft()
        self.engine.finish_step(ticket, self.driver.collect(ticket))
        events = self.engine.take_events()
        if self._steps_of:
            self._ask_again(events)

    def _ask_again(self, events: Sequence[Event]) -> None:
        requests: list[int] = []
        tokens: list[int] = []
        for event in events:
            if isinstance(event, Stepped):
                requests += event.requests
                tokens += event.tokens
            elif isinstance(event, ForwardDone):
                requests.append(event.request)
                tokens += event.tokens
        if requests:
            count = len(self._steps_of)
            contexts = [ContextId((request - count - 1) % count + 1) for request in requests]
            self.engine.handle([Steps([RequestId(each + count) for each in requests], contexts, tokens)])

    def cost_us(self) -> float:
        for _ in range(WARM_UP):
            self.turn()
        begun, self.driver_s = time.thread_time(), 0.0
        for _ in range(STEPS):
            self.turn()
        return 1e6 * (time.thread_time() - begun - self.driver_s) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=1, help="speculation depth")
    parser.add_argument("--profile", choices=KINDS, help="where the time goes instead")
    parser.add_argument("--contexts", type=int, default=1000, help="... with so many")
    arguments = parser.parse_args()
    if arguments.profile:
        _profile(Rows(arguments.profile, arguments.contexts, arguments.depth))
        return
    for kind in KINDS:
        costs = [min(Rows(kind, count, arguments.depth).cost_us() for _ in range(3)) for count in GRID]
        b, a = np.polyfit(GRID, costs, 1)
        cells = "  ".join(f"{count}: {cost:.0f}" for count, cost in zip(GRID, costs, strict=True))
        print(f"{kind:9} {a:6.0f} us + {b:5.2f} us a context     ({cells})")


def _profile(rows: Rows) -> None:
    rows.cost_us()
    profile = cProfile.Profile()
    profile.runcall(rows.cost_us)
    pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
