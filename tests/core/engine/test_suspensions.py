"""Contexts that give way come back exactly as they were: from host memory, or computed again where that is the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pie_core.engine.messages import (
    DropContext,
    EvictRows,
    ForwardDone,
    OpenSnapshot,
    SaveSnapshot,
    SnapshotOpened,
    Steps,
    SwapUse,
    TruncateContext,
)
from pie_core.errors import ForwardError
from pie_core.ids import ContextId, ProcessId, Tenant
from pie_plugins.drivers.dummy.driver import DummyDriver
from pie_plugins.drivers.dummy.options import DummyOptions
from tests.core.engine.stepping import RANDOM, SteppedEngine, dummy

PROMPT = [(11 * i) % 97 for i in range(26)]  # six pages of four, and two rows
GROUPS = (("paged",), ("latent", "window"), ("state",), ("paged", "window", "state"))


def small(groups: Sequence[str] = ("paged",), *, num_pages: int = 16, **options: Any) -> DummyDriver:
    return dummy(groups=tuple(groups), window=9, num_pages=num_pages, **options)


def uncached(driver: DummyDriver, **options: Any) -> SteppedEngine:
    """Nothing is kept or found but by swapping."""
    return SteppedEngine(driver, prefix_cache=False, **options)


def swapping(engine: SteppedEngine) -> SwapUse:
    return engine.status().swapping


def fill(engine: SteppedEngine, context: int = 90) -> None:
    """Needs all the memory of 16 pages, or slots; whoever had some gives way."""
    engine.create(context)
    engine.generate(context, [5] * 60, 3)
    engine.send(DropContext(ContextId(context)))
    engine.run()


def squeeze(engine: SteppedEngine) -> None:
    """Takes every page and slot that there is from contexts that are idle."""
    contexts = [each for each in engine.engine._contexts if not each.pages.is_empty]
    for context in contexts:
        engine.engine._suspend(context)


@pytest.mark.parametrize("groups", GROUPS)
def test_a_context_that_was_swapped_goes_on_as_if_it_had_not_been(groups: tuple[str, ...]) -> None:
    engine, undisturbed = uncached(small(groups)), uncached(small(groups, num_pages=400))
    for each in (engine, undisturbed):
        each.create(1)
        each.generate(1, PROMPT, 5, RANDOM)
    squeeze(engine)
    assert swapping(engine).contexts == 1
    before = engine.status().tokens
    assert engine.generate(1, [3, 4], 6, RANDOM) == undisturbed.generate(1, [3, 4], 6, RANDOM)
    assert engine.status().tokens <= before + 9, "only new rows and the last token are computed"
    use = swapping(engine)
    assert (use.contexts, use.bytes, use.suspensions, use.failures) == (0, 0, 1, 0)
    assert use.pages_out == use.pages_in > 0


def test_whoever_needs_the_memory_gets_it_and_the_idle_one_comes_back() -> None:
    engine, undisturbed = uncached(small()), uncached(small(num_pages=400))
    for each in (engine, undisturbed):
        each.create(1)
        each.generate(1, PROMPT, 5, RANDOM)
        fill(each)
    assert (swapping(engine).suspensions, swapping(undisturbed).suspensions) == (1, 0)
    assert engine.generate(1, [3], 20, RANDOM) == undisturbed.generate(1, [3], 20, RANDOM)
    assert engine.status().replayed_tokens == 0


def test_a_full_host_memory_means_that_rows_are_computed_again() -> None:
    engine = uncached(small(num_host_pages=5))
    engine.create(1)
    expected = engine.history(1), engine.generate(1, PROMPT, 5, RANDOM)
    squeeze(engine)
    status = engine.status()
    assert (status.suspensions, status.swapping.suspensions) == (1, 0)
    assert status.replayed_tokens == 30
    assert engine.history(1) == [*expected[0], *PROMPT, *expected[1]]


def test_the_budget_counts_bytes_over_all_groups() -> None:
    page_bytes = 4 * 16
    for budget, contexts in ((14 * page_bytes - 1, 1), (14 * page_bytes, 2), (None, 2), (0, 0)):
        engine = uncached(small(), swap_bytes=budget)
        for context in (1, 2):
            engine.create(context, tenant=f"t{context}")
            engine.forward(context, PROMPT)
        squeeze(engine)
        assert swapping(engine).contexts == contexts
        assert swapping(engine).bytes == contexts * 7 * page_bytes


class Refusing(DummyDriver):
    """Swaps fail in one direction."""

    fails_in = fails_out = False

    def swap_out(self, group: int, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        if self.fails_out:
            raise ForwardError("no copy engine")
        super().swap_out(group, pages, host_pages)

    def swap_in(self, group: int, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        if self.fails_in:
            raise MemoryError
        super().swap_in(group, host_pages, pages)


@pytest.mark.parametrize("direction", ["fails_in", "fails_out"])
def test_where_the_driver_fails_to_swap_the_rows_are_computed_again(direction: str) -> None:
    options: dict[str, Any] = {"num_pages": 16, "page_size": 4, "groups": ("paged", "state")}
    driver = Refusing(DummyOptions(**options), 97)
    setattr(driver, direction, True)
    engine, undisturbed = uncached(driver), uncached(small(("paged", "state"), num_pages=400))
    for each in (engine, undisturbed):
        each.create(1)
        each.generate(1, PROMPT, 5, RANDOM)
    squeeze(engine)
    assert engine.generate(1, [3], 5, RANDOM) == undisturbed.generate(1, [3], 5, RANDOM)
    use = swapping(engine)
    assert (use.failures, use.bytes, use.pages_in) == (1, 0, 0)
    assert engine.status().replayed_tokens == 30
    engine.send(DropContext(ContextId(1)))
    engine.run()
    assert engine.all_pages_are_free()


def test_forks_share_in_host_memory_what_they_shared_on_the_device() -> None:
    engine, undisturbed = uncached(small(num_pages=40)), uncached(small(num_pages=400))
    for each in (engine, undisturbed):
        each.create(1)
        each.forward(1, PROMPT)
        for child in range(2, 12):
            each.fork(1, child)
            each.draw(child, [child])
    squeeze(engine)
    use = swapping(engine)
    assert use.contexts == 11
    assert use.pages == [6 + 11], "the full pages once, and the last one of each"
    assert use.pages_out == 17
    for context in range(1, 12):
        assert engine.generate(context, [7], 4, RANDOM) == undisturbed.generate(context, [7], 4, RANDOM)
    assert swapping(engine).pages_in == 17
    assert engine.status().total_pages[0] - engine.status().free_pages[0] < 6 + 11 * 4


def test_what_a_swapped_context_shares_with_a_running_one_is_not_copied_back() -> None:
    engine = uncached(small(), speculation_depth=0)
    engine.create(1)
    engine.forward(1, PROMPT[:24])
    engine.fork(1, 2)
    engine.forward(2, [1])
    context = engine.engine.context(ContextId(2))
    assert context is not None
    engine.engine._suspend(context)
    assert swapping(engine).pages_out == 7
    engine.forward(2, [1])
    assert swapping(engine).pages_in == 1


def test_going_back_and_writing_again_parts_a_page_from_its_copy() -> None:
    engine, undisturbed = uncached(small()), uncached(small(num_pages=400))
    for each in (engine, undisturbed):
        each.create(1)
        each.forward(1, PROMPT[:8])
        each.fork(1, 2)
        each.draw(2, [9])
    context = engine.engine.context(ContextId(2))
    assert context is not None
    engine.engine._suspend(context)  # its pages have copies now, which context 1 changes
    for each in (engine, undisturbed):
        each.send(TruncateContext(ContextId(1), 6))
        each.generate(1, [50, 51, 52], 2, RANDOM)
    assert engine.generate(2, [5], 3, RANDOM) == undisturbed.generate(2, [5], 3, RANDOM)


def test_an_idle_snapshot_is_swapped_and_opens_without_computing_anything() -> None:
    engine = uncached(small(), speculation_depth=0)
    engine.create(1)
    engine.forward(1, PROMPT)
    saved = engine.new_request()
    engine.send(SaveSnapshot(saved, ContextId(1), "s", b""))
    expected = engine.draw(1, [8])
    engine.send(DropContext(ContextId(1)))
    fill(engine)
    assert swapping(engine).bytes == 7 * 4 * 16
    before, opened = engine.status().tokens, engine.new_request()
    engine.send(OpenSnapshot(opened, ContextId(2), ProcessId("p"), Tenant("t"), "s", False))
    engine.final(opened, SnapshotOpened)
    assert engine.draw(2, [8]) == expected
    assert engine.status().tokens == before + 1


def test_a_swapped_context_can_be_forked_truncated_evicted_and_dropped() -> None:
    engine, undisturbed = uncached(small()), uncached(small(num_pages=400))
    for each in (engine, undisturbed):
        each.create(1)
        each.forward(1, PROMPT)
    squeeze(engine)
    for each in (engine, undisturbed):
        each.fork(1, 2)
        each.fork(1, 3)
        each.send(TruncateContext(ContextId(2), 10), EvictRows(ContextId(3), 4, 20))
        each.send(DropContext(ContextId(1)))
        each.run()
    assert swapping(engine).pages == [3 + 2], "pages 0 to 2, and 0, 5 and 6"
    for context in (2, 3):
        assert engine.generate(context, [7], 9, RANDOM) == undisturbed.generate(context, [7], 9, RANDOM)
    assert swapping(engine).bytes == 0


def test_a_swapped_context_that_is_truncated_to_nothing_begins_on_the_device() -> None:
    engine = uncached(small())
    engine.create(1)
    engine.forward(1, PROMPT)
    squeeze(engine)
    engine.send(TruncateContext(ContextId(1), 0))
    engine.run()
    assert swapping(engine).contexts == swapping(engine).bytes == 0
    other = uncached(small())
    other.create(1, seed=7)
    assert engine.draw(1, PROMPT) == other.draw(1, PROMPT)


def test_a_context_longer_than_all_memory_survives_in_host_memory() -> None:
    """Its evicted rows could not even be computed again."""
    engine, undisturbed = uncached(small(num_pages=8)), uncached(small(num_pages=400))
    for each in (engine, undisturbed):
        each.create(1)
        for turn in range(8):
            each.generate(1, [turn], 7, RANDOM)
            each.send(EvictRows(ContextId(1), 4, 8 * turn + 4))
            each.run()
        each.create(2)
        each.generate(2, [5] * 25, 3)
    assert swapping(engine).suspensions == 1
    assert engine.generate(1, [3], 5, RANDOM) == undisturbed.generate(1, [3], 5, RANDOM)


@pytest.mark.parametrize(("gb_per_s", "swaps"), [(1.0, 1), (1e-9, 0)])
def test_moving_more_slowly_than_computing_means_computing(gb_per_s: float, swaps: int) -> None:
    engine = uncached(small(step_ms=0.2, token_us=20.0), swap_gb_per_s=gb_per_s)
    engine.create(1)
    engine.forward(1, PROMPT)
    squeeze(engine)
    assert swapping(engine).suspensions == swaps


def test_a_guess_does_not_follow_a_context_that_is_swapped() -> None:
    engine = uncached(small(), speculation_depth=1)
    engine.create(1)
    engine.draw(1, PROMPT, RANDOM)
    squeeze(engine)
    engine.run()
    assert swapping(engine).contexts == 1


def test_whoever_comes_back_can_go_on_however_many_wait() -> None:
    """Sixteen contexts over memory for one and a half: each comes back only to pages enough for its next rows."""
    engine, undisturbed = SteppedEngine(small(num_pages=9, page_size=8)), SteppedEngine(small(num_pages=400))
    prompts = [[(context + 3 * i) % 97 for i in range(20 + context)] for context in range(1, 17)]
    for each in (engine, undisturbed):
        for context, prompt in enumerate(prompts, start=1):
            each.create(context)
            each.forward(context, prompt)
    for turn in range(3):
        requests = [
            [each.begin_generation(context, [turn], 9, RANDOM) for context in range(1, 17)]
            for each in (engine, undisturbed)
        ]
        engine.run()
        undisturbed.run()
        mine, theirs = requests
        assert [engine.generated(each) for each in mine] == [undisturbed.generated(each) for each in theirs]
    assert swapping(engine).suspensions > 16


def test_an_idle_context_gives_way_while_others_run() -> None:
    engine = uncached(small())
    for context in (1, 2, 3):
        engine.create(context)
    engine.forward(1, [7] * 40)  # 10 of 16 pages, and nobody uses them
    running = engine.begin_generation(2, [3, 5], 18)
    engine.start()
    engine.finish()
    passed = engine.submit(3, [9] * 21)
    engine.run_until_answered(passed)
    assert not engine.is_answered(running)
    engine.run()
    assert len(engine.generated(running)) == 18


def test_where_many_lack_pages_the_youngest_give_way_to_the_others() -> None:
    """They reach the end of their pages together; if nobody gave way they would go on one by one, for 220 steps."""
    engine = uncached(small(num_pages=64))
    requests = []
    for context in range(1, 25):
        engine.create(context)
        requests.append(engine.begin_generation(context, [context, 3, 4], 24))
    engine.run()
    assert all(len(engine.generated(request)) == 24 for request in requests)
    assert engine.status().steps <= 110


def test_a_long_queue_does_not_drive_out_what_only_its_head_has_use_for() -> None:
    engine = uncached(small(num_pages=64))
    for context in range(1, 16):
        engine.create(context)
    for context in range(1, 7):
        engine.forward(context, [context] * 24)  # 36 of 64 pages, idle
    engine.begin_generation(7, [3, 5], 40)
    engine.start()
    engine.finish()
    passes = [engine.submit(context, [context] * 40) for context in range(8, 16)]  # 80 pages
    engine.start()
    assert engine.status().suspensions == 1
    engine.finish()
    engine.run()
    assert all(engine.is_answered(each) for each in passes)


def test_those_that_were_sent_away_leave_room_for_those_that_stayed() -> None:
    """All lack a page at the same time. What was given up is for those that stand still, not for coming back."""
    engine = uncached(small(num_pages=40))
    requests = []
    for context in range(1, 17):
        engine.create(context)
        requests.append(engine.begin_generation(context, [context, 3, 4, 5], 20))
    engine.run()
    assert all(len(engine.generated(request)) == 20 for request in requests)
    status = engine.status()
    assert status.steps <= 60
    assert status.suspensions <= 26


@pytest.mark.parametrize(("swap_bytes", "suspensions"), [(0, 0), (None, 1)])
def test_rows_are_computed_again_only_where_more_stand_still_than_run(
    swap_bytes: int | None, suspensions: int
) -> None:
    engine = uncached(small(num_pages=12), swap_bytes=swap_bytes)
    for context in range(1, 7):
        engine.create(context)
        engine.begin_generation(context, [context] * (5 if context < 5 else 7), 12)
    for _ in range(4):  # the last two have no room for a third row, the others do
        engine.start()
        engine.finish()
    assert engine.status().suspensions == suspensions
    engine.run()


def test_a_program_that_steps_is_not_idle_for_having_begun_long_ago() -> None:
    """Its context is in the cohort, which notes by itself when it was used."""
    engine = uncached(small(num_pages=24), speculation_depth=1)
    engine.create(1)
    token = engine.draw(1, [1, 2, 3])
    engine.create(2)
    engine.forward(2, [7] * 24)
    for _ in range(12):
        request = engine.new_request()
        engine.send(Steps([request], [ContextId(1)], [token]))
        engine.run_until_answered(request)
        (token,) = engine.final(request, ForwardDone).tokens
    assert engine.status().cohort_rows >= 12
    engine.create(3)
    engine.begin_generation(3, [3, 5], 12)
    engine.start()  # so that nobody waits until nothing runs
    engine.create(4)
    passed = engine.submit(4, [9] * 57)
    engine.run_until_answered(passed)
    held = {each.id: each.pages.is_swapped for each in engine.engine._contexts}
    assert held == {1: False, 2: True, 3: False, 4: False}
