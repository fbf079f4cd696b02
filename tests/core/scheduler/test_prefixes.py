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


def test_the_same_prompt_is_computed_once_but_for_its_last_rows() -> None:
    engine = engine_with_prompt()
    engine.create(2, process="other")
    before = computed(engine)
    done = engine.forward(2, PROMPT, samples=(Sample(29, GREEDY),))
    assert computed(engine) == before + 2
    assert engine.status().prefix_hit_tokens == 28
    assert done.tokens == draw_uncached(PROMPT).tokens


def test_what_outlives_its_context_is_found_and_given_back_when_it_is_needed() -> None:
    engine = engine_with_prompt()
    engine.send(DropContext(ContextId(1)))
    engine.run()
    assert engine.status().cached_pages == [7]
    assert engine.all_pages_are_free()
    engine.create(2)
    engine.forward(2, [5] * 255)
    assert engine.status().cached_pages == [0]


def test_a_prompt_that_parts_shares_what_stands_before() -> None:
    engine = engine_with_prompt()
    engine.create(2)
    other = [*PROMPT[:13], 50, *PROMPT[14:]]
    assert engine.draw(2, other) == draw_uncached(other).tokens[0]
    assert engine.status().prefix_hit_tokens == 12


def test_what_was_generated_is_found_too() -> None:
    engine = SteppedEngine(speculation_depth=0)
    engine.create(1)
    tokens = engine.generate(1, PROMPT, 12)
    engine.create(2)
    before = computed(engine)
    follow = [*PROMPT, *tokens, 9]
    assert engine.draw(2, follow) == draw_uncached(follow).tokens[0]
    assert computed(engine) - before == 3


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
    assert engine.status().prefix_hit_tokens == 28


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
        assert hits == probe // 4 * 4


def test_a_prompt_that_is_being_computed_is_waited_for() -> None:
    engine = SteppedEngine(max_batch_tokens=8)
    for context in (1, 2, 3):
        engine.create(context)
    requests = [engine.begin_generation(context, PROMPT, 3) for context in (1, 2, 3)]
    engine.run()
    for request in requests:
        assert engine.generated(request) == engine.generated(requests[0])
        engine.final(request, Generated)
    assert computed(engine) == 30 + 2 * 2 + 3 * 2
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
    assert engine.status().prefix_hit_tokens == 28


@pytest.mark.parametrize("groups", [("window",), ("paged", "state")])
def test_models_whose_cache_is_more_than_pages_share_nothing(groups: tuple[str, ...]) -> None:
    engine = SteppedEngine(dummy(groups=groups))
    for context in (1, 2):
        engine.create(context)
        engine.forward(context, PROMPT)
    assert engine.status().prefix_hit_tokens == 0


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
        fresh = 9 + 8 + 4  # the turn, its answer, and at most one page that was not whole
        assert computed(engine) - before <= fresh
