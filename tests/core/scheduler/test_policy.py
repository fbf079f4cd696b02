"""Who goes first, and that nobody starves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pie_core.contracts.driver import CacheGroup, CacheSpace
from pie_core.engine.context import Context
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant
from pie_core.kv_pages.context_pages import Cache, ContextPages
from pie_core.scheduler.batching import take_chunk
from pie_core.scheduler.policy import Policy
from pie_core.scheduler.request import Pass


def waiting(*sizes: int, num_pages: int = 100, num_drafts: int = 0) -> list[Pass]:
    """Passes of so many rows each, on contexts of their own that share one pool."""
    cache = Cache([CacheSpace(CacheGroup("full", "paged", 1), 4, num_pages, 0)])
    passes = []
    for number, size in enumerate(sizes):
        context = Context(
            ContextId(number), ProcessId("p"), Tenant("t"), stream=0, pages=ContextPages.empty(cache)
        )
        context.history.extend([1] * size)
        passes.append(
            Pass(RequestId(number), context, base=0, arrival=number, num_drafts=num_drafts if size > 1 else 0)
        )
    return passes


def chosen(passes: Sequence[Pass], tokens: int, requests: int = 99, overtake: bool = False) -> dict[int, int]:
    """How many rows of which pass the next step holds."""
    chunks = Policy(tokens, requests).choose(passes, take_chunk, overtake=overtake)
    return {each.running.request or 0: each.stop - each.start for each in chunks}


def test_decoding_goes_before_prompts_and_prompts_fill_the_rest() -> None:
    assert chosen(waiting(30, 1, 1, 30), tokens=16) == {1: 1, 2: 1, 0: 14}
    assert chosen(waiting(5, 1, 20), tokens=16) == {1: 1, 0: 5, 2: 10}


def test_prompts_keep_a_quarter_of_the_tokens_and_of_the_requests() -> None:
    assert chosen(waiting(*[1] * 30, 5, 5, 5), tokens=64, requests=8) == {
        **dict.fromkeys(range(6), 1),
        30: 5,
        31: 5,
    }
    assert chosen(waiting(*[1] * 30, 50), tokens=16) == {**dict.fromkeys(range(12), 1), 30: 4}
    assert chosen(waiting(*[1] * 30, 50), tokens=64, requests=8) == {**dict.fromkeys(range(7), 1), 30: 50}


@pytest.mark.parametrize(("tokens", "requests"), [(1, 8), (3, 8), (64, 1)])
def test_with_room_for_one_kind_only_they_take_turns(tokens: int, requests: int) -> None:
    first, second = waiting(9, 1)
    assert 0 in chosen([first, second], tokens, requests)
    assert 1 in chosen([second, first], tokens, requests)


def test_what_prompts_cannot_use_is_left_to_decoding() -> None:
    assert chosen(waiting(*[1] * 9, 60, 60, num_pages=12), tokens=64, requests=8) == dict.fromkeys(
        range(8), 1
    )


def test_no_later_prompt_starts_while_an_earlier_one_waits_for_pages() -> None:
    assert chosen(waiting(40, 8, 1, num_pages=8), tokens=64) == {2: 1}
    assert chosen(waiting(40, 8, 1, num_pages=8), tokens=64, overtake=True) == {2: 1, 1: 8}


def test_a_prompt_takes_the_pages_of_all_its_rows_at_once() -> None:
    first, second = waiting(24, 24, num_pages=9)
    assert chosen([first, second], tokens=8) == {0: 8}
    assert first.context.pages.num_pages == (6,)


def test_drafts_and_the_row_before_them_are_never_split() -> None:
    assert chosen(waiting(10, num_drafts=3), tokens=8) == {0: 6}
    assert chosen(waiting(4, num_drafts=3), tokens=3) == {}
    assert chosen(waiting(4, num_drafts=3), tokens=4) == {0: 4}
