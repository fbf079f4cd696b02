"""Rows that were computed once: whoever asks for the same gets them, and nobody gets anything else."""

from __future__ import annotations

from typing import Any

import pytest

from pie_core.contracts.forward import ProbeKind
from pie_core.engine.messages import (
    DropContext,
    EvictRows,
    ForwardDone,
    Generated,
    Probe,
    Sample,
    SamplerSpec,
    TruncateContext,
)
from pie_core.ids import ContextId
from tests.core.engine.stepping import GREEDY, SteppedEngine, dummy

PROMPT = [(7 * i) % 97 for i in range(30)]  # seven pages of four, and two rows


def engine_with_prompt(**fields: Any) -> SteppedEngine:
    """Context 1 has computed the prompt."""
    engine = SteppedEngine(speculation_depth=0)
    engine.create(1)
    engine.forward(1, PROMPT, **fields)
    return engine


def computed(engine: SteppedEngine) -> int:
    return engine.status().tokens


def draw_uncached(tokens: list[int], **fields: Any) -> ForwardDone:
    engine = SteppedEngine(prefix_cache=False)
    engine.create(1)
    return engine.forward(1, tokens, samples=(Sample(len(tokens) - 1, GREEDY),), **fields)


def test_the_same_prompt_is_computed_once_but_for_its_last_row() -> None:
    engine = engine_with_prompt()
    engine.create(2, process="other")
    before = computed(engine)
    done = engine.forward(2, PROMPT, samples=(Sample(29, GREEDY),))
    assert computed(engine) == before + 1
    assert engine.status().prefix_hit_tokens == 29
    assert done.tokens == draw_uncached(PROMPT).tokens


def test_what_outlives_its_context_is_found_and_given_back_when_it_is_needed() -> None:
    engine = engine_with_prompt()
    engine.send(DropContext(ContextId(1)))
    engine.run()
    assert engine.status().cached_pages == [8]
    assert engine.all_pages_are_free()
    engine.create(2)
    engine.forward(2, [5] * 255)
    assert engine.status().cached_pages == [0]


def test_whoever_lacks_more_pages_than_there_are_takes_none_from_the_cache() -> None:
    engine = SteppedEngine(dummy(num_pages=16))
    engine.create(1)
    engine.forward(1, PROMPT)
    engine.send(DropContext(ContextId(1)))
    engine.create(2)
    running = engine.begin_generation(2, [9] * 9, 12)
    engine.start()
    engine.create(3)
    waiting = engine.submit(3, [4] * 54)  # 14 pages; 8 are cached and 5 free
    for _ in range(4):
        engine.start()
        assert engine.status().cached_pages == [8]
        engine.finish()
    assert not engine.is_answered(running)
    engine.run()
    assert engine.is_answered(running)
    assert engine.is_answered(waiting)


def test_a_prompt_that_parts_shares_what_stands_before() -> None:
    engine = engine_with_prompt()
    engine.create(2)
    other = [*PROMPT[:13], 50, *PROMPT[14:]]
    assert engine.draw(2, other) == draw_uncached(other).tokens[0]
    assert engine.status().prefix_hit_tokens == 13, "three pages, and one row on a copy of the fourth"


def test_a_copied_page_is_written_by_whoever_copied_it() -> None:
    engine = engine_with_prompt()
    others = [[*PROMPT[:14], context, 50, 51] for context in (2, 3, 4)]
    for context, tokens in enumerate(others, start=2):
        engine.create(context)
        assert engine.draw(context, tokens) == draw_uncached(tokens).tokens[0]
    assert engine.status().prefix_hit_tokens == 3 * 14
    for context, tokens in enumerate([PROMPT, *others], start=1):
        follow = [*tokens, 7]
        assert engine.draw(context, [7]) == draw_uncached(follow).tokens[0]


def test_a_row_or_two_of_a_large_page_are_not_worth_its_copy() -> None:
    engine = SteppedEngine(dummy(page_size=16))
    engine.create(1)
    engine.forward(1, PROMPT)
    for context, alike, hits in ((2, 3, 0), (3, 4, 4)):
        engine.create(context)
        before = engine.status().prefix_hit_tokens
        engine.forward(context, [*PROMPT[:alike], 90 + context, 1])
        assert engine.status().prefix_hit_tokens - before == hits


