"""Generations that are wanted as a whole: nobody is told before the end, and what there is by then can be kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pie_core.engine.messages import Event
from pie_core.errors import InvalidRequest
from pie_core.host_api import context as contexts
from pie_core.host_api import generate
from pie_core.host_api.context import HostContext
from pie_core.host_api.generate import HostGeneration
from tests.core.host_api.programs_side import Side, sampler, side, value

PROMPT = [1, 2, 3]


def drive(scenario: Callable[[Side], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with side(**options) as opened:
            return await scenario(opened)

    return asyncio.run(main())


def begin(opened: Side, context: HostContext, count: int, *, whole: bool) -> HostGeneration:
    generation = generate.new_generation(opened.state, context, sampler())
    generate.max_tokens(opened.state, generation, count)
    if whole:
        generate.whole(opened.state, generation)
    generate.start(opened.state, generation)
    return generation


def prompted(opened: Side) -> HostContext:
    context = opened.context()
    contexts.append(opened.state, context, PROMPT)
    return context


async def to_the_end(opened: Side, generation: HostGeneration) -> list[int]:
    drawn: list[int] = []
    while (chunk := await value(generate.next_(opened.state, generation))) is not None:
        drawn += chunk
    return drawn


def test_the_worker_is_told_once_of_a_generation_that_is_wanted_as_a_whole() -> None:
    async def scenario(opened: Side) -> None:
        told: list[Event] = []
        opened.port.hears = told.extend
        streamed, whole = (begin(opened, prompted(opened), 9, whole=each) for each in (False, True))
        in_chunks = await to_the_end(opened, streamed)
        told.clear()
        chunk = await value(generate.next_(opened.state, whole))
        assert await to_the_end(opened, begin(opened, prompted(opened), 9, whole=True)) == chunk == in_chunks
        assert len([each for each in told if getattr(each, "finish", None) is None]) == 0
        assert await value(generate.next_(opened.state, whole)) is None
        assert whole.finish_reason == "length"
        for generation in (streamed, whole):
            held = await value(contexts.tokens(opened.state, generation.context))
            assert held + generation.context.transcript.pending_tokens() == PROMPT + in_chunks

    drive(scenario)


def test_what_a_whole_has_when_it_is_halted_is_kept_and_can_be_gone_on_from() -> None:
    async def scenario(opened: Side) -> None:
        expected = await to_the_end(opened, begin(opened, prompted(opened), 30, whole=False))
        context = prompted(opened)
        generation = begin(opened, context, 30, whole=True)
        await asyncio.sleep(0.05)
        kept = await value(generate.halt(opened.state, generation))
        assert 0 < len(kept) < 30
        assert kept == expected[: len(kept)]
        assert generation.finish_reason == "cancelled"
        assert await value(contexts.tokens(opened.state, context)) == PROMPT + kept
        assert context.transcript.fed_tokens == PROMPT + kept
        assert await value(generate.halt(opened.state, generation)) == [], "there is nothing left to read"
        rest = begin(opened, context, 30 - len(kept), whole=True)
        assert kept + await to_the_end(opened, rest) == expected

    drive(scenario, driver={"step_ms": 5.0})


@pytest.mark.parametrize("whole", [False, True])
def test_halting_what_has_ended_gives_what_was_not_read(whole: bool) -> None:
    async def scenario(opened: Side) -> None:
        context = prompted(opened)
        generation = begin(opened, context, 5, whole=whole)
        later = begin(opened, prompted(opened), 9, whole=True)
        await to_the_end(opened, later)
        kept = await value(generate.halt(opened.state, generation))
        assert len(kept) == 5
        assert generation.finish_reason == "length"
        held = await value(contexts.tokens(opened.state, context))
        assert held + context.transcript.pending_tokens() == PROMPT + kept

    drive(scenario)


def test_a_stream_that_is_halted_keeps_what_was_read_and_what_was_not() -> None:
    async def scenario(opened: Side) -> None:
        context = prompted(opened)
        generation = begin(opened, context, 30, whole=False)
        read = await value(generate.next_(opened.state, generation))
        await asyncio.sleep(0.03)
        rest = await value(generate.halt(opened.state, generation))
        assert read
        assert rest
        assert await value(contexts.tokens(opened.state, context)) == PROMPT + read + rest

    drive(scenario, driver={"step_ms": 5.0})


def test_what_begins_a_generation_comes_before_it() -> None:
    async def scenario(opened: Side) -> None:
        context = prompted(opened)
        unstarted = generate.new_generation(opened.state, context, sampler())
        with pytest.raises(InvalidRequest, match="was not started"):
            generate.halt(opened.state, unstarted)
        generation = begin(opened, context, 2, whole=False)
        with pytest.raises(InvalidRequest, match="was started already"):
            generate.whole(opened.state, generation)
        await to_the_end(opened, generation)

    drive(scenario)
