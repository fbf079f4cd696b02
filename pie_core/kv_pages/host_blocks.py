"""Blocks of the prefix cache that lie in host memory, on the device as well or there alone.

They get there with the contexts that are swapped out, whose copies the cache holds, too: nothing is copied for it. When
others need the host's memory, whoever was used least recently goes; of a prefix that was used at once, its end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from pie_core.contracts.forward import Int32
from pie_core.kv_pages.host_space import HostSpace
from pie_core.kv_pages.pool import PagePool
from pie_core.kv_pages.prefix_blocks import Block


class HostBlocks:
    def __init__(self, host: HostSpace, lost: Callable[[Block], None]) -> None:
        """`lost` is told of blocks that are nowhere any more."""
        self._host = host
        self._lost = lost
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()  # used least recently first
        host.cache_with(self._reclaim, self._let_go_of_one)

    def keep(self, block: Block, pages: list[Int32]) -> None:
        """By cache group: pages of host memory that hold the same as the block."""
        if not block.host_pages:
            for pool, held in zip(self._host.pools, pages, strict=True):
                pool.keep(held)
            block.host_pages = pages
        self._blocks[block.key] = block
        self._blocks.move_to_end(block.key)

    def use(self, blocks: Sequence[Block]) -> None:
        """Each follows the one before it."""
        for block in reversed(blocks):
            if block.host_pages:
                self._blocks.move_to_end(block.key)

    def drop(self, block: Block) -> None:
        pages, block.host_pages = block.host_pages, []
        if pages:
            del self._blocks[block.key]
            for pool, held in zip(self._host.pools, pages, strict=True):
                pool.let_go(held)
            if block.is_away:
                self._lost(block)

    def _reclaim(self, pool: PagePool, count: int) -> None:
        enough = pool.num_unheld + min(count, pool.num_idle)
        while pool.num_unheld < enough and self._let_go_of_one():
            pass

    def _let_go_of_one(self) -> bool:
        """Of those whose pages nobody else holds; False: there is none."""
        if not any(pool.num_idle for pool in self._host.pools):
            return False
        for _ in range(len(self._blocks)):
            block = next(iter(self._blocks.values()))
            if self._is_idle(block):
                self.drop(block)
                return True
            self.use([block])  # a context in host memory has it: it is of use there
        return False

    def _is_idle(self, block: Block) -> bool:
        return any(pool.is_idle(held) for pool, held in zip(self._host.pools, block.host_pages, strict=True))