def test_what_was_generated_is_found_too() -> None:
    engine = SteppedEngine(speculation_depth=0)
    engine.create(1)
    tokens = engine.generate(1, PROMPT, 12)
    engine.create(2)
    before = computed(engine)
    follow = [*PROMPT, *tokens, 9]
    assert engine.draw(2, follow) == draw_uncached(follow).tokens[0]
    assert computed(engine) - before == 2, "the last token drawn was never fed, and the new one"


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": tuple(range(1, 31))},
        {"masks": tuple((0, 1) if row == 3 else (0, row + 1) for row in range(30))},
    ],
    ids=["positions", "masks"],
)
def test_rows_that_differ_in_more_than_tokens_are_not_shared(fields: dict[str, Any]) -> None:
    engine = engine_with_prompt()
    engine.create(2)
    samples = (Sample(29, GREEDY),)
    assert (
        engine.forward(2, PROMPT, samples=samples, **fields).tokens == draw_uncached(PROMPT, **fields).tokens
    )
    assert engine.status().prefix_hit_tokens == 0


def test_tenants_share_nothing() -> None:
    engine = engine_with_prompt()
    engine.create(2, tenant="other")
    engine.forward(2, PROMPT)
    assert engine.status().prefix_hit_tokens == 0


def test_what_was_written_after_an_eviction_is_not_shared() -> None:
    engine = engine_with_prompt()
    engine.send(EvictRows(ContextId(1), 0, 8))
    engine.forward(1, [1, 2, 3, 4, 5, 6])
    engine.create(2)
    follow = [*PROMPT, 1, 2, 3, 4, 5, 6, 7]
    assert engine.draw(2, follow) == draw_uncached(follow).tokens[0]
    assert engine.status().prefix_hit_tokens == 30


def test_rows_that_have_to_give_something_are_computed() -> None:
    engine = engine_with_prompt()
    for context, probe in ((2, 9), (3, 0)):
        engine.create(context)
        before = engine.status()
        probes = (Probe(probe, ProbeKind.ENTROPY),)
        assert (
            engine.forward(context, PROMPT, probes=probes).probes
            == draw_uncached(PROMPT, probes=probes).probes
        )
        hits = engine.status().prefix_hit_tokens - before.prefix_hit_tokens
        assert hits == probe


def test_a_prompt_that_is_being_computed_is_waited_for() -> None:
    engine = SteppedEngine(max_batch_tokens=8)
    for context in (1, 2, 3):
        engine.create(context)
    requests = [engine.begin_generation(context, PROMPT, 3) for context in (1, 2, 3)]
    engine.run()
    for request in requests:
        assert engine.generated(request) == engine.generated(requests[0])
        engine.final(request, Generated)
    assert computed(engine) == 30 + 2 + 3 * 2
    assert engine.generated(requests[0])[0] == draw_uncached(PROMPT).tokens[0]


def test_a_prompt_that_waits_for_one_that_fails_is_computed_after_all() -> None:
    engine = SteppedEngine(dummy(fail_token=96), max_batch_tokens=64)
    for context in (1, 2):
        engine.create(context)
    failing = engine.submit(1, [*PROMPT, 96])
    following = engine.submit(2, PROMPT)
    engine.run()
    assert engine.events[failing][-1] != engine.events[following][-1]
    assert engine.final(following, ForwardDone).length == 30
    assert engine.status().prefix_hit_tokens == 0


def test_a_context_that_goes_back_into_a_shared_page_copies_it() -> None:
    engine = engine_with_prompt()
    engine.send(TruncateContext(ContextId(1), 14))
    engine.forward(1, [60, 61, 62])
    engine.create(2)
    assert engine.draw(2, PROMPT) == draw_uncached(PROMPT).tokens[0]
    assert engine.status().prefix_hit_tokens == 29


GROUPS = (("window",), ("latent", "window"), ("state",), ("paged", "state"), ("paged", "window", "state"))


def of_groups(groups: tuple[str, ...], **options: Any) -> SteppedEngine:
    options = {"speculation_depth": 0, "checkpoint_tokens": 8, **options}
    return SteppedEngine(dummy(groups=groups, window=6), **options)


