"""Continues a text as it stands: no chat template, no roles.

`append` takes tokens, and `auto_flush=False` leaves the assistant's cue out.

Input: prompt; optional: max_tokens (64), temperature (0.6; 0 is greedy), top_p (0.95).
"""

from inferlet import Context, Model, Sampler, chat


async def main(input):
    model = Model.load()
    ctx = Context(model).append(model.tokenizer().encode(input["prompt"]))

    sampler = Sampler.top_p(input.get("temperature", 0.6), input.get("top_p", 0.95))
    generation = ctx.generate(
        sampler, max_tokens=input.get("max_tokens", 64), stop=chat.stop_tokens(model), auto_flush=False
    )
    print(input["prompt"], end="", flush=True)
    async for piece in generation.stream():
        print(piece, end="", flush=True)
    print()
