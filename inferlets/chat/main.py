"""A conversation: each message of the client is answered, and what was said stays computed.

The context lives as long as the program, so a turn costs only its own tokens. The program ends with the client's
messages.

Input: optional: system, max_tokens (512), temperature (0.6), top_p (0.95).
"""

from inferlet import Context, Model, Sampler, session


async def main(input):
    ctx = Context(Model.load())
    if "system" in input:
        ctx.system(input["system"])
    sampler = Sampler.top_p(input.get("temperature", 0.6), input.get("top_p", 0.95))

    while (message := await session.receive()) is not None:
        ctx.user(message)
        async for piece in ctx.generate(sampler, max_tokens=input.get("max_tokens", 512)).stream():
            print(piece, end="", flush=True)
        print(flush=True)
        ctx.seal()
