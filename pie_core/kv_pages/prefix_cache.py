"""Blocks of rows whose KV is on pages already, found by everything that decides what the KV is.

A block's key is a hash of the key before it and of its rows, so a chain of keys stands for a whole prefix:

    root(tenant, weights, KV type) ── key(rows 0-15) ── key(rows 16-31) ── …

The cache holds the pages like any context does. When a pool runs short, it lets go of blocks that nobody else holds:
first those that were used least and longest ago, and that no cached block follows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pie_core.contracts.forward import Int32
from pie_core.kv_pages.context_pages import Cache
from pie_core.kv_pages.pool import PagePool

MAX_USES = 8  # beyond, more of them say nothing


@dataclass(slots=True)
class Block:
    parent: bytes
    pages: tuple[Int32, ...]  # by cache group
    uses: int = 0
    is_spared: bool = False  # another block follows it, and would not be found without it


class PrefixCache:
    def __init__(self, cache: Cache, identity: Sequence[str], *, enabled: bool) -> None:
        self._cache = cache
        self._identity = identity
        self._blocks: dict[bytes, Block] = {}  # least recently used first
        kinds = {space.group.kind for space in cache.spaces}
        # A window or a state behind the prefix would have to be kept as well.
        self.enabled = enabled and bool(kinds) and kinds <= {"paged", "latent"}
        self.rows = math.lcm(*(space.page_size for space in cache.spaces))  # of a block
        if self.enabled:
            for pool in cache.pools:
                pool.reclaim = self._reclaim

    def root(self, tenant: str) -> bytes:
        return _digest(part.encode() for part in (*self._identity, tenant))

    def key(
        self, before: bytes, tokens: Int32, positions: Int32, masks: Sequence[tuple[int, Int32]]
    ) -> bytes:
        parts = [before, tokens.tobytes(), positions.tobytes()]
        for row, runs in masks:
            parts += [str(row).encode(), runs.tobytes()]
        return _digest(parts)

    def find(self, key: bytes) -> tuple[Int32, ...] | None:
        """The pages of a block; it counts as used."""
        block = self._blocks.pop(key, None)
        if block is None:
            return None
        self._blocks[key] = block
        block.uses = min(block.uses + 1, MAX_USES)
        return block.pages

    def add(self, key: bytes, parent: bytes, pages: tuple[Int32, ...]) -> None:
        if key in self._blocks:
            return
        for pool, held in zip(self._cache.pools, pages, strict=True):
            pool.share(held)
        self._blocks[key] = Block(parent, pages)
        if parent in self._blocks:
            self._blocks[parent].is_spared = True

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def idle_pages(self) -> list[int]:
        """By cache group: pages that nobody but the cache holds."""
        return [self._num_idle(group) for group in range(len(self._cache.pools))]

    def _num_idle(self, group: int) -> int:
        held = [block.pages[group] for block in self._blocks.values()]
        return self._cache.pools[group].num_held_once(np.concatenate(held)) if held else 0

    def _reclaim(self, pool: PagePool, count: int) -> None:
        """Lets go of blocks until the pool gets so many pages back."""
        group = self._cache.pools.index(pool)
        count = min(count, self._num_idle(group))
        for _ in range(len(self._blocks) * (MAX_USES.bit_length() + 2)):
            if count <= 0 or not self._blocks:
                return
            key = next(iter(self._blocks))
            block = self._blocks.pop(key)
            given_back = pool.num_held_once(block.pages[group])
            if not given_back or block.uses or block.is_spared:
                block.uses //= 2
                block.is_spared = False
                self._blocks[key] = block
            else:
                self._let_go(block)
                count -= given_back

    def _let_go(self, block: Block) -> None:
        for pool, held in zip(self._cache.pools, block.pages, strict=True):
            pool.release(held)


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
