"""Requests that share their first pages read those of the first among them, so a group that is wrong changes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pie_core.contracts.driver import CacheSpace
from pie_core.contracts.forward import ForwardBatch, PageTable, PrefixGroups


def read_together(batch: ForwardBatch, spaces: Sequence[CacheSpace]) -> ForwardBatch:
    """The batch as every request of a group sees it: with the first pages of the group's first request."""
    if not len(batch.prefixes.first):
        return batch
    tables = tuple(
        _with_shared_pages(table, space.page_size, batch.prefixes)
        if isinstance(table, PageTable) and space.group.kind in ("paged", "latent")
        else table
        for table, space in zip(batch.cache, spaces, strict=True)
    )
    return replace(batch, cache=tables)


def wrong_groups(batch: ForwardBatch) -> str | None:
    """What is wrong with the groups' numbers, if something is."""
    end = 0
    groups = batch.prefixes
    for first, stop, rows in zip(
        groups.first.tolist(), groups.stop.tolist(), groups.rows.tolist(), strict=True
    ):
        if first < end or stop < first + 2 or stop > batch.num_requests:
            return (
                f"requests {first} to {stop} cannot share a prefix: of {batch.num_requests}, {end} are taken"
            )
        if not 0 < rows <= batch.kv_lengths[first:stop].min():
            return f"requests {first} to {stop} cannot share {rows} rows: one of them has fewer"
        end = stop
    return None


def _with_shared_pages(table: PageTable, page_size: int, groups: PrefixGroups) -> PageTable:
    pages = table.pages.copy()
    for first, stop, rows in zip(groups.first, groups.stop, groups.rows, strict=True):
        count = -(-int(rows) // page_size)
        leading = table.pages[table.indptr[first] : table.indptr[first] + count]
        for request in range(first + 1, stop):
            pages[table.indptr[request] : table.indptr[request] + count] = leading
    return replace(table, pages=pages)
