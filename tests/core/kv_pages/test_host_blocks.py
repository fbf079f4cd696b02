"""Rows that went to host memory with a context are found there by others, and make room for contexts that go there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from pie_core.engine.messages import DropContext, SwapUse
from pie_core.errors import ForwardError
from pie_core.ids import ContextId, RequestId
from pie_plugins.drivers.dummy.driver import DummyDriver
from pie_plugins.drivers.dummy.options import DummyOptions
from tests.core.engine.stepping import SteppedEngine, dummy

PROMPT = [(11 * i) % 97 for i in range(26)]  # six pages of four, and two rows
OTHER = [(13 * i + 1) % 97 for i in range(30)]
GROUPS = (("paged",), ("paged", "latent"))


def small(groups: Sequence[str] = ("paged",), *, num_pages: int = 16, **options: int) -> SteppedEngine:
    return SteppedEngine(dummy(groups=tuple(groups), num_pages=num_pages, **options), speculation_depth=0)


def drop(engine: SteppedEngine, context: int) -> None:
    engine.send(DropContext(ContextId(context)))
    engine.run()


def save_in_host(engine: SteppedEngine, context: int, prompt: Sequence[int], tenant: str = "t") -> list[int]:
    """A context computes its prompt, and some tokens, goes to host memory, and ends there; all that it was."""
    engine.create(context, tenant=tenant)
    drawn = engine.generate(context, prompt, 5)
    held = engine.engine.context(ContextId(context))
    assert held is not None
    engine.engine._suspend(held)
    assert held.pages.is_swapped
    drop(engine, context)
    return [*prompt, *drawn]


def fill_device(engine: SteppedEngine) -> None:
    """Nothing that was cached is left on the device."""
    engine.create(90, tenant="another")
    engine.forward(90, [5] * 64)
    drop(engine, 90)


def swapping(engine: SteppedEngine) -> SwapUse:
    return engine.status().swapping


@pytest.mark.parametrize("groups", GROUPS)
def test_rows_of_a_context_that_was_swapped_and_dropped_are_not_computed_again(
    groups: tuple[str, ...],
) -> None:
    engine, undisturbed = small(groups), small(groups, num_pages=400)
    history = save_in_host(engine, 1, PROMPT)
    fill_device(engine)
    before = engine.status().tokens
    for each in (engine, undisturbed):
        each.create(2)
    assert engine.generate(2, [*history, 3], 6) == undisturbed.generate(2, [*history, 3], 6)
    assert engine.status().tokens - before == 2 + 5, (
        "the last token was drawn and never fed, and the new ones"
    )
    assert swapping(engine).pages_fetched == swapping(engine).pages_in == 8 * len(groups)


def test_what_only_the_cache_has_in_host_memory_counts_as_free() -> None:
    engine = small()
    save_in_host(engine, 1, PROMPT)
    use = swapping(engine)
    assert (use.contexts, use.bytes, use.pages, use.cached_pages) == (0, 0, [0], [8])
    assert engine.all_pages_are_free()


def test_a_context_that_goes_to_host_memory_takes_the_room_of_what_is_only_cached_there() -> None:
    engine = small(num_host_pages=10)
    history = save_in_host(engine, 1, PROMPT)
    save_in_host(engine, 2, OTHER)
    assert swapping(engine).suspensions == 2
    assert swapping(engine).cached_pages == [10], "nine of the second, and the beginning of the first"
    fill_device(engine)
    engine.create(3)
    before = engine.status().prefix_hit_tokens
    engine.forward(3, history)
    assert engine.status().prefix_hit_tokens - before == 4


def test_what_a_pass_waits_to_take_goes_after_what_nobody_waits_for() -> None:
    engine = small(num_host_pages=20)
    history = save_in_host(engine, 1, PROMPT)
    save_in_host(engine, 2, OTHER)  # three pages are left in host memory
    engine.create(3)
    running = engine.begin_generation(3, [5] * 54, 8)
    engine.start()
    engine.create(4)
    passed = engine.submit(4, [*history, 3])
    engine.start()
    assert engine.engine._cache.host.has([9])
    engine.run_until_answered(running)
    drop(engine, 3)
    assert engine.is_answered(passed)
    assert engine.status().prefix_hit_tokens == 28, "its whole blocks"


def test_a_budget_in_bytes_holds_with_what_is_cached() -> None:
    page_bytes = 4 * 16
    engine = SteppedEngine(dummy(num_pages=16), speculation_depth=0, swap_bytes=9 * page_bytes)
    save_in_host(engine, 1, PROMPT)
    save_in_host(engine, 2, OTHER)
    assert swapping(engine).suspensions == 2
    assert swapping(engine).cached_pages == [9]


def test_a_context_in_host_memory_keeps_its_rows_where_others_need_room() -> None:
    engine, undisturbed = small(num_host_pages=10), small(num_pages=400)
    for each in (engine, undisturbed):
        each.create(1)
        each.generate(1, PROMPT, 5)
    held = engine.engine.context(ContextId(1))
    assert held is not None
    engine.engine._suspend(held)
    engine.create(2)
    engine.generate(2, OTHER, 5)
    other = engine.engine.context(ContextId(2))
    assert other is not None
    engine.engine._suspend(other)  # there are two pages left, and nine wanted
    assert not other.pages.is_swapped
    assert swapping(engine).contexts == 1
    assert engine.generate(1, [3], 6) == undisturbed.generate(1, [3], 6)


def test_what_came_back_is_not_copied_when_it_goes_again() -> None:
    engine = small()
    history = save_in_host(engine, 1, PROMPT)
    fill_device(engine)
    copied = swapping(engine).pages_out
    again = save_in_host(engine, 2, [*history, 3, 4])
    assert len(again) // 4 - len(history) // 4 <= swapping(engine).pages_out - copied <= 3


class Refusing(DummyDriver):
    def swap_in(self, group: int, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        raise ForwardError("no copy engine")


def test_what_the_driver_does_not_fetch_is_computed_again_and_forgotten() -> None:
    engine = SteppedEngine(Refusing(DummyOptions(num_pages=16, page_size=4), 97), speculation_depth=0)
    undisturbed = small(num_pages=400)
    history = save_in_host(engine, 1, PROMPT)
    fill_device(engine)
    for each in (engine, undisturbed):
        each.create(2)
    assert engine.generate(2, history, 6) == undisturbed.generate(2, history, 6)
    assert swapping(engine).failures == 1
    assert swapping(engine).cached_pages == [0]
    drop(engine, 2)
    assert engine.all_pages_are_free()


def test_tenants_find_nothing_of_each_other_in_host_memory() -> None:
    engine = small()
    history = save_in_host(engine, 1, PROMPT, tenant="another")
    fill_device(engine)
    engine.create(2)
    engine.forward(2, history)
    assert engine.status().prefix_hit_tokens == 0


def test_a_context_that_exactly_fits_does_so_without_the_end_that_would_have_to_be_copied() -> None:
    engine, undisturbed = small(num_pages=8), small(num_pages=400)
    history = save_in_host(engine, 1, PROMPT)  # seven whole pages, and two rows of an eighth
    engine.create(90)
    engine.forward(90, [5] * 32)
    drop(engine, 90)
    before = engine.status().tokens
    for each in (engine, undisturbed):
        each.create(2)
    assert engine.draw(2, [*history, 3]) == undisturbed.draw(2, [*history, 3])
    assert engine.status().tokens - before == 4


class Agents:
    """Each reads something, draws tokens, and waits for a tool, turn by turn; histories are kept in `said`."""

    def __init__(self, engine: SteppedEngine, count: int, turns: int, *, stays: bool) -> None:
        self.said: list[list[int]] = [[] for _ in range(count)]
        self._engine, self._turns, self._stays = engine, turns, stays
        self._contexts, self._ids = [0] * count, itertools.count(1)
        self._turn, self._back_at = [0] * count, [3 * agent for agent in range(count)]
        self._asked: dict[int, RequestId] = {}

    def run(self) -> None:
        for step in itertools.count():
            for agent in range(len(self.said)):
                if (
                    agent not in self._asked
                    and self._back_at[agent] <= step
                    and self._turn[agent] < self._turns
                ):
                    self._ask(agent)
            self._engine.start()
            if self._engine.in_flight:
                self._engine.finish()
            for agent in [each for each, asked in self._asked.items() if self._engine.is_answered(asked)]:
                self.said[agent] += self._engine.generated(self._asked.pop(agent))
                self._turn[agent] += 1
                self._back_at[agent] = step + 5
            if min(self._turn) == self._turns:
                return

    def _ask(self, agent: int) -> None:
        read = [(31 * agent + 17 * self._turn[agent] + 7 * row) % 97 for row in range(10)]
        self.said[agent] += read
        if not self._stays or not self._turn[agent]:
            before, self._contexts[agent] = self._contexts[agent], next(self._ids)
            self._engine.create(self._contexts[agent], process=f"p{agent}")
            if before:
                self._engine.send(DropContext(ContextId(before)))
            read = self.said[agent]
        self._asked[agent] = self._engine.begin_generation(self._contexts[agent], read, 6)


@pytest.mark.parametrize("stays", [True, False], ids=["kept", "sent again"])
def test_agents_over_a_quarter_of_their_memory_compute_next_to_nothing_again(stays: bool) -> None:
    """Whether they keep their contexts while their tools work, or open new ones with all that was said."""
    count, turns, length = 8, 12, 12 * 16
    engine = SteppedEngine(dummy(num_pages=count * length // 4 // 4))
    agents = Agents(engine, count, turns, stays=stays)
    agents.run()
    status = engine.status()
    assert [len(each) for each in agents.said] == [length] * count
    assert status.suspensions > 2 * count, "memory was short"
    assert status.tokens - count * length <= count * length // 8
