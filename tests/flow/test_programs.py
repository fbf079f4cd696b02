"""What programs do with contexts, passes, generations and their client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from pie_core.testing.recording_client import RecordingClient
from tests.flow.conftest import Pie

OnPie = Callable[[Callable[[Pie], Any]], Any]


def test_a_program_returns_json_and_prints(on_pie: OnPie) -> None:
    async def scenario(pie: Pie) -> None:
        client = RecordingClient()
        value = await pie.run(
            """
            import sys
            async def main(input):
                print("out", input["name"])
                print("err", file=sys.stderr)
                return {"hello": input["name"]}
            """,
            pie.state(client),
            name="pie",
        )
        assert value == {"hello": "pie"}
        assert client.stdout == b"out pie\n"
        assert client.stderr == b"err\n"

    on_pie(scenario)


LOOPS = """
from inferlet import Context, Model, Sampler, runtime

SAMPLERS = {
    "greedy": Sampler.argmax(),
    "seeded": Sampler.top_p(0.9, 0.95, seed=11),
    "penalized": Sampler.top_k(
        1.0, 20, seed=3, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1
    ),
}

def context():
    ctx = Context(Model.load(runtime.models()[0]))
    ctx.append(list(range(40, 75)))
    return ctx

async def offloaded(sampler):
    return await context().generate(sampler, max_tokens=24, auto_flush=False).collect_tokens()

async def stepped(sampler):
    tokens = []
    async for step in context().generate(sampler, max_tokens=24, auto_flush=False):
        tokens += (await step.execute()).tokens
    return tokens

async def by_hand(sampler):
    ctx = context()
    pending, tokens = ctx.buffer(), []
    ctx.truncate(0)
    while len(tokens) < 24:
        forward = ctx.forward()
        forward.input(pending)
        handle = forward.sample([len(pending) - 1], sampler)
        output = await forward.execute()
        pending = [output.token(handle)]
        tokens += pending
    return tokens

async def main(input):
    sampler = SAMPLERS[input["sampler"]]
    return [await loop(sampler) for loop in (offloaded, stepped, by_hand)]
