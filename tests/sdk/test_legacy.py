"""The older API: its own names over the same engine."""

from __future__ import annotations

import random
from collections.abc import Sequence

import inferlet
import pytest
from inferlet.errors import Unsupported
from inferlet.event_loop import run
from inferlet.legacy import Context, Model, Sampler, get_all_models, get_auto_model, get_model, stop_condition

from tests.sdk.fake_host import CUE, END, World, turn


def everything(model: Model) -> stop_condition.StopCondition:
    return stop_condition.max_len(256).or_(stop_condition.ends_with_any(model.eos_tokens()))


def test_the_documented_program_runs(world: World) -> None:
    async def main() -> str:
        model = get_auto_model()
        ctx = model.create_context()
        ctx.fill_system("You are brief.")
        ctx.fill_user("How are you?")
        return await ctx.generate(Sampler.top_p(0.6, 0.95), everything(model))

    assert run(main())
    assert world.calls["generate"] == 1


def test_the_next_turn_ends_the_answer() -> None:
    async def main() -> None:
        model = get_model("fake")
        ctx = model.create_context()
        ctx.fill_user("a")
        answer = await ctx.generate(Sampler.greedy(), stop_condition.max_len(3))
        ctx.fork().fill_user("b")
        ctx.fill_user("b")
        assert ctx.get_token_ids() == [
            *turn("user", "a"),
            CUE,
            *answer.encode(),
            END,
            *turn("user", "b"),
            CUE,
        ]

    run(main())


def test_plain_text_needs_no_turn() -> None:
    async def main() -> None:
        ctx = get_auto_model().create_context()
        ctx.fill("one ")
        ctx.fill_token(50)
        await ctx.flush()
        answer = await _after_more_text(ctx)
        assert ctx.get_text() == "one 2three" + answer

    async def _after_more_text(ctx: Context) -> str:
        ctx.fill("three")
        return await ctx.generate(Sampler.greedy(), stop_condition.max_len(4))

    run(main())


def test_steps_by_hand_give_the_tokens_of_a_generation() -> None:
    async def main() -> None:
        ctx = get_auto_model().create_context()
        ctx.fill_user("a")
        twin = ctx.fork()
        tokens = []
        for _ in range(5):
            tokens.append(await twin.decode_step(Sampler.greedy()))
            twin.fill_token(tokens[-1])
        text = await ctx.generate(Sampler.greedy(), stop_condition.max_len(5))
        assert text.encode() == bytes(tokens)

    run(main())


def test_an_ending_of_several_tokens_is_found_and_cut_off() -> None:
    async def main() -> None:
        model = get_auto_model()
        ctx = model.create_context()
        ctx.fill_user("a")
        long = await ctx.fork().generate(Sampler.greedy(), stop_condition.max_len(8))
        ending = model.get_tokenizer().tokenize(long[4:6])
        short = await ctx.generate(
            Sampler.greedy(), stop_condition.max_len(8).or_(stop_condition.ends_with(ending))
        )
        assert short == long[: long.index(long[4:6])]

    run(main())


def test_a_program_may_sample_itself() -> None:
    class Second:
        def sample(self, ids: Sequence[int], probs: Sequence[float]) -> int:
            assert probs[0] >= probs[1]
            return ids[1]

    async def main() -> None:
        ctx = get_auto_model().create_context()
        ctx.fill_user("a")
        first = await ctx.fork().generate(Sampler.greedy(), stop_condition.max_len(1))
        assert await ctx.generate(Second(), stop_condition.max_len(1)) != first

    run(main())


def test_both_ways_to_generate_stop_alike() -> None:
    class Greedy:
        def sample(self, ids: Sequence[int], probs: Sequence[float]) -> int:
            return ids[0]

    async def main(prompt: str) -> None:
        model = get_auto_model()
        ctx = model.create_context()
        ctx.fill_user(prompt)
        twin = ctx.fork()
        stop = stop_condition.max_len(60).or_(stop_condition.ends_with_any(model.eos_tokens()))
        assert await ctx.generate(Sampler.greedy(), stop) == await twin.generate(Greedy(), stop)
        assert ctx.get_token_ids() == twin.get_token_ids()

    for number in random.Random(0).sample(range(100), 5):
        run(main(str(number)))


def test_the_entry_points_are_found_in_the_package_too() -> None:
    assert inferlet.get_auto_model is get_auto_model
    assert get_all_models() == ["fake"]
    assert "get_auto_model" not in inferlet.__all__
    with pytest.raises(AttributeError, match="create_context"):
        inferlet.create_context  # noqa: B018


def test_what_this_version_lacks_is_refused_by_name() -> None:
    model = get_auto_model()
    with pytest.raises(Unsupported, match="drop_masked_kv_pages"):
        model.create_context().drop_masked_kv_pages()
    with pytest.raises(Unsupported, match="create_queue"):
        model.create_queue()
