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
