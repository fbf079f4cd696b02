"""A context that was flushed goes on as if it had not been: the same tokens, the same next turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.flow.conftest import Pie

OnPie = Callable[[Callable[[Pie], Any]], Any]

PROGRAM = """
from inferlet import Context, Model, Sampler


async def stepped(generation):
    return [token async for step in generation for token in (await step.execute()).tokens]


async def main(input):
    model = Model.load()
    ctx = Context(model).system("Be brief.").user("Name a river.")
    for action in input["actions"]:
        if action == "cue":
            ctx.cue()
        elif action == "flush":
            await ctx.flush()
        elif action == "keep":
            ctx.save("continuing")
            ctx = Context.take(model, "continuing")
    first = ctx.generate(Sampler.argmax(), max_tokens=6, stop=[])
    tokens = await (stepped(first) if input["stepped"] else first.collect_tokens())
    ctx.seal().user("And another?")
    again = await ctx.generate(Sampler.argmax(), max_tokens=3, stop=[]).collect_tokens()
    return [tokens, again, ctx.tokens() + ctx.buffer()]
"""


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(
    "actions", [["flush"], ["cue"], ["cue", "flush"], ["flush", "cue", "flush"], ["cue", "flush", "keep"]]
)
def test_a_flushed_context_goes_on(on_pie: OnPie, actions: list[str], stepped: bool) -> None:
    async def scenario(pie: Pie) -> None:
        plain = await pie.run(PROGRAM, actions=[], stepped=False)
        assert len(plain[0]) == 6
        assert await pie.run(PROGRAM, actions=actions, stepped=stepped) == plain

    on_pie(scenario)


def test_an_empty_context_has_nothing_to_go_on_from(on_pie: OnPie) -> None:
    async def scenario(pie: Pie) -> None:
        code = await pie.run(
            """
            from inferlet import Context, Model, Sampler
            from inferlet.errors import InvalidRequest

            async def main():
                try:
                    await Context(Model.load()).generate(Sampler.argmax(), auto_flush=False).collect_tokens()
                except InvalidRequest as error:
                    return error.message.split(":")[0]
            """
        )
        assert code == "empty input"

    on_pie(scenario)


def test_rows_are_counted_whoever_ran_the_loop(on_pie: OnPie) -> None:
    source = """
    from inferlet import Context, Model, Sampler

    async def main(input):
        ctx = Context(Model.load()).user("Name a river.")
        generation = ctx.generate(Sampler.argmax(), max_tokens=6, stop=[])
        if input["stepped"]:
            async for step in generation:
                await step.execute()
        else:
            await generation.collect_tokens()
        await ctx.flush()
        lengths = [ctx.seq_len, ctx.position, len(ctx.tokens())]
        ctx.truncate(2)
        before = ctx.tokens()
        ctx.seal().user("And another?")
        return [lengths, before, ctx.buffer()]
    """

    async def scenario(pie: Pie) -> None:
        lengths, before, buffer = await pie.run(source, stepped=False)
        assert len(set(lengths)) == 1
        assert len(before) == lengths[0] - 2
        assert await pie.run(source, stepped=True) == [lengths, before, buffer]

    on_pie(scenario)


def test_what_was_drained_and_fed_is_in_the_transcript_once(on_pie: OnPie) -> None:
    async def scenario(pie: Pie) -> None:
        assert await pie.run(
            """
            from inferlet import Context, Model, Sampler

            async def main():
                model = Model.load()
                drained, flushed = Context(model).user("a"), Context(model).user("a")
                await drained.forward().input(drained.drain()).execute()
                await flushed.flush()
                drained.cue().append([5, 6])
                flushed.cue().append([5, 6])
                await drained.flush()
                await flushed.flush()
                for ctx in (drained, flushed):
                    ctx.truncate(1)
                    ctx.seal().user("b").cue()
                return [
                    drained.tokens() == flushed.tokens(),
                    drained.buffer() == flushed.buffer(),
                    drained.seq_len == flushed.seq_len,
                ]
            """
        ) == [True, True, True]

    on_pie(scenario)
