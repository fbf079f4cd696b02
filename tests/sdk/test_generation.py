"""Generations: the loop in the engine and the loop stepped from here draw the same tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inferlet import Context, Distribution, Entropy, Generator, Logits, Model, Sampler
from inferlet.errors import InvalidRequest, OutOfPages, Unsupported
from inferlet.event_loop import run

from tests.sdk.fake_host import CUE, END, PASS_NS, World, logits, reset

LETTERS = list(range(97, 123))


async def stepped(generator: Generator) -> list[int]:
    tokens: list[int] = []
    async for step in generator:
        tokens += (await step.execute()).tokens
    return tokens


async def stepped_among_others(generator: Generator) -> list[int]:
    other = asyncio.create_task(asyncio.sleep(1000))
    tokens = await stepped(generator)
    other.cancel()
    return tokens


async def streamed(generator: Generator) -> list[int]:
    return [token async for chunk in generator.stream_tokens() for token in chunk]


async def half_and_half(generator: Generator) -> list[int]:
    tokens = []
    async for step in generator:
        tokens += (await step.execute()).tokens
        if len(tokens) == 3:
            break
    return tokens + await generator.collect_tokens()


WAYS: list[Callable[[Generator], Awaitable[list[int]]]] = [
    stepped,
    stepped_among_others,
    streamed,
    half_and_half,
]


def outcome(
    way: Callable[[Generator], Awaitable[list[int]]],
    prompt: str,
    sampler: Sampler,
    limit: int,
    stop: list[int],
) -> tuple[list[int], list[int], str | None]:
    """The tokens, everything the context holds afterwards, and why it ended."""

    async def main() -> tuple[list[int], list[int], str | None]:
        reset()
        ctx = Context(Model.load()).user(prompt)
        generator = ctx.generate(sampler, max_tokens=limit, stop=stop)
        tokens = await way(generator)
        return tokens, ctx.tokens() + ctx.buffer(), generator.finish_reason

    return run(main())


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.text(alphabet="abc", min_size=1, max_size=5),
    limit=st.integers(1, 40),
    stop=st.lists(st.sampled_from([*LETTERS, END]), max_size=3),
    seed=st.none() | st.integers(0, 99),
)
def test_every_way_to_run_a_generation_gives_the_same_tokens(
    prompt: str, limit: int, stop: list[int], seed: int | None
) -> None:
    sampler = Sampler.argmax() if seed is None else Sampler.top_p(1.0, 0.9, seed=seed)
    expected = outcome(stepped, prompt, sampler, limit, stop)
    for way in WAYS:
        fresh = Sampler.argmax() if seed is None else Sampler.top_p(1.0, 0.9, seed=seed)
        assert outcome(way, prompt, fresh, limit, stop) == expected, way


def test_collecting_leaves_the_loop_to_the_engine(world: World) -> None:
    text = run(Context(Model.load()).user("go").generate(Sampler.argmax(), max_tokens=20).collect_text())
    assert text
    assert world.calls["step"] == world.calls["execute"] == 0


def test_a_lone_task_steps_by_one_call_a_token(world: World) -> None:
    async def main() -> list[int]:
        ctx = Context(Model.load()).user("go")
        return await stepped(ctx.generate(Sampler.argmax(), max_tokens=20, stop=[]))

    assert len(run(main())) == 20
    assert (world.calls["execute"], world.calls["step"], world.calls["wait"]) == (1, 19, 0)


def test_tasks_step_at_the_same_time(world: World) -> None:
    async def main() -> None:
        model = Model.load()
        await asyncio.gather(
            *(
                stepped(Context(model).user(str(n)).generate(Sampler.argmax(), max_tokens=10, stop=[]))
                for n in range(4)
            )
        )

    run(main())
    assert world.now == 10 * PASS_NS
    assert world.most_at_once == 4


def test_generations_in_the_engine_overlap(world: World) -> None:
    async def main() -> list[str]:
        model = Model.load()
        return await asyncio.gather(
            *(
                Context(model).user(str(n)).generate(Sampler.argmax(), max_tokens=10, stop=[]).collect_text()
                for n in range(4)
            )
        )

    assert len(set(run(main()))) == 4
    assert world.now == 10 * PASS_NS


def test_text_streams_piece_by_piece(world: World) -> None:
    async def main() -> tuple[list[str], str]:
        model = Model.load()
        prompt = Context(model).user("go")
        twin = prompt.fork()
        pieces = [piece async for piece in prompt.generate(Sampler.argmax(), max_tokens=12).stream()]
        return pieces, await twin.generate(Sampler.argmax(), max_tokens=12).collect_text()

    pieces, whole = run(main())
    assert len(pieces) > 1
    assert "".join(pieces) == whole


def test_a_stream_left_early_keeps_what_was_consumed(world: World) -> None:
    async def main() -> None:
        ctx = Context(Model.load()).user("go")
        expected = await stepped(ctx.fork().generate(Sampler.argmax(), max_tokens=4, stop=[]))
        before = [*ctx.buffer(), CUE]
        seen: list[int] = []
        async for chunk in ctx.generate(Sampler.argmax(), stop=[]).stream_tokens():
            seen += chunk
            if len(seen) >= 4:
                break
        assert ctx.tokens() + ctx.buffer() == before + expected
        assert world.broken_off == [4]

    run(main())


def test_using_the_context_meanwhile_shows_what_was_consumed_and_the_stream_goes_on(world: World) -> None:
    async def main() -> None:
        ctx = Context(Model.load()).user("go")
        expected = await stepped(ctx.fork().generate(Sampler.argmax(), max_tokens=8, stop=[]))
        prompt = [*ctx.buffer(), CUE]
        generator = ctx.generate(Sampler.argmax(), max_tokens=8, stop=[])
        seen: list[int] = []
        async for chunk in generator.stream_tokens():
            seen += chunk
            if len(seen) in (2, 5):
                branch = generator.fork()
                assert branch.tokens() + branch.buffer() == prompt + seen
        assert seen == expected
        assert ctx.tokens() + ctx.buffer() == prompt + expected
        assert generator.finish_reason == "length"

    run(main())
    assert world.broken_off == [2, 3]


def test_another_task_may_use_the_context_while_its_stream_waits(world: World) -> None:
    async def main() -> None:
        ctx = Context(Model.load()).user("go")
        expected = await stepped(ctx.fork().generate(Sampler.argmax(), max_tokens=8, stop=[]))

        async def look() -> int:
            await asyncio.sleep(0.025)
            return ctx.seq_len

        tokens, length = await asyncio.gather(
            ctx.generate(Sampler.argmax(), max_tokens=8, stop=[]).collect_tokens(), look()
        )
        assert tokens == expected
        assert length < ctx.seq_len

    run(main())
    assert world.broken_off == [2]


def test_looking_before_the_first_token_does_not_disturb(world: World) -> None:
    async def main() -> None:
        ctx = Context(Model.load()).user("go")
        expected = await stepped(ctx.fork().generate(Sampler.argmax(), max_tokens=4, stop=[]))

        async def look() -> None:
            await asyncio.sleep(0.005)
            assert ctx.buffer() == []

        tokens, _ = await asyncio.gather(
            ctx.generate(Sampler.argmax(), max_tokens=4, stop=[]).collect_tokens(), look()
        )
        assert tokens == expected

    run(main())
    assert world.broken_off == [0]


@pytest.mark.parametrize("way", WAYS)
def test_a_flushed_context_goes_on_as_if_it_had_not_been(
    way: Callable[[Generator], Awaitable[list[int]]],
) -> None:
    async def main() -> None:
        for stop in ([], LETTERS):
            plain = Context(Model.load()).user("go").cue()
            flushed = plain.fork()
            await flushed.flush()
            first, second = (
                each.generate(Sampler.argmax(), max_tokens=9, stop=stop, auto_flush=False)
                for each in (plain, flushed)
            )
            assert await way(first) == await way(second)
            assert plain.tokens() + plain.buffer() == flushed.tokens() + flushed.buffer()
            assert first.finish_reason == second.finish_reason

    run(main())


def test_a_closed_stream_stays_closed() -> None:
    async def main() -> None:
        ctx = Context(Model.load()).user("go")
        generator = ctx.generate(Sampler.argmax(), stop=[])
        stream = generator.stream_tokens()
        first = await anext(stream)
        await stream.aclose()
        assert [chunk async for chunk in stream] == []
        assert ctx.buffer() == first[-1:]
        assert generator.finish_reason == "cancelled"

    run(main())


def test_a_cancelled_collection_breaks_off(world: World) -> None:
    async def main() -> None:
        ctx = Context(Model.load()).user("go")
        generator = ctx.generate(Sampler.argmax(), stop=[])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(generator.collect_tokens(), 0.055)
        assert len(ctx.tokens() + ctx.buffer()) == len("go") + 3 + 5
        assert generator.tokens_generated == 5

    run(main())
    assert world.broken_off == [5]


def test_a_collection_that_is_interrupted_goes_on_from_what_there_was(world: World) -> None:
    async def main() -> tuple[list[int], list[int]]:
        expected = (
            await Context(Model.load())
            .user("go")
            .generate(Sampler.argmax(), stop=[], max_tokens=12)
            .collect_tokens()
        )
        ctx = Context(Model.load()).user("go")
        generator = ctx.generate(Sampler.argmax(), stop=[], max_tokens=12)
        collecting = asyncio.create_task(generator.collect_tokens())
        await asyncio.sleep(0.055)
        branch = ctx.fork()
        assert (branch.tokens() + branch.buffer())[-5:] == expected[:5]
        collected = await collecting
        assert generator.tokens_generated == 12
        assert (ctx.tokens() + ctx.buffer())[-12:] == expected
        return collected, expected

    collected, expected = run(main())
    assert collected == expected
    assert world.broken_off == [5]


def test_a_collection_is_told_of_nothing_before_its_end(world: World) -> None:
    ctx = Context(Model.load()).user("go")
    assert len(run(ctx.generate(Sampler.argmax(), stop=[], max_tokens=20).collect_tokens())) == 20
    assert world.calls["next"] == 2, "all tokens, and that there are no more"


def test_collect_text_ends_with_the_turn_even_without_stop_tokens() -> None:
    async def main() -> tuple[str, str]:
        ctx = Context(Model.load()).user("x").cue()
        with_stop = ctx.fork().generate(Sampler.argmax(), max_tokens=200)
        without = ctx.generate(Sampler.argmax(), max_tokens=200, auto_flush=False)
        pair = await with_stop.collect_text(), await without.collect_text()
        assert with_stop.finish_reason == without.finish_reason == "stop"
        assert ctx.buffer() == [END]
        return pair

    with_stop, without = run(main())
    assert with_stop == without != ""


def test_no_tokens_are_asked_for_when_none_are_allowed(world: World) -> None:
    ctx = Context(Model.load()).user("go")
    assert run(ctx.generate(Sampler.argmax(), max_tokens=0).collect_tokens()) == []
    assert not world.ends


def test_a_logit_mask_holds_at_every_step() -> None:
    only_a_and_b = [97, 2]
    ctx = Context(Model.load()).user("go")
    text = run(ctx.generate(Sampler.argmax(), max_tokens=30, logit_mask=only_a_and_b).collect_text())
    assert len(text) == 30
    assert set(text) <= {"a", "b"}


def test_probes_of_every_step_and_of_one_step() -> None:
    async def main() -> None:
        ctx = Context(Model.load()).append([1, 2])
        generator = ctx.generate(Sampler.argmax(), max_tokens=2, stop=[], auto_flush=False)
        entropy = generator.probe_each_step(0, Entropy())
        history = [1]
        async for step in generator:
            top = step.probe(0, Distribution(1.0, 1))
            output = await step.execute()
            found = output.distribution(top)
            assert found is not None
            assert found[0] == [max(range(260), key=logits(history).__getitem__)]
            assert (output.entropy(entropy) or 0) > 0
            assert output.entropy(top) is None
            history = [1, 2, *output.tokens]

    run(main())


def test_the_program_can_choose_the_tokens_itself() -> None:
    async def main() -> None:
        ctx = Context(Model.load()).append([1, 2])
        generator = ctx.generate(Sampler.argmax(), max_tokens=3, stop=[99], auto_flush=False)
        kept: list[int] = []
        async for step in generator:
            raw = step.clear_sampler().probe(0, Logits())
            output = await step.execute()
            assert output.tokens == []
            assert output.auto_sampler is None
            assert len(output.logits(raw) or b"") == 4 * 260
            kept += generator.accept([50 + len(kept)])
        assert kept == [50, 51, 52]
        assert ctx.tokens() == [1, 2, 50, 51]
        assert ctx.buffer() == [52]
        assert generator.finish_reason == "length"

    run(main())


def test_choosing_a_stop_token_ends_it() -> None:
    async def main() -> None:
        ctx = Context(Model.load()).append([1])
        generator = ctx.generate(Sampler.argmax(), stop=[99], auto_flush=False).add_stop(98)
        step = await anext(aiter(generator))
        await step.clear_sampler().execute()
        assert generator.accept([5, 98, 6]) == [5]
        assert generator.is_done
        assert generator.tokens_generated == 1

    run(main())


def test_a_refused_step_can_be_repeated(world: World) -> None:
    async def main() -> None:
        ctx = Context(Model.load()).user("go")
        twin = ctx.fork()
        generator = ctx.generate(Sampler.argmax(), max_tokens=2, stop=[])
        world.refuse_next_pass = "out-of-pages"
        with pytest.raises(OutOfPages):
            await (await anext(aiter(generator))).execute()
        expected = await stepped(twin.generate(Sampler.argmax(), max_tokens=2, stop=[]))
        assert await stepped(generator) == expected

    run(main())


@pytest.mark.parametrize(
    "option", ["constrain", "speculator", "system_speculation", "adapter", "zo_seed", "horizon"]
)
def test_options_of_later_versions_are_refused_by_name(option: str) -> None:
    ctx = Context(Model.load())
    with pytest.raises(Unsupported, match=option):
        ctx.generate(Sampler.argmax(), **{option: 1})  # type: ignore[arg-type]
    ctx.generate(Sampler.argmax(), **{option: None})  # type: ignore[arg-type]


def test_wrong_options_are_refused() -> None:
    ctx = Context(Model.load())
    with pytest.raises(TypeError, match="max_token"):
        ctx.generate(Sampler.argmax(), max_token=1)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match="max_tokens is -1"):
        ctx.generate(Sampler.argmax(), max_tokens=-1)
    with pytest.raises(InvalidRequest, match="empty input"):
        run(Context(ctx.model).generate(Sampler.argmax(), auto_flush=False).collect_tokens())
