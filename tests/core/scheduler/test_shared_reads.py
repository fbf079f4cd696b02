"""Requests of a step that read the same pages stand side by side and are named, whoever they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pie_core.contracts.forward import ForwardBatch
from pie_core.engine.messages import EvictRows
from pie_core.ids import ContextId, Ticket
from pie_plugins.drivers.dummy.driver import DummyDriver
from tests.core.engine.stepping import RANDOM, SteppedEngine, dummy

PROMPT = [(11 * i) % 97 for i in range(34)]  # eight pages of four, and two rows
OTHER = [(13 * i + 5) % 97 for i in range(21)]


class Seen:
    """An engine whose batches are looked at."""

    def __init__(self, **options: Any) -> None:
        driver = dummy(num_pages=400, **options)
        self.batches: list[ForwardBatch] = []
        submit = driver.submit

        def noted(batch: ForwardBatch) -> Ticket:
            self.batches.append(batch)
            return submit(batch)

        setattr(driver, "submit", noted)  # noqa: B010 - a method, to the type checker
        assert isinstance(driver, DummyDriver)
        self.engine = SteppedEngine(driver, speculation_depth=0)

    def prompts(self, *prompts: list[int]) -> None:
        for context, prompt in enumerate(prompts, start=1):
            self.engine.create(context)
            self.engine.forward(context, prompt)

    def decode_all(self, contexts: range, count: int = 6) -> list[list[int]]:
        """Everybody generates side by side."""
        self.batches.clear()
        requests = [self.engine.begin_generation(each, [each % 97], count, RANDOM) for each in contexts]
        self.engine.run()
        return [self.engine.generated(each) for each in requests]

    def groups(self) -> list[list[tuple[list[int], int]]]:
        """By batch: the contexts of each group, and how many rows they share."""
        return [
            [
                (sorted(batch.context_ids[first:stop].tolist()), rows)
                for first, stop, rows in zip(
                    batch.prefixes.first.tolist(),
                    batch.prefixes.stop.tolist(),
                    batch.prefixes.rows.tolist(),
                    strict=True,
                )
            ]
            for batch in self.batches
        ]


def alone(contexts: range, prompt: list[int], count: int = 6) -> list[list[int]]:
    """What forks of one context draw when each is the only one at the driver."""
    engine = SteppedEngine(dummy(num_pages=400), max_batch_requests=1, prefix_cache=False)
    engine.create(1)
    engine.forward(1, prompt)
    for child in contexts[1:]:
        engine.fork(1, child)
    return [engine.generate(each, [each % 97], count, RANDOM) for each in contexts]


def test_forks_are_a_group_from_their_first_step_to_their_last() -> None:
    seen = Seen()
    seen.prompts(PROMPT)
    for child in range(2, 6):
        seen.engine.fork(1, child)
    drawn = seen.decode_all(range(1, 6))
    assert drawn == alone(range(1, 6), PROMPT)
    assert [each[0] for each in seen.groups() if each] == [([1, 2, 3, 4, 5], 32)] * 6
    assert seen.engine.engine._loop.shared_rows == 6 * 4 * 32


def test_strangers_stand_between_no_group() -> None:
    seen = Seen()
    seen.prompts(PROMPT, OTHER, PROMPT, [7] * 9, OTHER, PROMPT, [8])
    seen.decode_all(range(1, 8))
    assert len(seen.batches) >= 6
    for batch, groups in zip(seen.batches, seen.groups(), strict=True):
        here = set(batch.context_ids.tolist())
        expected = [([1, 3, 6], 32), ([2, 5], 20)]
        assert groups == [each for each in expected if set(each[0]) <= here]


def test_who_shares_more_is_a_group_of_its_own_if_that_saves_more() -> None:
    """One page of a system prompt is common to all; two families share much more."""
    system = PROMPT[:4]
    family = [*system, *OTHER]
    seen = Seen()
    seen.prompts([*PROMPT, 1], [*family, 2], [*PROMPT, 3], [*family, 4], [*system, 50], [*PROMPT, 6])
    seen.decode_all(range(1, 7))
    assert sorted(seen.groups()[0]) == [([1, 3, 6], 32), ([2, 4], 24)]


def test_a_page_that_all_share_counts_more_than_one_that_two_share_beside_it() -> None:
    system = PROMPT[:16]
    seen = Seen()
    seen.prompts(*([*system, *[60 + each] * 5] for each in (1, 2, 3, 3, 5, 6)))
    seen.decode_all(range(1, 7))
    assert seen.groups()[0] == [([1, 2, 3, 4, 5, 6], 16)]


@pytest.mark.parametrize("groups", [("paged", "window"), ("latent", "state"), ("paged", "latent")])
def test_the_other_kinds_of_groups_do_not_stand_in_the_way(groups: tuple[str, ...]) -> None:
    seen = Seen(groups=groups, window=9)
    seen.prompts(PROMPT)
    for child in range(2, 5):
        seen.engine.fork(1, child)
    seen.decode_all(range(1, 5))
    assert seen.groups()[0] == [([1, 2, 3, 4], 32)]


@pytest.mark.parametrize("groups", [("window",), ("state",)])
def test_models_that_keep_no_row_for_ever_share_no_reads(groups: tuple[str, ...]) -> None:
    seen = Seen(groups=groups)
    seen.prompts(PROMPT)
    seen.engine.fork(1, 2)
    seen.decode_all(range(1, 3))
    assert not any(seen.groups())


def test_contexts_that_evict_read_for_themselves() -> None:
    seen = Seen()
    seen.prompts(PROMPT)
    for child in range(2, 5):
        seen.engine.fork(1, child)
    seen.engine.send(EvictRows(ContextId(3), 8, 20))
    seen.decode_all(range(1, 5))
    assert seen.groups()[0] == [([1, 2, 4], 32)]


def test_prompts_that_go_on_from_the_same_rows_are_a_group_too() -> None:
    seen = Seen()
    seen.prompts(PROMPT)
    for child in range(2, 5):
        seen.engine.fork(1, child)
    seen.batches.clear()
    for context in range(1, 5):
        seen.engine.submit(context, [context] * 7)
    seen.engine.run()
    assert seen.groups()[0] == [([1, 2, 3, 4], 32)]
    assert np.diff(seen.batches[0].indptr).tolist() == [7] * 4
