"""A program for others to launch: it answers one question and returns the answer, which launch-caller collects.

Nothing in it knows about being launched by a program: launch it yourself and it does the same.

Input: prompt; optional: max_tokens (64).
"""

from inferlet import Context, Model, Sampler


async def main(input):
    ctx = Context(Model.load()).user(input["prompt"])
    answer = ctx.generate(Sampler.argmax(), max_tokens=input.get("max_tokens", 64))
    return (await answer.collect_text()).strip()
