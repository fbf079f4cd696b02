"""Blocks of rows whose KV is on pages already, found by everything that decides what the KV is.

A block's key is a hash of the key before it and of its rows, so a chain of keys stands for a whole prefix:

    root(tenant, weights, KV type) ── key(rows 0-15) ── key(rows 16-31) ── key(rows 32-37)
                                                                            where a turn ended

A block has up to three parts, by kind of cache group: rows on pages that every later row may read (paged, latent), rows
that only a window's length reads (window), and states after some of its rows (state). Going on from a length takes the
first part of all blocks before it, the second of those within a window of it, and a state after just that many rows.

The cache holds pages like any context does. Where a model keeps nothing but rows, blocks of contexts that are swapped
out lie in host memory, too (`kv_pages.host_blocks`), and come back from there. When a pool runs short, the cache lets
go of what nobody else holds and is worth least (`kv_pages.priorities`): of the first part only blocks that none on the
device follows, for they would not be found without them. Worth is what it costs to compute again, times how often it
was used and once more: rows cost more the more rows they read, and a state as much as the rows since the state before.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from pie_core.contracts.forward import Int32
from pie_core.kv_pages.context_pages import Cache
from pie_core.kv_pages.host_blocks import HostBlocks
from pie_core.kv_pages.page_list import first_needed
from pie_core.kv_pages.pool import PagePool
from pie_core.kv_pages.prefix_blocks import Block, Hit, Rows, lengths_within, pages_in_host, shared_out
from pie_core.kv_pages.priorities import Priorities

MAX_USES = 8  # beyond, more of them say nothing
TAIL_SHARE = 0.25  # of a block's rows; fewer are not worth a copy of their page
FEWEST_BLOCKS = 1024
MAX_TRIED = 8  # blocks that begin alike
MAX_BLOCKS_SINCE_STATE = 64

_NO_PAGES: Int32 = np.empty(0, np.int32)

# Copies pages of host memory to pages of the device, both by cache group; whether the driver has taken all of it.
Fetch = Callable[[Sequence[Int32], Sequence[Int32]], bool]


class PrefixCache:
    def __init__(
        self, cache: Cache, identity: Sequence[str], *, enabled: bool, states_every: int = 256
    ) -> None:
        self._cache = cache
        self._identity = identity
        self._blocks: dict[bytes, Block] = {}
        self._followers: Counter[bytes] = Counter()  # by parent: blocks that would not be found without it
        self._beginnings: dict[tuple[bytes, int], list[Block]] = {}  # by parent and first token, oldest first
        self._leaves: Priorities[bytes] = Priorities()
        self._windows: Priorities[bytes] = Priorities()
        self._states: Priorities[tuple[bytes, int]] = Priorities()
        self._kinds = [space.group.kind for space in cache.spaces]
        self._in_host = HostBlocks(cache.host, self._forget)
        self.rows = cache.block_rows
        self.enabled = enabled and bool(self._kinds)
        self.keeps_rows_only = set(self._kinds) <= {"paged", "latent"}
        if self.enabled:
            for pool in cache.pools:
                pool.cache_with(self._reclaim)
            cache.settles_later = "window" in self._kinds or "state" in self._kinds
            if "state" in self._kinds:
                cache.states_every = max(states_every // self.rows, 1) * self.rows
        # Blocks without pages, where a model has states alone, cost no more than what is found by them.
        blocks_of_a_page = max(cache.states_every // self.rows, 1)
        pages = sum(pool.num_pages for pool in (*cache.pools, *cache.host.pools))
        self._max_blocks = FEWEST_BLOCKS + 2 * blocks_of_a_page * pages

    def root(self, tenant: str) -> bytes:
        return _digest(part.encode() for part in (*self._identity, tenant))

    def key(self, before: bytes, rows: Rows) -> bytes:
        parts = [
            before,
            len(rows.tokens).to_bytes(4, "little"),
            rows.tokens.tobytes(),
            rows.positions.tobytes(),
        ]
        for row, runs in rows.masks:
            parts += [row.to_bytes(4, "little"), len(runs).to_bytes(4, "little"), runs.tobytes()]
        return hashlib.blake2b(b"".join(parts), digest_size=16).digest()

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def idle_pages(self) -> list[int]:
        """By cache group: pages that nobody but the cache holds."""
        return [pool.num_idle for pool in self._cache.pools]

    # ---- finding

    def chain(self, keys: Iterable[bytes]) -> list[Block]:
        """The blocks of these keys, up to the first that is not here."""
        found = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def beginning_like(self, before: bytes, rows: Rows) -> tuple[Block, int] | None:
        """The block behind `before` whose first rows are these, as many as possible; and the rows up to there."""
        best: tuple[Block, int] | None = None
        candidates = self._beginnings.get((before, int(rows.tokens[0])), ()) if len(rows.tokens) else ()
        for block in candidates[-MAX_TRIED:]:
            length = self._usable(block, block.rows.common_with(rows))
            if length - block.start >= TAIL_SHARE * self.rows and (best is None or length > best[1]):
                best = (block, length)
        return best

    def _usable(self, block: Block, common: int) -> int:
        if "state" not in self._kinds:
            return block.start + common
        return max((length for length in block.states if length <= block.start + common), default=0)

    def hit(self, written: int, chain: Sequence[Block], tail: tuple[Block, int] | None) -> Hit | None:
        """The most of these blocks from which a context that has `written` rows can go on; it is held from now on."""
        for length, blocks in lengths_within(chain, tail):
            states = blocks[-1].states.get(length) if "state" in self._kinds else ()
            if states is None or not self._reaches_windows(written, length, blocks):
                continue
            pages = [
                self._pages(group, written, length, blocks) if kind != "state" else _NO_PAGES
                for group, kind in enumerate(self._kinds)
            ]
            found = Hit(length, pages, states, blocks)
            self._hold(found)
            return found
        return None

    def let_go(self, hit: Hit) -> None:
        """Nobody takes it."""
        for pool, pages in self._held_by(hit.pages, hit.states):
            pool.release(pages)

    def use(self, hit: Hit) -> None:
        """Somebody has taken it."""
        last = hit.blocks[-1]
        for block in hit.blocks:
            block.uses = min(block.uses + 1, MAX_USES)
            self._rank(block)
        if hit.length in last.states:
            self._states.set((last.key, hit.length), self._worth_of_state(last))
        self._in_host.use(hit.blocks)

    def still_wanted(self, chain: Sequence[Block]) -> None:
        """Somebody waits for room to take it: of what lies in host memory it goes last."""
        self._in_host.use(chain)

    def _first_row(self, group: int, written: int, length: int) -> int:
        """Of those that a row at `length` reads and that a context of `written` rows has not got itself."""
        space = self._cache.spaces[group]
        window = space.group.window if space.group.kind == "window" else None
        return max(first_needed(length, window, space.page_size), written)

    def _reaches_windows(self, written: int, length: int, blocks: Sequence[Block]) -> bool:
        for group, kind in enumerate(self._kinds):
            if kind == "window":
                first = self._first_row(group, written, length)
                for block in reversed(blocks):
                    if block.stop <= first:
                        break
                    if not len(block.pages[group]):
                        return False
        return True

    def _pages(self, group: int, written: int, length: int, blocks: Sequence[Block]) -> Int32:
        size = self._cache.spaces[group].page_size
        first = self._first_row(group, written, length)
        parts = [block.pages[group] for block in blocks if block.stop > first]
        if not parts:
            return _NO_PAGES
        joined = np.concatenate(parts)
        begin = next(block.start for block in blocks if block.stop > first) // size
        return joined[first // size - begin : -(-length // size) - begin]

    def _hold(self, hit: Hit) -> None:
        for pool, pages in self._held_by(hit.pages, hit.states):
            pool.share(pages)

    def _held_by(self, pages: Sequence[Int32], states: Sequence[int]) -> Iterator[tuple[PagePool, Int32]]:
        slots = iter(states)
        for pool, kind, held in zip(self._cache.pools, self._kinds, pages, strict=True):
            if kind == "state":
                held = np.array([slot for slot in (next(slots, None),) if slot is not None], np.int32)
            if len(held):
                yield pool, held

    # ---- adding

    def add(
        self,
        key: bytes,
        parent: bytes,
        start: int,
        rows: Rows,
        pages: list[Int32],
        state: tuple[int, ...] | None = None,
    ) -> None:
        """Rows that are written; `state` is the one after the last of them. What is here already is kept."""
        block = self._blocks.get(key)
        if block is None:
            block = self._new_block(key, parent, start, rows, pages)
        elif block.is_away:
            self._keep(pages)
            self._stand(block, pages)
            self._rank(block)
        elif not self._has_windows(block) and self._has_windows_in(pages):
            self._take_windows(block, pages)
        if state and block.stop not in block.states:
            self._keep([_NO_PAGES] * len(pages), state)
            block.states[block.stop] = state
            self._states.set((key, block.stop), self._worth_of_state(block))

    def add_run(
        self, keys: Sequence[bytes], parent: bytes, start: int, rows: Rows, pages: list[Int32]
    ) -> None:
        """Many blocks at once, one behind the other, of a model that keeps nothing but rows."""
        new = [
            place
            for place, key in enumerate(keys)
            if (known := self._blocks.get(key)) is None or known.is_away
        ]
        if not new:
            return
        size, parents = self.rows, (parent, *keys)
        tokens, positions = rows.tokens.copy(), rows.positions.copy()
        by_block = [held.reshape(len(keys), -1) for held in pages]
        self._keep([held[new].reshape(-1) for held in by_block])
        for place in new:
            if (away := self._blocks.get(keys[place])) is not None:
                self._stand(away, [held[place] for held in by_block])
                continue
            first = place * size
            own = Rows(tokens[first : first + size], positions[first : first + size])
            block = Block(keys[place], parents[place], start + first, own, [held[place] for held in by_block])
            self._enter(block)
        self._rank(self._blocks[keys[new[-1]]])
        self._keep_within_bounds()

    def _enter(self, block: Block) -> None:
        """Its pages are held."""
        self._blocks[block.key] = block
        self._stand(block, block.pages)
        place = (block.parent, int(block.rows.tokens[0]))
        if place in self._beginnings:
            self._drop_beginnings_of(block, self._beginnings[place])
        self._beginnings.setdefault(place, []).append(block)

    def _stand(self, block: Block, pages: list[Int32]) -> None:
        """It is on these pages of the device from now on."""
        block.pages, block.is_away = pages, False
        block.since = self._leaves.clock
        self._followers[block.parent] += 1
        self._leaves.remove(block.parent)

    def _keep_within_bounds(self) -> None:
        while len(self._blocks) > self._max_blocks and (worst := self._leaves.pop()) is not None:
            self._remove(self._blocks[worst])

    def _new_block(self, key: bytes, parent: bytes, start: int, rows: Rows, pages: list[Int32]) -> Block:
        copied = Rows(rows.tokens.copy(), rows.positions.copy(), rows.masks)
        block = Block(key, parent, start, copied, pages)
        self._keep(pages)
        self._enter(block)
        self._rank(block)
        self._keep_within_bounds()
        return block

    def _drop_beginnings_of(self, block: Block, alike: Sequence[Block]) -> None:
        """A block that ended where a turn did says nothing more than the one it has become."""
        shorter = [
            each
            for each in alike
            if each.stop < block.stop and not each.states and each.key not in self._followers
        ]
        for each in shorter:
            if each.rows.common_with(block.rows) == len(each.rows.tokens):
                self._remove(each)

    def _has_windows(self, block: Block) -> bool:
        return self._has_windows_in(block.pages)

    def _has_windows_in(self, pages: Sequence[Int32]) -> bool:
        return all(len(held) for held, kind in zip(pages, self._kinds, strict=True) if kind == "window")

    def _take_windows(self, block: Block, pages: Sequence[Int32]) -> None:
        self._drop_windows(block)
        taken = [
            held if kind == "window" else _NO_PAGES for held, kind in zip(pages, self._kinds, strict=True)
        ]
        self._keep(taken)
        block.pages = [new if len(new) else old for old, new in zip(block.pages, taken, strict=True)]
        self._rank(block)

    def _keep(self, pages: Sequence[Int32], states: Sequence[int] = ()) -> None:
        for pool, held in self._held_by(pages, states):
            pool.keep(held)

    def _release(self, pages: Sequence[Int32], states: Sequence[int] = ()) -> None:
        for pool, held in self._held_by(pages, states):
            pool.let_go(held)

    # ---- in host memory

    def also_in_host(self, keys: Sequence[bytes], pages: Sequence[Int32]) -> None:
        """By cache group, pages of host memory that hold the same as these blocks, each as many."""
        by_block = [held.reshape(len(keys), -1) for held in pages]
        for place in range(len(keys) - 1, -1, -1):
            if (block := self._blocks.get(keys[place])) is not None:
                self._in_host.keep(block, [held[place] for held in by_block])

    def bring_back(self, blocks: Sequence[Block], fetch: Fetch) -> None:
        """Blocks that lie in host memory alone get pages of the device, which has them. What is not fetched is lost."""
        pools, sources = self._cache.pools, pages_in_host(blocks)
        taken = [pool.allocate(len(held)) for pool, held in zip(pools, sources, strict=True)]
        targets = [np.array(held, np.int32) for held in taken]
        if fetch(sources, targets):
            self._come_back(blocks, targets)
        else:
            for block in blocks:
                self._in_host.drop(block)
        for pool, held in zip(pools, targets, strict=True):
            pool.release(held)

    def _come_back(self, blocks: Sequence[Block], pages: Sequence[Int32]) -> None:
        self._keep(pages)
        for block, own in zip(blocks, shared_out(pages, blocks), strict=True):
            self._stand(block, own)
            self._rank(block)
        whole = [block for block in blocks if len(block.rows.tokens) == self.rows]  # nobody writes to them
        for group, pool in enumerate(self._cache.pools):
            for block in whole:
                for page, twin in zip(block.pages[group], block.host_pages[group], strict=True):
                    pool.pair(int(page), int(twin))

    # ---- what it is worth, and letting go

    def _rank(self, block: Block) -> None:
        """It is used now."""
        block.since = self._leaves.clock
        self._rank_leaf(block)
        worth = block.cost * (1 + block.uses)
        if "window" in self._kinds and self._has_windows(block):
            self._windows.set(block.key, worth)

    def _rank_leaf(self, block: Block) -> None:
        if block.key not in self._followers:
            self._leaves.set(block.key, block.cost * (1 + block.uses), block.since)

    def _worth_of_state(self, block: Block) -> float:
        """As much as the rows since the state before it; going back further than it pays to look is enough."""
        cost, before = block.cost, self._blocks.get(block.parent)
        for _ in range(MAX_BLOCKS_SINCE_STATE):
            if before is None or before.states:
                break
            cost += before.cost
            before = self._blocks.get(before.parent)
        return cost * (1 + block.uses)

    def _reclaim(self, pool: PagePool, count: int) -> None:
        """Lets go of what is worth least until the pool gets so many pages back, if there are as many idle ones."""
        group = self._cache.pools.index(pool)
        let_go = {"window": self._drop_worst_windows, "state": self._drop_worst_state}.get(
            self._kinds[group], self._drop_worst_block
        )
        enough = pool.num_unheld + min(count, pool.num_idle)
        used: list[Block] = []
        while pool.num_unheld < enough and (let_go(group, used) or self._find_stranded(group)):
            pass
        for block in used:
            self._rank(block)
            for length in block.states:
                self._states.set((block.key, length), self._worth_of_state(block))

    def _drop_worst_block(self, group: int, used: list[Block]) -> bool:
        """False: there is none left. What gives nothing back, for somebody holds it, is put aside."""
        key = self._leaves.pop()
        if key is None:
            return False
        block = self._blocks[key]
        if self._cache.pools[group].is_idle(block.pages[group]):
            self._leave_device(block)
        else:
            used.append(block)
        return True

    def _find_stranded(self, group: int) -> bool:
        """Blocks that somebody went on from and then evicted: nobody holds them, but those behind them are in use."""
        if self._kinds[group] in ("window", "state"):
            return False
        pool = self._cache.pools[group]
        stranded = [
            each
            for each in self._blocks.values()
            if each.key in self._followers and pool.is_idle(each.pages[group])
        ]
        for block in stranded:
            self._leaves.set(block.key, block.cost, block.since)
        return bool(stranded)

    def _drop_worst_windows(self, group: int, used: list[Block]) -> bool:
        key = self._windows.pop()
        if key is None:
            return False
        block = self._blocks[key]
        if self._cache.pools[group].is_idle(block.pages[group]):
            self._drop_windows(block)
        else:
            used.append(block)
        return True

    def _drop_worst_state(self, group: int, used: list[Block]) -> bool:
        entry = self._states.pop()
        if entry is None:
            return False
        key, length = entry
        block = self._blocks[key]
        place = self._kinds[:group].count("state")
        if self._cache.pools[group].is_idle(np.array([block.states[length][place]], np.int32)):
            self._drop_state(block, length)
        else:
            used.append(block)
        return True

    def _drop_windows(self, block: Block) -> None:
        self._windows.remove(block.key)
        dropped = [
            held if kind == "window" else _NO_PAGES
            for held, kind in zip(block.pages, self._kinds, strict=True)
        ]
        self._release(dropped)
        block.pages = [
            _NO_PAGES if kind == "window" else held
            for held, kind in zip(block.pages, self._kinds, strict=True)
        ]

    def _drop_state(self, block: Block, length: int) -> None:
        self._states.remove((block.key, length))
        self._release([_NO_PAGES] * len(self._kinds), block.states.pop(length))

    def _leave_device(self, block: Block) -> None:
        if not block.host_pages:
            self._remove(block)
        else:
            self._give_up_place(block)
            block.pages, block.is_away = [_NO_PAGES] * len(self._kinds), True

    def _remove(self, block: Block) -> None:
        if not block.is_away:
            for length in list(block.states):
                self._drop_state(block, length)
            self._windows.remove(block.key)
            self._give_up_place(block)
            self._forget(block)
        self._in_host.drop(block)

    def _give_up_place(self, block: Block) -> None:
        """On the device."""
        self._release(block.pages)
        self._leaves.remove(block.key)
        self._followers[block.parent] -= 1
        if not self._followers[block.parent]:
            del self._followers[block.parent]
            if (parent := self._blocks.get(block.parent)) is not None and not parent.is_away:
                self._rank_leaf(parent)

    def _forget(self, block: Block) -> None:
        """It is neither on the device nor in host memory."""
        del self._blocks[block.key]
        place = (block.parent, int(block.rows.tokens[0]))
        self._beginnings[place].remove(block)
        if not self._beginnings[place]:
            del self._beginnings[place]


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
