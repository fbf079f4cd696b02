"""Turns of a program's own loop: gathered from all contexts, and no different from passes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pie_core.engine.messages import Cancel, Forward, Steps, TruncateContext
from pie_core.errors import InvalidRequest, LimitExceeded
from pie_core.host_api import context as contexts
from pie_core.host_api import forward
from pie_core.host_api.context import ContextTurn, HostContext
from pie_core.host_api.forward import HostPass, HostSampler, PendingPass
from pie_core.sandbox.hosting import Pending
from tests.core.engine.stepping import VOCAB
from tests.core.host_api.programs_side import Side, sampler, side, value


def drive(scenario: Callable[[Side], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with side(**options) as opened:
            return await scenario(opened)

    return asyncio.run(main())


def step(opened: Side, context: HostContext, token: int, drawing: HostSampler) -> Pending[int]:
    """What the program waits for; a token that is known at once counts as that."""
    answer = forward.step(opened.state, context, token, drawing)
    return answer if isinstance(answer, Pending) else Pending.of(answer)


def execute(opened: Side, context: HostContext, tokens: list[int], drawing: HostSampler) -> PendingPass:
    described = HostPass(context)
    forward.input_(opened.state, described, tokens)
    forward.sample(opened.state, described, [len(tokens) - 1], drawing)
    return forward.execute(opened.state, described)


async def loop(
    opened: Side, context: HostContext, turns: int, drawing: HostSampler, first: int = 1
) -> list[int]:
    drawn = [first]
    for _ in range(turns):
        drawn.append(await value(step(opened, context, drawn[-1], drawing)))
    return drawn


def test_the_turns_of_all_contexts_travel_in_one_message_once_each_has_begun() -> None:
    async def scenario(opened: Side) -> None:
        drawing, listed = sampler(), [opened.context() for _ in range(3)]
        await asyncio.gather(*(loop(opened, context, 1, drawing) for context in listed))
        opened.sent.clear()
        await asyncio.gather(*(loop(opened, context, 4, drawing) for context in listed))
        steps = [each for each in opened.sent if isinstance(each, Steps)]
        assert len(steps) == len(opened.sent) == 4
        assert [sorted(each.contexts) for each in steps] == [[context.id for context in listed]] * 4

    drive(scenario)


@pytest.mark.parametrize("drawing", [sampler(), sampler(temperature=1.0, seed=3)], ids=["greedy", "seeded"])
def test_turns_draw_what_passes_draw_and_leave_the_same_context(drawing: HostSampler) -> None:
    async def scenario(opened: Side) -> None:
        by_turns, by_passes = opened.context(), opened.context()
        drawn = await loop(opened, by_turns, 12, drawing)
        assert any(isinstance(each, Steps) for each in opened.sent)
        opened.sent.clear()
        expected = [1]
        for _ in range(12):
            described = HostPass(by_passes)
            forward.input_(opened.state, described, [expected[-1]])
            forward.sample(opened.state, described, [0], drawing)
            forward.pass_speculation(opened.state, described, False)  # such a pass never becomes a turn
            (token,) = await value(forward.tokens(opened.state, forward.execute(opened.state, described)))
            expected.append(token)
        assert not any(isinstance(each, Steps) for each in opened.sent)
        assert drawn == expected
        for context in (by_turns, by_passes):
            assert context.rows.length == 12
            assert context.transcript.fed_tokens == drawn[:-1]
            assert await value(contexts.tokens(opened.state, context)) == drawn[:-1]

    drive(scenario)


def test_a_submitted_pass_that_is_a_turn_travels_as_one() -> None:
    async def scenario(opened: Side) -> None:
        drawing, context = sampler(), opened.context()
        (first,) = await value(forward.tokens(opened.state, execute(opened, context, [1, 2, 3], drawing)))
        opened.sent.clear()
        both = [execute(opened, context, [first], drawing), execute(opened, context, [5], drawing)]
        drawn = [await value(forward.tokens(opened.state, each)) for each in both]
        assert [type(each) for each in opened.sent] == [Steps]
        assert drawn == [await value(forward.tokens(opened.state, each)) for each in both], "read twice"
        with pytest.raises(InvalidRequest, match="there is no probe 0: the pass has 0"):
            forward.probe(opened.state, both[0], 0)
        assert context.transcript.fed_tokens == [1, 2, 3, first, 5]

    drive(scenario)


def test_a_sampler_that_changed_makes_a_pass_and_turns_follow_that() -> None:
    async def scenario(opened: Side) -> None:
        drawing, context = sampler(), opened.context()
        await loop(opened, context, 2, drawing)
        opened.sent.clear()
        forward.temperature(opened.state, drawing, 0.5)
        await loop(opened, context, 3, drawing)
        assert [type(each) for each in opened.sent] == [Forward, Steps, Steps]

    drive(scenario)


def test_what_else_is_sent_stays_in_order_with_turns() -> None:
    async def scenario(opened: Side) -> None:
        drawing, first, second = sampler(), opened.context(), opened.context()
        for context in (first, second):
            await loop(opened, context, 2, drawing)
        opened.sent.clear()
        pending = step(opened, first, 7, drawing)
        contexts.truncate(opened.state, second, 1)
        behind = step(opened, second, 8, drawing)
        third = step(opened, opened.context(), 9, drawing)
        for each in (pending, behind, third):
            await value(each)
        assert [type(each).__name__ for each in opened.sent] == [
            "Steps",
            "TruncateContext",
            "Forward",
            "CreateContext",
            "Forward",
        ]
        assert second.rows.length == 2
        assert await value(contexts.tokens(opened.state, second)) == [1, 8]

    drive(scenario)


def test_a_turn_that_nobody_waits_for_any_more_is_cancelled_and_the_context_goes_on() -> None:
    async def scenario(opened: Side) -> None:
        drawing, context = sampler(), opened.context()
        drawn = await loop(opened, context, 2, drawing)
        pending = step(opened, context, drawn[-1], drawing)
        opened.sent.clear()
        pending.abandon()
        assert [type(each) for each in opened.sent] == [Steps, Cancel]
        fed = await value(contexts.tokens(opened.state, context))
        assert fed == drawn[: len(fed)]
        assert context.rows.length == len(fed)
        assert len(await loop(opened, context, 3, drawing, first=4)) == 4

    drive(scenario, driver={"step_ms": 20.0})


def test_a_turn_that_is_refused_leaves_the_context_as_it_was() -> None:
    async def scenario(opened: Side) -> None:
        drawing, context = sampler(), opened.context()
        drawn = await loop(opened, context, 2, drawing)
        with pytest.raises(InvalidRequest):
            await value(step(opened, context, VOCAB, drawing))
        assert context.rows.length == 2
        assert context.transcript.fed_tokens == drawn[:-1]
        assert (await loop(opened, context, 2, drawing, first=drawn[-1]))[0] == drawn[-1]

    drive(scenario)


def test_a_loop_over_tokens_that_were_drained_writes_them_down_once() -> None:
    async def scenario(opened: Side) -> None:
        drawing, context = sampler(), opened.context()
        await loop(opened, context, 2, drawing)
        contexts.append(opened.state, context, [3])
        (token,) = contexts.drain(opened.state, context)
        drawn = await loop(opened, context, 2, drawing, first=token)
        fed = await value(contexts.tokens(opened.state, context))
        assert context.transcript.fed_tokens == fed
        assert fed[2:] == drawn[:-1]

    drive(scenario)


def test_a_fork_in_the_middle_of_a_loop_knows_what_was_fed() -> None:
    async def scenario(opened: Side) -> None:
        drawing, context = sampler(), opened.context()
        drawn = await loop(opened, context, 5, drawing)
        twin = context.fork()
        assert twin.transcript.fed_tokens == drawn[:-1]
        assert twin.rows.next == 5
        opened.sent.clear()
        after = [await value(step(opened, each, drawn[-1], drawing)) for each in (context, twin)]
        assert after[0] == after[1]
        assert [type(each) for each in opened.sent] == [Steps, Forward], "a fork begins with a pass"
        assert not any(isinstance(each, TruncateContext) for each in opened.sent)

    drive(scenario)


async def idle(opened: Side) -> None:
    """Returns when everything that may run ahead has been computed."""
    for _ in range(50):
        await asyncio.sleep(0.001)
    opened.sent.clear()


def test_a_turn_whose_token_is_known_is_answered_within_the_call() -> None:
    async def scenario(opened: Side) -> None:
        drawing, context, plain = sampler(temperature=1.0, seed=5), opened.context(), opened.context()
        drawn = await loop(opened, context, 2, drawing)
        for _ in range(6):
            await idle(opened)
            answer = forward.step(opened.state, context, drawn[-1], drawing)
            assert isinstance(answer, int)
            assert opened.sent == []
            drawn.append(answer)
        assert context.rows.length == 8
        assert context.transcript.fed_tokens == drawn[:-1]
        assert await value(contexts.tokens(opened.state, context)) == drawn[:-1]
        assert drawn == await loop(opened, plain, 8, drawing)

    drive(scenario, speculation_depth=2)


@pytest.mark.parametrize("depth", [0, 1])
def test_where_nothing_would_be_left_ahead_the_next_row_is_begun_first(depth: int) -> None:
    async def scenario(opened: Side) -> None:
        drawing, context = sampler(), opened.context()
        drawn = await loop(opened, context, 2, drawing)
        await idle(opened)
        assert isinstance(forward.step(opened.state, context, drawn[-1], drawing), Pending)

    drive(scenario, speculation_depth=depth)


def test_another_token_than_the_one_drawn_is_not_known_at_once() -> None:
    async def scenario(opened: Side) -> None:
        drawing, context, other = sampler(), opened.context(), opened.context()
        drawn = await loop(opened, context, 2, drawing)
        await idle(opened)
        pending = forward.step(opened.state, context, (drawn[-1] + 1) % VOCAB, drawing)
        assert isinstance(pending, Pending)
        token = await value(pending)
        assert context.transcript.fed_tokens == [*drawn[:-1], (drawn[-1] + 1) % VOCAB]
        again = await loop(opened, other, 2, drawing)
        assert again == drawn
        assert token == await value(step(opened, other, (drawn[-1] + 1) % VOCAB, drawing))

    drive(scenario, speculation_depth=2)


def test_what_was_sent_before_comes_before_a_turn_that_is_known() -> None:
    async def scenario(opened: Side) -> None:
        drawing, context = sampler(), opened.context()
        drawn = await loop(opened, context, 2, drawing)
        await idle(opened)
        twin = context.fork()
        first, second = (step(opened, each, drawn[-1], drawing) for each in (context, twin))
        assert not first.done, "the fork is not known to the engine yet"
        assert await value(first) == await value(second)
        assert await value(contexts.tokens(opened.state, twin)) == drawn

    drive(scenario, speculation_depth=2)


def test_programs_whose_tokens_are_limited_are_not_answered_past_the_limit() -> None:
    async def scenario(opened: Side) -> None:
        drawing, context = sampler(), opened.context()
        drawn = await loop(opened, context, 4, drawing)
        await idle(opened)
        drawn.append(await value(step(opened, context, drawn[-1], drawing)))
        await idle(opened)
        with pytest.raises(LimitExceeded):
            await value(step(opened, context, drawn[-1], drawing))

    drive(scenario, speculation_depth=2, max_tokens_per_process=5)


def test_a_closed_context_is_freed_without_the_garbage_collector() -> None:
    async def use(opened: Side) -> None:
        drawing, context = sampler(), opened.context()
        await loop(opened, context, 3, drawing)
        both = step(opened, context, 7, drawing), execute(opened, context, [5], drawing)
        await value(both[0])
        context.close()

    async def scenario(opened: Side) -> None:
        gc.collect()
        gc.disable()
        before = _count(HostContext, ContextTurn)
        await use(opened)
        await loop(opened, opened.context(), 1, sampler())  # whatever has heard of the first is over
        opened.sent.clear()
        assert _count(HostContext, ContextTurn) <= before, "more than other tests have left"

    try:
        drive(scenario)
    finally:
        gc.enable()


def _count(*kinds: type) -> int:
    return sum(type(each) in kinds for each in gc.get_objects())
