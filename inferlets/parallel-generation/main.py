"""Two continuations of one conversation at the same time.

The system prompt is written once and shared by both forks; `asyncio.gather` lets the engine batch their passes.

Input: optional: max_tokens (128), topics (a list of things to explain; here two).
"""

import asyncio

from inferlet import Context, Model, Sampler

TOPICS = ["why the sky is blue", "how a rainbow forms"]


async def main(input):
    trunk = Context(Model.load()).system("You explain things to a child, in two sentences.")
    await trunk.flush()

    async def explain(topic):
        branch = trunk.fork().user(f"Explain {topic}.")
        return await branch.generate(Sampler.top_p(), max_tokens=input.get("max_tokens", 128)).collect_text()

    texts = await asyncio.gather(*(explain(topic) for topic in input.get("topics", TOPICS)))
    for number, text in enumerate(texts, 1):
        print(f"Output {number}: {text}")
