"""Contexts that grow, fork, shrink and end on small pools, against a pretended device memory that tells any mix-up."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pie_core.contracts.driver import CacheGroup, CacheSpace
from pie_core.errors import OutOfPages
from pie_core.kv_pages.context_pages import Cache, ContextPages
from pie_core.kv_pages.page_list import PageCopy, PageList
from pie_core.kv_pages.pool import PagePool
from pie_core.kv_pages.prefix_blocks import Rows
from pie_core.kv_pages.prefix_cache import PrefixCache
from pie_core.kv_pages.state_slots import EMPTY, StateSlots


def paged(page_size: int, num_pages: int, num_host_pages: int = 0) -> CacheSpace:
    return CacheSpace(CacheGroup("full", "paged", 1), page_size, num_pages, num_host_pages)


def windowed(page_size: int, num_pages: int, window: int, num_host_pages: int = 0) -> CacheSpace:
    return CacheSpace(CacheGroup("window", "window", 1, window), page_size, num_pages, num_host_pages)


def state(num_slots: int, num_host_slots: int = 0) -> CacheSpace:
    return CacheSpace(CacheGroup("state", "state", 1), 1, num_slots, num_host_slots)


def write(pages: ContextPages, written: int, count: int) -> list[PageCopy]:
    assert pages.fitting_rows(written, count, count, 1) == count
    copies = pages.begin(written, count, count, (written + count,))
    pages.finish(written + count)
    return copies


def test_a_pool_hands_out_each_page_once_and_says_what_is_missing() -> None:
    pool = PagePool("full", 3)
    assert sorted(pool.allocate(3)) == [0, 1, 2]
    with pytest.raises(OutOfPages, match=r"'full': 1 pages wanted, 0 of 3 are free"):
        pool.allocate(1)


def test_a_page_is_freed_when_its_last_holder_lets_go() -> None:
    pool = PagePool("full", 2)
    pages = pool.allocate(1)
    pool.share(pages)
    pool.release(pages)
    assert pool.num_free == 1
    pool.release(pages)
    assert pool.num_free == 2


def test_a_fork_shares_full_pages_and_copies_the_last_one_on_the_first_write() -> None:
    cache = Cache([paged(4, 8)])
    parent = ContextPages.empty(cache)
    assert write(parent, 0, 6) == []
    child = parent.fork(6)
    assert cache.pools[0].num_free == 6
    (copy,) = write(child, 6, 1)
    assert copy.source == parent.pages_of(0)[1]
    assert copy.target == child.pages_of(0)[1]
    assert write(parent, 6, 1) == [], "the parent is alone on its page again"
    assert cache.pools[0].num_free == 5


def test_a_fork_at_a_page_boundary_copies_nothing() -> None:
    parent = ContextPages.empty(Cache([paged(4, 8)]))
    write(parent, 0, 4)
    child = parent.fork(4)
    assert write(child, 4, 1) == write(parent, 4, 1) == []


def test_a_fork_gives_back_what_was_reserved_behind_it() -> None:
    cache = Cache([paged(1, 8)])
    parent = ContextPages.empty(cache)
    parent.begin(0, 1, 4, (1,))
    parent.finish(1)
    child = parent.fork(1)
    assert cache.pools[0].num_free == 7
    write(parent, 1, 1)
    write(child, 1, 1)
    assert parent.pages_of(0)[1] != child.pages_of(0)[1]


def test_pages_that_left_the_window_are_free_however_long_the_context_gets() -> None:
    cache = Cache([windowed(4, 100, window=8)])
    pages = ContextPages.empty(cache)
    for row in range(1000):
        write(pages, row, 1)
        assert pages.num_pages[0] <= 3
    pages.release()
    assert cache.pools[0].num_free == 100


def test_a_window_of_one_row_needs_no_page_between_steps_at_a_page_boundary() -> None:
    pages = ContextPages.empty(Cache([windowed(2, 4, window=1)]))
    for row in range(10):
        write(pages, row, 1)
    assert pages.num_pages == (0,)
    write(pages, 10, 1)
    assert pages.num_pages == (1,)


def test_going_back_behind_the_window_starts_over() -> None:
    pages = ContextPages.empty(Cache([windowed(2, 16, window=4)]))
    for row in range(12):
        write(pages, row, 1)
    assert pages.truncate(11) == 11
    assert pages.truncate(5) == 0


def test_going_back_on_a_recurrent_group_ends_at_a_checkpoint_or_at_the_start() -> None:
    cache = Cache([state(16)])
    pages = ContextPages.empty(cache)
    write(pages, 0, 5)
    pages.checkpoint(limit=2)
    write(pages, 5, 3)
    assert pages.truncate(7) == 5
    assert pages.truncate(4) == 0
    assert pages.num_pages == (0,)
    assert cache.pools[0].num_free == 16


def test_beyond_their_limit_the_oldest_checkpoint_goes() -> None:
    pages = ContextPages.empty(Cache([state(16)]))
    for row in range(4):
        write(pages, row, 1)
        pages.checkpoint(limit=2)
    assert pages.truncate(3) == 3
    assert pages.truncate(2) == 0


def test_a_context_that_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(OutOfPages, match=r"33 tokens need 9 pages of 4 in cache group 'full', which has 8"):
        ContextPages.empty(Cache([paged(4, 8)])).refuse_what_never_fits(33)


def test_a_context_that_evicts_may_get_longer_than_all_memory() -> None:
    pages = ContextPages.empty(Cache([paged(4, 4)]))
    for row in range(100):
        pages.refuse_what_never_fits(row + 1)
        write(pages, row, 1)
        pages.evict([(4, max(row - 5, 4))])
        assert pages.num_pages[0] <= 4


def test_going_back_into_an_evicted_page_takes_a_new_one() -> None:
    cache = Cache([paged(4, 8)])
    pages = ContextPages.empty(cache)
    write(pages, 0, 12)
    pages.evict([(4, 12)])
    assert cache.pools[0].num_free == 7
    assert pages.truncate(6) == 6
    assert write(pages, 6, 1) == []
    group = pages.groups[0]
    assert isinstance(group, PageList)
    assert group.logical.tolist() == [0, 1]


def swap(pages: ContextPages, written: int) -> list[int]:
    """Moves to host memory or back; how many pages of each group were copied."""
    move = pages.plan_swap_in() if pages.is_swapped else pages.plan_swap_out(written)
    move.take()
    pages.swapped(move, written)
    return move.num_copied


def test_what_is_swapped_out_leaves_the_device_and_comes_back() -> None:
    cache = Cache([paged(4, 8, 8), state(4, 4)], None)
    pages = ContextPages.empty(cache)
    write(pages, 0, 10)
    assert swap(pages, 10) == [3, 1]
    assert pages.is_empty
    assert [pool.num_free for pool in cache.pools] == [8, 4]
    assert [pool.num_free for pool in cache.host.pools] == [5, 3]
    assert pages.fitting_rows(10, 1, 1, 1) == 0, "nothing is written in host memory"
    assert swap(pages, 10) == [3, 1]
    assert not cache.host.is_used
    assert write(pages, 10, 1) == []


def test_forks_that_are_swapped_share_what_is_complete() -> None:
    cache = Cache([paged(4, 8, 8)], None)
    parent = ContextPages.empty(cache)
    write(parent, 0, 10)
    child = parent.fork(10)
    write(child, 10, 1)
    assert swap(parent, 10) == [3]
    assert swap(child, 11) == [1]
    assert cache.host.pools[0].num_used == 4
    assert swap(child, 11) == [3]
    assert swap(parent, 10) == [1]
    assert cache.pools[0].num_used == 4


class Owner:
    """A context of the model: what it wrote, and the pages under test."""

    def __init__(self, pages: ContextPages, rows: list[int]) -> None:
        self.pages = pages
        self.rows = rows
        self.evicted: set[int] = set()
        self.evicts = False


class ContextPagesMachine(RuleBasedStateMachine):
    """Every row written is a fresh number; a device memory remembers which number lies where."""

    @initialize(
        page_size=st.integers(1, 4),
        num_pages=st.integers(2, 24),
        window=st.integers(1, 6),
        slots=st.integers(2, 12),
        host=st.integers(0, 24),
        shares=st.booleans(),
    )
    def set_up(
        self, page_size: int, num_pages: int, window: int, slots: int, host: int, shares: bool
    ) -> None:
        self.window = window
        spaces = [
            paged(page_size, num_pages, host),
            windowed(page_size, num_pages, window, host),
            state(slots, host),
        ]
        self.cache = Cache(spaces, None)
        self.memory: list[dict[tuple[int, int], object]] = [{} for _ in spaces]
        self.host_memory: list[dict[tuple[int, int], object]] = [{} for _ in spaces]
        self.prefixes = PrefixCache(self.cache, ("weights",), enabled=shares, states_every=4)
        self.owners = [Owner(ContextPages.empty(self.cache), [])]
        self.known: list[list[int]] = []  # rows that were offered
        self.fresh = 0

    def owner(self, number: int) -> Owner:
        return self.owners[number % len(self.owners)]

    @rule(
        number=st.integers(0, 9), count=st.integers(1, 9), reserved=st.integers(0, 5), how=st.integers(0, 9)
    )
    def write(self, number: int, count: int, reserved: int, how: int) -> None:
        owner = self.owner(number)
        written = len(owner.rows)
        count = owner.pages.fitting_rows(written, count, count + reserved, 1)
        if count == 0:
            return
        copies = owner.pages.begin(written, count, count + reserved, (written + count,))
        if how == 0:
            owner.pages.undo(copies)
        else:
            self.copy(copies)
        if how <= 1:  # the step failed; what it may have written is garbage
            owner.pages.abort()
            owner.pages.truncate(written)
            return
        self.put(owner, count)
        owner.pages.finish(len(owner.rows))
        if how % 3 and not owner.evicts:
            self.offer(owner)
        owner.pages.settle(len(owner.rows))
        if how % 2:
            owner.pages.truncate(len(owner.rows))  # gives back what was reserved
            owner.pages.checkpoint(limit=3)

    def keys(self, rows: list[int]) -> list[bytes]:
        keys, size = [self.prefixes.root("t")], self.prefixes.rows
        for start in range(0, len(rows) - size + 1, size):
            keys.append(self.prefixes.key(keys[-1], some_rows(rows[start : start + size])))
        return keys

    def offer(self, owner: Owner) -> None:
        """Whole blocks, and what is behind them."""
        if not self.prefixes.enabled:
            return
        self.known = [*self.known[-9:], list(owner.rows)]
        size, keys = self.prefixes.rows, self.keys(owner.rows)
        for start in range(0, len(owner.rows), size):
            stop, before = min(start + size, len(owner.rows)), keys[start // size]
            rows = some_rows(owner.rows[start:stop])
            pages, states = owner.pages.block(start, stop), owner.pages.states_at(stop)
            if len(pages[0]):
                self.prefixes.add(self.prefixes.key(before, rows), before, start, rows, pages, states)

    @precondition(lambda self: self.known and len(self.owners) < 5)
    @rule(number=st.integers(0, 9), length=st.integers(1, 40))
    def take(self, number: int, length: int) -> None:
        """A new owner wants the first of these rows."""
        rows = self.known[number % len(self.known)][:length]
        size, keys = self.prefixes.rows, self.keys(rows)
        chain = self.prefixes.chain(keys[1:])
        start = len(chain) * size
        tail = self.prefixes.beginning_like(keys[len(chain)], some_rows(rows[start : start + size]))
        hit = self.prefixes.hit(0, chain, tail)
        if hit is None:
            return
        if number % 2:
            self.prefixes.let_go(hit)
            return
        owner = Owner(ContextPages.empty(self.cache), rows[: hit.length])
        owner.pages.adopt(0, hit.length, hit.pages, hit.states)
        self.prefixes.use(hit)
        self.owners.append(owner)

    def put(self, owner: Owner, count: int) -> None:
        start = len(owner.rows)
        owner.rows += range(self.fresh, self.fresh + count)
        self.fresh += count
        for group, held in enumerate(owner.pages.groups):
            if isinstance(held, StateSlots):
                for length, slot in held.writing:
                    self.memory[group][slot, 0] = tuple(owner.rows[:length])
            else:
                places = dict(zip(held.logical.tolist(), held.pages.tolist(), strict=True))
                for row in range(start, start + count):
                    page = places[row // held.page_size]
                    self.memory[group][page, row % held.page_size] = owner.rows[row]

    def copy(self, copies: list[PageCopy]) -> None:
        for each in copies:
            copy_page(self.memory[each.group], each.source, self.memory[each.group], each.target)

    @rule(number=st.integers(0, 9), fails=st.booleans())
    def swap(self, number: int, fails: bool) -> None:
        owner = self.owner(number)
        pages, written = owner.pages, len(owner.rows)
        back = pages.is_swapped
        if back:
            move = pages.plan_swap_in()
            pools = self.cache.pools
            fits = all(count <= pool.num_free for count, pool in zip(move.num_copied, pools, strict=True))
        else:
            move = pages.plan_swap_out(written)
            fits = self.cache.host.has(move.num_copied)
        if (pages.is_empty and not back) or not fits:
            return
        move.take()
        if fails:
            move.undo()
            return
        device_and_host = zip(self.memory, self.host_memory, strict=True)
        for each, (device, host) in zip(move.groups, device_and_host, strict=True):
            for source, target in zip(each.sources, each.targets, strict=True):
                copy_page(*((host, source, device, target) if back else (device, source, host, target)))
        pages.swapped(move, written)

    @precondition(lambda self: len(self.owners) < 5)
    @rule(number=st.integers(0, 9))
    def fork(self, number: int) -> None:
        owner = self.owner(number)
        self.owners.append(Owner(owner.pages.fork(len(owner.rows)), list(owner.rows)))
        self.owners[-1].evicted, self.owners[-1].evicts = set(owner.evicted), owner.evicts

    @rule(number=st.integers(0, 9), start=st.integers(0, 30), count=st.integers(0, 12))
    def evict(self, number: int, start: int, count: int) -> None:
        owner = self.owner(number)
        start = min(start, len(owner.rows))
        stop = min(start + count, len(owner.rows))
        owner.pages.evict([(start, stop)])
        owner.evicted |= set(range(start, stop))
        owner.evicts = True

    @rule(number=st.integers(0, 9), length=st.integers(0, 40))
    def truncate(self, number: int, length: int) -> None:
        owner = self.owner(number)
        length = min(length, len(owner.rows))
        kept = owner.pages.truncate(length)
        assert 0 <= kept <= length
        del owner.rows[kept:]
        owner.evicted = {row for row in owner.evicted if row < kept}

    @rule(number=st.integers(0, 9))
    def drop_checkpoints(self, number: int) -> None:
        self.owner(number).pages.drop_checkpoints()

    @precondition(lambda self: len(self.owners) > 1)
    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        owner = self.owner(number)
        owner.pages.release()
        self.owners.remove(owner)

    @invariant()
    def every_readable_row_is_what_was_written(self) -> None:
        for owner in self.owners:
            for group, held in enumerate(owner.pages.groups):
                if isinstance(held, StateSlots):
                    self.check_state(owner, group, held)
                else:
                    self.check_rows(owner, group, held)

    def content(self, owner: Owner, group: int) -> dict[tuple[int, int], object]:
        return (self.host_memory if owner.pages.is_swapped else self.memory)[group]

    def check_rows(self, owner: Owner, group: int, held: PageList) -> None:
        pages, logical = held.table(len(owner.rows))
        places = dict(zip(logical.tolist(), pages.tolist(), strict=True))
        oldest = max(len(owner.rows) - self.window + 1, 0) if held.window else 0
        for row in range(oldest, len(owner.rows)):
            if row in owner.evicted:
                continue
            page = places[row // held.page_size]
            assert self.content(owner, group)[page, row % held.page_size] == owner.rows[row]

    def check_state(self, owner: Owner, group: int, held: StateSlots) -> None:
        assert held.length == len(owner.rows)
        assert (held.current == EMPTY) == (not owner.rows)
        if owner.rows:
            assert self.content(owner, group)[held.current, 0] == tuple(owner.rows)

    @invariant()
    def no_page_is_lost_or_counted_wrongly(self) -> None:
        for pool in (*self.cache.pools, *self.cache.host.pools):
            holders: Counter[int] = Counter()
            if pool in self.cache.pools:
                kept = self.kept(self.cache.pools.index(pool))
                holders.update(kept)
                assert pool.num_idle == sum(pool._holders[page] == count for page, count in kept.items())
            for held in (held for owner in self.owners for held in owner.pages.groups if held.pool is pool):
                holders.update(held._held() if isinstance(held, StateSlots) else held.pages.tolist())
            assert pool.num_free == pool.num_pages - len(holders)
            assert {page: int(pool._holders[page]) for page in holders} == dict(holders)

    def kept(self, group: int) -> Counter[int]:
        """What the cache holds."""
        kept: Counter[int] = Counter()
        for block in self.prefixes._blocks.values():
            kept.update(block.pages[group].tolist())
            if group == 2:
                kept.update(states[0] for states in block.states.values())
        return kept

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for owner in self.owners:
            owner.pages.release()
        assert all(pool.has(pool.num_pages) for pool in self.cache.pools), "idle pages are as good as free"
        assert all(
            pool.num_free == pool.num_pages and not pool._twins
            for pool in (*self.cache.pools, *self.cache.host.pools)
        )


def some_rows(values: list[int]) -> Rows:
    return Rows(np.array(values, np.int32), np.zeros(len(values), np.int32))


def copy_page(
    source: dict[tuple[int, int], object],
    page: int,
    target: dict[tuple[int, int], object],
    target_page: int,
) -> None:
    for offset in range(4):
        if (page, offset) in source:
            target[target_page, offset] = source[page, offset]


TestContextPages = ContextPagesMachine.TestCase
TestContextPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
