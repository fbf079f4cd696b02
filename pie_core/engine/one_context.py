"""An engine for one token list: the logits of every position and the greedy continuation, without tokenizer or guest.

What is compared with other implementations goes the way of every pass: the engine's pages, batches and steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32, Int32, ProbeKind
from pie_core.engine.engine import Engine
from pie_core.engine.messages import (
    CreateContext,
    Failed,
    Forward,
    ForwardDone,
    Probe,
    Sample,
    SamplerSpec,
)
from pie_core.engine.options import EngineOptions
from pie_core.errors import EngineLost, InvalidRequest, Unsupported, error_from_code
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant

CONTEXT = ContextId(1)
OPTIONS = EngineOptions(speculation_depth=0)
LONGEST_PASS = 256


@dataclass(frozen=True, slots=True)
class Reading:
    logits: Float32  # [tokens, vocab] or [tokens, streams, vocab]
    greedy: Int32  # [n] or [n, streams]: what the model goes on with


def read_logits(driver: Driver, tokens: Sequence[int], num_greedy: int = 0) -> Reading:
    """Raises what the engine answers: OutOfPages, InvalidRequest for tokens outside the vocabulary, and so on."""
    if driver.capabilities.streams > 1:
        raise Unsupported(
            f"tokens of architecture {driver.capabilities.architecture!r} have {driver.capabilities.streams} columns;"
            " read_frames reads those"
        )
    if not tokens:
        raise InvalidRequest("no tokens to read: expected at least one")
    reader = _Reader(driver)
    size = max(1, min(LONGEST_PASS, OPTIONS.max_pass_values // driver.capabilities.vocab_size))
    chunks = [tuple(tokens[start : start + size]) for start in range(0, len(tokens), size)]
    passes = [reader.run(chunk) for chunk in chunks]
    rows = [np.frombuffer(probe.values, "<f4") for each in passes for probe in each.probes]
    last = passes[-1].tokens[0]
    greedy: list[int] = []
    while len(greedy) < num_greedy:
        greedy.append(last)
        if len(greedy) < num_greedy:
            last = reader.run((last,), probed=False).tokens[0]
    return Reading(np.stack(rows), np.array(greedy, np.int32))


class _Reader:
    """One context, passed to the engine chunk by chunk."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._engine = Engine(driver, OPTIONS, "model")
        self._requests = 0
        self._engine.handle(
            [CreateContext(context=CONTEXT, process=ProcessId("reader"), tenant=Tenant("reader"), seed=0)]
        )

    def run(self, tokens: tuple[int, ...], probed: bool = True) -> ForwardDone:
        self._requests += 1
        probes = tuple(Probe(row, int(ProbeKind.LOGITS)) for row in range(len(tokens))) if probed else ()
        sample = Sample(len(tokens) - 1, SamplerSpec())
        request = RequestId(self._requests)
        command = Forward(request=request, context=CONTEXT, tokens=tokens, samples=(sample,), probes=probes)
        self._engine.handle([command])
        return self._answer()

    def _answer(self) -> ForwardDone:
        """Steps until the pass has ended."""
        while (ticket := self._engine.start_step()) is not None:
            self._engine.finish_step(ticket, self._driver.collect(ticket))
        for event in self._engine.take_events():
            if isinstance(event, Failed):
                raise error_from_code(event.code, event.message)
            if isinstance(event, ForwardDone):
                return event
        raise EngineLost("the engine neither steps nor answers")
