"""Who comes into a step where memory is short: nobody waits for ever, and long queues cost no more than short ones."""

from __future__ import annotations

import itertools

import pytest

from pie_core.engine.messages import DropContext
from pie_core.ids import ContextId, RequestId
from pie_core.scheduler.choosing import MOST_OVERTAKEN, TRIED_IN_VAIN
from pie_core.scheduler.prefixes import Prefixes
from pie_core.scheduler.request import Pass, Readiness
from tests.core.engine.stepping import SteppedEngine, dummy

SYSTEM = [(11 * i) % 97 for i in range(40)]  # ten pages of four


class Crowd:
    """Short requests that all begin alike: so many at a time, and one more for each that ends."""

    def __init__(self, engine: SteppedEngine, count: int) -> None:
        self.engine, self.ended = engine, 0
        self._ids, self._count = itertools.count(1000), count
        self._open: dict[RequestId, ContextId] = {}

    def step(self) -> None:
        while len(self._open) < self._count:
            context = ContextId(next(self._ids))
            self.engine.create(context, process=f"p{context}")
            request = self.engine.begin_generation(context, [*SYSTEM, context % 97, 3], 6)
            self._open[request] = context
        self.engine.start()
        if self.engine.in_flight:
            self.engine.finish()
        for request in [each for each in self._open if self.engine.is_answered(each)]:
            self.engine.send(DropContext(self._open.pop(request)))
            self.ended += 1


@pytest.mark.parametrize("num_host_pages", [0, 64])
def test_whoever_needs_much_is_not_overtaken_for_ever_by_those_whose_rows_are_cached(
    num_host_pages: int,
) -> None:
    crowd = Crowd(SteppedEngine(dummy(num_pages=32, num_host_pages=num_host_pages)), count=12)
    engine = crowd.engine
    for _ in range(40):
        crowd.step()
    engine.create(1, process="large")
    large = engine.begin_generation(1, [5] * 88, 4)
    before = crowd.ended
    while not engine.is_answered(large) and crowd.ended < 1000:
        crowd.step()
    assert engine.is_answered(large)
    assert crowd.ended - before <= 12 + 4 * MOST_OVERTAKEN


def test_a_long_queue_is_not_gone_through_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is where nothing runs, and the first in line cannot."""
    looked_at: list[int] = []  # passes, by choice
    begin_choice, readiness = Prefixes.begin_choice, Prefixes.readiness

    def beginning(self: Prefixes) -> None:
        looked_at.append(0)
        begin_choice(self)

    def counting(self: Prefixes, waiting: Pass) -> Readiness:
        looked_at[-1] += 1
        return readiness(self, waiting)

    monkeypatch.setattr(Prefixes, "begin_choice", beginning)
    monkeypatch.setattr(Prefixes, "readiness", counting)
    engine = SteppedEngine(dummy(num_pages=64))
    requests = []
    for context in range(1, 301):
        engine.create(context, process=f"p{context}")
        requests.append(engine.begin_generation(context, [context % 97, context // 97, *SYSTEM], 6))
    for _ in range(60):
        while engine.start():
            pass
        engine.finish()
    assert engine.status().waiting > 200
    in_a_step = engine.engine.options.max_batch_tokens // (len(SYSTEM) + 2)
    too_many = [each for each in looked_at if each > TRIED_IN_VAIN + in_a_step + 1]
    assert len(too_many) <= len(looked_at) / 20
    engine.run()
    assert all(engine.is_answered(each) for each in requests)


def test_the_first_in_turn_come_first_however_many_wait() -> None:
    """One program has two hundred, and each of three others one: they have not to wait for the two hundred."""
    engine = SteppedEngine(dummy(num_pages=32))
    for context in range(1, 201):
        engine.create(context, process="many")
        engine.begin_generation(context, [context % 97, context // 97, *SYSTEM], 6)
    engine.start()
    few = []
    for context in range(201, 204):
        engine.create(context, process=f"p{context}")
        few.append(engine.begin_generation(context, [context % 97, context // 97, *SYSTEM], 6))
    urgent = 300
    engine.create(urgent, process="many")
    first = engine.begin_generation(urgent, [1, 2, 3, *SYSTEM], 6, priority=1)
    while not all(map(engine.is_answered, [*few, first])):
        engine.start()
        engine.finish()
    assert engine.status().waiting > 180


def test_higher_priorities_overtake_whoever_is_the_next_to_come() -> None:
    crowd = Crowd(SteppedEngine(dummy(num_pages=32)), count=12)
    engine = crowd.engine
    for _ in range(40):
        crowd.step()
    engine.create(1, process="large")
    large = engine.begin_generation(1, [5] * 88, 4)
    waiting = next(each for each in engine.engine._loop.waiting if each.request == large)
    while waiting.overtaken < MOST_OVERTAKEN:
        crowd.step()
    engine.create(2, process="urgent")
    urgent = engine.begin_generation(2, [*SYSTEM, 1, 3], 2, priority=1)
    for _ in range(4):
        crowd.step()
    assert engine.is_answered(urgent)
    assert not engine.is_answered(large)
