"""Rows that nobody reads any more: hidden exactly, whatever the page size, and their memory really freed."""

from __future__ import annotations

from typing import Any

import pytest

from pie_core.engine.messages import EvictRows, ForwardDone, PinRows, Sample, TruncateContext
from pie_core.ids import ContextId
from tests.core.engine.stepping import GREEDY, SteppedEngine, dummy

ONE = ContextId(1)


def written(length: int = 20, **options: Any) -> SteppedEngine:
    engine = SteppedEngine(dummy(**options))
    engine.create(1)
    engine.forward(1, range(length))
    return engine


def masked_draw(tokens: list[int], mask: tuple[int, ...]) -> int:
    """What a token behind `range(20)` draws that reads only what the mask shows."""
    engine = written()
    samples = (Sample(len(tokens) - 1, GREEDY),)
    masks = tuple((*mask[:-1], mask[-1] + row) for row in range(len(tokens)))
    return engine.forward(1, tokens, samples=samples, masks=masks).tokens[0]


@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
@pytest.mark.parametrize("groups", [("paged",), ("latent", "window")])
def test_evicted_rows_are_hidden_from_every_later_row(page_size: int, groups: tuple[str, ...]) -> None:
    engine = written(page_size=page_size, groups=groups)
    expected = written(page_size=page_size, groups=groups)
    engine.send(EvictRows(ONE, 3, 11))
    samples = (Sample(1, GREEDY),)
    masks = ((0, 3, 8, 10), (0, 3, 8, 11))
    assert engine.forward(1, [7, 8], samples=samples) == expected.forward(
        1, [7, 8], samples=samples, masks=masks
    )
    assert engine.history(1) == [*range(20), 7, 8]


def test_pages_whose_rows_are_all_evicted_are_free() -> None:
    engine = written()
    free = engine.status().free_pages[0]
    engine.send(EvictRows(ONE, 3, 8))
    assert engine.status().free_pages[0] == free + 1
    engine.send(EvictRows(ONE, 2, 3), EvictRows(ONE, 0, 2))
    assert engine.status().free_pages[0] == free + 2


def test_pinned_rows_are_left_alone() -> None:
    engine = written()
    engine.send(PinRows(ONE, 0, 4), EvictRows(ONE, 0, 12))
    assert engine.draw(1, [9]) == masked_draw([9], (0, 4, 8, 9))


def test_a_fork_of_what_was_evicted_goes_on_alike_and_holds_what_it_shares() -> None:
    engine = written()
    engine.fork(1, 2)
    free = engine.status().free_pages[0]
    engine.send(EvictRows(ONE, 0, 8))
    assert engine.status().free_pages[0] == free, "the fork reads them"
    engine.fork(1, 3)
    assert engine.draw(1, [9]) == engine.draw(3, [9]) == masked_draw([9], (8, 13))
    alone = written()
    assert engine.draw(2, [9]) == alone.draw(1, [9])


def test_going_back_brings_no_evicted_row_back() -> None:
    engine = written()
    engine.send(EvictRows(ONE, 4, 16), TruncateContext(ONE, 10))
    expected = SteppedEngine()
    expected.create(1)
    expected.forward(1, range(10))
    masks = ((0, 4, 6, 1), (0, 4, 6, 2))
    samples = (Sample(1, GREEDY),)
    assert (
        engine.forward(1, [50, 51], samples=samples).tokens
        == expected.forward(1, [50, 51], samples=samples, masks=masks).tokens
    )


def test_what_cannot_be_evicted_is_told_to_the_next_request() -> None:
    engine = written(8)
    engine.send(EvictRows(ONE, 3, 9))
    assert "cannot evict rows 3 to 9: the context has 8" in engine.refused(1).message
    engine.send(PinRows(ONE, -1, 2))
    assert "cannot pin rows -1 to 2" in engine.refused(1).message
    for unable in (dummy(groups=("paged", "state")), dummy(without=("attention-mask",))):
        engine = SteppedEngine(unable)
        engine.create(1)
        engine.forward(1, [1, 2])
        engine.send(EvictRows(ONE, 0, 1))
        assert engine.refused(1).code == "unsupported"


def test_a_mask_that_shows_evicted_rows_only_is_refused() -> None:
    engine = written()
    engine.send(EvictRows(ONE, 0, 8))
    assert "nothing is left to attend to" in engine.refused(1, masks=((0, 8),)).message


def windowed(count: int, *, masked: bool) -> list[int]:
    """Tokens of a loop in which each reads four first ones and the last sixteen; pages never get more."""
    sink, window, page_size = 4, 16, 4
    engine = SteppedEngine(dummy(num_pages=6, page_size=page_size, max_model_len=count + 4))
    engine.create(1)
    drawn: list[int] = []
    tokens = [1, 2, 3, 4]
    for length in range(len(tokens), len(tokens) + count):
        masks = ((0, sink, max(length - window - sink, 0), window + 1),) if masked and drawn else ()
        samples = (Sample(len(tokens) - 1, GREEDY),)
        request = engine.submit(1, tokens, samples=samples, masks=masks)
        engine.run_until_answered(request)
        drawn += engine.final(request, ForwardDone).tokens
        tokens = drawn[-1:]
        engine.send(EvictRows(ONE, sink, max(length - window + 1, sink)))
        status = engine.status()
        assert status.total_pages[0] - status.free_pages[0] <= (sink + window) // page_size + 1
    return drawn


def test_a_loop_under_sink_and_window_stays_at_their_pages_and_one_more() -> None:
    tokens = windowed(600, masked=True)
    assert tokens == windowed(600, masked=False)
    assert len(set(tokens)) > 10
