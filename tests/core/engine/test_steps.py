"""Loops of programs: a `Step` is the pass that a `Forward` with the same sampler would be, alone or among others."""

from __future__ import annotations

from collections.abc import Sequence

from pie_core.engine.messages import Failed, ForwardDone, Generate, Generated, Sample, SamplerSpec, Steps
from pie_core.ids import ContextId, RequestId
from tests.core.engine.stepping import GREEDY, RANDOM, SteppedEngine


def step(engine: SteppedEngine, contexts: Sequence[int], tokens: Sequence[int]) -> list[RequestId]:
    requests = [engine.new_request() for _ in contexts]
    engine.send(Steps(requests, [ContextId(each) for each in contexts], list(tokens)))
    return requests


def test_steps_draw_what_the_same_passes_draw() -> None:
    engine, plain = SteppedEngine(), SteppedEngine(speculation_depth=0)
    samplers = {1: GREEDY, 2: RANDOM, 3: SamplerSpec(temperature=1.0, seed=5)}
    drawn: dict[int, list[int]] = {}
    expected: dict[int, list[int]] = {}
    for context, sampler in samplers.items():
        for each, found in ((engine, drawn), (plain, expected)):
            each.create(context)
            found[context] = [each.draw(context, [1, 2, context], sampler)]
    for _ in range(9):
        requests = step(engine, list(samplers), [drawn[each][-1] for each in samplers])
        engine.run()
        for context, request in zip(samplers, requests, strict=True):
            done = engine.final(request, ForwardDone)
            drawn[context] += done.tokens
            assert (done.length, done.position) == (2 + len(drawn[context]), 2 + len(drawn[context]))
            expected[context].append(plain.draw(context, expected[context][-1:], samplers[context]))
    assert drawn == expected
    assert engine.status().run_ahead_hits == 27


def test_a_step_that_feeds_another_token_is_served_all_the_same() -> None:
    engine, plain = SteppedEngine(), SteppedEngine(speculation_depth=0)
    for each in (engine, plain):
        each.create(1)
        each.draw(1, [1, 2], RANDOM)
    (request,) = step(engine, [1], [50])
    engine.run()
    assert engine.final(request, ForwardDone).tokens == [plain.draw(1, [50], RANDOM)]


def test_steps_of_one_context_take_effect_in_their_order() -> None:
    engine = SteppedEngine()
    engine.create(1)
    engine.draw(1, [1])
    step(engine, [1, 1, 1], [7, 8, 9])
    engine.run()
    assert engine.history(1) == [1, 7, 8, 9]


def test_a_step_on_a_context_without_a_pass_to_repeat_fails_alone() -> None:
    engine = SteppedEngine()
    for context in (1, 2):
        engine.create(context)
    engine.draw(1, [1])
    good, bad, missing = step(engine, [1, 2, 3], [2, 2, 2])
    engine.run()
    engine.final(good, ForwardDone)
    assert "nothing to repeat" in engine.final(bad, Failed).message
    assert engine.final(missing, Failed).code == "not-found"
    two = engine.submit(1, [3, 4], samples=(Sample(0, GREEDY), Sample(1, GREEDY)))
    engine.run()
    engine.final(two, ForwardDone)
    (again,) = step(engine, [1], [5])
    engine.run()
    assert "nothing to repeat" in engine.final(again, Failed).message


def test_a_whole_generation_is_told_at_its_end() -> None:
    engine = SteppedEngine()
    for context in (1, 2):
        engine.create(context)
    expected = engine.generate(1, [1, 2, 3], 20, RANDOM)
    request = engine.new_request()
    engine.send(Generate(request, ContextId(2), (1, 2, 3), RANDOM, (), 20, whole=True))
    engine.run()
    assert list(engine.events[request]) == [Generated(request, expected, "length", 23, 23)]