def draw_alone(groups: tuple[str, ...], tokens: list[int]) -> int:
    engine = of_groups(groups, prefix_cache=False)
    engine.create(1)
    return engine.draw(1, tokens)


@pytest.mark.parametrize("groups", GROUPS)
def test_models_with_windows_and_states_share_prefixes_too(groups: tuple[str, ...]) -> None:
    engine = of_groups(groups)
    engine.create(1)
    engine.forward(1, PROMPT)
    follow = [*PROMPT, 5, 6, 7]
    for context, drop in ((2, False), (3, True)):
        if drop:
            engine.send(DropContext(ContextId(1)), DropContext(ContextId(2)))
        engine.create(context)
        before = engine.status().prefix_hit_tokens
        assert engine.draw(context, follow) == draw_alone(groups, follow)
        assert engine.status().prefix_hit_tokens - before >= 30, "from where the turn ended"


@pytest.mark.parametrize("groups", GROUPS)
def test_a_prompt_that_parts_goes_on_from_the_last_state_that_is_kept(groups: tuple[str, ...]) -> None:
    engine = of_groups(groups)
    engine.create(1)
    engine.forward(1, PROMPT)
    engine.create(2)
    other = [*PROMPT[:22], 50, *PROMPT[23:]]
    assert engine.draw(2, other) == draw_alone(groups, other)
    block = 16 if groups == ("state",) else 8  # states are kept every so many rows
    assert engine.status().prefix_hit_tokens == (22 // block * block if "state" in groups else 22)


@pytest.mark.parametrize("groups", GROUPS)
def test_prefixes_are_found_after_most_of_them_were_let_go(groups: tuple[str, ...]) -> None:
    """Whatever part of a block is missing, the rest of it is not taken for the whole."""
    engine = of_groups(groups)
    prompts = [[(context * 13 + 7 * i) % 97 for i in range(40)] for context in range(12)]
    for turn in range(2):
        for number, prompt in enumerate(prompts):
            context = 100 * turn + number + 1
            engine.create(context)
            assert engine.draw(context, prompt) == draw_alone(groups, prompt)
            engine.send(DropContext(ContextId(context)))
    assert engine.all_pages_are_free()
    status = engine.status()
    assert all(cached <= total for cached, total in zip(status.cached_pages, status.total_pages, strict=True))


def test_what_is_used_often_outlives_what_was_used_last() -> None:
    engine = SteppedEngine(dummy(num_pages=24), speculation_depth=0)
    for context in range(1, 6):
        engine.create(context)
        engine.forward(context, [*PROMPT[:16], context, context])
        engine.send(DropContext(ContextId(context)))
    for context in range(10, 20):  # passers-by, each for the first and last time
        engine.create(context)
        engine.forward(context, [context] * 20)
        engine.send(DropContext(ContextId(context)))
    engine.create(99)
    before = engine.status().prefix_hit_tokens
    engine.forward(99, [*PROMPT[:16], 90, 91])
    assert engine.status().prefix_hit_tokens - before == 16


def test_what_was_used_often_once_does_not_stay_for_ever() -> None:
    engine = SteppedEngine(dummy(num_pages=24), speculation_depth=0)
    for context in range(1, 20):
        engine.create(context)
        engine.forward(context, [*PROMPT[:16], context, context])
        engine.send(DropContext(ContextId(context)))
    for context in range(20, 90):
        engine.create(context)
        engine.forward(context, [context] * 20)
        engine.send(DropContext(ContextId(context)))
    engine.create(99)
    before = engine.status().prefix_hit_tokens
    engine.forward(99, [*PROMPT[:16], 90, 91])
    assert engine.status().prefix_hit_tokens == before


def test_a_session_of_many_turns_computes_no_row_twice() -> None:
    engine = SteppedEngine(dummy(num_pages=512, max_model_len=2000))
    history: list[int] = []
    for turn in range(40):
        context = turn + 1
        engine.create(context)
        prompt = [*history, *[(turn + 5 * i) % 97 for i in range(9)]]
        before = computed(engine)
        history = [*prompt, *engine.generate(context, prompt, 8, SamplerSpec())]
        engine.send(DropContext(ContextId(context)))
        fresh = 9 + 8 + 1  # the turn, its answer, and a token drawn for nothing
        assert computed(engine) - before <= fresh
