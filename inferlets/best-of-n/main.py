"""Several answers to one question, and the one that the others agree with most.

The question is computed once: every candidate is a fork that shares its pages. All candidates are generated at the
same time, in the batches of one engine.

Input: optional: question, num_candidates (5), max_tokens (256), temperature (0.8).
"""

import asyncio
from difflib import SequenceMatcher

from inferlet import Context, Model, Sampler

QUESTION = "Which is heavier, a kilogram of feathers or a kilogram of iron? Answer in one sentence."


async def main(input):
    trunk = Context(Model.load()).user(input.get("question", QUESTION))
    await trunk.flush()
    sampler = Sampler.top_p(input.get("temperature", 0.8), 0.95)

    async def candidate():
        with trunk.fork() as branch:
            text = await branch.generate(sampler, max_tokens=input.get("max_tokens", 256)).collect_text()
            return text.strip()

    texts = await asyncio.gather(*(candidate() for _ in range(input.get("num_candidates", 5))))
    ranked = sorted(texts, key=lambda text: agreement(text, texts), reverse=True)
    for place, text in enumerate(ranked, 1):
        print(f"{place}. (agreement {agreement(text, texts):.2f}) {text}")
    return ranked[0]


def agreement(text, texts):
    """How similar the text is to all of them on average."""
    return sum(SequenceMatcher(None, text, other).ratio() for other in texts) / len(texts)
