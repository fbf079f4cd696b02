"""The plain decoding loop over a driver: no engine, no guests, nothing between two steps but the next batch."""

from __future__ import annotations

from collections.abc import Sequence

from pie_core.contracts.driver import Driver
from pie_core.testing.batches import Context, Request, Sample, Stepper


def greedy(
    driver: Driver, prompts: Sequence[Sequence[int]], max_tokens: int, stop: Sequence[int] = ()
) -> list[list[int]]:
    """Prefills all prompts in as few steps as the driver allows, then decodes them together until each one ends."""
    stepper = Stepper(driver)
    contexts = [stepper.context() for _ in prompts]
    generated: list[list[int]] = [[] for _ in prompts]
    for places in _batches(prompts, driver.capabilities.max_batch_tokens):
        result = stepper.run([_request(contexts[place], prompts[place]) for place in places])
        for place, token in zip(places, result.tokens.tolist(), strict=True):
            generated[place].append(token)
    live = list(range(len(prompts)))
    while live := [place for place in live if _goes_on(generated[place], max_tokens, stop)]:
        result = stepper.run([_request(contexts[place], generated[place][-1:]) for place in live])
        for place, token in zip(live, result.tokens.tolist(), strict=True):
            generated[place].append(token)
    for context in contexts:
        stepper.book.drop_context(context)
    return generated


def _request(context: Context, tokens: Sequence[int]) -> Request:
    return Request(context, tokens, samples=[Sample()])


def _goes_on(generated: Sequence[int], max_tokens: int, stop: Sequence[int]) -> bool:
    return len(generated) < max_tokens and generated[-1] not in stop


def _batches(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for place, prompt in enumerate(prompts):
        if len(prompt) > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(place)
        room -= len(prompt)
    return batches
