"""Host memory for what contexts hold while others need the device: a pool per cache group, and one budget."""

from __future__ import annotations

from collections.abc import Sequence

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

    @property
    def is_used(self) -> bool:
        return any(pool.num_used for pool in self.pools)

    @property
    def used_bytes(self) -> int:
        return self.bytes_of([pool.num_used for pool in self.pools])

    def has(self, counts: Sequence[int]) -> bool:
        """Whether so many pages of each group can be taken."""
        fits = all(count <= pool.num_free for count, pool in zip(counts, self.pools, strict=True))
        return fits and self.used_bytes + self.bytes_of(counts) <= self._budget_bytes

    def bytes_of(self, counts: Sequence[int]) -> int:
        """Of so many pages of each group."""
        return sum(count * each for count, each in zip(counts, self._page_bytes, strict=True))