"""


def test_offloaded_stepped_and_hand_written_loops_give_the_same_tokens(on_pie: OnPie) -> None:
    async def scenario(pie: Pie) -> None:
        for sampler in ("greedy", "seeded", "penalized"):
            offloaded, stepped, by_hand = await pie.run(LOOPS, sampler=sampler)
            assert len(offloaded) == 24
            assert offloaded == stepped == by_hand, sampler

    on_pie(scenario)


def test_contexts_of_one_program_really_overlap(on_pie: OnPie) -> None:
    source = """
    import asyncio
    from inferlet import Context, Model, Sampler, runtime

    async def one(first):
        ctx = Context(Model.load(runtime.models()[0]))
        ctx.append([first, 50, 60])
        return await ctx.generate(Sampler.argmax(), max_tokens=30, auto_flush=False).collect_tokens()

    async def main(input):
        if input["together"]:
            return await asyncio.gather(*(one(first) for first in range(20, 28)))
        return [await one(first) for first in range(20, 28)]
    """

    async def scenario(pie: Pie) -> None:
        apart = await pie.run(source, together=False)
        steps_apart = (await pie.status()).steps
        together = await pie.run(source, together=True)
        steps_together = (await pie.status()).steps - steps_apart
        assert together == apart
        assert steps_together * 4 < steps_apart

    on_pie(scenario)


def test_a_fork_goes_its_own_way_and_leaves_its_parent_as_it_was(on_pie: OnPie) -> None:
    source = """
    from inferlet import Context, Model, Sampler, runtime

    async def next_tokens(ctx):
        return await ctx.generate(Sampler.argmax(), max_tokens=8, auto_flush=False).collect_tokens()

    async def main(input):
        ctx = Context(Model.load(runtime.models()[0]))
        ctx.append(list(range(30, 51)))
        await ctx.flush()
        plain, altered = ctx.fork(), ctx.fork()
        plain.append([60]); altered.append([61]); ctx.append([60])
        return [await next_tokens(c) for c in (altered, plain, ctx)]
    """

    async def scenario(pie: Pie) -> None:
        altered, plain, parent = await pie.run(source)
        assert plain == parent
        assert altered != plain

    on_pie(scenario)


def test_a_snapshot_outlives_its_program_and_belongs_to_its_user(on_pie: OnPie) -> None:
    saving = """
    from inferlet import Context, Model, Sampler, runtime
    async def main(input):
        ctx = Context(Model.load(runtime.models()[0]))
        ctx.system("Be brief.").user("one two three")
        await ctx.flush()
        ctx.user("four")
        ctx.save("kept")
        ctx.cue()
        return await ctx.generate(Sampler.argmax(), max_tokens=6).collect_tokens()
    """
    opening = """
    from inferlet import Context, Model, Sampler, runtime
    async def main(input):
        ctx = getattr(Context, input["how"])(Model.load(runtime.models()[0]), "kept")
        ctx.cue()
        return await ctx.generate(Sampler.argmax(), max_tokens=6).collect_tokens()
    """
    refused = """
    from inferlet import Context, Model, errors, runtime
    async def main(input):
        try:
            Context.open(Model.load(runtime.models()[0]), "kept")
        except errors.NotFound as error:
            return str(error)
    """

    async def scenario(pie: Pie) -> None:
        saved = await pie.run(saving, pie.state(user="alice"))
        assert await pie.run(opening, pie.state(user="alice"), how="open") == saved
        assert "kept" in await pie.run(refused, pie.state(user="bob"))
        assert await pie.run(opening, pie.state(user="alice"), how="take") == saved
        assert "kept" in await pie.run(refused, pie.state(user="alice"))

    on_pie(scenario)


def test_breaking_off_a_stream_keeps_only_what_was_consumed(on_pie: OnPie) -> None:
    source = """
    from inferlet import Context, Model, Sampler, runtime

    def context():
        ctx = Context(Model.load(runtime.models()[0]))
        ctx.append(list(range(40, 60)))
        return ctx

    async def main(input):
        whole = await context().generate(Sampler.argmax(), max_tokens=20, auto_flush=False).collect_tokens()
        ctx = context()
        generator = ctx.generate(Sampler.argmax(), max_tokens=20, auto_flush=False)
        taken = []
        async for step in generator:
            taken += (await step.execute()).tokens
            if len(taken) >= 7:
                break
        rest = await ctx.generate(Sampler.argmax(), max_tokens=13, auto_flush=False).collect_tokens()
        return whole, taken + rest
    """

    async def scenario(pie: Pie) -> None:
        whole, continued = await pie.run(source)
        assert continued == whole

    on_pie(scenario)


def test_messages_and_files_reach_the_program_and_come_back(on_pie: OnPie) -> None:
    source = """
    from inferlet import session
    async def main(input):
        while (message := await session.receive()) is not None:
            session.send(message.upper())
        content = await session.receive_file()
        session.send_file(content[::-1])
    """

    async def scenario(pie: Pie) -> None:
        client = RecordingClient()
        state = pie.state(client)
        running = asyncio.create_task(pie.run(source, state))
        state.messages.put("first")
        await asyncio.sleep(0.05)
        state.messages.put("second")
        state.files.put(bytes(range(256)))
        state.close_input()
        await running
        assert client.messages == ["FIRST", "SECOND"]
        assert client.files == [bytes(reversed(range(256)))]

    on_pie(scenario)


def test_probes_agree_with_each_other_and_with_the_greedy_token(on_pie: OnPie) -> None:
    source = """
    import math
    from inferlet import Context, Distribution, Entropy, Logits, Logprob, Logprobs, Model, Sampler, runtime
    async def main(input):
        ctx = Context(Model.load(runtime.models()[0]))
        forward = ctx.forward()
        forward.input([40, 41, 42, 43])
        token = forward.sample([3], Sampler.argmax())
        logits, dist = forward.probe(3, Logits()), forward.probe(3, Distribution(1.0, 0))
        entropy, three = forward.probe(3, Entropy()), forward.probe(3, Logprobs([1, 2, 3]))
        output = await forward.execute()
        return {
            "token": output.token(token), "logits": list(memoryview(output.logits(logits)).cast("f")),
            "ids": output.distribution(dist)[0], "probs": output.distribution(dist)[1],
            "entropy": output.entropy(entropy), "three": output.logprobs(three),
        }
    """

    async def scenario(pie: Pie) -> None:
        import math

        got = await pie.run(source)
        logits = got["logits"]
        assert got["token"] == logits.index(max(logits)) == got["ids"][0]
        total = math.fsum(math.exp(x) for x in logits)
        probabilities = [math.exp(x) / total for x in logits]
        by_id = dict(zip(got["ids"], got["probs"], strict=True))
        assert all(abs(by_id[i] - p) < 1e-5 for i, p in enumerate(probabilities))
        assert abs(got["entropy"] + math.fsum(p * math.log(p) for p in probabilities)) < 1e-4
        assert all(abs(got["three"][i] - math.log(probabilities[i + 1])) < 1e-4 for i in range(3))

    on_pie(scenario)


def test_breaking_off_after_the_engine_has_finished_cuts_the_context_too(on_pie: OnPie) -> None:
    source = """
    import asyncio
    from inferlet import Context, Model, Sampler

    def context():
        ctx = Context(Model.load())
        ctx.append(list(range(40, 60)))
        return ctx

    async def main(input):
        whole = await context().generate(Sampler.argmax(), max_tokens=20, auto_flush=False).collect_tokens()
        ctx = context()
        pieces = ctx.generate(Sampler.argmax(), max_tokens=20, auto_flush=False).stream_tokens()
        taken = await anext(pieces)
        await asyncio.sleep(0.3)
        await pieces.aclose()
        rest = await ctx.generate(Sampler.argmax(), max_tokens=20 - len(taken), auto_flush=False).collect_tokens()
        return whole, taken + rest
    """

    async def scenario(pie: Pie) -> None:
        whole, continued = await pie.run(source)
        assert continued == whole

    on_pie(scenario)
