"""What runs ahead: when it is claimed, when it is dropped, and that nobody can tell but by the counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pie_core.contracts.forward import NO_TICKET, ProbeKind
from pie_core.engine.messages import (
    Ack,
    BreakOff,
    Cancel,
    DropContext,
    EndProcess,
    ForwardDone,
    Probe,
    Sample,
    SamplerSpec,
    SaveSnapshot,
    TruncateContext,
)
from pie_core.ids import ContextId, ProcessId, RequestId
from tests.core.engine.recorder import Recorder
from tests.core.engine.stepping import GREEDY, RANDOM, SteppedEngine, dummy

PENALIZED = SamplerSpec(temperature=1.0, repetition=1.4, presence=0.5)
BIASED = SamplerSpec(bias_tokens=(3,), bias_values=(9.0,))


def stepped(depth: int, **options: Any) -> SteppedEngine:
    engine = SteppedEngine(dummy(**options), speculation_depth=depth)
    engine.create(1)
    return engine


def loop(
    engine: SteppedEngine,
    count: int,
    sampler: SamplerSpec = GREEDY,
    tokens: Sequence[int] = (1, 2),
    context: int = 1,
    **fields: Any,
) -> list[int]:
    """The explicit loop, each pass sent as soon as the one before is answered."""
    drawn: list[int] = []
    for _ in range(count):
        samples = (Sample(len(tokens) - 1, sampler),)
        request = engine.submit(context, tokens, samples=samples, **fields)
        engine.run_until_answered(request)
        drawn += engine.final(request, ForwardDone).tokens
        tokens = drawn[-1:]
    return drawn


def counters(engine: SteppedEngine) -> tuple[int, int, int]:
    status = engine.status()
    return status.run_ahead_hits, status.run_ahead_misses, status.run_ahead_drops


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("sampler", [GREEDY, RANDOM, PENALIZED, BIASED])
@pytest.mark.parametrize("groups", [("paged",), ("state",), ("paged", "window", "state")])
def test_every_pass_of_a_plain_loop_but_the_first_is_served_from_a_guess(
    depth: int, sampler: SamplerSpec, groups: tuple[str, ...]
) -> None:
    plain, ahead = stepped(0, groups=groups, window=5), stepped(depth, groups=groups, window=5)
    assert loop(ahead, 12, sampler) == loop(plain, 12, sampler)
    assert counters(plain) == (0, 0, 0)
    assert counters(ahead) == (11, 0, 0)


def test_a_guess_is_fed_by_reference_and_everything_else_is_known_before() -> None:
    driver = Recorder()
    engine = SteppedEngine(driver, speculation_depth=1)
    engine.create(1, seed=5)
    engine.submit(1, [1, 2, 3], samples=(Sample(2, PENALIZED),))
    assert engine.start()
    assert engine.start()
    first, guess = driver.batches
    assert first.tokens.tickets.tolist() == [NO_TICKET] * 3
    assert (guess.tokens.tickets.tolist(), guess.tokens.rows.tolist()) == ([0], [0])
    assert (guess.kv_lengths.tolist(), guess.positions.tolist()) == ([3], [3])
    assert (guess.samplers.index.tolist(), guess.samplers.stream.tolist()) == ([4], [5])
    history = guess.samplers.history
    assert history.ids.tolist()[:3] == [1, 2, 3]
    assert history.tickets.tolist() == [NO_TICKET, NO_TICKET, NO_TICKET, 0]


def test_without_references_a_guess_waits_until_its_token_is_known() -> None:
    engine = stepped(1, without=("ticket-tokens",))
    assert loop(engine, 6) == loop(stepped(0), 6)
    engine.run()
    tokens = loop(engine, 1, tokens=[5])
    engine.run()
    loop(engine, 1, tokens=tokens)
    assert counters(engine)[0] == 1


def test_the_chain_of_guesses_is_as_long_as_the_depth_and_waits_for_the_program() -> None:
    engine = stepped(3)
    drawn = loop(engine, 1)
    engine.run()
    assert engine.status().steps == 4
    before = engine.status().steps
    for _ in range(3):
        drawn += engine.forward(1, drawn[-1:], samples=(Sample(0, GREEDY),)).tokens
    assert counters(engine) == (3, 0, 0)
    assert engine.status().steps == before + 3
    assert drawn == loop(stepped(0), 4)


OTHERS: list[dict[str, Any]] = [
    {"tokens": [96]},
    {"tokens": [1, 2]},
    {"sampler": RANDOM},
    {"sampler": BIASED},
    {"sampler": SamplerSpec(seed=3)},
    {"positions": (40,)},
    {"masks": ((0, 2),)},
    {"logit_mask": (3, 4)},
    {"probes": (Probe(0, ProbeKind.ENTROPY),)},
    {"samples": ()},
    {"samples": (Sample(0, GREEDY), Sample(0, GREEDY))},
]


@pytest.mark.parametrize("fields", OTHERS, ids=[" ".join(each) for each in OTHERS])
@pytest.mark.parametrize("groups", [("paged",), ("latent", "window")])
def test_a_pass_that_is_not_the_guess_in_any_way_misses_and_gives_what_it_gives_alone(
    fields: dict[str, Any], groups: tuple[str, ...]
) -> None:
    answers = []
    for depth in (0, 2):
        engine = stepped(depth, groups=groups)
        drawn = loop(engine, 3)
        fields = dict(fields)
        tokens = fields.get("tokens", drawn[-1:])
        samples = fields.get("samples", (Sample(len(tokens) - 1, fields.get("sampler", GREEDY)),))
        rest = {
            name: fields[name] for name in ("positions", "masks", "logit_mask", "probes") if name in fields
        }
        done = engine.forward(1, tokens, samples=samples, **rest)
        answers.append((done.tokens, done.probes, done.length, done.position, loop(engine, 3, tokens=[7])))
    assert answers[0] == answers[1]
    assert counters(engine)[1] >= 1


def test_the_same_pass_written_out_in_full_is_a_hit() -> None:
    engine = stepped(1)
    drawn = loop(engine, 2)
    done = engine.forward(1, drawn[-1:], positions=(3,), samples=(Sample(0, SamplerSpec(seed=None)),))
    assert done.tokens == loop(stepped(0), 3)[-1:]
    assert counters(engine)[:2] == (2, 0)


def test_a_program_can_forbid_the_guess_behind_one_pass() -> None:
    engine = stepped(4)
    assert loop(engine, 6, pass_speculation=False) == loop(stepped(0), 6)
    assert counters(engine) == (0, 0, 0)
    assert engine.status().steps == 6


@pytest.mark.parametrize("change", ["fork", "truncate", "save", "generate"])
@pytest.mark.parametrize("groups", [("paged",), ("paged", "window", "state")])
def test_whatever_else_happens_to_a_context_never_sees_what_runs_ahead(
    change: str, groups: tuple[str, ...]
) -> None:
    answers = []
    for depth in (0, 3):
        engine = stepped(depth, groups=groups, window=5)
        drawn: list[Any] = loop(engine, 4, RANDOM)
        if change == "fork":
            engine.fork(1, 2)
            drawn += loop(engine, 3, RANDOM, [drawn[-1]], context=2)
        elif change == "truncate":
            engine.send(TruncateContext(ContextId(1), 3))
        elif change == "save":
            request = engine.new_request()
            engine.send(SaveSnapshot(request, ContextId(1), "s", b""))
            engine.run()
            engine.final(request, Ack)
        else:
            drawn += engine.generate(1, [drawn[-1]], 4, RANDOM)
        drawn += loop(engine, 3, RANDOM, [drawn[-1]])
        answers.append((drawn, engine.history(1)))
    assert answers[0] == answers[1]
    assert counters(engine)[2] >= 1


def test_a_generation_keeps_two_steps_at_the_driver() -> None:
    engine = stepped(0)
    engine.begin_generation(1, [1, 2], 20)
    for _ in range(5):
        assert engine.start()
        if len(engine.in_flight) == 2:
            engine.finish()
        assert len(engine.in_flight) >= 1
    assert not engine.start() or len(engine.in_flight) == 2


def test_a_stop_token_is_noticed_one_step_late_and_the_late_step_leaves_no_trace() -> None:
    plain = SteppedEngine(max_in_flight=1)
    plain.create(1)
    tokens = plain.generate(1, [1, 2], 8)
    stop = tokens[5]
    for groups in (("paged",), ("state",)):
        engine, alone = stepped(1, groups=groups), SteppedEngine(dummy(groups=groups), max_in_flight=1)
        alone.create(1)
        free = alone.generate(1, [1, 2], 8)
        stop = free[5]
        kept = free[: free.index(stop)]
        assert engine.generate(1, [1, 2], 0, stop_tokens=[stop]) == kept
        assert counters(engine)[2] == 1
        assert engine.history(1) == [1, 2, *kept]
        engine.send(DropContext(ContextId(1)))
        engine.run()
        assert engine.all_pages_are_free()


def test_a_generation_computes_nothing_beyond_its_limit() -> None:
    engine = stepped(4)
    engine.generate(1, [1, 2], 7)
    assert engine.status().steps == 7
    assert counters(engine) == (0, 0, 0)


def test_pages_that_a_step_may_still_touch_are_not_given_away() -> None:
    engine = SteppedEngine(dummy(num_pages=8), speculation_depth=1)
    engine.create(1)
    engine.begin_generation(1, [1] * 8, 20)
    engine.start()
    engine.start()
    engine.send(EndProcess(ProcessId("p")))
    assert engine.status().free_pages == [5]
    engine.finish()
    assert not engine.all_pages_are_free()
    engine.finish()
    assert engine.all_pages_are_free()


def test_guesses_give_way_to_passes_that_lack_pages() -> None:
    engine = SteppedEngine(dummy(num_pages=6, page_size=2), speculation_depth=4)
    for context in (1, 2):
        engine.create(context)
    engine.forward(1, [1, 2, 3, 4], samples=(Sample(3, GREEDY),))
    assert engine.status().free_pages[0] < 4
    assert engine.forward(2, [5] * 8).length == 8
    assert counters(engine)[2] > 0


@pytest.mark.parametrize("kind", ["cancel", "break"])
def test_ending_a_generation_early_drops_what_runs_ahead_of_it(kind: str) -> None:
    engine = stepped(2)
    expected = SteppedEngine()
    expected.create(1)
    tokens = expected.generate(1, [1, 2], 12)
    request = engine.begin_generation(1, [1, 2], 0)
    while len(engine.generated(request)) < 5:
        engine.start()
        engine.start()
        engine.finish()
    if kind == "cancel":
        engine.send(Cancel(request))
    else:
        engine.send(BreakOff(engine.new_request(), request, 3))
    engine.run()
    kept = [] if kind == "cancel" else [1, 2, *tokens[:3]]
    assert engine.history(1) == kept
    assert engine.draw(1, [9]) == loop(stepped(0), 1, tokens=[*kept, 9])[0]


def test_a_guess_that_fails_is_forgotten_and_the_real_pass_fails_by_itself() -> None:
    first = loop(stepped(0), 3)
    engine = SteppedEngine(dummy(fail_token=first[2]), speculation_depth=3)
    engine.create(1)
    assert loop(engine, 3) == first
    engine.run()
    failed = engine.refused(1, first[2:], samples=(Sample(0, GREEDY),))
    assert failed.code == "forward"
    assert engine.history(1) == [1, 2, *first[:2]]
    assert engine.draw(1, [5]) == loop(stepped(0), 1, tokens=[1, 2, *first[:2], 5])[0]


def test_programs_that_step_themselves_are_not_split_into_half_empty_steps() -> None:
    engine = SteppedEngine(speculation_depth=0)
    for context in range(1, 5):
        engine.create(context)
    engine.submit(1, [1], samples=(Sample(0, GREEDY),))
    assert engine.start()
    for context in (2, 3, 4):
        engine.submit(context, [1], samples=(Sample(0, GREEDY),))
    assert not engine.start(), "the pass of context 1 that follows belongs in the same step"
    engine.finish()
    engine.submit(1, [2], samples=(Sample(0, GREEDY),))
    engine.run()
    assert engine.status().steps == 2


@pytest.mark.parametrize("sampler", [GREEDY, PENALIZED])
def test_a_loop_has_a_row_in_every_step_while_prompts_queue_up(sampler: SamplerSpec) -> None:
    """Guesses of what programs ask for next come before rows of prompts that wait."""
    engine = SteppedEngine(dummy(num_pages=256, max_batch_tokens=16))
    drawn = dict.fromkeys((1, 2, 3), 1)
    samples = (Sample(0, sampler),)
    for context in drawn:
        engine.create(context)
    asked = {context: engine.submit(context, [context], samples=samples) for context in drawn}
    engine.start()
    for context in range(10, 20):
        engine.create(context)
        engine.submit(context, [context] * 40)
    for _ in range(20):
        while engine.start():
            pass
        engine.finish()
        for context in [each for each, request in asked.items() if engine.is_answered(request)]:
            (token,) = engine.final(asked[context], ForwardDone).tokens
            asked[context] = engine.submit(context, [token], samples=samples)
            drawn[context] += 1
    assert engine.status().waiting > 0, "some prompts have yet to be computed"
    assert all(count == 21 for count in drawn.values()), drawn


@pytest.mark.parametrize("depth", [0, 1])
def test_a_step_of_prompts_is_followed_by_what_waits_even_if_nobody_in_it_goes_on(depth: int) -> None:
    engine = SteppedEngine(dummy(max_batch_tokens=16), speculation_depth=depth)
    for context in range(1, 6):
        engine.create(context)
        engine.submit(context, [context] * 16)
    engine.start()
    for _ in range(4):
        assert engine.start(), "the driver has its next step before it is done with the last"
        engine.finish()
    engine.finish()
    assert engine.status().steps == 5


@pytest.mark.parametrize(("tokens", "requests"), [(1, 8), (3, 8), (64, 1), (4, 2)])
def test_guesses_leave_room_for_prompts_however_small_steps_are(tokens: int, requests: int) -> None:
    driver = dummy(num_pages=256, max_batch_tokens=tokens, max_batch_requests=requests, max_model_len=64)
    engine = SteppedEngine(driver, speculation_depth=2)
    loops = {context: [context] for context in (1, 2, 3)}
    asked: dict[int, RequestId] = {}
    engine.create(9)
    prompt = engine.submit(9, [9] * 30)
    for context in loops:
        engine.create(context)
    for _ in range(400):
        for context, drawn in loops.items():
            if context not in asked and len(drawn) < 50:
                asked[context] = engine.submit(context, drawn[-1:], samples=(Sample(0, GREEDY),))
        while engine.start():
            pass
        if engine.in_flight:
            engine.finish()
        for context in [each for each, request in asked.items() if engine.is_answered(request)]:
            loops[context] += engine.final(asked.pop(context), ForwardDone).tokens
        if engine.is_answered(prompt):
            break
    assert engine.is_answered(prompt)
    assert any(len(drawn) < 50 for drawn in loops.values()), "loops ran on, and the prompt ended beside them"
