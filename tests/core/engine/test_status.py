"""What an engine counts of itself, and tells in its Status."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pie_core.engine.histograms import SECONDS, Distribution, Histogram
from pie_core.engine.messages import Failed, Generated, ReadStatus, Status, Steps
from pie_core.ids import ContextId
from tests.core.engine.stepping import SteppedEngine, dummy


def status(engine: SteppedEngine, processes: bool = False) -> Status:
    request = engine.new_request()
    engine.send(ReadStatus(request=request, processes=processes))
    return engine.final(request, Status)


def test_a_histogram_counts_each_value_in_the_first_interval_that_holds_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, times in ((0.5, 1), (1.0, 1), (1.5, 3), (9.0, 1)):
        histogram.observe(value, times)
    assert histogram.distribution() == Distribution((1.0, 2.0), (2, 3, 1), 15.0)
    assert histogram.distribution().mean == 2.5


@given(st.lists(st.floats(0, 20), max_size=30))
def test_many_values_at_once_count_as_one_by_one(values: list[float]) -> None:
    at_once, one_by_one = Histogram(SECONDS), Histogram(SECONDS)
    at_once.observe_all(np.array(values))
    for value in values:
        one_by_one.observe(value)
    assert at_once.distribution().counts == one_by_one.distribution().counts
    assert at_once.distribution().total == pytest.approx(one_by_one.distribution().total)


def test_quantiles_lie_within_their_interval() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    assert histogram.distribution().quantile(0.5) is None
    for value, times in ((0.5, 4), (3.0, 4)):
        histogram.observe(value, times)
    early = histogram.distribution()
    assert [early.quantile(each) for each in (0.25, 0.5, 0.75, 1.0)] == [0.5, 1.0, 3.0, 4.0]
    histogram.observe(100.0, 2)
    assert histogram.distribution().since(early) == Distribution((1.0, 2.0, 4.0), (0, 0, 0, 2), 200.0)
    assert histogram.distribution().quantile(1.0) == 4.0
    assert early.since(Distribution()) == early


def test_every_step_counts_once_by_its_size_and_its_device_time() -> None:
    engine = SteppedEngine(max_batch_requests=3, speculation_depth=0)
    for context in range(1, 6):
        engine.create(context)
    for context in range(1, 6):
        engine.submit(context, [context, 2])
    engine.run()
    found = status(engine)
    assert (found.steps, found.passes, found.tokens) == (2, 5, 10)
    assert found.batch_sizes.count == found.step_seconds.count == found.steps
    assert found.batch_sizes.total == found.passes
    assert found.step_seconds.total == found.busy_s
    sizes = dict(zip(found.batch_sizes.bounds, found.batch_sizes.counts, strict=False))
    assert sizes[2.0] == sizes[4.0] == 1


def test_a_generation_is_timed_from_its_request_to_its_first_token_and_between_tokens() -> None:
    engine = SteppedEngine(max_in_flight=1)
    engine.create(1)
    request = engine.begin_generation(1, [1, 2, 3], 5)
    while not engine.is_answered(request):
        engine.now += 0.3
        engine.start()
        engine.finish()
    found = status(engine)
    assert len(engine.generated(request)) == found.between_tokens_seconds.count + 1 == 5
    assert (found.first_token_seconds.count, found.first_token_seconds.total) == (1, 0.3)
    assert abs(found.between_tokens_seconds.mean - 0.3) < 1e-9
    assert found.sampled_tokens >= 5


def test_passes_of_loops_are_timed_in_one_step_of_sixteen() -> None:
    engine = SteppedEngine(speculation_depth=0, max_in_flight=1)
    for context in (1, 2):
        engine.create(context)
        engine.draw(context, [1, 2, 3])
    for _ in range(32):
        requests = [engine.new_request() for _ in range(2)]
        engine.send(Steps(requests, [ContextId(1), ContextId(2)], [4, 5]))
        engine.start()
        engine.now += 0.3
        engine.finish()
    found = status(engine).pass_wait_seconds
    assert found.count == 4
    assert found.total == pytest.approx(1.2)
    assert dict(zip(found.bounds, found.counts, strict=False))[0.5] == 4


def test_a_generation_that_fails_has_no_time_between_tokens() -> None:
    engine = SteppedEngine(request_timeout_s=1.0)
    engine.create(1)
    request = engine.begin_generation(1, [1, 2, 3], 50)
    engine.start()
    engine.finish()
    engine.now = 2.0
    engine.run()
    assert engine.final(request, Failed).code == "deadline-exceeded"
    found = status(engine)
    assert found.timeouts == 1
    assert found.first_token_seconds.count == 1
    assert found.between_tokens_seconds.count == 0


def test_prompts_are_looked_up_once_and_hits_are_among_them() -> None:
    engine = SteppedEngine(dummy(page_size=4))
    prompt = list(range(1, 18))
    for context in (1, 2):
        engine.create(context)
        engine.forward(context, prompt)
    found = status(engine)
    assert (found.prefix_lookup_tokens, found.prefix_hit_tokens) == (34, 16)


def test_the_processes_of_an_engine_are_told_to_those_who_ask() -> None:
    engine = SteppedEngine()
    engine.create(1, process="p")
    engine.create(2, process="p")
    engine.create(3, process="q")
    request = engine.begin_generation(1, [1, 2, 3], 4)
    engine.run()
    assert engine.final(request, Generated).finish == "length"
    engine.submit(3, [1, 2])
    assert status(engine).processes == []
    p, q = status(engine, processes=True).processes
    assert (p.process, p.contexts, p.open_requests, p.tokens) == ("p", 2, 0, 7)
    assert p.pages > 0
    assert (q.process, q.contexts, q.open_requests, q.tokens) == ("q", 1, 1, 2)


def test_a_loop_of_a_program_has_an_open_request_while_its_pass_runs() -> None:
    engine = SteppedEngine(speculation_depth=0)
    engine.create(1)
    engine.draw(1, [1, 2, 3])
    engine.send(Steps([engine.new_request()], [ContextId(1)], [4]))
    engine.start()
    (running,) = status(engine, processes=True).processes
    engine.finish()
    (done,) = status(engine, processes=True).processes
    assert (running.open_requests, done.open_requests) == (1, 0)


def test_groups_are_named_in_the_order_of_their_pages() -> None:
    found = status(SteppedEngine(dummy(groups=("paged", "window"), window=6)))
    assert found.groups
    assert len(found.groups) == len(found.total_pages) == len(found.free_pages) == len(found.cached_pages)


def test_a_step_that_fails_counts_its_passes() -> None:
    engine = SteppedEngine(dummy())

    def breaks(ticket: object) -> None:
        raise RuntimeError("the device is gone")

    engine.driver.collect = breaks  # type: ignore[method-assign, assignment]
    engine.create(1)
    request = engine.submit(1, [1], samples=())
    engine.run()
    assert engine.final(request, Failed).code == "forward"
    assert status(engine).failed_passes == 1
