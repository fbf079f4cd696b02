"""Pages that a program manages itself: reserved, written in place or not at all, committed, released."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pie_core.engine.messages import (
    Command,
    DropContext,
    EndManaging,
    EndProcess,
    Failed,
    Forward,
    ForwardDone,
    Generate,
    Generated,
    ManagePages,
    OpenSnapshot,
    PageCounts,
    Sample,
    SaveSnapshot,
    SnapshotOpened,
    TruncateContext,
)
from pie_core.ids import ContextId, ProcessId, Tenant
from tests.core.engine.stepping import GREEDY, SteppedEngine, dummy

PAGE = 4


def engine_with(num_pages: int = 16, prefix_cache: bool = False, **options: object) -> SteppedEngine:
    engine = SteppedEngine(dummy(num_pages=num_pages, page_size=PAGE), prefix_cache=prefix_cache, **options)
    engine.create(1)
    return engine


def manage(engine: SteppedEngine, context: int = 1, **changes: int) -> tuple[int, int, int] | tuple[str, str]:
    """(committed, count, length), or the code and text of the refusal."""
    request = engine.new_request()
    engine.send(ManagePages(request, ContextId(context), **changes))
    engine.run()
    answer = engine.events[request][-1]
    if isinstance(answer, Failed):
        return answer.code, answer.message
    assert isinstance(answer, PageCounts)
    return answer.committed, answer.count, answer.length


def free(engine: SteppedEngine) -> int:
    return engine.status().free_pages[0]


def test_pages_are_reserved_written_committed_and_released() -> None:
    engine = engine_with()
    assert manage(engine, reserve=3) == (0, 3, 0)
    assert free(engine) == 13
    assert engine.forward(1, [1] * 6).length == 6
    assert free(engine) == 13
    assert manage(engine, commit=1) == (1, 3, 6)
    assert manage(engine, release=1, reserve=2) == (1, 4, 6)
    assert free(engine) == 12
    assert engine.forward(1, [2] * 10).length == 16
    assert manage(engine, commit=3) == (4, 4, 16)
    engine.send(DropContext(ContextId(1)))
    assert engine.all_pages_are_free()


def test_no_row_is_written_behind_what_is_reserved() -> None:
    engine = engine_with()
    assert manage(engine) == (0, 0, 0)
    refused = engine.refused(1, [1])
    assert refused.code == "invalid-request"
    assert "reserve more first" in refused.message
    manage(engine, reserve=1)
    assert engine.forward(1, [1] * 3).length == 3
    assert "writes rows 3 to 4, and the 1 pages of 4" in engine.refused(1, [2] * 2).message
    assert engine.history(1) == [1] * 3
    assert engine.forward(1, [2]).length == 4


def test_rows_positions_masks_and_tokens_are_those_of_any_context() -> None:
    raw, plain = engine_with(), engine_with()
    manage(raw, reserve=4)
    last: list[ForwardDone] = []
    for engine in (raw, plain):
        engine.forward(1, [1, 2, 3], positions=(5, 6, 9))
        engine.forward(1, [4, 5], masks=((0, 2, 1, 1), (0, 5)))
        last.append(engine.forward(1, [6], samples=(Sample(0, GREEDY),)))
    assert last[0].tokens == last[1].tokens
    assert last[0].position == last[1].position == 13
    assert raw.draw(1, [7, 8]) == plain.draw(1, [7, 8])
    assert raw.history(1) == plain.history(1)


def test_only_full_pages_are_committed_and_they_stay() -> None:
    engine = engine_with()
    manage(engine, reserve=3)
    engine.forward(1, [1] * 7)
    code, message = manage(engine, commit=2)  # type: ignore[misc]
    assert (code, "1 working pages are full" in str(message)) == ("invalid-request", True)
    assert manage(engine, commit=1) == (1, 3, 7)
    assert manage(engine, commit=1)[0] == "invalid-request"
    engine.send(TruncateContext(ContextId(1), 3))
    assert "4 are committed" in engine.refused(1).message
    engine.send(TruncateContext(ContextId(1), 4))
    assert engine.forward(1, [2]).length == 5
    assert manage(engine) == (1, 3, 5)


def test_pages_are_released_once_and_only_empty_ones() -> None:
    engine = engine_with()
    manage(engine, reserve=3)
    engine.forward(1, [1] * 5)
    assert "1 of the context's 3 hold no rows; truncate it first" in str(manage(engine, release=2)[1])
    assert manage(engine, release=1) == (0, 2, 5)
    assert manage(engine, release=1)[0] == "invalid-request"
    assert manage(engine, release=1, reserve=5)[0] == "invalid-request"  # refused as a whole
    assert manage(engine) == (0, 2, 5)
    engine.send(TruncateContext(ContextId(1), 4))
    assert manage(engine, release=1) == (0, 1, 4)
    assert free(engine) == 15


def test_a_first_reservation_that_is_refused_promises_nothing() -> None:
    engine = SteppedEngine(dummy(num_pages=4, page_size=PAGE, num_host_pages=0), prefix_cache=False)
    engine.create(1)
    engine.forward(1, [1] * 8)
    engine.create(2)
    engine.submit(2, [1] * 9)
    assert engine.start()  # context 1 has given its pages up: three are at work
    request = engine.new_request()
    engine.send(ManagePages(request, ContextId(1), reserve=1))
    assert engine.final(request, Failed).code == "out-of-pages"
    engine.run()
    engine.send(DropContext(ContextId(2)))
    assert free(engine) == 4
    engine.send(DropContext(ContextId(1)))
    assert engine.all_pages_are_free()


def test_a_page_that_a_fork_shares_is_not_written_and_not_copied() -> None:
    engine = engine_with()
    manage(engine, reserve=4)
    engine.forward(1, [1] * 6)
    engine.fork(1, 2)
    refused = engine.refused(1, [2])
    assert refused.code == "page-shared"
    assert engine.forward(2, [3]).length == 7  # a fork is like any context: it gets a copy
    assert engine.forward(1, [2]).length == 7  # nobody else holds the page now
    engine.fork(1, 3)
    assert engine.refused(1, [2]).code == "page-shared"
    engine.send(TruncateContext(ContextId(1), 4))
    assert engine.forward(1, [2]).length == 5  # at a page's end nothing is shared that is written
    assert engine.history(3) == [1] * 6 + [2]
    assert manage(engine, 3, reserve=1) == (0, 3, 7)
    engine.send(DropContext(ContextId(3)), DropContext(ContextId(2)), DropContext(ContextId(1)))
    assert engine.all_pages_are_free()


def test_releasing_a_shared_page_leaves_it_to_the_others() -> None:
    engine = engine_with()
    manage(engine, reserve=2)
    engine.forward(1, [1] * 8)
    engine.fork(1, 2)
    engine.send(TruncateContext(ContextId(1), 0))
    assert manage(engine, release=2) == (0, 0, 0)
    engine.create(3)
    assert engine.draw(2, [5]) == SteppedEngine.draw(engine_of([1] * 8), 1, [5])


def engine_of(tokens: list[int]) -> SteppedEngine:
    engine = engine_with()
    engine.forward(1, tokens)
    return engine


def test_a_snapshot_shares_its_pages_and_what_is_opened_is_managed_by_the_engine() -> None:
    engine = engine_with()
    manage(engine, reserve=4)
    engine.forward(1, [1] * 6)
    engine.send(SaveSnapshot(engine.new_request(), ContextId(1), "kept", b""))
    assert engine.refused(1, [2]).code == "page-shared"
    opened = engine.new_request()
    engine.send(OpenSnapshot(opened, ContextId(2), ProcessId("p"), Tenant("t"), "kept", take=True))
    assert engine.final(opened, SnapshotOpened).length == 6
    assert engine.forward(2, [3] * 20).length == 26
    assert engine.forward(1, [2]).length == 7


def test_ending_the_management_gives_back_what_is_empty_and_copies_again() -> None:
    engine = engine_with()
    manage(engine, reserve=8)
    engine.forward(1, [1] * 6)
    engine.fork(1, 2)
    engine.send(EndManaging(ContextId(1)))
    assert engine.forward(1, [2] * 30).length == 36
    request = engine.begin_generation(1, [3], 2)
    engine.run()
    assert engine.final(request, Generated).finish == "length"
    engine.send(DropContext(ContextId(1)), DropContext(ContextId(2)))
    assert engine.all_pages_are_free()


def test_generations_are_refused_where_the_program_manages_the_pages() -> None:
    engine = engine_with()
    manage(engine, reserve=4)
    request = engine.begin_generation(1, [3], 2)
    engine.run()
    assert "step through it" in engine.final(request, Failed).message
    tokens = [engine.draw(1, [3])]
    tokens.append(engine.draw(1, tokens[-1:]))
    assert tokens == engine_with().generate(1, [3], 2)
    assert engine.engine.context(ContextId(1)).ahead == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("reserve", "code"), [(17, "out-of-pages"), (200, "invalid-request")])
def test_more_than_there_can_be_is_refused_and_nothing_changes(reserve: int, code: str) -> None:
    engine = engine_with()
    manage(engine, reserve=2)
    assert manage(engine, reserve=reserve)[0] == code
    assert manage(engine) == (0, 2, 0)
    assert free(engine) == 14


def test_quotas_count_what_is_reserved() -> None:
    engine = engine_with(max_page_share_per_process=0.5)
    engine.create(2)
    assert manage(engine, reserve=6) == (0, 6, 0)
    code, message = manage(engine, 2, reserve=3)  # type: ignore[misc]
    assert (code, "'p' would have 9 pages of cache group 'paged'; the limit is 8" in str(message)) == (
        "limit-exceeded",
        True,
    )
    assert engine.refused(2, [1] * 12).code == "limit-exceeded"
    assert engine.forward(1, [1] * 24).length == 24  # within what it has
    assert engine.forward(2, [1] * 8).length == 8


def test_what_is_reserved_is_kept_from_others_that_run() -> None:
    engine = engine_with(num_pages=8, speculation_depth=0)
    for context in (2, 3):
        engine.create(context, process=f"p{context}")
    manage(engine, reserve=4)
    long = engine.begin_generation(2, [1] * 8, 6)  # two pages, and two more as it goes
    engine.start()
    greedy = engine.submit(3, [2] * 12)  # three pages: only two are not spoken for
    engine.start()
    waiting = engine.submit(1, [3] * 16)
    engine.run_until_answered(waiting)
    assert not engine.is_answered(greedy)
    assert engine.final(waiting, ForwardDone).length == 16
    engine.run()
    assert engine.final(long, Generated).finish == "length"
    assert engine.final(greedy, ForwardDone).length == 12


def test_idle_contexts_give_way_to_a_reservation_and_reservations_to_those_that_starve() -> None:
    engine = engine_with(num_pages=8)
    engine.create(2, process="q")
    engine.forward(2, [1] * 24)
    assert manage(engine, reserve=6) == (0, 6, 0)
    assert engine.engine.context(ContextId(2)).pages.is_empty  # type: ignore[union-attr]
    assert engine.forward(2, [1]).length == 25  # seven pages: the promise lapses
    assert engine.forward(1, [2] * 24).length == 24
    assert engine.draw(2, [3]) == engine_of_25(3)
    assert manage(engine) == (0, 6, 24)
    engine.send(EndProcess(ProcessId("p")), EndProcess(ProcessId("q")))
    assert engine.all_pages_are_free()


def engine_of_25(token: int) -> int:
    engine = engine_with()
    engine.forward(1, [1] * 25)
    return engine.draw(1, [token])


def test_a_pass_that_fails_leaves_its_pages_reserved() -> None:
    engine = SteppedEngine(dummy(num_pages=16, page_size=PAGE, fail_token=9), prefix_cache=False)
    engine.create(1)
    manage(engine, reserve=3)
    engine.forward(1, [1] * 5)
    assert engine.refused(1, [9] * 6).code == "forward"
    assert manage(engine) == (0, 3, 5)
    assert free(engine) == 13
    assert engine.forward(1, [1] * 7).length == 12


def test_committed_pages_are_found_by_others_and_working_ones_are_not() -> None:
    engine = engine_with(prefix_cache=True)
    manage(engine, reserve=3)
    engine.forward(1, [5] * 12)
    engine.create(2)
    engine.forward(2, [5] * 11)
    assert engine.status().prefix_hit_tokens == 0
    manage(engine, commit=2)
    engine.create(3)
    engine.forward(3, [5] * 11)
    assert engine.status().prefix_hit_tokens >= 8
    engine.send(*(DropContext(ContextId(each)) for each in (1, 2, 3)))
    assert engine.all_pages_are_free()


def test_models_without_pages_of_whole_contexts_refuse() -> None:
    engine = SteppedEngine(dummy(groups=("state",), page_size=PAGE))
    engine.create(1)
    assert manage(engine, reserve=1)[0] == "unsupported"


def test_groups_of_other_kinds_follow_the_first_paged_one() -> None:
    groups = ("window", "latent", "paged", "state")
    options: dict[str, Any] = {"groups": groups, "window": 6, "page_size": PAGE, "num_pages": 32}
    raw, plain = (SteppedEngine(dummy(**options), prefix_cache=False) for _ in range(2))
    raw.create(1)
    plain.create(1)
    manage(raw, reserve=5)
    for tokens in ([1, 2, 3], [4] * 9, [5], [6] * 6):
        assert raw.draw(1, tokens) == plain.draw(1, tokens)
    raw.send(DropContext(ContextId(1)))
    assert raw.all_pages_are_free()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_reserved_everything_is_answered_and_nothing_leaks(seed: int) -> None:
    choose = random.Random(seed)
    engine = SteppedEngine(dummy(num_pages=12, page_size=PAGE, fail_token=96), prefix_cache=seed % 2 == 0)
    requests = []
    for context in range(1, 7):
        engine.create(context, process=f"p{context}")
    for _ in range(120):
        context, request = ContextId(choose.randrange(1, 7)), engine.new_request()
        requests.append(request)
        tokens = tuple(choose.randrange(1, 97) for _ in range(choose.randrange(1, 20)))
        commands: list[Command] = [
            ManagePages(request, context, reserve=choose.randrange(5)),
            ManagePages(request, context, release=choose.randrange(3)),
            ManagePages(request, context, commit=choose.randrange(2)),
            Forward(request, context, tokens),
            Forward(request, context, tokens[:2]),
            Generate(request, context, tokens[:3], GREEDY, (), choose.randrange(1, 12)),
        ]
        engine.send(choose.choice(commands))
        if choose.random() < 0.3:
            endings: list[Command] = [EndManaging(context), TruncateContext(context, 0)]
            engine.send(choose.choice(endings))
        for _ in range(choose.randrange(3)):
            engine.start()
        if engine.in_flight and choose.random() < 0.5:
            engine.finish()
    engine.run()
    assert all(map(engine.is_answered, requests))
    kinds = {type(engine.events[each][-1]) for each in requests}
    assert kinds >= {Failed, ForwardDone, Generated, PageCounts}
    engine.send(*(DropContext(ContextId(context)) for context in range(1, 7)))
    assert engine.all_pages_are_free()
