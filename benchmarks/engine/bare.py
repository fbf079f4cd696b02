"""The bare loop: a driver that is given the same decode step again and again, two at a time, with no host."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from benchmarks.engine.stage import Decode, decode_of
from benchmarks.pie_in_process import WatchedApplication
from pie_core.contracts.forward import ForwardBatch, TokenRefs
from pie_core.ids import Ticket
from pie_core.testing.batches import Request, Sample, Stepper


def bare_decode(app: WatchedApplication, contexts: int, steps: int) -> Decode:
    """The batch is laid out once; from then on only lengths and tokens change."""
    driver = app.driver
    stepper = Stepper(driver)
    requests = [Request(stepper.context(), [5], samples=[Sample()]) for _ in range(contexts)]
    for each in requests:
        stepper.make_room(each.context, steps + 1)
    batch = stepper.build(requests)
    app.watched.take_steps()
    open_steps: deque[Ticket] = deque()
    for _ in range(steps):
        open_steps.append(driver.submit(batch))
        batch = _next(batch, open_steps[-1])
        if len(open_steps) == 2:
            driver.collect(open_steps.popleft())
    while open_steps:
        driver.collect(open_steps.popleft())
    return decode_of(app, contexts)


def _next(batch: ForwardBatch, ticket: Ticket) -> ForwardBatch:
    """Each token is what the step before draws."""
    requests = batch.num_requests
    drawn = TokenRefs(
        np.zeros(requests, np.int32), np.full(requests, ticket, np.int64), np.arange(requests, dtype=np.int32)
    )
    return replace(
        batch,
        tokens=drawn,
        kv_lengths=batch.kv_lengths + 1,
        positions=batch.positions + 1,
        samplers=replace(batch.samplers, index=batch.samplers.index + np.uint32(1)),
    )
