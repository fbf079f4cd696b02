"""Contexts: fillers, the buffer, branches, snapshots and what happens after release."""

from __future__ import annotations

import asyncio

import pytest
from inferlet import Context, Model, Sampler
from inferlet.errors import InvalidRequest, NotFound, OutOfPages, Unsupported
from inferlet.event_loop import run

from tests.sdk.fake_host import CUE, END, PASS_NS, World, turn


@pytest.fixture
def model() -> Model:
    return Model.load()


def test_fillers_chain_and_fill_the_buffer(model: Model) -> None:
    ctx = Context(model).system("s").user("u").assistant("a").seal().append([7]).cue().cue()
    assert ctx.buffer() == [*turn("system", "s"), *turn("user", "u"), *turn("assistant", "a"), END, 7, CUE]
    assert ctx.seq_len == 0


def test_tools_are_described_called_and_answered(model: Model) -> None:
    ctx = Context(model).equip([{"name": "f"}, '{"name": "g"}'])
    ctx.tool_call("f", {"city": "東京"}).tool_call("g", "{}", "id").tool_result("f", {"n": 1}).tool_result(
        "g", "x", "id"
    )
    assert ctx.buffer() == [
        *turn("user", '[{"name": "f"}, {"name": "g"}]'),
        *turn("assistant", 'f {"city": "東京"} '),
        *turn("assistant", "g {} id"),
        *turn("user", 'f {"n": 1} '),
        *turn("user", "g x id"),
    ]


def test_flush_writes_the_buffer_once(model: Model, world: World) -> None:
    async def main() -> None:
        ctx = Context(model).user("hello")
        await ctx.flush()
        await ctx.flush()
        assert ctx.tokens() == turn("user", "hello")
        assert ctx.buffer() == []

    run(main())
    assert world.calls["flush"] == 1


def test_contexts_flush_at_the_same_time(model: Model, world: World) -> None:
    async def main() -> None:
        await asyncio.gather(*(Context(model).user(str(number)).flush() for number in range(8)))

    run(main())
    assert world.most_at_once == 8
    assert world.now == PASS_NS


def test_a_fork_has_the_rows_and_the_buffer_and_goes_its_own_way(model: Model) -> None:
    async def main() -> None:
        trunk = Context(model).user("one")
        await trunk.flush()
        branch = trunk.append([5]).fork()
        branch.append([6])
        assert (trunk.buffer(), branch.buffer()) == ([5], [5, 6])
        assert trunk.tokens() == branch.tokens()

    run(main())


def test_a_snapshot_opens_many_times_and_is_taken_once(model: Model) -> None:
    Context(model).append([1, 2]).save("kept")
    assert Context.open(model, "kept").buffer() == [1, 2]
    assert Context.take(model, "kept").buffer() == [1, 2]
    with pytest.raises(NotFound, match="kept"):
        Context.open(model, "kept")


def test_an_unnamed_snapshot_has_a_fresh_name(model: Model) -> None:
    ctx = Context(model).append([1])
    first, second = ctx.snapshot(), ctx.snapshot()
    assert first != second
    Context.delete(model, first)
    with pytest.raises(NotFound):
        Context.take(model, first)


def test_truncating_drops_rows_and_the_buffer(model: Model) -> None:
    async def main() -> None:
        ctx = Context(model).append([1, 2, 3])
        await ctx.flush()
        ctx.append([4]).truncate(2)
        assert (ctx.tokens(), ctx.buffer()) == ([1], [])

    run(main())


def test_rows_are_evicted_and_pinned_by_their_numbers(model: Model, world: World) -> None:
    ctx = Context(model).append([1, 2, 3])
    ctx.pin(0, 1)
    ctx.evict(1, 2)
    assert (world.calls["pin 0 1"], world.calls["evict 1 2"]) == (1, 1)


def test_a_token_held_back_by_a_generation_is_seen_by_every_other_call(model: Model) -> None:
    async def main() -> None:
        ctx = Context(model).user("hi")
        tokens = []
        async for step in ctx.generate(Sampler.argmax(), max_tokens=3, stop=[]):
            tokens += (await step.execute()).tokens
        assert ctx.fork().buffer() == ctx.buffer() == tokens[-1:]
        assert ctx.append([9]).buffer() == [*tokens[-1:], 9]

    run(main())


def test_a_released_context_is_refused(model: Model) -> None:
    with Context(model).append([1]) as ctx:
        assert ctx.buffer() == [1]
    with pytest.raises(InvalidRequest, match="released"):
        ctx.append([2])
    assert "released" in repr(ctx)
    ctx.release()


def test_a_refusal_keeps_its_code_and_what_was_there(model: Model, world: World) -> None:
    async def main() -> None:
        ctx = Context(model).append([1, 2])
        world.refuse_next_pass = "out-of-pages"
        with pytest.raises(OutOfPages) as refusal:
            await ctx.flush()
        assert refusal.value.code == "out-of-pages"
        assert ctx.buffer() == [1, 2]

    run(main())


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(NotFound, match="this server has: fake"):
        Model.load("nonesuch")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("append_image", [b""]), ("append_video", [b""])],
)
def test_what_this_version_lacks_is_refused_by_name(model: Model, name: str, arguments: list[object]) -> None:
    with pytest.raises(Unsupported, match=f"Context.{name}"):
        getattr(Context(model), name)(*arguments)


def test_pages_by_hand_are_one_object_until_they_are_closed(model: Model, world: World) -> None:
    ctx = Context(model).append(range(20))
    run(ctx.flush())
    ctx.inner().reserve_working_pages(2)
    assert ctx.inner().working_page_count == ctx.inner().working_pages == 4
    ctx.inner().commit(1)
    with pytest.raises(InvalidRequest, match="not full"):
        ctx.inner().commit(1)
    assert (ctx.inner().committed_pages, ctx.inner().working_tokens, ctx.inner().page_size) == (1, 4, 16)
    pages = ctx.inner()
    pages.release(2)
    with pytest.raises(InvalidRequest, match="not empty"):
        pages.release(1)
    pages.close()
    pages.close()
    with pytest.raises(InvalidRequest, match="inner"):
        pages.reserve(1)
    with ctx.inner() as again:
        assert again is not pages
    assert world.calls["take pages"] == 2
    ctx.inner()
    ctx.release()
