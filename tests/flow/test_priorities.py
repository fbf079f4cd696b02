"""What programs may say about how urgent their work is, and how long it may take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.flow.conftest import Pie, StartPie

OnPie = Callable[[Callable[[Pie], Any]], Any]

SLOW = """
models:
  - name: dummy
    driver: {type: dummy, options: {step_ms: 30}}
"""

PRELUDE = """
import asyncio
from inferlet import Context, Model, Sampler, errors, runtime

def context(tokens):
    return Context(Model.load()).append(tokens)
"""


def test_a_pass_that_takes_too_long_fails_and_leaves_its_context_as_it_was(start_pie: StartPie) -> None:
    source = (
        PRELUDE
        + """
async def main(input):
    ctx = context([5, 6, 7])
    await ctx.flush()
    try:
        await ctx.forward().input([8, 9]).timeout(0.001).execute()
    except errors.DeadlineExceeded as error:
        assert isinstance(error, TimeoutError) and error.code == "deadline-exceeded"
    else:
        return "in time"
    kept = ctx.seq_len, ctx.tokens()
    await ctx.forward().input([8]).timeout(60).execute()
    return kept, ctx.tokens()
"""
    )

    async def scenario() -> None:
        async with start_pie(SLOW) as pie:
            assert await pie.run(source) == [[3, [5, 6, 7]], [5, 6, 7, 8]]
            await pie.check_nothing_is_left()

    asyncio.run(scenario())


def test_a_generation_that_takes_too_long_fails_however_it_is_run(start_pie: StartPie) -> None:
    source = (
        PRELUDE
        + """
async def collected(ctx):
    await ctx.generate(Sampler.argmax(), max_tokens=1000, auto_flush=False, timeout=0.1).collect_tokens()

async def stepped(ctx):
    async for step in ctx.generate(Sampler.argmax(), max_tokens=1000, auto_flush=False).timeout(0.1):
        await step.execute()

async def main(input):
    outcomes = []
    for way in (collected, stepped):
        ctx = context([5, 6, 7])
        try:
            await way(ctx)
            outcomes.append("in time")
        except errors.DeadlineExceeded:
            outcomes.append(ctx.tokens() + ctx.buffer())
    return outcomes
"""
    )

    async def scenario() -> None:
        async with start_pie(SLOW) as pie:
            collected, stepped = await pie.run(source)
            assert collected == [5, 6, 7]
            assert stepped[:3] == [5, 6, 7]
            await pie.check_nothing_is_left()

    asyncio.run(scenario())


def test_cancelling_a_task_takes_its_pass_back(start_pie: StartPie) -> None:
    source = (
        PRELUDE
        + """
async def main(input):
    ctx = context([5, 6, 7])
    try:
        async with asyncio.timeout(0.001):
            await ctx.flush()
    except TimeoutError:
        flushed = ctx.seq_len, ctx.buffer()
    await ctx.flush()
    task = asyncio.create_task(ctx.forward().input([8, 9]).execute())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    steps = ctx.generate(Sampler.argmax(), max_tokens=3, auto_flush=False)
    step = await anext(steps)
    try:
        async with asyncio.timeout(0.001):
            await step.execute()
    except TimeoutError:
        pass
    tokens = [token async for step in steps for token in (await step.execute()).tokens]
    return flushed, task.cancelled(), tokens, await context([5, 6, 7]).generate(
        Sampler.argmax(), max_tokens=3, auto_flush=False
    ).collect_tokens()
"""
    )

    async def scenario() -> None:
        async with start_pie(SLOW) as pie:
            flushed, cancelled, tokens, expected = await pie.run(source)
            assert flushed == [0, [5, 6, 7]]
            assert cancelled is True
            assert len(tokens) == 3
            assert tokens == expected
            await pie.check_nothing_is_left()

    asyncio.run(scenario())


def test_the_pages_of_a_program_that_is_cancelled_are_free_after_the_steps_at_the_driver(
    start_pie: StartPie,
) -> None:
    source = PRELUDE + (
        "async def main(input):\n"
        "    await context(list(range(2, 200))).generate(Sampler.argmax(), auto_flush=False).collect_tokens()\n"
    )

    async def scenario() -> None:
        async with start_pie(SLOW) as pie:
            running = asyncio.create_task(pie.run(source))
            await pie.until(lambda status: status.steps > 3)
            running.cancel()
            before = (await pie.status()).steps
            await pie.until(lambda status: status.free_pages == status.total_pages)
            assert (await pie.status()).steps - before <= 3  # those under way: the driver takes two at a time
            await asyncio.wait([running])
            await pie.check_nothing_is_left()

    asyncio.run(scenario())


ORDER = (
    PRELUDE
    + """
async def main(input):
    order = []

    async def one(name, ctx, **options):
        await ctx.generate(Sampler.argmax(), max_tokens=3, auto_flush=False, **options).collect_tokens()
        order.append(name)

    contexts = [context([3, 4]).set_priority(-7), context([5, 6]), context([7, 8])]
    contexts[2].set_bid(1.0)
    fork = contexts[0].fork()
    await asyncio.gather(
        one("set", contexts[0]), one("bid", contexts[2]), one("plain", contexts[1]), one("fork", fork, priority=-1)
    )
    return order
"""
)


def test_priorities_order_the_work_of_a_program(start_pie: StartPie) -> None:
    one_at_a_time = """
models:
  - name: dummy
    driver: {type: dummy, options: {max_batch_requests: 1}}
"""

    async def scenario() -> None:
        async with start_pie(one_at_a_time) as pie:
            assert await pie.run(ORDER) == ["plain", "fork", "set", "bid"]
            await pie.check_nothing_is_left()

    asyncio.run(scenario())


def test_a_program_cannot_ask_for_more_than_it_was_launched_with(on_pie: OnPie) -> None:
    source = (
        PRELUDE
        + """
async def main(input):
    ctx = context([3])
    ctx.set_priority(runtime.priority())
    refusals = []
    asked = runtime.priority() + 1
    for ask in (
        lambda: ctx.set_priority(asked),
        lambda: ctx.forward().input([4]).priority(asked)._described(),
        lambda: ctx.start_engine_loop(Sampler.argmax(), 1, [], None, asked),
    ):
        try:
            ask()
        except errors.LimitExceeded as error:
            refusals.append(error.message)
    for seconds in (0, -1, float("nan")):
        try:
            ctx.forward().input([4]).timeout(seconds)._described()
        except errors.InvalidRequest:
            refusals.append(seconds == seconds)
    with ctx.idle():
        pass
    return runtime.priority(), refusals
"""
    )

    async def scenario(pie: Pie) -> None:
        highest, refusals = await pie.run(source)
        assert highest == 0
        assert len(refusals) == 6
        assert all("priority 1: the program was launched with 0" in each for each in refusals[:3])
        urgent = pie.app.new_process("alice", pie.state().client, priority=7)
        highest, refusals = await pie.run(source, urgent)
        assert highest == 7
        assert "priority 8: the program was launched with 7" in refusals[0]

    on_pie(scenario)
