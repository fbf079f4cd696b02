"""However a run is cut into steps, batches, graphs, pages and forks, it gives what the plain sequential run gives."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp

from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.contracts.driver import Driver
from pie_core.testing.any_architecture import write_checkpoint
from pie_core.testing.batches import Context, FromTicket, Request, Sample, Stepper
from tests.plugins.drivers.cuda_native.machine import cuda_native
from tests.plugins.drivers.portable.test_equivalence import Story, check_stories, greedy, stories
from tests.plugins.models.reference import ARCHITECTURES, tiny

PAGE_SIZES = (1, 4, 16)
SAMPLES = [
    Sample(),
    Sample(temperature=1.0, stream=4, top_k=30),
    Sample(temperature=0.8, stream=2**40, min_p=0.05),
]


@cache
def driver(architecture: str, page_size: int) -> Driver:
    folder = Path(mkdtemp())
    write_checkpoint(folder, ARCHITECTURES[architecture], tiny(architecture))
    return cuda_native(folder, kv_page_size=page_size, total_pages=2048)


@settings(max_examples=15, deadline=None)
@given(
    architecture=st.sampled_from(["llama", "qwen3"]),
    page_size=st.sampled_from(PAGE_SIZES),
    told=st.lists(stories(), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_pages_chunks_and_neighbours_change_nothing(
    architecture: str, page_size: int, told: list[Story], order: Random
) -> None:
    check_stories(Stepper(driver(architecture, page_size)), architecture, told, order)


@settings(max_examples=20, deadline=None)
@given(
    page_size=st.sampled_from(PAGE_SIZES),
    prompts=st.lists(st.lists(st.integers(0, 319), min_size=1, max_size=20), min_size=1, max_size=5),
    kinds=st.lists(st.integers(0, len(SAMPLES) - 1), min_size=5, max_size=5),
    leaving=st.lists(st.integers(1, 6), min_size=5, max_size=5),
    depth=st.integers(0, 3),
)
def test_contexts_that_come_and_go_keep_their_tokens_at_any_depth(
    page_size: int, prompts: list[list[int]], kinds: list[int], leaving: list[int], depth: int
) -> None:
    """Steps are queued behind open ones; contexts leave after different numbers of tokens, so buckets change."""
    samples = [SAMPLES[kind] for kind in kinds]
    expected = [
        alone(prompt, sample, count) for prompt, sample, count in zip(prompts, samples, leaving, strict=False)
    ]
    stepper = Stepper(driver("llama", page_size))
    contexts = [stepper.context() for _ in prompts]
    first = stepper.submit(
        [Request(c, p, samples=[s]) for c, p, s in zip(contexts, prompts, samples, strict=False)]
    )
    found: list[list[int]] = [[] for _ in prompts]
    fed = {place: FromTicket(first, place) for place in range(len(prompts))}
    open_steps = [(first, list(range(len(prompts))))]
    for step in range(1, max(leaving)):
        live = [place for place in range(len(prompts)) if leaving[place] > step]
        if not live:
            break
        ticket = stepper.submit(
            [Request(contexts[place], [fed[place]], samples=[samples[place]]) for place in live]
        )
        fed = {place: FromTicket(ticket, row) for row, place in enumerate(live)}
        open_steps.append((ticket, live))
        while len(open_steps) > depth:
            _take(stepper, open_steps.pop(0), found)
    for each in open_steps:
        _take(stepper, each, found)
    assert found == expected


def _take(stepper: Stepper, step: tuple[int, list[int]], found: list[list[int]]) -> None:
    ticket, live = step
    result = stepper.collect(ticket)  # type: ignore[arg-type]
    assert not result.failed
    for place, token in zip(live, result.tokens.tolist(), strict=True):
        found[place].append(token)


def alone(prompt: list[int], sample: Sample, count: int) -> list[int]:
    """The plain loop of one context on pages of its own size."""
    stepper = Stepper(driver("llama", 16))
    context: Context = stepper.context()
    fed, tokens = prompt, []
    for _ in range(count):
        result = stepper.run([Request(context, fed, samples=[sample])])
        fed = [int(result.tokens[0])]
        tokens += fed
    return tokens


def test_greedy_tokens_equal_the_portable_driver_s() -> None:
    prompt = list(range(7, 30))
    assert alone(prompt, Sample(), 12) == greedy("llama", prompt, 12)
