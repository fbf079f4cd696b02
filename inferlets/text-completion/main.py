"""A chat completion that streams: the smallest useful inferlet.

The engine runs the whole decoding loop (`stream` needs no code per token here), and the text is printed as it comes.

Input: prompt; optional: system, max_tokens (256), temperature (0.6; 0 is greedy), top_p (0.95).
"""

from inferlet import Context, Model, Sampler


async def main(input):
    ctx = Context(Model.load())
    if "system" in input:
        ctx.system(input["system"])
    ctx.user(input["prompt"])

    sampler = Sampler.top_p(input.get("temperature", 0.6), input.get("top_p", 0.95))
    async for piece in ctx.generate(sampler, max_tokens=input.get("max_tokens", 256)).stream():
        print(piece, end="", flush=True)
    print()
