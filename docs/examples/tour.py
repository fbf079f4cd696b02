"""The examples of docs/write-an-inferlet.md, as one program."""

import asyncio
import json
import time

from inferlet import Context, Entropy, Logprobs, Model, Sampler, chat, errors, session, tools
from inferlet.errors import InferletError, NotFound


async def answer(model, question):
    ctx = Context(model).system("Be brief.").user(question)
    return await ctx.generate(Sampler.top_p(0.6, 0.95), max_tokens=64).collect_text()


async def converse(ctx):
    first = await ctx.user("Name a river.").generate(Sampler.argmax(), max_tokens=32).collect_text()
    ctx.seal()
    second = await ctx.user("And another?").generate(Sampler.argmax(), max_tokens=32).collect_text()
    return [first, second]


async def until_unsure(ctx, limit):
    """Stops where the model no longer knows how to go on."""
    tokens, stop = [], chat.stop_tokens(ctx.model)
    await ctx.cue().flush()  # the first step feeds its last token again: one row
    async for step in ctx.generate(Sampler.argmax(), max_tokens=50, stop=stop, auto_flush=False):
        entropy = step.probe(0, Entropy())
        output = await step.execute()
        tokens += output.tokens
        if output.entropy(entropy) > limit:
            break
    return ctx.model.tokenizer().decode(tokens)


async def more_likely(ctx, yes, no):
    """Which of two tokens the model expects next, from one pass and without drawing any."""
    tokens = ctx.cue().drain()
    forward = ctx.forward().input(tokens)
    handle = forward.probe(len(tokens) - 1, Logprobs([yes, no]))
    first, second = (await forward.execute()).logprobs(handle)
    return yes if first > second else no


async def with_tools(ctx, functions, question):
    """Answers calls until the model writes none."""
    ctx.equip([{"name": name, "description": function.__doc__} for name, function in functions.items()])
    ctx.user(question)
    while True:
        decoder, events, written = tools.Decoder(ctx.model), [], []
        async for tokens in ctx.generate(Sampler.argmax(), max_tokens=64).stream_tokens():
            events.append(decoder.feed(tokens))
            written += tokens
        calls = [each for each in [*events, *decoder.finish()] if isinstance(each, tools.Event.Call)]
        if not calls:
            return ctx.model.tokenizer().decode(written)
        for call in calls:
            function, arguments = functions[call.name], json.loads(call.arguments)
            ctx.tool_result(call.name, function(**arguments), call.id)


def clock():
    """The time of day."""
    return time.strftime("%H:%M")


async def best_of(ctx, count):
    async def draft():
        with ctx.fork() as branch:
            return await branch.generate(Sampler.top_p(0.9), max_tokens=32).collect_text()

    return max(await asyncio.gather(*(draft() for _ in range(count))), key=len)


async def in_pages(ctx, tokens):
    """Writes tokens on pages of its own and keeps the full ones."""
    with ctx.inner() as pages:
        pages.reserve(len(tokens) // pages.page_size + 1)
        await ctx.forward().input(tokens).execute()
        pages.commit(pages.working_tokens // pages.page_size)
        return pages.committed_pages, pages.working_pages


async def remembered(model, name):
    try:
        return Context.open(model, name)
    except NotFound:
        ctx = Context(model).system("A long text that every run needs.")
        await ctx.flush()
        ctx.save(name)
        return ctx


async def ask(question, seconds):
    session.send(question)
    try:
        return await asyncio.wait_for(session.receive(), seconds)
    except TimeoutError:
        return None


async def in_time(ctx, seconds):
    try:
        return await ctx.generate(Sampler.argmax(), max_tokens=64, timeout=seconds).collect_text()
    except errors.DeadlineExceeded:
        return None


async def main(input):
    model = Model.load()
    report = {
        "answer": await answer(model, input["question"]),
        "conversation": await converse(Context(model)),
        "sure": await until_unsure(Context(model).user("a"), limit=3.0),
        "likely": await more_likely(Context(model).user("b"), 97, 98),
        "best": await best_of(Context(model).user("c"), 3),
        "remembered": (await remembered(model, "tour")).seq_len,
        "pages": await in_pages(Context(model), list(range(97, 117))),
        "in_time": await in_time(Context(model).user("d"), 30.0),
        "reply": await ask("Are you there?", 0.5),
    }
    try:
        await Context(model).forward().execute()
    except InferletError as error:
        report["refused"] = error.code
    try:
        report["time"] = await with_tools(Context(model), {"clock": clock}, "What time is it?")
    except InferletError as error:  # a template that knows no tools
        report["time"] = error.code
    return report
