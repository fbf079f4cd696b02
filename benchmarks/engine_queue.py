"""What choosing a step costs the engine while many wait for memory: no guests, no event loop, no driver's work.

    python -m benchmarks.engine_queue [--waiting N ...] [--steps N]

Generations of 1,000 tokens and 30 to draw wait for memory that 30 of them fit into; *alike*: their first 500 tokens are
the same. CPU time of `Engine.start_step`, median and longest of the steps after the first.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from pie_core.contracts.driver import DriverRequest
from pie_core.contracts.forward import ForwardBatch
from pie_core.engine.engine import Engine
from pie_core.engine.messages import CreateContext, Generate, SamplerSpec
from pie_core.engine.options import EngineOptions
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant, Ticket
from pie_core.plugins import load_plugins

ROWS, DRAWN, ALIKE, PAGE, FIT = 1000, 30, 500, 16, 30


class Queue:
    def __init__(self, waiting: int, alike: int) -> None:
        declaration = load_plugins().driver("dummy")
        sizes = {"num_pages": FIT * (ROWS + DRAWN) // PAGE, "page_size": PAGE, "num_host_pages": 0}
        options = declaration.options(vocab_size=32000, interpret=False, max_model_len=4096, **sizes)
        self._driver: Any = declaration.load(DriverRequest(None, "cpu", options, {}, {}))
        self._driver_s = 0.0
        self._time_driver()
        self._engine = Engine(self._driver, EngineOptions(max_batch_tokens=8192), "queue")
        self._in_flight: deque[Ticket] = deque()
        for number in range(waiting):
            context = ContextId(number + 1)
            tokens = (*range(alike), *((number * 31 + row * 7) % 32000 for row in range(ROWS - alike)))
            command = Generate(RequestId(number + 1), context, tokens, SamplerSpec(), (), DRAWN, whole=True)
            program = ProcessId(f"p{number}")
            self._engine.handle([CreateContext(context, program, Tenant("t"), 7), command])

    def run(self, steps: int) -> Iterator[float]:
        """Seconds that starting each step took, without the driver."""
        for _ in range(steps):
            begun_at, self._driver_s = time.thread_time(), 0.0
            ticket = self._engine.start_step()
            if ticket is not None:
                yield time.thread_time() - begun_at - self._driver_s
                self._in_flight.append(ticket)
            if not self._in_flight:
                return
            if ticket is None or len(self._in_flight) > 1:
                first = self._in_flight.popleft()
                self._engine.finish_step(first, self._driver.collect(first))

    def _time_driver(self) -> None:
        submit = self._driver.submit

        def timed(batch: ForwardBatch) -> Ticket:
            begun_at = time.thread_time()
            ticket: Ticket = submit(batch)
            self._driver_s += time.thread_time() - begun_at
            return ticket

        self._driver.submit = timed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--waiting", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--steps", type=int, default=150)
    chosen = parser.parse_args(arguments)
    for waiting in chosen.waiting:
        for alike in (0, ALIKE):
            took = list(Queue(waiting, alike).run(chosen.steps))[1:]
            print(
                f"{waiting:5} waiting, {alike:3} rows alike: {1e3 * median(took):6.2f} ms a step, "
                f"longest {1e3 * max(took):6.2f} ms"
            )


if __name__ == "__main__":
    main()
