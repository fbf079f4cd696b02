"""However a run is cut into steps, batches, pages, forks and drafts, it gives what the plain sequential run gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32, ProbeKind, last_accepted
from pie_core.testing.any_architecture import write_checkpoint
from pie_core.testing.batches import (
    Context,
    FromTicket,
    Mask,
    Probe,
    Request,
    Sample,
    Stepper,
    probe_values,
)
from tests.plugins.models.reference import ARCHITECTURES, CONFIGS, portable

TOLERANCE = 1e-5  # of the logits' standard deviation
PAGE_SIZES = (1, 3, 16, 64)
VOCAB = 320


@cache
def driver(architecture: str, page_size: int) -> Driver:
    folder = Path(mkdtemp())
    write_checkpoint(folder, ARCHITECTURES[architecture], CONFIGS[architecture])
    return portable(folder, kv_page_size=page_size)


@dataclass(frozen=True)
class Story:
    """One context: its tokens, where they are cut into steps, and ranges that single rows may read."""

    tokens: list[int]
    cuts: list[int]
    masks: dict[int, tuple[int, int]]

    def chunks(self, start: int = 0) -> list[tuple[int, int]]:
        places = [start, *(cut for cut in self.cuts if start < cut < len(self.tokens)), len(self.tokens)]
        return list(pairwise(places))

    def request(self, context: Context, start: int, stop: int) -> Request:
        masks = [Mask(row - start, [self.masks[row]]) for row in sorted(self.masks) if start <= row < stop]
        probes = [Probe(ProbeKind.LOGITS)]
        return Request(context, self.tokens[start:stop], samples=[Sample()], probes=probes, masks=masks)


@st.composite
def stories(draw: st.DrawFn) -> Story:
    length = draw(st.integers(2, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4)))
    rows = draw(st.sets(st.integers(1, length - 1), max_size=3))
    masks = {}
    for row in rows:
        start = int(random.integers(0, row + 1))
        masks[row] = (start, int(random.integers(start + 1, row + 2)))
    return Story(random.integers(0, VOCAB, length).tolist(), cuts, masks)


def sequential(architecture: str, story: Story) -> tuple[Float32, int]:
    """The whole story in one step of one context."""
    stepper = Stepper(driver(architecture, 16))
    result = stepper.run([story.request(stepper.context(), 0, len(story.tokens))])
    return probe_values(result, 0), int(result.tokens[0])


def close(seen: Float32, expected: Float32) -> bool:
    return bool(np.abs(seen - expected).max() <= TOLERANCE * expected.std())


def check_stories(stepper: Stepper, architecture: str, told: list[Story], order: Random) -> None:
    """Told side by side, in chunks that take turns in a random order on pages that lie anywhere, they end as alone."""
    stepper.book.shuffle(3)
    contexts = [stepper.context() for _ in told]
    waiting = [story.chunks() for story in told]
    answers: dict[int, tuple[Float32, int]] = {}
    while any(waiting):
        ready = [place for place, chunks in enumerate(waiting) if chunks]
        chosen = [place for place in ready if order.random() < 0.7] or ready
        order.shuffle(chosen)
        requests = [told[place].request(contexts[place], *waiting[place].pop(0)) for place in chosen]
        result = stepper.run(requests)
        assert not result.failed
        for row, place in enumerate(chosen):
            answers[place] = probe_values(result, row), int(result.tokens[row])
    for place, story in enumerate(told):
        expected, token = sequential(architecture, story)
        assert close(answers[place][0], expected)
        assert answers[place][1] == token


@settings(max_examples=25, deadline=None)
@given(
    architecture=st.sampled_from(sorted(CONFIGS)),
    page_size=st.sampled_from(PAGE_SIZES),
    told=st.lists(stories(), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_pages_chunks_and_neighbours_change_nothing(
    architecture: str, page_size: int, told: list[Story], order: Random
) -> None:
    check_stories(Stepper(driver(architecture, page_size)), architecture, told, order)


@settings(max_examples=15, deadline=None)
@given(
    architecture=st.sampled_from(sorted(CONFIGS)),
    page_size=st.sampled_from(PAGE_SIZES),
    told=stories(),
    tail=stories(),
    data=st.data(),
)
def test_a_fork_continues_like_a_context_of_its_own(
    architecture: str, page_size: int, told: Story, tail: Story, data: st.DataObject
) -> None:
    shared = data.draw(st.integers(1, len(told.tokens)), label="shared rows")
    stepper = Stepper(driver(architecture, page_size))
    parent = stepper.context()
    stepper.run([Request(parent, told.tokens[:shared])])
    child = stepper.fork(parent)
    whole = Story(told.tokens[:shared] + tail.tokens, [cut + shared for cut in tail.cuts], {})
    unmasked = Story(told.tokens, told.cuts, {})
    grown = [(unmasked, parent), (whole, child)] if shared < len(told.tokens) else [(whole, child)]
    for story, context in reversed(grown):
        for start, stop in story.chunks(shared):
            result = stepper.run([story.request(context, start, stop)])
        expected, token = sequential(architecture, story)
        assert close(probe_values(result, 0), expected)
        assert int(result.tokens[0]) == token


def greedy(architecture: str, tokens: Sequence[int], count: int) -> list[int]:
    """The plain loop, one token a step."""
    stepper = Stepper(driver(architecture, 16))
    context, fed, found = stepper.context(), list(tokens), []
    for _ in range(count):
        result = stepper.run([Request(context, fed, samples=[Sample()])])
        fed = [int(result.tokens[0])]
        found += fed
    return found


@settings(max_examples=20, deadline=None)
@given(
    architecture=st.sampled_from(sorted(CONFIGS)),
    page_size=st.sampled_from(PAGE_SIZES),
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=3),
    right=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    ahead=st.booleans(),
)
def test_verified_drafts_give_the_tokens_of_the_plain_loop(
    architecture: str, page_size: int, prompts: list[list[int]], right: list[int], ahead: bool
) -> None:
    """`right` drafts of three are what the model says; with `ahead` the next step is queued before that is known."""
    expected = [greedy(architecture, prompt, 6) for prompt in prompts]
    stepper = Stepper(driver(architecture, page_size))
    contexts = [stepper.context() for _ in prompts]
    stepper.run(
        [
            Request(context, prompt, samples=[Sample()])
            for context, prompt in zip(contexts, prompts, strict=True)
        ]
    )
    requests = []
    for context, wanted, agreeing in zip(contexts, expected, right, strict=False):
        drafts = [
            token if place < agreeing else (token + 1) % VOCAB for place, token in enumerate(wanted[1:4])
        ]
        samples = [Sample(row) for row in range(4)]
        requests.append(Request(context, [wanted[0], *drafts], samples=samples, drafts=3))
    ticket = stepper.submit(requests)
    result = None if ahead else stepper.collect(ticket)
    following = stepper.submit(
        [
            Request(context, [FromTicket(ticket, last_accepted(place))], samples=[Sample()])
            for place, context in enumerate(contexts)
        ]
    )
    result = result or stepper.collect(ticket)
    after = stepper.collect(following)
    for place, (wanted, agreeing) in enumerate(zip(expected, right, strict=False)):
        assert result.accepted[place] == agreeing
        assert result.tokens[4 * place : 4 * place + agreeing + 1].tolist() == wanted[1 : agreeing + 2]
        assert after.tokens[place] == wanted[agreeing + 2]


def test_rows_that_no_head_of_an_index_likes_are_chosen_alike_in_every_chunk() -> None:
    """Their scores are all 0, and more tie there than are read."""
    twice = [256, 162, 156, 131, 122, 183, 229, 199, 24, 54, 166, 124] * 2
    behind = [
        18,
        78,
        184,
        103,
        208,
        283,
        191,
        233,
        295,
        44,
        265,
        168,
        36,
        74,
        71,
        60,
        111,
        182,
        75,
        3,
        191,
        238,
        212,
    ]
    story = Story([*twice, *behind, 0, 169], [12, 34], {})
    check_stories(Stepper(driver("deepseek_v32", 16)), "deepseek_v32", [story], Random(0))
