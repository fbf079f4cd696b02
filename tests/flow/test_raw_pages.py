"""Programs that manage the KV pages of a context themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.flow.conftest import Pie, StartPie

OnPie = Callable[[Callable[[Pie], Any]], Any]

PRELUDE = """
import asyncio
from inferlet import Context, Model, Sampler, errors

def code_of(call, *arguments):
    try:
        call(*arguments)
    except errors.InferletError as error:
        return error.code

async def outcome(awaitable):
    try:
        await awaitable
    except errors.InferletError as error:
        return error.code

def write(ctx, tokens):
    return ctx.forward().input(tokens).execute()
"""


def test_pages_are_reserved_written_committed_and_released(on_pie: OnPie) -> None:
    source = (
        PRELUDE
        + """
async def main(input):
    ctx = Context(Model.load())
    pages, size = ctx.inner(), ctx.page_size
    outcomes = [await outcome(write(ctx, [5]))]
    pages.reserve(3)
    forward = ctx.forward().input_at(list(range(2, 2 + size + 3)), list(range(size + 3)))
    handle = forward.sample([size + 2], Sampler.argmax())
    token = (await forward.execute()).token(handle)
    outcomes += [code_of(pages.commit, 2), code_of(pages.commit, 1), code_of(pages.commit, 1)]
    counts = [pages.committed_pages, pages.working_pages, pages.working_tokens, ctx.seq_len - size]
    outcomes += [code_of(ctx.truncate, 4)]
    outcomes += [code_of(pages.release, count) for count in (2, 1, 1)]
    outcomes += [await outcome(ctx.generate(Sampler.argmax(), max_tokens=2, auto_flush=False).collect_tokens())]
    stepped = []
    async for step in ctx.generate(Sampler.argmax(), max_tokens=3, auto_flush=False):
        stepped += (await step.execute()).tokens
    plain = Context(Model.load()).append(range(2, 2 + size + 3))
    expected = await plain.generate(Sampler.argmax(), max_tokens=3, auto_flush=False).collect_tokens()
    pages.close()
    after = await ctx.generate(Sampler.argmax(), max_tokens=40, auto_flush=False).collect_tokens()
    return outcomes, counts, [token] == expected[:1], stepped == expected, len(after)
"""
    )

    async def scenario(pie: Pie) -> None:
        outcomes, counts, *equal, after = await pie.run(source)
        invalid = "invalid-request"
        assert outcomes == [invalid, invalid, None, invalid, invalid, invalid, None, invalid, invalid]
        assert counts == [1, 2, 3, 3]
        assert equal == [True, True]
        assert after == 40

    on_pie(scenario)


def test_a_shared_page_is_an_error_where_others_get_a_copy(on_pie: OnPie) -> None:
    source = (
        PRELUDE
        + """
async def main(input):
    ctx = Context(Model.load())
    ctx.inner().reserve(4)
    await write(ctx, [7] * (ctx.page_size + 2))
    fork = ctx.fork()
    outcomes = [await outcome(write(ctx, [8]))]
    kept = ctx.tokens()
    await write(fork, [9])
    outcomes += [await outcome(write(ctx, [8]))]
    ctx.save("here")
    outcomes += [await outcome(write(ctx, [8]))]
    Context.delete(ctx.model, "here")
    outcomes += [await outcome(write(ctx, [8]))]
    opened = None
    ctx.save("there")
    ctx.inner().close()
    await write(ctx, [10] * 100)
    opened = Context.take(ctx.model, "there")
    second = code_of(lambda: opened.inner().reserve(1))
    return outcomes, len(kept) - ctx.page_size, fork.tokens()[-1], ctx.tokens()[-1], opened.tokens()[-1], second
"""
    )

    async def scenario(pie: Pie) -> None:
        outcomes, kept, *last, second = await pie.run(source)
        assert outcomes == ["page-shared", None, "page-shared", None]
        assert kept == 2
        assert last == [9, 10, 8]
        assert second is None

    on_pie(scenario)


def test_what_a_program_reserves_ends_with_it_and_is_bounded(start_pie: StartPie) -> None:
    small = """
models:
  - name: dummy
    driver: {type: dummy, options: {num_pages: 16, page_size: 4}}
    limits: {page_share_per_program: 0.75}
"""
    source = (
        PRELUDE
        + """
async def main(input):
    ctx, other = Context(Model.load()), Context(Model.load())
    ctx.inner().reserve(8)
    refused = [code_of(other.inner().reserve, 5), code_of(ctx.inner().reserve, 5), code_of(ctx.inner().reserve, 9)]
    other.inner().reserve(4)
    if input.get("stay"):
        await asyncio.sleep(3600)
    return refused
"""
    )

    async def scenario() -> None:
        async with start_pie(small) as pie:
            assert await pie.run(source) == ["limit-exceeded", "limit-exceeded", "out-of-pages"]
            await pie.check_nothing_is_left()
            staying = asyncio.create_task(pie.run(source, stay=True))
            await pie.until(lambda status: status.free_pages == [4])
            other = PRELUDE + (
                "async def main(input):\n"
                "    ctx = Context(Model.load())\n"
                "    first = code_of(ctx.inner().reserve, 5)\n"
                "    ctx.inner().close()\n"
                "    await write(ctx, [5] * 40)\n"  # ten pages: what others only reserved gives way
                "    return first, ctx.seq_len\n"
            )
            assert await pie.run(other, pie.state(user="bob")) == ["out-of-pages", 40]
            staying.cancel()
            await asyncio.wait([staying])
            await pie.check_nothing_is_left()

    asyncio.run(scenario())
