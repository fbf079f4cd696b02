"""The pages of a context whose program reserves them itself, counted in those of the model's first paged group.

    0 ──── committed ──── rows written ──── count        pages; no pass writes behind `count`

What is reserved and holds no rows yet is *promised*: each pool keeps so many pages from everybody else, and the pass
that writes there takes them. A promise lapses when memory is short, and is made again as far as pages are free.
"""

from __future__ import annotations

from pie_core.errors import InvalidRequest
from pie_core.kv_pages.context_pages import Cache, ContextPages
from pie_core.kv_pages.page_list import PageList


class RawPages:
    __slots__ = ("_groups", "_pools", "committed", "count", "page_size", "promised")

    def __init__(self, cache: Cache, length: int) -> None:
        """Of a context that has so many rows. The model has a paged or latent group."""
        kinds = [space.group.kind for space in cache.spaces]
        self._groups = [group for group, kind in enumerate(kinds) if kind in ("paged", "latent")]
        self._pools = cache.pools
        self.page_size = cache.spaces[self._groups[0]].page_size
        self.count = -(-length // self.page_size)
        self.committed = 0
        self.promised = [0] * len(kinds)  # by group

    @property
    def rows(self) -> int:
        """How many rows the context may have."""
        return self.count * self.page_size

    @property
    def committed_rows(self) -> int:
        """How many of them stay as they are."""
        return self.committed * self.page_size

    @property
    def is_promised(self) -> bool:
        return any(self.promised)

    def check_commit(self, count: int, length: int) -> None:
        """Raises InvalidRequest unless the next `count` pages are full."""
        full = length // self.page_size - self.committed
        if count > full:
            raise InvalidRequest(
                f"cannot commit {count} pages: {max(full, 0)} working pages are full ({length} rows, "
                f"{self.committed} pages of {self.page_size} committed already)"
            )

    def check_release(self, count: int, length: int) -> None:
        """Raises InvalidRequest unless the last `count` pages hold no rows."""
        empty = self.count + -length // self.page_size
        if count > empty:
            raise InvalidRequest(
                f"cannot release {count} pages: {empty} of the context's {self.count} hold no rows; truncate it first"
            )

    def can_reserve(self, count: int, pages: ContextPages) -> bool:
        """Whether the pools can promise so many more pages, once others have given back what they need not hold."""
        return all(
            self._pools[group].will_have(missing)
            for group, missing in self._lacking(self.count + count, pages)
        )

    def withdraw(self) -> list[tuple[int, int]]:
        """Nothing is promised any more: whoever comes first has the pages. Returns what was promised, by group."""
        before = [(group, self.promised[group]) for group in self._groups]
        for group, count in before:
            self._pools[group].promised -= count
            self.promised[group] = 0
        return before

    def restore(self, promised: list[tuple[int, int]]) -> None:
        """Promises this, as far as pages are free or about to be."""
        for group, count in promised:
            pool = self._pools[group]
            self.promised[group] = min(count, max(pool.num_unheld - pool.promised, 0))
            pool.promised += self.promised[group]

    def renew(self, pages: ContextPages) -> None:
        """Promises what is reserved and not held, as far as pages are free or about to be."""
        self.withdraw()
        self.restore(self._lacking(self.count, pages))

    def _lacking(self, count: int, pages: ContextPages) -> list[tuple[int, int]]:
        """By group, the pages to take until the context has so many."""
        lists = [(group, pages.groups[group]) for group in self._groups]
        length = count * self.page_size
        return [
            (group, each.size_at(length) - each.num_pages)
            for group, each in lists
            if isinstance(each, PageList)
        ]
