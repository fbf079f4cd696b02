"""Host memory for what contexts hold while others need the device: a pool per cache group, and one budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pie_core.contracts.driver import CacheSpace
from pie_core.kv_pages.pool import PagePool


class HostSpace:
    """The driver's swap space, as far as the budget reaches. Each pool is the partner of the device's of its group."""

    def __init__(
        self, spaces: Sequence[CacheSpace], device: Sequence[PagePool], budget_bytes: int | None
    ) -> None:
        self.pools = tuple(PagePool(each.group.name, each.num_host_pages) for each in spaces)
        for pool, partner in zip(self.pools, device, strict=True):
            pool.partner, partner.partner = partner, pool
        self._page_bytes = tuple(each.group.unit_bytes * each.page_size for each in spaces)
        self._budget_bytes = self.bytes_of([each.num_host_pages for each in spaces])
        if budget_bytes is not None:
            self._budget_bytes = min(self._budget_bytes, budget_bytes)
        self._let_go_of_one: Callable[[], bool] = _nothing_to_let_go

    def cache_with(self, reclaim: Callable[[PagePool, int], None], let_go_of_one: Callable[[], bool]) -> None:
        """From now on a cache keeps pages of the pools, and lets go of some when others need the room."""
        for pool in self.pools:
            pool.cache_with(reclaim)
        self._let_go_of_one = let_go_of_one

    @property
    def used_pages(self) -> list[int]:
        """By cache group, those that only a cache holds excepted."""
        return [pool.num_used - pool.num_idle for pool in self.pools]

    @property
    def is_used(self) -> bool:
        return any(self.used_pages)

    @property
    def used_bytes(self) -> int:
        return self.bytes_of(self.used_pages)

    def has(self, counts: Sequence[int]) -> bool:
        """Whether so many pages of each group can be taken, now that a cache has let go of what it must."""
        most = [pool.num_pages - used for pool, used in zip(self.pools, self.used_pages, strict=True)]
        if any(count > limit for count, limit in zip(counts, most, strict=True)):
            return False
        wanted = self.bytes_of(counts)
        if self.used_bytes + wanted > self._budget_bytes:
            return False
        while self._bytes_with_cached + wanted > self._budget_bytes and self._let_go_of_one():
            pass
        return all(pool.has(count) for count, pool in zip(counts, self.pools, strict=True))

    @property
    def _bytes_with_cached(self) -> int:
        return self.bytes_of([pool.num_used for pool in self.pools])

    def bytes_of(self, counts: Sequence[int]) -> int:
        """Of so many pages of each group."""
        return sum(count * each for count, each in zip(counts, self._page_bytes, strict=True))


def _nothing_to_let_go() -> bool:
    return False
