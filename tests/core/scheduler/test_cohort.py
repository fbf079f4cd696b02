"""Contexts that decode steadily, as rows of arrays: who comes, who leaves, and that nobody can tell the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest

from pie_core.contracts.forward import ProbeKind
from pie_core.engine.messages import (
    Ack,
    BreakOff,
    Cancel,
    CreateContext,
    DropContext,
    EvictRows,
    Failed,
    ForkContext,
    ForwardDone,
    Generate,
    Generated,
    PinRows,
    Probe,
    Progress,
    Sample,
    SamplerSpec,
    SaveSnapshot,
    SetPriority,
    Stepped,
    Steps,
    TruncateContext,
    ended_by,
)
from pie_core.errors import ForwardError
from pie_core.ids import ContextId, ProcessId, Tenant
from pie_core.scheduler.cohort import Cohort
from pie_plugins.drivers.dummy.driver import DummyDriver
from tests.core.engine.recorder import Recorder
from tests.core.engine.stepping import GREEDY, RANDOM, SteppedEngine, dummy

PENALIZED = SamplerSpec(temperature=1.0, presence=0.5)


def opened(contexts: int, driver: DummyDriver | None = None, **options: Any) -> SteppedEngine:
    engine = SteppedEngine(driver or dummy(num_pages=4000), **options)
    for context in range(1, contexts + 1):
        engine.create(context, process=f"p{context}", seed=context)
    return engine


def seats(engine: SteppedEngine) -> int:
    return len(engine.engine._cohort)


def step(engine: SteppedEngine, contexts: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """One turn of all these loops."""
    requests = [engine.new_request() for _ in contexts]
    engine.send(Steps(requests, [ContextId(each) for each in contexts], list(tokens)))
    while not all(map(engine.is_answered, requests)):
        engine.start()
        engine.start()
        engine.finish()
    return [engine.final(each, ForwardDone).tokens[0] for each in requests]


def without_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cohort, "_takes", lambda cohort, running: False)


# ---- what it computes


def test_generations_come_at_their_prompt_and_leave_at_their_end() -> None:
    engine = opened(3)
    requests = [engine.begin_generation(context, [context, 2], 9, RANDOM) for context in (1, 2, 3)]
    engine.start()
    assert seats(engine) == 3
    engine.run()
    assert seats(engine) == 0
    assert engine.status().cohort_rows == 3 * 8
    for context, request in enumerate(requests, start=1):
        assert engine.history(context) == [context, 2, *engine.generated(request)]


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_long_generations_of_many_contexts_give_what_each_gives_alone(page_size: int) -> None:
    """Longer than the ring of tokens, and more of them than the columns have at first."""
    counts = [40 + 29 * (context % 9) for context in range(1, 41)]
    engine = opened(40, dummy(num_pages=20000, page_size=page_size))
    requests = [engine.begin_generation(c, [c], count, RANDOM) for c, count in enumerate(counts, start=1)]
    engine.run()
    for context in (1, 8, 17, 40):
        alone = SteppedEngine(dummy(num_pages=400), max_in_flight=1, speculation_depth=0)
        alone.create(1, seed=context)
        count = counts[context - 1]
        assert engine.generated(requests[context - 1]) == alone.generate(1, [context], count, RANDOM)


def test_one_event_tells_the_tokens_of_all_generations_of_a_step() -> None:
    engine = opened(4)
    for context in range(1, 5):
        engine.begin_generation(context, [context], 6)
    for _ in range(2):
        engine.start()
        engine.finish()
    ticket = engine.engine.start_step()
    assert ticket is not None
    engine.engine.finish_step(ticket, engine.driver.collect(ticket))
    (event,) = engine.engine.take_events()
    assert isinstance(event, Progress)
    assert (len(event.requests), event.lengths, event.positions) == (4, [4] * 4, [4] * 4)


def test_a_loop_is_served_by_steps_for_many_pages_and_rings() -> None:
    engine, plain = opened(3), opened(3, speculation_depth=0)
    first = [engine.draw(context, [5, context], RANDOM) for context in (1, 2, 3)]
    drawn, expected = [first], [[plain.draw(context, [5, context], RANDOM) for context in (1, 2, 3)]]
    for _ in range(300):
        drawn.append(step(engine, (1, 2, 3), drawn[-1]))
    for context in (1, 2, 3):
        request = plain.begin_generation(context, [expected[0][context - 1]], 60, RANDOM)
        plain.run()
        assert [row[context - 1] for row in drawn[1:61]] == plain.generated(request)
    assert engine.status().run_ahead_hits > 400
    assert engine.status().cohort_rows >= 900


def test_histories_of_contexts_in_step_are_written_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    flush, flushed = Cohort._flush, [0]

    def counted(cohort: Cohort, place: int) -> None:
        flushed[-1] += 1
        flush(cohort, place)

    monkeypatch.setattr(Cohort, "_flush", counted)
    engine = opened(128, dummy(num_pages=20000, page_size=16))
    requests = [engine.begin_generation(context, [context % 97], 450) for context in range(1, 129)]
    for _ in range(440):
        engine.start()
        engine.finish()
        flushed.append(0)
    assert sum(flushed) >= 128
    assert max(flushed) <= 4
    engine.run()
    assert engine.history(128) == [31, *engine.generated(requests[-1])]


def differences(one: Any, other: Any, name: str) -> list[str]:
    """Which arrays are not the same; pages may have been taken in another order."""
    if is_dataclass(one):
        pairs = [(getattr(one, each.name), getattr(other, each.name), each.name) for each in fields(one)]
        return [
            found for mine, others, part in pairs for found in differences(mine, others, f"{name}.{part}")
        ]
    if isinstance(one, tuple):
        assert len(one) == len(other)
        return [
            found for pair in zip(one, other, strict=True) for found in differences(pair[0], pair[1], name)
        ]
    if name.endswith("cache.pages"):
        return []
    return [] if one.dtype == other.dtype and np.array_equal(one, other) else [f"{name}: {one} {other}"]


@pytest.mark.parametrize("groups", [("paged",), ("latent", "paged")])
@pytest.mark.parametrize("axes", [1, 3])
def test_its_batches_are_those_that_passes_alone_would_make(
    monkeypatch: pytest.MonkeyPatch, groups: tuple[str, ...], axes: int
) -> None:
    recorded = []
    for with_cohort in (True, False):
        if not with_cohort:
            without_cohort(monkeypatch)
        driver = Recorder(num_pages=400, groups=groups, position_axes=axes)
        engine = opened(5, driver, speculation_depth=0, max_in_flight=1)
        samplers = [GREEDY, RANDOM, SamplerSpec(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, seed=9)]
        engine.forward(1, [1, 2, 3], positions=(4, 9, 2))
        engine.send(TruncateContext(ContextId(1), 2))
        for context in range(1, 6):
            engine.begin_generation(context, [context] * context, 20, samplers[context % 3])
        engine.run()
        recorded.append(driver.batches)
    for number, batches in enumerate(zip(*recorded, strict=True)):
        assert differences(batches[0], batches[1], f"step {number}") == []


def test_prompts_and_rows_share_a_step() -> None:
    driver = Recorder(num_pages=400)
    engine = opened(4, driver, max_in_flight=1)
    for context in (1, 2):
        engine.begin_generation(context, [context], 9, RANDOM)
    engine.start()
    engine.finish()
    prompt = engine.submit(3, range(9), samples=(Sample(3, PENALIZED), Sample(8, GREEDY)), logit_mask=(3, 50))
    probed = engine.submit(4, [1, 2], probes=(Probe(1, ProbeKind.ENTROPY),))
    engine.start()
    batch = driver.batches[-1]
    assert np.diff(batch.indptr).tolist() == [9, 2, 1, 1]
    assert batch.samplers.rows.tolist() == [3, 8, 11, 12]
    assert batch.samplers.mask_index.tolist() == [0, 0, -1, -1]
    assert np.diff(batch.samplers.history_indptr).tolist() == [4, 0, 0, 0]
    engine.run()
    alone = opened(4, speculation_depth=0)
    expected = alone.forward(
        3, range(9), samples=(Sample(3, PENALIZED), Sample(8, GREEDY)), logit_mask=(3, 50)
    )
    assert engine.final(prompt, ForwardDone).tokens == expected.tokens
    assert engine.final(probed, ForwardDone).probes


# ---- who comes, and what makes them leave


@pytest.mark.parametrize(
    ("groups", "sampler"),
    [(("paged",), PENALIZED), (("paged",), SamplerSpec(bias_tokens=(1,), bias_values=(2.0,)))]
    + [((kind,), GREEDY) for kind in ("window", "state")],
)
def test_what_is_not_plain_stays_outside(groups: tuple[str, ...], sampler: SamplerSpec) -> None:
    engine = opened(1, dummy(groups=groups))
    assert len(engine.generate(1, [1], 9, sampler)) == 9
    assert engine.status().cohort_rows == 0


CHANGES: dict[str, Any] = {
    "fork": lambda engine: ForkContext(ContextId(2), ContextId(1)),
    "truncate": lambda engine: TruncateContext(ContextId(1), 3),
    "evict": lambda engine: EvictRows(ContextId(1), 0, 2),
    "pin": lambda engine: PinRows(ContextId(1), 0, 2),
    "priority": lambda engine: SetPriority(ContextId(1), 3),
    "save": lambda engine: SaveSnapshot(engine.new_request(), ContextId(1), "s", b""),
    "drop": lambda engine: DropContext(ContextId(1)),
    "unequal": lambda engine: Steps([engine.new_request()], [ContextId(1)], [96]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_else_happens_takes_a_context_out_and_drops_what_ran_ahead(change: str) -> None:
    engine = opened(1, speculation_depth=3)
    engine.draw(1, [1, 2, 3, 4])
    assert seats(engine) == 1
    assert engine.engine.runs_ahead(ContextId(1))
    engine.send(CHANGES[change](engine))
    assert seats(engine) == 0
    status = engine.status()
    assert (status.run_ahead_drops, status.run_ahead_misses) == (3, int(change == "unequal"))
    engine.run()
    engine.send(DropContext(ContextId(1)), DropContext(ContextId(2)))
    engine.run()


def test_reading_tokens_leaves_a_context_where_it_is() -> None:
    engine = opened(1)
    drawn = [engine.draw(1, [1, 2])]
    for _ in range(3):
        drawn += step(engine, [1], drawn[-1:])
    assert engine.history(1) == [1, 2, *drawn[:-1]]
    assert seats(engine) == 1
    hits = engine.status().run_ahead_hits
    step(engine, [1], drawn[-1:])
    assert engine.status().run_ahead_hits == hits + 1


@pytest.mark.parametrize("kind", ["cancel", "break", "break all"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_generation_can_be_ended_while_its_rows_are_at_the_driver(kind: str, whole: bool) -> None:
    engine = opened(2)
    expected = engine.generate(2, [1, 1], 30, SamplerSpec(temperature=1.0, seed=3))
    request = engine.new_request()
    sampler = SamplerSpec(temperature=1.0, seed=3)
    engine.send(Generate(request, ContextId(1), (1, 1), sampler, (), 30, whole=whole))
    for _ in range(7):
        engine.start()
        engine.start()
        engine.finish()
    assert len(engine.in_flight) == 1
    if kind == "cancel":
        engine.send(Cancel(request))
        assert engine.final(request, Failed).code == "cancelled"
        assert engine.history(1) == []
    else:
        breaking = engine.new_request()
        engine.send(BreakOff(breaking, request, 4 if kind == "break" else None))
        engine.final(breaking, Ack)
        kept = expected[: 4 if kind == "break" else 7]
        assert engine.final(request, Generated).tokens == (kept if whole else [])
        assert engine.history(1) == [1, 1, *kept]
    engine.run()
    assert engine.draw(1, [7]) >= 0


def test_rows_that_fail_end_alone() -> None:
    plain = opened(3)
    tokens = {c: plain.generate(c, [c], 12, RANDOM) for c in (1, 2, 3)}
    bad = next(each for each in tokens[1][3:] if each not in tokens[2] + tokens[3] + tokens[1][:3])
    engine = opened(3, dummy(num_pages=4000, fail_token=bad))
    requests = {c: engine.begin_generation(c, [c], 12, RANDOM) for c in (1, 2, 3)}
    engine.run()
    assert f"token {bad} fails" in engine.final(requests[1], Failed).message
    assert [engine.generated(requests[c]) for c in (2, 3)] == [tokens[2], tokens[3]]
    assert engine.history(1) == []


def test_a_failed_step_ends_its_rows_and_guesses_are_forgotten() -> None:
    engine = opened(2)
    generation = engine.begin_generation(1, [1], 20)
    drawn = [engine.draw(2, [1])]
    engine.run_until_answered(engine.submit(2, drawn[-1:], samples=(Sample(0, GREEDY),)))
    while engine.in_flight:
        ticket = engine.in_flight.popleft()
        engine.driver.collect(ticket)
        engine.engine.finish_step(ticket, ForwardError("the device failed"))
        engine._take_events()
    engine.run()
    assert engine.is_answered(generation)
    assert seats(engine) <= 1
    assert engine.history(2) == [1, drawn[0]]


def test_a_step_waits_behind_what_its_context_does() -> None:
    engine = opened(1)
    (token,) = [engine.draw(1, [1])]
    first, second, third = (engine.new_request() for _ in range(3))
    one = [ContextId(1)]
    engine.send(Steps([first], one, [token]), Steps([second], one, [7]), Steps([third], one, [8]))
    engine.run()
    for request, length in ((first, 2), (second, 3), (third, 4)):
        assert engine.final(request, ForwardDone).length == length
    assert engine.history(1) == [1, token, 7, 8]


def test_steps_have_the_engines_time_limit() -> None:
    engine = opened(2, request_timeout_s=5.0)
    tokens = [engine.draw(context, [context]) for context in (1, 2)]
    requests = [engine.new_request() for _ in tokens]
    engine.run()
    engine.send(Steps(requests, [ContextId(1), ContextId(2)], [tokens[0], 50]))
    engine.final(requests[0], ForwardDone)
    assert engine.engine.wakes_in_s == 5.0
    engine.now = 6.0
    engine.start()
    assert engine.final(requests[1], Failed).code == "deadline-exceeded"
    engine.run()
    assert engine.history(2) == [2]


@pytest.mark.parametrize("limit", [{"max_tokens_per_process": 9}, {"max_requests_per_process": 1}])
def test_limits_hold_for_steps_as_for_passes(limit: dict[str, Any]) -> None:
    engine = opened(1, **limit)
    drawn = [engine.draw(1, [1, 2])]
    while len(drawn) < 8:
        drawn += step(engine, [1], drawn[-1:])
    (request,) = [engine.new_request()]
    engine.send(Steps([request], [ContextId(1)], drawn[-1:]))
    engine.run()
    if "max_tokens_per_process" in limit:
        assert engine.final(request, Failed).code == "limit-exceeded"
    else:
        engine.final(request, ForwardDone)


def test_many_generations_of_one_process_count_every_token() -> None:
    engine = SteppedEngine(dummy(num_pages=400), max_tokens_per_process=1000)
    for context in (1, 2, 3):
        engine.create(context)
        engine.begin_generation(context, [1, 2], 20)
    engine.run()
    assert engine.engine._quotas.tokens["p"] == 3 * 22


def test_what_a_generation_wrote_is_found_by_others() -> None:
    engine = opened(2)
    engine.send()
    drawn = engine.generate(1, [1, 2, 3, 4], 13)
    before = engine.status().prefix_hit_tokens
    engine.create(9, process="p1", tenant="t")
    engine.forward(9, [1, 2, 3, 4, *drawn, 5])
    assert engine.status().prefix_hit_tokens - before == 16


# ---- when not all fit


def test_rows_take_turns_with_each_other_and_with_passes() -> None:
    engine = opened(6, max_batch_requests=2)
    requests = {c: engine.begin_generation(c, [c], 12) for c in range(1, 6)}
    engine.begin_generation(6, [6], 12, PENALIZED)
    for _ in range(24):
        engine.start()
        engine.finish()
    lengths = [len(engine.generated(each)) for each in requests.values()]
    assert max(lengths) - min(lengths) <= 2
    assert min(lengths) >= 5


def test_rows_of_higher_priority_go_first() -> None:
    engine = opened(4, max_batch_requests=2, max_in_flight=1)
    requests = {c: engine.new_request() for c in range(1, 5)}
    for context, request in requests.items():
        priority = int(context > 2)
        engine.send(Generate(request, ContextId(context), (1,), GREEDY, (), 10, priority=priority))
    for _ in range(10):
        engine.start()
        engine.finish()
    assert [len(engine.generated(requests[c])) for c in range(1, 5)] == [0, 0, 10, 10]


def test_a_prompt_is_not_starved_by_rows() -> None:
    engine = opened(9, max_batch_tokens=8)
    for context in range(1, 9):
        engine.begin_generation(context, [context], 100)
    engine.start()
    engine.finish()
    prompt = engine.submit(9, [1] * 20)
    for _ in range(20):
        engine.start()
        engine.finish()
    assert engine.is_answered(prompt)


def test_guesses_for_which_there_is_no_room_come_next() -> None:
    """Five programs that have not asked for more, two rows in a step."""
    engine = opened(5, max_batch_requests=2, speculation_depth=3)
    for context in range(1, 6):
        engine.submit(context, [context], samples=(Sample(0, GREEDY),))
    ahead = []
    while engine.start() or engine.in_flight:
        engine.finish()
        columns = engine.engine._cohort.columns
        ahead.append(np.ptp((columns.submitted - columns.claimed)[:5]) if seats(engine) == 5 else 0)
    assert max(ahead) <= 2
    assert columns.submitted[:5].tolist() == [4] * 5


def test_a_step_whose_context_leaves_is_answered_and_limited_as_a_step() -> None:
    engine = opened(2, request_timeout_s=5.0)
    tokens = [engine.draw(context, [context]) for context in (1, 2)]
    requests = [engine.new_request() for _ in tokens]
    step(engine, (1, 2), tokens)
    engine.send(Steps(requests, [ContextId(1), ContextId(2)], [50, 51]))
    assert seats(engine) == 2
    for context in (1, 2):
        engine.send(CreateContext(ContextId(context), ProcessId("other"), Tenant("t"), 1))
    assert seats(engine) == 0
    assert engine.engine.wakes_in_s == 5.0
    while (ticket := engine.engine.start_step()) is not None:
        engine.engine.finish_step(ticket, engine.driver.collect(ticket))
    answers = [event for event in engine.engine.take_events() if not isinstance(event, Failed)]
    assert all(isinstance(each, Stepped) for each in answers)
    assert sorted(request for each in answers for request in ended_by([each])) == requests


def test_stop_tokens_may_lie_outside_the_vocabulary_and_be_many() -> None:
    free = opened(1).generate(1, [1], 30)
    for others in ([2**32 - 1, -7], list(range(200, 230)), list(range(200, 300))):
        engine = opened(1)
        assert engine.generate(1, [1], 30, stop_tokens=others) == free
        assert (engine.status().cohort_rows > 0) == (len(others) <= 64)
        engine = opened(1)
        assert engine.generate(1, [1], 30, stop_tokens=[free[9], *others]) == free[: free.index(free[9])]


def test_who_takes_another_ones_place_draws_in_its_own_way() -> None:
    driver = Recorder(num_pages=400)
    engine = opened(2, driver)
    drawn = []
    for context, sampler in ((1, GREEDY), (2, RANDOM)):
        engine.begin_generation(context, [context] * 3, 6, sampler)
        engine.run()
        batch = driver.batches[-1]
        drawn.append(
            (batch.context_ids.tolist(), batch.samplers.temperature.tolist(), batch.samplers.stream.tolist())
        )
    assert drawn == [([1], [0.0], [1]), ([2], [1.0], [2])]


def test_settings_of_samplers_are_the_same_objects_while_the_same_contexts_decode() -> None:
    driver = Recorder(num_pages=400)
    engine = opened(2, driver)
    for context in (1, 2):
        engine.begin_generation(context, [context] * 3, 6, RANDOM)
    engine.run()
    first, second = (batch.samplers for batch in driver.batches[-3:-1])
    assert first.stream is second.stream
    assert first.temperature is second.temperature
    with pytest.raises(ValueError, match="read-only"):
        first.temperature[0] = 0.5
