"""A program that launches others: one for each question, eight at a time, all in the batches of one engine.

What they return comes back; what ends one of them is raised where it is awaited, and the others go on. The manifest
says how many programs may run at a time (`children` under [capabilities]).

Input: optional: prompts (three of its own), callee (launch-callee), max_tokens (64).
"""

import asyncio

from inferlet import InferletError, launch

PROMPTS = ["Name a river.", "Name a mountain.", "Name a desert."]
AT_A_TIME = 8


async def main(input):
    places = asyncio.Semaphore(AT_A_TIME)

    async def answer(prompt):
        given = {"prompt": prompt, "max_tokens": input.get("max_tokens", 64)}
        async with places:
            try:
                return await launch(input.get("callee", "launch-callee"), given)
            except InferletError as error:
                return f"({error.code}) {error.message.splitlines()[-1]}"

    prompts = input.get("prompts", PROMPTS)
    answers = await asyncio.gather(*map(answer, prompts))
    for prompt, text in zip(prompts, answers, strict=True):
        print(f"{prompt} {text}")
    return answers
