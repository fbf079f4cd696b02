"""Values that no WIT type can hold are refused in the guest; they used to end the program with a panic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pie_core.testing.recording_client import RecordingClient
from tests.flow.conftest import Pie

OnPie = Callable[[Callable[[Pie], Any]], Any]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("f.input_at([40], [-1])", "positions: -1 is not a whole number"),
        ("f.input([-5])", "tokens: -5 is not"),
        ("f.input([1 << 40])", "tokens: 1099511627776 is not"),
        ("f.input(['x'])", "tokens: 'x' is not"),
        ("f.input([1.5])", "tokens: 1.5 is not"),
        ("f.input([4]); f.sample([-1], Sampler.argmax())", "rows: -1 is not"),
        ("f.input([4]); f.sample([0], Sampler.top_k(1.0, -2))", "value: -2 is not"),
        ("f.input([4]); f.sample([0], Sampler.top_p('hot'))", "value: 'hot' is not a number"),
        ("f.input([4]); f.sample([0], Sampler.argmax(seed=1 << 70))", "is not a whole number"),
        ("f.input([4]); f.attention_mask([[0, -1]])", "rows: -1 is not"),
        ("ctx.append([None])", "tokens: None is not"),
        ("ctx.truncate(-1)", "count: -1 is not"),
        ("ctx.user(7)", "expected text, not int"),
        ("ctx.user(chr(0xD800))", "surrogate"),
        ("ctx.save(None)", "name: expected text, not NoneType"),
        ("model.tokenizer().encode(b'bytes')", "text: expected text, not bytes"),
        ("await ctx.generate(Sampler.argmax(), max_tokens=-3).collect_tokens()", "-3"),
    ],
)
def test_a_value_that_cannot_cross_is_refused_by_name(on_pie: OnPie, body: str, words: str) -> None:
    source = f"""
    from inferlet import Context, Model, Sampler, errors

    async def main(input):
        model = Model.load()
        ctx = Context(model)
        f = ctx.forward()
        try:
            {body}
            await f.execute()
        except (errors.InvalidRequest, ValueError, TypeError) as error:
            return str(error)
    """

    async def scenario(pie: Pie) -> None:
        assert words in await pie.run(source)

    on_pie(scenario)


def test_a_print_larger_than_the_hosts_appetite_arrives_whole(on_pie: OnPie) -> None:
    async def scenario(pie: Pie) -> None:
        client = RecordingClient()
        source = "async def main(input):\n    print('x' * 5_000_000)\n    print('the end', end='')\n"
        await pie.run(source, pie.state(client))
        assert len(client.stdout) == 5_000_000 + 1 + len("the end")

    on_pie(scenario)
