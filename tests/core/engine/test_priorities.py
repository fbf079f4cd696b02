"""Whose passes go first, and what a request that ends early gives back."""

from __future__ import annotations

from pie_core.engine.messages import (
    Cancel,
    CreateContext,
    Failed,
    Forward,
    OpenSnapshot,
    SaveSnapshot,
    SetPriority,
)
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant
from tests.core.engine.stepping import SteppedEngine, dummy


def create(engine: SteppedEngine, context: int, priority: int = 0) -> None:
    owner = (ProcessId(f"p{context}"), Tenant("t"))
    engine.send(CreateContext(ContextId(context), *owner, seed=7, priority=priority))


def order_of(engine: SteppedEngine, requests: list[RequestId]) -> list[RequestId]:
    """In which order the requests are answered, a step at a time."""
    answered: list[RequestId] = []
    while len(answered) < len(requests):
        engine.start()
        engine.finish()
        answered += [each for each in requests if engine.is_answered(each) and each not in answered]
    return answered


def one_at_a_time() -> SteppedEngine:
    return SteppedEngine(max_batch_requests=1, max_in_flight=1, speculation_depth=0)


def test_passes_have_the_priority_of_their_context_unless_they_say_otherwise() -> None:
    engine = one_at_a_time()
    for context, priority in ((1, -5), (2, 0), (3, 5), (4, 0)):
        create(engine, context, priority)
    requests = [engine.submit(each, [1]) for each in (1, 2, 3)] + [engine.submit(4, [1], priority=9)]
    assert order_of(engine, requests) == [requests[place] for place in (3, 2, 1, 0)]


def test_a_context_gets_another_priority_for_what_comes_behind() -> None:
    engine = one_at_a_time()
    create(engine, 1)
    create(engine, 2)
    for context in (1, 2):
        engine.forward(context, [1])
    engine.send(SetPriority(ContextId(2), 3))
    requests = [engine.submit(1, [2]), engine.submit(2, [2])]
    assert order_of(engine, requests) == requests[::-1]


def test_a_fork_has_its_source_s_priority_and_an_opened_snapshot_its_opener_s() -> None:
    engine = one_at_a_time()
    create(engine, 1, priority=4)
    create(engine, 2)
    engine.forward(1, [1])
    engine.fork(1, 3)
    engine.send(SaveSnapshot(engine.new_request(), ContextId(1), "kept", b""))
    engine.send(
        OpenSnapshot(
            engine.new_request(), ContextId(4), ProcessId("p4"), Tenant("t"), "kept", take=False, priority=-1
        )
    )
    engine.run()
    requests = [engine.submit(each, [2]) for each in (4, 2, 3)]
    assert order_of(engine, requests) == requests[::-1]


def test_a_higher_priority_has_pages_before_those_that_asked_earlier() -> None:
    engine = SteppedEngine(dummy(num_pages=8), speculation_depth=0, prefix_cache=False)
    for context in (1, 2, 3):
        create(engine, context, priority=context)
    holder = engine.begin_generation(1, [1] * 20, 4)
    engine.start()
    waiting = [engine.submit(2, [2] * 20), engine.submit(3, [3] * 20)]  # 5 pages each: room for one
    engine.run_until_answered(waiting[1])
    assert not engine.is_answered(waiting[0])
    engine.run()
    assert all(map(engine.is_answered, [holder, *waiting]))


def test_of_idle_contexts_the_lowest_priority_gives_its_pages_up_first() -> None:
    engine = SteppedEngine(dummy(num_pages=10, num_host_pages=0), prefix_cache=False, speculation_depth=0)
    for context, priority in ((1, 5), (2, 0), (3, 0)):
        create(engine, context, priority)
    engine.forward(1, [1] * 16)  # used longest ago, but worth more
    engine.forward(2, [2] * 16)
    engine.forward(3, [3] * 16)
    held = [engine.engine.context(ContextId(each)) for each in (1, 2)]
    assert [each is not None and each.written for each in held] == [16, 0]


def test_a_cancelled_or_overdue_pass_has_freed_its_pages_when_the_steps_at_the_driver_are_over() -> None:
    engine = SteppedEngine(max_batch_tokens=8)
    for context in (1, 2):
        create(engine, context)
    cancelled = engine.submit(1, [1] * 60)
    overdue = engine.submit(2, [2] * 60, timeout_s=1.0)
    engine.start()
    engine.start()
    engine.now = 2.0
    engine.send(Cancel(cancelled))
    while engine.in_flight:
        engine.finish()
        engine.engine.start_step()
    assert engine.final(cancelled, Failed).code == "cancelled"
    assert engine.status().steps == 2
    assert engine.all_pages_are_free()
    engine.send(Forward(engine.new_request(), ContextId(2), (5,)))
    engine.run()
    assert engine.final(overdue, Failed).code == "deadline-exceeded"
    assert engine.history(2) == [5]
