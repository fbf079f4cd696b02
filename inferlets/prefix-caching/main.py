"""A long prefix that outlives the program: computed by the first run, opened by every later one.

`save` keeps a context under a name on the server; `open` gives a copy of it. The name holds a digest of the text, so
another document gets another snapshot.

Input: optional: document, question, max_tokens (128), forget (true deletes the snapshot first).
"""

import hashlib
import time

from inferlet import Context, Model, Sampler
from inferlet.errors import NotFound

DOCUMENT = """The tides of the sea follow the moon. Its gravity raises the water on the side of the earth that faces it
and, because the earth itself is pulled as well, on the opposite side too. As the earth turns, each coast passes both
bulges, and so most coasts see two high tides a day, about twelve hours and twenty-five minutes apart. When sun and
moon pull in one line, at new and full moon, the tides are highest and are called spring tides. At the half moons the
two pull at right angles, and the weaker neap tides follow."""
QUESTION = "How many high tides do most coasts see in a day?"


async def main(input):
    model = Model.load()
    document = input.get("document", DOCUMENT)
    name = f"prefix-caching/{hashlib.sha256(document.encode()).hexdigest()[:16]}"
    if input.get("forget"):
        forget(model, name)

    started = time.monotonic()
    ctx, found = await prefix(model, name, document)
    seconds = time.monotonic() - started
    print(f"{'opened' if found else 'computed and saved'} {ctx.seq_len} tokens in {seconds * 1000:.0f} ms")

    ctx.user(input.get("question", QUESTION))
    return await ctx.generate(Sampler.argmax(), max_tokens=input.get("max_tokens", 128)).collect_text()


async def prefix(model, name, document):
    """A context that has read the document, and whether it was found."""
    try:
        return Context.open(model, name), True
    except NotFound:
        ctx = Context(model).user(f"Read this text:\n{document}").assistant("I have read it.")
        await ctx.flush()
        ctx.save(name)
        return ctx, False


def forget(model, name):
    try:
        Context.delete(model, name)
    except NotFound:
        print("there was nothing to forget")
