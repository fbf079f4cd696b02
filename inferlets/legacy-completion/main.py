"""A chat completion in the API of pie 0.2: contexts are filled, and `generate` returns the text.

Input: prompt; optional: system, max_tokens (256).
"""

from inferlet.legacy import Sampler, get_auto_model, stop_condition


async def main(input):
    model = get_auto_model()
    ctx = model.create_context()
    ctx.fill_system(input.get("system", "You are a helpful assistant."))
    ctx.fill_user(input["prompt"])

    stop = stop_condition.max_len(input.get("max_tokens", 256)).or_(
        stop_condition.ends_with_any(model.eos_tokens())
    )
    return await ctx.generate(Sampler.top_p(0.6, 0.95), stop)
